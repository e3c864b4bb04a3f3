"""TIES against a reference written from its paper."""

from __future__ import annotations

from itertools import chain, combinations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from evomerge.errors import MethodError
from evomerge.methods import METHODS, merge_state_dicts
from evomerge.methods.base import TensorInfo, check_params

from .families import Family, assert_close, families
from .references import densities, elect_and_merge, modes, trim


@given(families(), densities, modes, st.booleans(), st.floats(-1, 2))
def test_ties(family: Family, density: float, mode: str, normalize: bool, scale: float):
    if normalize:  # a sum of weights that almost cancels magnifies any rounding
        subsets = chain.from_iterable(combinations(family.weights, k) for k in range(1, len(family.weights) + 1))
        assume(all(abs(sum(subset)) > 1e-3 for subset in subsets))
    trimmed = [trim(tau, density) for tau in family.taus]
    expected = family.base + scale * elect_and_merge(trimmed, family.weights, mode, normalize)
    merged = family.merge("ties", density=density, mode=mode, normalize=normalize, scale=scale)
    assert_close(merged, expected)


def test_ties_where_the_experts_cancel_elects_plus():
    family = Family(np.zeros(2), [np.array([2.0, -1.0]), np.array([-2.0, 1.0])], [1.0, 1.0])
    for mode in ("mean", "sum"):
        assert family.merge("ties", density=1.0, mode=mode).tolist() == [2.0, 1.0]


def test_ties_with_weights_that_cancel():
    """Both entries agree (a negative weight turns its task vector), but their weights sum to nothing: counts as 1."""
    family = Family(np.zeros(1), [np.array([2.0]), np.array([-3.0])], [1.0, -1.0])
    assert family.merge("ties", normalize=True).tolist() == [5.0]


@given(st.lists(families(fewest=2, most=2), min_size=1, max_size=4), densities)
def test_ties_over_the_model_is_ties_on_one_long_vector(parts: list[Family], density: float):
    """The paper's scope: the reference flattens the whole model into one vector an expert."""
    weights = parts[0].weights
    flat = [[part.base.reshape(-1) for part in parts], *([p.experts[t].reshape(-1) for p in parts] for t in range(2))]
    base, *experts = (np.concatenate(arrays) for arrays in flat)
    trimmed = [trim(expert - base, density) for expert in experts]
    expected = base + elect_and_merge(trimmed, weights, "mean", False)
    merged = merge_state_dicts(
        "ties",
        {str(i): torch.tensor(part.base) for i, part in enumerate(parts)},
        [{str(i): torch.tensor(part.experts[t]) for i, part in enumerate(parts)} for t in range(2)],
        weights=weights,
        density=density,
        scope="model",
    )
    assert_close(np.concatenate([m.numpy().reshape(-1) for m in merged.values()]), expected)


def test_ties_over_the_model_counts_untouched_tensors_like_equal_ones():
    """Whether an expert is the base object or a copy of it must not move the model's threshold."""
    generator = torch.Generator().manual_seed(0)
    base = {"a": torch.randn(50, generator=generator), "b": torch.randn(30, generator=generator)}
    expert = {"a": base["a"] + torch.randn(50, generator=generator), "b": base["b"]}
    copied = {"a": expert["a"], "b": base["b"].clone()}
    shared, cloned = (merge_state_dicts("ties", base, [e], density=0.25, scope="model") for e in (expert, copied))
    assert torch.equal(shared["a"], cloned["a"])
    assert int((shared["a"] != base["a"]).sum()) == 20  # a quarter of all 80, not of the 50


def test_ties_over_the_model_takes_a_model_of_two_types():
    base = {"a": torch.zeros(4, dtype=torch.float32), "b": torch.zeros(4, dtype=torch.float64)}
    expert = {"a": torch.tensor([1.0, 2, 3, 4]), "b": torch.tensor([1.5, 2.5, 3.5, 4.5], dtype=torch.float64)}
    merged = merge_state_dicts("ties", base, [expert], density=0.5, scope="model")
    assert merged["a"].tolist() == [0, 0, 3, 4]
    assert merged["b"].tolist() == [0, 0, 3.5, 4.5]


def test_ties_keeps_equal_magnitudes_and_at_least_one():
    base = torch.zeros(10)
    expert = torch.tensor([1.0, -1, 1, -1, 1, 0.5, 0.5, 0, 0, 0])
    info = TensorInfo("w", shape=(10,))
    for density in (1e-9, 0.1, 0.2, 0.5):
        merged = METHODS["ties"].merge(base, [expert], weights=[1.0], info=info, density=density)
        assert merged.tolist() == [1, -1, 1, -1, 1, 0, 0, 0, 0, 0]


@given(families(), densities, st.floats(-1, 2))
def test_ties_linear_elects_before_the_weights(family: Family, density: float, scale: float):
    """AdaMerging's ties_merging_split with merge_func dis-sum, entry by entry; a sum of zero counts as +."""
    trimmed = [trim(tau, density) for tau in family.taus]
    plus = sum(trimmed) >= 0
    kept = [np.where(plus, tau > 0, tau < 0) * tau for tau in trimmed]
    expected = family.base + scale * sum(weight * tau for weight, tau in zip(family.weights, kept, strict=True))
    assert_close(family.merge("ties_linear", density=density, scale=scale), expected)


@given(families(), densities, st.sampled_from([0.3, 1.0, -0.5]))
def test_ties_linear_with_equal_positive_weights_is_ties_that_sums(family: Family, density: float, weight: float):
    family.weights = [abs(weight)] * len(family.experts)
    assert_close(family.merge("ties_linear", density=density), family.merge("ties", density=density, mode="sum"))


def test_an_expert_of_weight_0_has_its_vote():
    family = Family(np.zeros(2), [np.array([1.0, 1.0]), np.array([-2.0, 3.0])], [1.0, 0.0])
    assert family.merge("ties_linear", density=1.0).tolist() == [0.0, 1.0]


@given(families(fewest=2), densities)
def test_ties_of_one_expert_many_times_is_that_expert_trimmed(family: Family, density: float):
    """Identical experts agree everywhere."""
    family.experts = [family.experts[0]] * len(family.experts)
    family.weights = [1.0] * len(family.experts)
    expected = family.base + trim(family.taus[0], density)
    assert_close(family.merge("ties", density=density), expected)


@given(families())
def test_ties_at_density_1_with_equal_signs_is_the_mean(family: Family):
    family.experts = [family.base + np.abs(tau) + 0.1 for tau in family.taus]
    family.weights = [1.0] * len(family.experts)
    assert_close(family.merge("ties", density=1.0), np.mean(family.experts, axis=0))


@given(families(low=0.25))
def test_ties_at_density_1_summing_with_equal_signs_is_task_arithmetic(family: Family):
    family.experts = [family.base + np.abs(tau) + 0.1 for tau in family.taus]
    assert_close(family.merge("ties", density=1.0, mode="sum"), family.merge("task_arithmetic"))


def test_ties_lets_nan_through():
    expert = torch.tensor([float("nan"), 5.0, 1.0, 1.0])
    info = TensorInfo("w", shape=(4,))
    merged = METHODS["ties"].merge(torch.zeros(4), [expert, expert], weights=[1.0, 1.0], info=info, density=0.5)
    assert torch.isnan(merged[0]) and merged[1] == 5


def test_ties_prepares_only_what_no_candidate_changes():
    ties = METHODS["ties"]
    base, expert = torch.zeros(8), torch.arange(8.0)
    sources = [(TensorInfo("w", shape=(8,)), base, [expert])]
    assert ties.prepare(sources, scope="tensor") is None  # the density varies
    assert not ties.chunked_with(None, density=0.5, scope="tensor")
    state = ties.prepare(sources, density=0.5, scope="tensor")
    assert ties.chunked_with(state, density=0.5, scope="tensor")
    assert not ties.chunked_with(state, density=0.25, scope="tensor")
    with pytest.raises(MethodError, match="density"):
        ties.prepare(sources, scope="model")
    with pytest.raises(MethodError, match="whole model"):
        ties.chunked_with(state, density=0.5, scope="model")
    with pytest.raises(MethodError, match="other"):
        ties.merge(base, [expert], weights=[1], info=TensorInfo("other", shape=(8,)), state=state, density=0.5)
    # A state for another density is not used: the tensor, whole here, gives its own thresholds.
    merged = ties.merge(base, [expert], weights=[1], info=sources[0][0], state=state, density=0.25)
    assert merged.tolist() == [0, 0, 0, 0, 0, 0, 6, 7]


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_density_must_be_above_0_and_at_most_1(method: str):
    for density in (0, -0.1, 1.5, float("nan"), True, "half"):
        with pytest.raises(MethodError, match="density"):
            check_params(method, METHODS[method], {"density": density})
