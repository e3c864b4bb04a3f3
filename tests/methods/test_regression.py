"""RegMean against a reference written from its paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import MethodError
from evomerge.methods import merge_state_dicts
from evomerge.methods.regression import positive_solver

from .families import assert_close

NAME = "model.layers.0.mlp.up_proj.weight"


def case(
    seed: int, out: int, width: int, count: int, rows: int
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """A base (out, in), experts, and the inputs (rows, in) of each."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((out, width))
    experts = [base + rng.standard_normal(base.shape) for _ in range(count)]
    return base, experts, [rng.standard_normal((rows, width)) * rng.uniform(0.5, 2) for _ in range(count)]


def merge(base, experts, grams, weights, name: str = NAME, **params) -> np.ndarray:
    merged = merge_state_dicts(
        "regmean",
        {name: torch.tensor(base)},
        [{name: torch.tensor(e)} for e in experts],
        statistics=[{name: torch.tensor(G)} for G in grams],
        weights=weights,
        **params,
    )
    return merged[name].numpy()


def gram(X: np.ndarray) -> np.ndarray:
    return X.T @ X / len(X)


cases = st.tuples(st.integers(0, 2**32), st.integers(1, 7), st.integers(1, 9), st.integers(1, 4))


@given(cases, st.floats(0, 1), st.lists(st.floats(0.1, 3), min_size=4, max_size=4))
def test_regmean(shape, rho: float, weights: list[float]):
    """Equation 2 with off-diagonals scaled (section 4), weights on the Gram matrices."""
    seed, out, width, count = shape
    base, experts, X = case(seed, out, width, count, rows=4 * width + 3)
    scaled = [gram(x) * (rho + (1 - rho) * np.eye(width)) * w for x, w in zip(X, weights, strict=False)]
    right = sum(G @ W.T for G, W in zip(scaled, experts, strict=True))
    expected = (np.linalg.inv(sum(scaled)) @ right).T
    merged = merge(base, experts, [gram(x) for x in X], weights[:count], rho=rho)
    np.testing.assert_allclose(merged, expected, rtol=1e-8, atol=1e-8)  # the inverse's own error, not the solve's


@given(cases)
def test_it_is_the_least_squares_fit_to_all_experts_outputs(shape):
    """Equation 1, by numpy's lstsq on the inputs themselves."""
    seed, out, width, count = shape
    base, experts, X = case(seed, out, width, count, rows=4 * width + 3)
    stacked = np.concatenate([x / np.sqrt(len(x)) for x in X])
    wanted = np.concatenate([x @ W.T / np.sqrt(len(x)) for x, W in zip(X, experts, strict=True)])
    expected = np.linalg.lstsq(stacked, wanted, rcond=None)[0].T
    merged = merge(base, experts, [gram(x) for x in X], [1.0] * count, rho=1.0)
    np.testing.assert_allclose(merged, expected, rtol=1e-9, atol=1e-9)


@given(cases)
def test_equal_inputs_give_the_mean_and_one_expert_is_kept(shape):
    seed, out, width, count = shape
    base, experts, X = case(seed, out, width, count, rows=4 * width + 3)
    merged = merge(base, experts, [gram(X[0])] * count, [1.0] * count)
    assert_close(merged, np.mean(experts, axis=0))
    alone = [0.0] * (count - 1) + [0.6]
    assert_close(merge(base, experts, [gram(x) for x in X], alone), experts[-1])


def test_few_inputs_leave_the_mean_where_they_say_nothing():
    """Rank-deficient Gram matrices (2 rows, 6 inputs), undamped: the outputs fit, the rest is the mean."""
    base, experts, X = case(3, 4, 6, 2, rows=2)
    merged = merge(base, experts, [gram(x) for x in X], [1.0, 1.0], rho=1.0)
    for x, W in zip(X, experts, strict=True):
        np.testing.assert_allclose(x @ merged.T, x @ W.T, rtol=1e-6, atol=1e-6)
    unseen = np.linalg.svd(np.concatenate(X))[2][4:]  # directions that no input has
    np.testing.assert_allclose(merged @ unseen.T, np.mean(experts, axis=0) @ unseen.T, rtol=1e-6, atol=1e-6)


def test_units_that_never_fire_stay_the_mean():
    base, experts, X = case(4, 5, 6, 3, rows=40)
    for x in X:
        x[:, [1, 4]] = 0
    for rho in (0.9, 1.0):
        merged = merge(base, experts, [gram(x) for x in X], [1.0] * 3, rho=rho)
        assert_close(merged[:, [1, 4]], np.mean(experts, axis=0)[:, [1, 4]])
    nothing = merge(base, experts, [np.zeros((6, 6))] * 3, [1.0] * 3)
    assert_close(nothing, np.mean(experts, axis=0))


def test_tensors_without_gram_matrix_are_the_weighted_mean():
    """Also those that have two dimensions (embeddings): weights are shares everywhere."""
    base, experts, _ = case(5, 3, 4, 2, rows=1)
    expected = (0.5 * experts[0] + 1.5 * experts[1]) / 2.0
    for shape in ((3, 4), (12,), (2, 2, 3)):
        tensors = [{"embed.weight": torch.tensor(a.reshape(shape))} for a in (base, *experts)]
        merged = merge_state_dicts("regmean", tensors[0], tensors[1:], statistics=[{}, {}], weights=[0.5, 1.5])
        assert_close(merged["embed.weight"].numpy(), expected.reshape(shape))


def test_scale_is_of_the_merged_task_vector():
    base, experts, X = case(6, 3, 4, 2, rows=30)
    grams = [gram(x) for x in X]
    whole = merge(base, experts, grams, [1.0, 1.0])
    assert_close(merge(base, experts, grams, [1.0, 1.0], scale=0.4), base + 0.4 * (whole - base))


def test_refusals():
    base, experts, X = case(7, 3, 4, 2, rows=9)
    with pytest.raises(MethodError, match=r"Gram matrix of .* is \(3, 3\), but the layer has 4 inputs"):
        merge(base, experts, [np.eye(3)] * 2, [1.0, 1.0])
    tensors = [{NAME: torch.tensor(a)} for a in (base, *experts)]
    with pytest.raises(MethodError, match="expert 1 has no Gram matrix"):
        merge_state_dicts("regmean", tensors[0], tensors[1:], statistics=[{NAME: torch.eye(4)}, {}])
    with pytest.raises(MethodError, match="evomerge collect EXPERIMENT --what gram"):
        merge_state_dicts("regmean", tensors[0], tensors[1:])
    with pytest.raises(MethodError, match="outside its legal range"):
        merge(base, experts, [gram(x) for x in X], [1.0, -1.0])


@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(0, 12))
def test_the_solver_is_the_pseudo_inverse(seed: int, n: int, rank: int):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((min(rank, n), n))
    A = X.T @ X
    B = A @ rng.standard_normal((n, 3))
    found = positive_solver(torch.tensor(A), 1e-12)(torch.tensor(B)).numpy()
    np.testing.assert_allclose(found, np.linalg.pinv(A, rcond=1e-10, hermitian=True) @ B, rtol=1e-4, atol=1e-6)


def test_tall_matrices_are_merged_by_blocks_of_rows():
    """Each output is a fit of its own: rows merged apart are the rows of the whole."""
    base, experts, X = case(8, 70_000, 3, 2, rows=20)
    grams = [gram(x) for x in X]
    whole = merge(base, experts, grams, [1.0, 0.5])
    for rows in (slice(0, 5), slice(43_680, 43_700), slice(69_990, 70_000)):
        assert_close(whole[rows], merge(base[rows], [e[rows] for e in experts], grams, [1.0, 0.5]))
