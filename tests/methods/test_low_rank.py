"""TSV-M, Iso-C and Iso-CTS against their papers' equations, on plain decompositions in float64.

Tolerance 1e-8 of the task vectors' size. Where a paper's formula depends on which of equal singular values comes first,
the families are left out by ``assume``; singular values of zero take no part (their vectors are arbitrary).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from evomerge.errors import MethodError
from evomerge.methods import METHODS
from evomerge.methods.base import LowRank, TensorInfo

from .families import Family
from .matrix_families import kept, matrix_families

ZERO = 1e-11  # of the largest: everything below is zero to rounding


def triples(tau: np.ndarray, top: int, size: float | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(U, S, V) of the ``top`` largest singular values that are not zero."""
    U, S, Vh = np.linalg.svd(tau, full_matrices=False)
    size = float(S[0]) if size is None else size
    rank = min(top, int((ZERO * size < S).sum()))
    if rank < len(S) and S[rank] > ZERO * size:
        assume(S[rank - 1] - S[rank] > 1e-5 * S[0] if rank else True)  # which triple is the last one must be clear
    return U[:, :rank], S[:rank], Vh[:rank].T


def orthogonal(columns: np.ndarray) -> np.ndarray:
    """The nearest matrix with orthonormal columns (orthogonal Procrustes): U V' of its decomposition."""
    U, S, Vh = np.linalg.svd(columns, full_matrices=False)
    assume(not ((S > 1e-12) & (S < 1e-5)).any())  # not nearly the same direction twice
    keep = S > 1e-8
    return U[:, keep] @ Vh[keep]


def tsv_m(family: Family, rank_share: float | None) -> np.ndarray:
    """Task Singular Vectors, TSV-Merge."""
    experts, rank = kept(family), min(family.base.shape)
    top = max(1, rank // len(experts) if rank_share is None else int(rank * rank_share))
    parts = [(w, *triples(tau, top)) for w, tau in experts if tau.any()]
    if not parts:
        return np.zeros_like(family.base)
    U = np.concatenate([U for _, U, _, _ in parts], axis=1)
    S = np.concatenate([w * S for w, _, S, _ in parts])
    V = np.concatenate([V for _, _, _, V in parts], axis=1)
    return orthogonal(U) @ np.diag(S) @ orthogonal(V).T


def iso_c(family: Family) -> np.ndarray:
    """No Task Left Behind, Iso-C: mean(S) U V' of the sum."""
    total = np.asarray(np.sum([w * tau for w, tau in kept(family)], axis=0))
    size = max(np.abs(tau).max() for _, tau in kept(family))
    assume(not 0 < np.abs(total).max() < 1e-6 * size)  # task vectors that cancel to rounding
    if not total.any():
        return np.zeros_like(family.base)
    U, S, V = triples(total, min(total.shape))
    assume(S[-1] > 1e-5 * S[0])
    return S.mean() * U @ V.T


def iso_cts(family: Family, common: float) -> np.ndarray:
    """No Task Left Behind, Iso-CTS."""
    experts, rank = kept(family), min(family.base.shape)
    own = round((rank - int(rank * common)) / len(experts))
    total = np.sum([w * tau for w, tau in experts], axis=0)
    if own == 0:
        return iso_c(family)
    size = max(np.abs(tau).max() for _, tau in experts)
    assume(not 0 < np.abs(total).max() < 1e-6 * size)
    assume(own * len(experts) <= rank)
    U, S, V = triples(total, rank - own * len(experts))
    left, values, right = [U], [S], [V]
    for w, tau in experts:
        rest = w * tau - U @ U.T @ (w * tau)
        scale = float(np.linalg.norm(w * tau))
        sizes = np.linalg.svd(rest, compute_uv=False)
        assume(not ((sizes > 1e-13 * scale) & (sizes < 1e-6 * scale)).any())
        u, s, v = triples(rest, own, size=scale)
        left.append(u)
        values.append(s)
        right.append(v)
    flat = np.concatenate(values)
    if not len(flat):
        return np.zeros_like(family.base)
    return flat.mean() * orthogonal(np.concatenate(left, 1)) @ orthogonal(np.concatenate(right, 1)).T


def assert_like(merged: np.ndarray, family: Family, tau: np.ndarray) -> None:
    size = max(1.0, *(float(np.abs(tau).max()) for tau in family.taus))
    np.testing.assert_allclose(merged, family.base + tau, rtol=0, atol=1e-8 * size)


@given(matrix_families(), st.none() | st.floats(0.05, 1), st.floats(-1, 2))
def test_tsv_m(family: Family, rank_share: float | None, scale: float):
    assume(kept(family))
    assume(rank_share is None or (abs(r := min(family.base.shape) * rank_share - 1e-9) and r % 1 < 0.99))
    expected = scale * tsv_m(family, rank_share)
    assert_like(family.merge("tsv_m", rank_share=rank_share, scale=scale), family, expected)


@given(matrix_families(), st.floats(0.05, 1), st.floats(-1, 2))
def test_svd_linear(family: Family, rank_share: float, scale: float):
    """Truncated decompositions of each task vector, weighed and added: Eckart and Young."""
    shape = family.base.shape
    assume(abs(r := min(shape) * rank_share - 1e-9) and r % 1 < 0.99)
    expected = np.zeros(shape)
    for w, tau in kept(family):
        U, S, V = triples(tau, max(1, int(min(shape) * rank_share)))
        expected += scale * w * (U * S) @ V.T
    assert_like(family.merge("svd_linear", rank_share=rank_share, scale=scale), family, expected)


def test_svd_linear_by_hand():
    """tau = diag(3, 2) and [[0, 1], [0, 0]]: of each the largest triple, at weights 0.5 and -2."""
    taus = [np.diag([3.0, 2.0]), np.array([[0.0, 1.0], [0.0, 0.0]])]
    family = Family(np.ones((2, 2)), [1.0 + tau for tau in taus], [0.5, -2.0])
    np.testing.assert_allclose(family.merge("svd_linear", rank_share=0.5), [[2.5, -1.0], [1.0, 1.0]], atol=1e-12)


def test_svd_linear_of_everything_is_task_arithmetic():
    rng = np.random.default_rng(5)
    family = Family(rng.standard_normal((4, 3)), list(rng.standard_normal((2, 4, 3))), [0.7, -0.2])
    assert np.array_equal(family.merge("svd_linear", rank_share=1.0), family.merge("task_arithmetic"))


def test_svd_linear_decomposes_once_in_a_search():
    """A later candidate is merged from what is kept: the sources are not looked at again."""
    info, generator = TensorInfo("w", shape=(6, 5)), torch.Generator().manual_seed(0)
    base, first, other = (torch.randn(6, 5, generator=generator) for _ in range(3))
    method, call = METHODS["svd_linear"], {"weights": [1.0], "info": info, "rank_share": 0.5}
    state = method.prepare([], seed=0, rank_share=0.5)
    merged = method.merge(base, [first], state=state, **call)
    assert torch.equal(method.merge(base, [other], state=state, **call), merged)
    assert torch.equal(method.merge(base, [first], **call), merged)
    assert method.prepare([], rank_share=0.5) is None and method.prepare([], seed=0) is None


@given(matrix_families(), st.floats(-1, 2))
def test_iso_c(family: Family, scale: float):
    assume(kept(family))
    assert_like(family.merge("iso_c", scale=scale), family, scale * iso_c(family))


@given(matrix_families(), st.sampled_from([0.0, 0.25, 0.5, 0.8, 1.0]))
def test_iso_cts(family: Family, common: float):
    assume(kept(family))
    assert_like(family.merge("iso_cts", common=common), family, iso_cts(family, common))


@given(matrix_families(most=1))
def test_one_expert_is_kept_by_tsv_m(family: Family):
    family.weights = [1.0]
    assert_like(family.merge("tsv_m"), family, family.taus[0])


@given(matrix_families(most=1, full_rank=True))
def test_one_expert_has_a_flat_spectrum_in_iso_c(family: Family):
    family.weights = [1.0]
    before = np.linalg.svd(family.taus[0], compute_uv=False)
    assume(before[-1] > 1e-5 * before[0])
    after = np.linalg.svd(family.merge("iso_c") - family.base, compute_uv=False)
    np.testing.assert_allclose(after, before.mean(), rtol=1e-8)


@given(matrix_families(full_rank=True), st.integers(2, 4))
def test_equal_experts_are_one_truncated_expert_in_tsv_m(family: Family, count: int):
    """Their directions count once: each factor's columns u, u become u / sqrt(2), u / sqrt(2), so the weights' mean
    is what is left."""
    tau = family.taus[0]
    family.experts, family.weights = [family.experts[0]] * count, [0.5 + 0.25 * t for t in range(count)]
    U, S, V = triples(tau, max(1, min(tau.shape) // count))
    assert_like(family.merge("tsv_m"), family, np.mean(family.weights) * (U * S) @ V.T)


def test_experts_in_orthogonal_subspaces_are_added_by_tsv_m():
    """Nothing interferes, so nothing changes: task arithmetic."""
    rng = np.random.default_rng(0)
    base, blocks = rng.standard_normal((9, 12)), [np.zeros((9, 12)) for _ in range(3)]
    for t, block in enumerate(blocks):
        block[3 * t : 3 * t + 3, 4 * t : 4 * t + 4] = rng.standard_normal((3, 4))
    family = Family(base, [base + block for block in blocks], [0.5, -1.0, 2.0])
    np.testing.assert_allclose(family.merge("tsv_m"), family.merge("task_arithmetic"), atol=1e-12)


@given(matrix_families(full_rank=True), st.floats(0.1, 3))
def test_iso_c_goes_with_the_size_of_the_sum(family: Family, factor: float):
    assume(kept(family))
    tau = iso_c(family)
    family.weights = [factor * w for w in family.weights]
    assert_like(family.merge("iso_c"), family, factor * tau)


def test_rounding_is_no_direction_of_a_task_in_iso_cts():
    """One expert of one direction, which is the common one: nothing is left that is its own."""
    rows = np.array([72, -40, 64, 32, 0, 0, 56, -72, -40, -72])
    columns = np.array([1, -0.5, 0.5, -0.125])
    draws = np.random.default_rng(0)
    for _ in range(200):
        tau = np.outer(rows + draws.integers(-3, 4, 10), columns + draws.standard_normal(4))
        family = Family(np.zeros((10, 4)), [tau], [0.35546875])
        np.testing.assert_allclose(family.merge("iso_cts", common=0.25), 0.35546875 * tau, atol=1e-10)


def test_iso_cts_with_everything_common_is_iso_c_to_the_bit():
    family = Family(np.zeros((6, 4)), list(np.random.default_rng(1).standard_normal((3, 6, 4))), [1.0, 0.5, 2.0])
    assert np.array_equal(family.merge("iso_cts", common=1.0), family.merge("iso_c"))


def spectrum(sizes: torch.Tensor, m: int, n: int, seed: int) -> torch.Tensor:
    """A float64 matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(k, len(sizes), generator=generator, dtype=torch.float64)).Q for k in (m, n))
    return U * sizes @ V.T


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (50, 50), (4200, 24), (24, 4200)], ids=str)
@pytest.mark.parametrize("smallest", [1e-1, 1e-4, 1e-7], ids=str)
@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts"])
def test_float32_is_as_good_as_float64(method: str, shape: tuple[int, int], smallest: float):
    """Through the Gram matrix where the spectrum allows it, through LAPACK where not: the same numbers to rounding.

    Half the singular values lie below what float32 resolves if ``smallest`` is 1e-7, and are left out on both sides.
    """
    sizes = torch.ones(min(shape), dtype=torch.float64)
    sizes[len(sizes) // 2 :] = smallest
    sizes *= torch.linspace(1.5, 1, len(sizes), dtype=torch.float64)
    experts = [spectrum(sizes, *shape, seed=t).float() for t in range(3)]
    options = {"weights": [1.0, 0.5, -0.7], "info": TensorInfo("w", shape=shape)}
    if method != "tsv_m":  # the sum of three has no small singular values; one does
        options["weights"] = [1.0, 0.0, 0.0]
    single = METHODS[method].merge(torch.zeros(shape), experts, **options)
    if smallest < 1e-6:
        sizes[len(sizes) // 2 :] = 0
    clean = [spectrum(sizes, *shape, seed=t) for t in range(3)]
    double = METHODS[method].merge(torch.zeros(shape, dtype=torch.float64), clean, **options)
    assert single.dtype == torch.float32
    tolerance = 1e-5 if smallest > 1e-2 else 3e-3  # directions of relative size s are known to 1e-7 / s
    torch.testing.assert_close(single.double(), double, rtol=0, atol=tolerance * float(double.abs().max()))


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts"])
def test_low_rank_experts_bring_no_noise(method: str):
    """What two adapters of rank 3 do not reach stays as it was: the merged task vector has rank 6, not 40."""
    generator = torch.Generator().manual_seed(0)
    factors = [
        LowRank(torch.randn(50, 3, generator=generator), torch.randn(3, 40, generator=generator), 2.0) for _ in range(2)
    ]
    base = torch.randn(50, 40, generator=generator)
    options = {"weights": [1.0, 1.0], "info": TensorInfo("w", shape=(50, 40))}
    tau = METHODS[method].merge(base, factors, **options) - base
    S = torch.linalg.svdvals(tau.double())
    assert float(S[5]) > 0.1 * float(S[0])
    assert float(S[6]) < 1e-5 * float(S[0])
    if method != "tsv_m":
        torch.testing.assert_close(S[:6], S[:1].expand(6), rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", ["svd_linear", "tsv_m", "iso_c", "iso_cts"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_not_finite_is_refused(method: str, value: float, dtype: torch.dtype):
    base = torch.zeros(4, 3, dtype=dtype)
    experts = [torch.full_like(base, value), base + 1]
    with pytest.raises(MethodError, match="finite"):
        METHODS[method].merge(base, experts, weights=[1.0, 1.0], info=TensorInfo("w", shape=(4, 3)))


def test_more_experts_than_directions():
    """Each keeps at least its largest one."""
    rng = np.random.default_rng(3)
    family = Family(np.zeros((3, 2)), list(rng.standard_normal((7, 3, 2))), [1.0] * 7)
    for method in ("tsv_m", "iso_c", "iso_cts"):
        merged = family.merge(method)
        assert np.isfinite(merged).all()
        assert np.abs(merged).max() > 0.1
    lines = Family(np.zeros((1, 2)), [np.array([[1.0, 0.0]]), np.array([[0.0, 3.0]])], [1.0, 1.0])
    # One left direction, shared; the right ones are orthogonal already: [1 1] / sqrt(2) . diag(1, 3) . I.
    np.testing.assert_allclose(lines.merge("tsv_m"), np.array([[1.0, 3.0]]) / np.sqrt(2), atol=1e-12)
