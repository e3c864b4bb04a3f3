"""TIES and DARE against references written from their papers."""

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
from .test_random import documented_uniform

densities = st.floats(0.01, 1)
modes = st.sampled_from(["mean", "sum"])


def trim(tau: np.ndarray, density: float) -> np.ndarray:
    """TIES-Merging, algorithm 1, step 1: keep_topk_reset_rest_to_zero; equal magnitudes are all kept."""
    keep = max(1, round(density * tau.size))
    smallest = np.sort(np.abs(tau).reshape(-1))[::-1][keep - 1]
    return np.where(np.abs(tau) >= smallest, tau, 0.0)


def elect_and_merge(taus: list[np.ndarray], weights: list[float], mode: str, normalize: bool) -> np.ndarray:
    """Algorithm 1, steps 2 and 3, entry by entry, with weights on the trimmed task vectors."""
    out = np.zeros(taus[0].size)
    flat = [tau.reshape(-1) for tau in taus]
    for p in range(out.size):
        entries = [(weight, weight * tau[p]) for weight, tau in zip(weights, flat, strict=True)]
        elected = 1.0 if sum(value for _, value in entries) >= 0 else -1.0
        agree = [(weight, value) for weight, value in entries if value * elected > 0]
        if agree:
            total = sum(value for _, value in agree)
            share = sum(weight for weight, _ in agree)
            divisor = (share if abs(share) >= 1e-8 else 1) if normalize else len(agree) if mode == "mean" else 1
            out[p] = total / divisor
    return out.reshape(taus[0].shape)


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


# -- DARE


def drop(tau: np.ndarray, key: tuple[int, str, int], *, density: float, rescale: str) -> np.ndarray:
    """DARE, section 3.2: delta = m * tau / (1 - p), m Bernoulli(1 - p), here 1 - p = density; the documented mask."""
    mask = documented_uniform(*key, 0, tau.size).reshape(tau.shape) < np.float32(density)
    kept = tau * mask
    if density == 1:
        return tau
    if rescale == "l1":
        return kept * (np.abs(tau).sum() / np.abs(kept).sum() if kept.any() else 1)
    return kept / density


dare = {"seed": st.integers(0, 2**40), "density": densities, "rescale": st.sampled_from(["density", "l1"])}


@given(family=families(), scale=st.floats(-1, 2), **dare)
def test_dare_linear(family: Family, seed: int, density: float, rescale: str, scale: float):
    dropped = [drop(tau, (seed, family.name, t), density=density, rescale=rescale) for t, tau in enumerate(family.taus)]
    expected = family.base + scale * sum(w * tau for w, tau in zip(family.weights, dropped, strict=True))
    merged = family.merge("dare_linear", seed=seed, density=density, rescale=rescale, scale=scale)
    assert_close(merged, expected)


@given(family=families(low=0.0), mode=modes, normalize=st.booleans(), **dare)
def test_dare_ties(family: Family, seed: int, *, density: float, rescale: str, mode: str, normalize: bool):
    """DARE's drop, then TIES-Merging's election and disjoint merge."""
    # Continuous numbers: on a grid, rescaled sums could cancel or not by a matter of rounding.
    rng = np.random.default_rng(seed)
    family.experts = [family.base + rng.standard_normal(family.base.shape) for _ in family.experts]
    dropped = [drop(tau, (seed, family.name, t), density=density, rescale=rescale) for t, tau in enumerate(family.taus)]
    expected = family.base + elect_and_merge(dropped, family.weights, mode, normalize)
    merged = family.merge("dare_ties", seed=seed, density=density, rescale=rescale, mode=mode, normalize=normalize)
    assert_close(merged, expected)


@given(families(), st.integers(0, 2**40))
def test_dare_at_density_1_is_what_follows_it(family: Family, seed: int):
    for rescale in ("density", "l1"):
        merged = family.merge("dare_linear", seed=seed, density=1.0, rescale=rescale)
        assert np.array_equal(merged, family.merge("task_arithmetic"))
        merged = family.merge("dare_ties", seed=seed, density=1.0, rescale=rescale)
        assert np.array_equal(merged, family.merge("ties", density=1.0))


def test_dare_keeps_the_stated_share_and_the_expectation():
    """Independent of how masks are keyed: the kept share is binomial, and the mean over seeds is task arithmetic."""
    rng = np.random.default_rng(0)
    n, seeds = 20_000, range(40)
    family = Family(rng.standard_normal(n), [], [0.6, 0.9])
    family.experts = [family.base + 0.1 * rng.standard_normal(n) for _ in range(2)]
    for density in (0.1, 0.5, 0.9):
        only_first = Family(family.base, family.experts, [0.6, 0.0])
        mean = np.zeros(n)
        for seed in seeds:
            shift = only_first.merge("dare_linear", seed=seed, density=density) - family.base
            kept = int((np.abs(shift) > 1e-14).sum())
            assert abs(kept - n * density) < 6 * np.sqrt(n * density * (1 - density))
            mean += family.merge("dare_linear", seed=seed, density=density) / len(seeds)
        spread = sum((w * t) ** 2 for w, t in zip(family.weights, family.taus, strict=True)) * (1 / density - 1)
        deviation = (mean - family.merge("task_arithmetic")) / np.sqrt(spread / len(seeds))
        assert abs(deviation.mean()) < 6 / np.sqrt(n)
        assert abs(deviation.std() - 1) < 0.05


def test_dare_masks_differ_between_experts_tensors_and_seeds():
    base, expert = torch.zeros(1000), torch.ones(1000)

    def kept(seed: int = 0, name: str = "w", before: int = 0) -> torch.Tensor:
        experts = [base] * before + [expert]
        merged = METHODS["dare_linear"].merge(
            base, experts, weights=[1.0] * len(experts), info=TensorInfo(name, shape=(1000,)), seed=seed
        )
        return merged != 0

    masks = [kept(), kept(seed=1), kept(name="v"), kept(before=1)]
    for i, mask in enumerate(masks):
        for other in masks[:i]:
            assert 350 < int((mask == other).sum()) < 650


def test_l1_rescaling_restores_the_norm_of_each_task_vector():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(500, generator=generator, dtype=torch.float64)
    expert = base + torch.randn(500, generator=generator, dtype=torch.float64)
    info = TensorInfo("w", shape=(500,))
    for method in ("dare_linear", "dare_ties"):
        merged = METHODS[method].merge(base, [expert], weights=[1.0], info=info, density=0.2, rescale="l1")
        torch.testing.assert_close((merged - base).abs().sum(), (expert - base).abs().sum())


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_density_must_be_above_0_and_at_most_1(method: str):
    for density in (0, -0.1, 1.5, float("nan"), True, "half"):
        with pytest.raises(MethodError, match="density"):
            check_params(method, METHODS[method], {"density": density})
