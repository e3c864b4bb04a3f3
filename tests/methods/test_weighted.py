"""Fisher-weighted averaging and LM-Cocktail against references written from their papers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import MethodError
from evomerge.methods import METHODS, merge_state_dicts

from .families import Family, assert_close, families

seeds = st.integers(0, 2**32)


def positive(family: Family) -> Family:
    """The family with weights of 0 or more, at least one of them above 0."""
    family.weights = [abs(w) for w in family.weights]
    if not any(family.weights):
        family.weights[0] = 1.0
    return family


def importances(family: Family, seed: int, low: float = -12.0) -> list[np.ndarray]:
    """F of each expert, of very different magnitudes; a third of the entries are exactly 0."""
    rng = np.random.default_rng(seed)
    shape = family.base.shape
    return [np.where(rng.random(shape) < 0.3, 0.0, 10 ** rng.uniform(low, 0, shape)) for _ in family.experts]


def merge(method: str, family: Family, statistics: list, **params) -> np.ndarray:
    """By merge_state_dicts, in float64."""
    tensors = [{family.name: torch.tensor(a)} for a in (family.base, *family.experts)]
    mappings = [given if isinstance(given, dict) else {family.name: given} for given in statistics]
    given = [{key: torch.tensor(v, dtype=torch.float64) for key, v in mapping.items()} for mapping in mappings]
    merged = merge_state_dicts(
        method, tensors[0], tensors[1:], weights=family.weights, statistics=given, dtype=torch.float64, **params
    )
    return merged[family.name].numpy()


def fisher_reference(family: Family, F: list[np.ndarray], norms: list[float], floor: float, by: str, first: bool):
    """Matena and Raffel, equation 3: theta* = sum lambda_i F_i theta_i / sum lambda_i F_i."""
    numerator, denominator = np.zeros(family.base.shape), np.zeros(family.base.shape)
    chosen = [i for i, w in enumerate(family.weights) if w != 0]
    for i in chosen:
        diagonal = F[i]
        if i == chosen[0] or not first:
            diagonal = np.maximum(diagonal, floor) if by == "max" else diagonal + floor
        numerator += family.weights[i] / norms[i] * diagonal * family.experts[i]
        denominator += family.weights[i] / norms[i] * diagonal
    return numerator / denominator


@given(families(), seeds, st.sampled_from([1e-6, 1e-2]), st.sampled_from(["max", "add"]), st.booleans(), st.booleans())
def test_fisher(family: Family, seed: int, floor: float, by: str, first: bool, normalize: bool):
    F = importances(positive(family), seed)
    norms = [np.sqrt((f**2).sum()) or 1.0 if normalize else 1.0 for f in F]
    expected = fisher_reference(family, F, norms, floor, by, first)
    merged = merge("fisher", family, F, floor=floor, floor_by=by, favor_first=first, normalize=normalize)
    assert_close(merged, expected)


def test_fisher_is_normalised_over_the_whole_model():
    """Two tensors an expert: one norm for both, the paper's (an l2 norm over all its entries)."""
    base = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros(1, dtype=torch.float64)}
    experts = [{"a": torch.full((2,), v).double(), "b": torch.full((1,), v).double()} for v in (1.0, 2.0)]
    F = [
        {"a": torch.tensor([3.0, 0.0]).double(), "b": torch.tensor([4.0]).double()},  # norm 5
        {"a": torch.tensor([6.0, 0.0]).double(), "b": torch.tensor([8.0]).double()},  # the same, twice as steep
    ]
    merged = merge_state_dicts("fisher", base, experts, statistics=F)
    floored = (1 / 5 + 2 / 10) / (1 / 5 + 1 / 10)  # of an entry where both are 0: by the norms alone
    assert_close(torch.cat([merged["a"], merged["b"]]).numpy(), np.array([1.5, floored, 1.5]))
    merged = merge_state_dicts("fisher", base, experts, statistics=F, normalize=False)
    assert_close(merged["b"].numpy(), np.array([(4 * 1 + 8 * 2) / 12]))


@given(families(), seeds)
def test_fisher_with_equal_importance_is_the_mean(family: Family, seed: int):
    F = [importances(positive(family), seed)[0]] * len(family.experts)
    assert_close(merge("fisher", family, F), family.merge("linear"))


@given(families(fewest=2), seeds)
def test_one_expert_is_kept(family: Family, seed: int):
    """To the bit, where the others' weights are 0."""
    family.weights = [0.0] * len(family.experts)
    family.weights[-1] = 0.7
    F = importances(family, seed)
    assert np.array_equal(merge("fisher", family, F), family.experts[-1])
    losses = [{"one": float(t)} for t in range(len(F))]
    assert np.array_equal(merge("lm_cocktail", family, losses), family.experts[-1])


def test_fisher_without_floor_and_gradient_is_the_mean():
    family = Family(np.zeros(3), [np.array([1.0, 2, 3]), np.array([5.0, 6, 7])], [1.0, 3.0])
    F = [np.array([0.0, 1, 0]), np.array([0.0, 0, 0])]
    assert_close(merge("fisher", family, F, floor=0.0, normalize=False), np.array([4.0, 2.0, 6.0]))


def test_tensors_without_importance_are_the_mean_and_halves_are_refused():
    family = Family(np.zeros(2), [np.array([1.0, 2]), np.array([5.0, 6])], [1.0, 3.0])
    assert_close(merge("fisher", family, [{}, {}]), np.array([4.0, 5.0]))
    with pytest.raises(MethodError, match=r"expert 1 has no Fisher information for .*up_proj"):
        merge("fisher", family, [np.ones(2), {}])
    with pytest.raises(MethodError, match=r"has the shape \(3,\), but the tensor \(2,\)"):
        merge("fisher", family, [np.ones(3), np.ones(3)])


@pytest.mark.parametrize("method", ["fisher", "lm_cocktail"])
def test_means_need_a_weight_and_none_below_zero(method: str):
    family = Family(np.zeros(2), [np.ones(2), np.ones(2)], [0.0, 0.0])
    statistics = [np.ones(2)] * 2 if method == "fisher" else [{"one": 0.5}] * 2
    with pytest.raises(MethodError, match="all weights are zero"):
        merge(method, family, statistics)
    family.weights = [1.0, -0.5]
    with pytest.raises(MethodError, match="outside its legal range"):
        merge(method, family, statistics)


@given(families(), seeds, st.sampled_from([0.05, 1.0, 5.0]))
def test_lm_cocktail(family: Family, seed: int, temperature: float):
    """Section 3: softmax(-L / tau); the weights as a prior on the models."""
    losses = np.random.default_rng(seed).uniform(0, 8, (len(family.experts), 3))
    positive(family)
    scores = np.exp(-(losses.mean(1) - losses.mean(1).min()) / temperature) * np.array(family.weights)
    if not scores.sum() > 1e-200:
        return
    expected = sum(s * e for s, e in zip(scores / scores.sum(), family.experts, strict=True))
    given_losses = [{f"task{k}": float(v) for k, v in enumerate(row)} for row in losses]
    assert_close(merge("lm_cocktail", family, given_losses, temperature=temperature), np.asarray(expected))


def test_lm_cocktail_cold_takes_the_best_and_hot_the_mean():
    family = Family(np.zeros(1), [np.array([1.0]), np.array([2.0]), np.array([6.0])], [1.0, 1.0, 1.0])
    losses = [{"one": 1.5}, {"one": 1.0}, {"one": 900.0}]
    assert_close(merge("lm_cocktail", family, losses, temperature=1e-4), np.array([2.0]))
    assert_close(merge("lm_cocktail", family, losses, temperature=1e14), np.array([3.0]))


def test_lm_cocktail_refuses_losses_of_different_tasks():
    family = Family(np.zeros(1), [np.ones(1), np.ones(1)], [1.0, 1.0])
    with pytest.raises(MethodError, match="expert 1 has two and the first one one"):
        merge("lm_cocktail", family, [{"one": 1.0}, {"two": 1.0}])


def test_without_a_base():
    experts = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 4.0])}]
    F = [{"w": torch.tensor([1.0, 3.0])}, {"w": torch.tensor([1.0, 1.0])}]
    merged = merge_state_dicts("fisher", None, experts, statistics=F, normalize=False)
    assert merged["w"].tolist() == [2.0, 2.5]
    assert METHODS["fisher"].keeps_base and not METHODS["fisher"].needs_base
