"""sce against its three steps on whole float64 arrays."""

from __future__ import annotations

from contextlib import nullcontext
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from evomerge.methods import METHODS, fused
from evomerge.methods.base import TensorInfo, arithmetic_dtype
from evomerge.methods.chunks import merge_chunks
from evomerge.methods.sce import _erase, variation

from .families import Family, assert_close, families
from .test_fused import WEIGHTS, same_bits, tensors


def reference(family: Family, select_topk: float, floor: float, scale: float) -> np.ndarray:
    """FuseChat's Select, Calculate and Erase, then the mean that mergekit takes of what is left."""
    chosen = [t for t, w in enumerate(family.weights) if w != 0]
    if not chosen:
        return family.base
    taus = np.stack([family.taus[t].reshape(-1) for t in chosen])
    thetas = np.stack([family.experts[t].reshape(-1) for t in chosen])
    if select_topk < 1:
        # Exact, as fractions: on a coarse grid many entries have the very same variance.
        spread = np.array([_spread(column) for column in thetas.T], dtype=object)
        count = int(select_topk * sum(s > 0 for s in spread))
        limit = sorted(spread, reverse=True)[count - 1] if count else None
        taus = taus * np.array([limit is not None and s >= limit for s in spread], dtype=float)
    energy = np.mean(taus**2, axis=1)
    share = (
        energy / energy.sum() if energy.sum() > 0 and energy.sum() >= floor else np.full(len(chosen), 1 / len(chosen))
    )
    majority = np.where(taus.sum(0) >= 0, 1, -1)
    kept = share[:, None] * (np.sign(taus) == majority)
    weights = np.array([family.weights[t] for t in chosen])
    divisor = kept.sum(0)
    merged = (weights[:, None] * kept * taus).sum(0) / np.where(divisor == 0, 1, divisor)
    return family.base + scale * merged.reshape(family.base.shape)


def _spread(column: np.ndarray) -> Fraction:
    exact = [Fraction(float(value)) for value in column]
    mean = sum(exact, Fraction()) / len(exact)
    return sum(((value - mean) ** 2 for value in exact), Fraction())


@given(families(), st.sampled_from([1.0, 0.0, 0.1, 0.5, 0.9]), st.sampled_from([0.0, 1e-6, 1.0]), st.floats(-2, 2))
def test_sce(family: Family, select_topk: float, floor: float, scale: float):
    # Entries whose task vectors cancel: their sign is all rounding. (Not on the grid, where sums are exact.)
    total = np.abs(np.sum([t for t, w in zip(family.taus, family.weights, strict=True) if w != 0] or [0.0], axis=0))
    assume(np.all((total == 0) | (total > 1e-9)))
    merged = family.merge("sce", select_topk=select_topk, floor=floor, scale=scale)
    assert_close(merged, reference(family, select_topk, floor, scale))


@given(families(most=1), st.floats(0, 0.99))
def test_one_expert_alone_differs_from_nobody(family: Family, select_topk: float):
    family.weights = [1.0]
    assert_close(family.merge("sce"), family.experts[0])
    assert np.array_equal(family.merge("sce", select_topk=select_topk), family.base)


@given(families(fewest=2))
def test_equal_experts_are_kept(family: Family):
    family.experts = [family.experts[0].copy() for _ in family.experts]
    family.weights = [1.0] * len(family.experts)
    assert_close(family.merge("sce"), family.experts[0])


def test_by_hand():
    """Selected are entries 0 and 1 (variances 4 and 1 of 4, 1, 0.25, 0); energies 9 + 1 = 10 and 1 + 1 = 2."""
    base = np.zeros(4)
    a, b = np.array([3.0, 1.0, 0.5, 2.0]), np.array([-1.0, -1.0, -0.5, 2.0])
    merged = Family(base, [a, b], [1.0, 1.0]).merge("sce", select_topk=0.7)  # int(0.7 x 3) = 2
    assert_close(merged, np.array([3.0, 1.0, 0.0, 0.0]))  # at entry 1 the sum is 0, which counts as +
    weighted = Family(base, [a, b], [0.5, -2.0]).merge("sce")  # all: energies 14.25 and 6.25, the last entry from both
    assert_close(weighted, np.array([1.5, 0.5, 0.25, 2 * (0.5 * 14.25 - 2 * 6.25) / 20.5]))


def test_floor_makes_experts_with_small_changes_count_the_same():
    """mergekit's: below a sum of mean squares of 1e-6 the energies do not count."""
    base, a, b = np.zeros(3), np.full(3, 1e-4), np.full(3, 2e-4)
    family = Family(base, [a, b], [1.0, 1.0])
    assert_close(family.merge("sce"), np.full(3, (1e-4 * 1 + 2e-4 * 4) / 5))
    assert_close(family.merge("sce", floor=1e-6), np.full(3, 1.5e-4))


def test_a_prepared_search_selects_anew_for_those_that_take_part():
    """Weights do not change the selection, leaving an expert out does; what was prepared gives both, by slices."""
    method, shape = METHODS["sce"], (300, 900)
    info = TensorInfo("w", shape=shape)
    base, *experts = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    params: dict[str, Any] = {"select_topk": 0.2, "floor": 0.0, "scale": 1.0}
    state = method.prepare([(info, base, experts)], **params)
    assert state is not None and method.chunked_with(state, **params)
    for weights in ([1.0, 1.0, 1.0], [0.5, -1.0, 2.0], [1.0, 0.0, 1.0]):
        pieces = merge_chunks(method, base, experts, weights=weights, info=info, state=state, params=params)
        merged = torch.cat([piece for _, piece in pieces]).view(shape)
        taken = [e for e, w in zip(experts, weights, strict=True) if w != 0]
        expected = method.merge(base, taken, weights=[w for w in weights if w != 0], info=info, **params)
        assert torch.equal(merged, expected)
    assert set(state.of) == {(0, 1, 2), (0, 2)}


@pytest.mark.skipif(fused.kernels() is None, reason="numba is not installed, or no fused multiply-add")
@given(st.data(), st.integers(1, 5), st.sampled_from([0.0, 0.2, 1.0]), WEIGHTS)
def test_the_compiled_loops_give_the_plain_codes_bits(data, count: int, select_topk: float, scale: float):
    base, *experts = data.draw(tensors(count + 1))
    weights = [data.draw(WEIGHTS) for _ in experts]
    dtype = arithmetic_dtype(base, *experts)
    info = TensorInfo("w", shape=tuple(base.shape))
    found = []
    for context in (fused.plain, nullcontext):
        with context():
            spread = variation(experts, dtype)
            threshold = (
                0.0 if select_topk == 1 else float(spread.nan_to_num(0, 1, 1).kthvalue(spread.numel() // 2 + 1)[0])
            )
            shares = [1 / (2 + t) for t in range(count)]
            merged = _erase(base, experts, threshold, shares, weights, dtype=dtype, scale=scale)
            whole = METHODS["sce"].merge(base, experts, weights=weights, info=info, select_topk=select_topk)
            found.append((spread, merged, whole))
    assert all(same_bits(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("count", [2, 3, 8])
def test_the_share_is_exact_in_float32(count: int):
    shape, info = (1000, 101), TensorInfo("w", shape=(1000, 101))
    base, *experts = torch.randn(count + 1, *shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    experts[0][:, 0] = experts[1][:, 0]
    for expert in experts[1:]:
        expert[:, 0] = experts[0][:, 0]  # one column in which nobody differs
    merged = METHODS["sce"].merge(base, experts, weights=[1.0] * count, info=info, select_topk=0.25)
    changed = (merged != base.float()).sum().item()
    assert 24_990 <= changed <= 25_100  # all that equal the last one stay: bfloat16 has ties
    assert torch.equal(merged[:, 0], base[:, 0].float())
