"""PCB-Merging against a reference written from its authors' code, and what it reduces to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from evomerge.errors import MethodError
from evomerge.methods import METHODS, merge_state_dicts
from evomerge.methods.base import TensorInfo, check_params
from evomerge.methods.chunks import merge_chunks

from .families import Family, assert_close, families

densities = st.floats(0.05, 1)
clips = st.sampled_from([0.0, 0.0001, 0.01, 0.1, 0.3])


def ends(values: np.ndarray, at_least: float, at_most: float) -> tuple[float, float]:
    """The authors' clamp: the values at two places of the sorted vector."""
    ordered = np.sort(values)
    first = int(len(ordered) * at_least)
    return ordered[min(first, len(ordered) - 1)], ordered[max(first, int(len(ordered) * (1 - at_most) - 1))]


def share_of_range(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def pcb(taus: list[np.ndarray], weights: list[float], density: float, clip: float) -> tuple[np.ndarray, np.ndarray]:
    """(the merged task vector, sum of the coefficients) of flat task vectors of one model."""
    count, total = len(taus), sum(taus)
    top, bottom = np.zeros(len(total)), np.zeros(len(total))
    for tau, weight in zip(taus, weights, strict=True):
        low, high = ends(np.abs(tau), clip, clip)
        magnitudes = np.clip(np.abs(tau), low, high)
        score = np.exp(count * share_of_range(magnitudes, low, high) ** 2) * np.tanh(tau * total)
        ordered = np.sort(score)
        threshold = ordered[min(int(len(ordered) * (1 - density)), len(ordered) - 1)]
        kept = np.clip(score, threshold, None)
        if kept.max() > threshold:
            coefficient = share_of_range(kept, threshold, kept.max())
        else:  # the authors' code divides by zero here
            coefficient = (kept == score) * float(threshold > 0)
        top += weight * coefficient * np.sign(tau) * magnitudes
        bottom += coefficient
    return top / np.maximum(bottom, 1e-12), bottom


def is_clear(bottom: np.ndarray) -> bool:
    """No entry's coefficients are so small that their ratio is a matter of rounding."""
    return bool(((bottom == 0) | (bottom > 1e-4)).all())


def taking_part(family: Family) -> list[int]:
    return [t for t, weight in enumerate(family.weights) if weight != 0]


@given(families(), densities, clips, st.floats(-1, 2))
def test_pcb(family: Family, density: float, clip: float, scale: float):
    there = taking_part(family)
    assume(there)
    taus = [family.taus[t].reshape(-1) for t in there]
    merged, bottom = pcb(taus, [family.weights[t] for t in there], density, clip)
    assume(is_clear(bottom))
    expected = family.base + scale * merged.reshape(family.base.shape)
    assert_close(family.merge("pcb", density=density, clip=clip, scale=scale), expected)


@given(st.lists(families(fewest=3, most=3), min_size=1, max_size=4), densities, clips)
def test_pcb_over_the_model_is_pcb_of_one_long_vector(parts: list[Family], density: float, clip: float):
    """The authors flatten the whole model."""
    weights = parts[0].weights
    there = taking_part(parts[0])
    assume(there)
    taus = [np.concatenate([part.taus[t].reshape(-1) for part in parts]) for t in there]
    merged, bottom = pcb(taus, [weights[t] for t in there], density, clip)
    assume(is_clear(bottom))
    expected = np.concatenate([part.base.reshape(-1) for part in parts]) + merged
    found = merge_state_dicts(
        "pcb",
        {str(i): torch.tensor(part.base) for i, part in enumerate(parts)},
        [{str(i): torch.tensor(part.experts[t]) for i, part in enumerate(parts)} for t in range(3)],
        weights=weights,
        density=density,
        clip=clip,
        scope="model",
    )
    assert_close(np.concatenate([m.numpy().reshape(-1) for m in found.values()]), expected)


@given(families(), densities)
def test_of_identical_experts_it_is_one_of_them_without_its_low_scores(family: Family, density: float):
    family.experts, family.weights = [family.experts[0]] * len(family.experts), [1.0] * len(family.experts)
    tau = family.taus[0]
    moved = family.merge("pcb", density=density, clip=0.0) - family.base
    kept = moved != 0
    assert_close(moved[kept], tau[kept])
    if kept.any():  # the score grows with the magnitude
        assert np.abs(tau[kept]).min() >= np.abs(tau[~kept]).max(initial=0) - 1e-12


@given(families(fewest=2))
def test_weights_that_are_equal_scale_it(family: Family):
    family.weights = [1.0] * len(family.weights)
    once = family.merge("pcb")
    family.weights = [0.5] * len(family.weights)
    assert_close(2 * (family.merge("pcb") - family.base), once - family.base)


def test_an_untouched_tensor_counts_like_an_equal_one():
    generator = torch.Generator().manual_seed(0)
    base = {"a": torch.randn(50, generator=generator), "b": torch.randn(30, generator=generator)}
    experts = [{name: t + torch.randn(t.shape, generator=generator) for name, t in base.items()} for _ in range(2)]
    experts[1]["b"] = base["b"]
    copied = [experts[0], {**experts[1], "b": base["b"].clone()}]
    for scope in ("tensor", "model"):
        shared, cloned = (merge_state_dicts("pcb", base, e, density=0.3, scope=scope) for e in (experts, copied))
        assert all(torch.equal(shared[name], cloned[name]) for name in base)


def test_many_experts_do_not_overflow():
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.zeros(500)}
    experts = [{"w": torch.randn(500, generator=generator)} for _ in range(300)]
    merged = merge_state_dicts("pcb", base, experts, weights=[1.0] * 300)["w"]
    assert torch.isfinite(merged).all() and bool((merged != 0).any())


def test_the_model_is_looked_at_again_only_where_other_experts_take_part():
    class Sources(list):
        reads = 0

        def __iter__(self):
            self.reads += 1
            return super().__iter__()

    generator = torch.Generator().manual_seed(0)
    base, *experts = torch.randn(4, 40, generator=generator)
    info = TensorInfo("w", shape=(40,))
    sources = Sources([(info, base, experts)])
    method = METHODS["pcb"]
    state = method.prepare(sources, scope="model")
    for weights, reads in (([1, 2, 3], 4), ([3, 2, 1], 4), ([0, 2, 1], 8), ([0, 1, 1], 8), ([1, 1, 1], 8)):
        method.merge(base, experts, weights=weights, info=info, state=state, scope="model")
        assert sources.reads == reads
    with pytest.raises(MethodError, match="whole model"):
        method.merge(base, experts, weights=[1, 1, 1], info=info, scope="model")


def test_levels_of_a_tensor_are_kept_for_the_next_candidate():
    generator = torch.Generator().manual_seed(0)
    base, *experts = torch.randn(4, 400, generator=generator)
    info, method = TensorInfo("w", shape=(400,)), METHODS["pcb"]
    sources = [(info, base, experts)]
    params = check_params("pcb", method, {})
    assert method.prepare(sources, scope="tensor", clip=0.0) is None  # density varies
    state = method.prepare(sources, **params)
    for weights, known in (([1, 2, 3], 1), ([3, 2, 1], 1), ([0, 2, 1], 2), ([0, 1, 1], 2)):
        pieces = merge_chunks(method, base, experts, weights=weights, info=info, state=state, params=params)
        merged = torch.cat([piece for _, piece in pieces])
        assert torch.equal(merged, method.merge(base, experts, weights=weights, info=info, **params))
        assert len(state.found) == known


def test_shares_must_be_shares():
    for name, values in {"density": (0, 1.5, True), "clip": (-0.1, 0.6), "scope": ("layer",)}.items():
        for value in values:
            with pytest.raises(MethodError, match=name):
                check_params("pcb", METHODS["pcb"], {name: value})
