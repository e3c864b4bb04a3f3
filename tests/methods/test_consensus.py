"""Consensus Merging against a reference written from its paper, and what it reduces to."""

from __future__ import annotations

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

strictness = st.sampled_from([0.0, 0.2, 0.4, 0.6, 1.0]) | st.floats(0.1, 3)
counts = st.integers(0, 6)


def consensus(taus: list[np.ndarray], together: np.ndarray, k: int, l: float) -> np.ndarray:  # noqa: E741
    """1 where at least k of the TALL masks abs(tau_t) > l abs(tau_MT - tau_t) hold the entry."""
    masks = [np.abs(tau) > l * np.abs(together - tau) for tau in taus]
    return sum(masks, np.zeros(together.shape)) >= k


def is_clear(taus: list[np.ndarray], together: np.ndarray, l: float) -> bool:  # noqa: E741
    """No mask is a matter of rounding."""
    gaps = [np.abs(tau) - l * np.abs(together - tau) for tau in taus]
    return all(
        ((np.abs(gap) > 1e-9) | ((tau == 0) & (together == 0))).all() for gap, tau in zip(gaps, taus, strict=True)
    )


def chosen(family: Family) -> tuple[list[np.ndarray], list[float]]:
    """Task vectors and weights of the experts that take part."""
    pairs = [(tau, w) for tau, w in zip(family.taus, family.weights, strict=True) if w != 0]
    return [tau for tau, _ in pairs], [w for _, w in pairs]


@given(families(), counts, strictness, st.floats(-1, 2))
def test_consensus_task_arithmetic(family: Family, k: int, l: float, scale: float):  # noqa: E741
    taus, weights = chosen(family)
    together = sum(taus, np.zeros(family.base.shape))
    assume(is_clear(taus, together, l))
    merged = sum((w * tau for w, tau in zip(weights, taus, strict=True)), np.zeros(family.base.shape))
    expected = family.base + scale * consensus(taus, together, k, l) * merged
    assert_close(family.merge("consensus", k=k, l=l, scale=scale), expected)


@given(families(), counts, strictness, densities, modes)
def test_consensus_ties(family: Family, k: int, l: float, density: float, mode: str):  # noqa: E741
    """tau_MT is the TIES merge, the masks look at the task vectors before they are trimmed."""
    taus, weights = chosen(family)
    assume(taus)
    trimmed = [trim(tau, density) for tau in taus]
    together = elect_and_merge(trimmed, [1.0] * len(taus), mode, False)
    assume(is_clear(taus, together, l))
    expected = family.base + consensus(taus, together, k, l) * elect_and_merge(trimmed, weights, mode, False)
    assert_close(family.merge("consensus", inner="ties", k=k, l=l, density=density, mode=mode), expected)


@given(families(), st.floats(0, 2), st.floats(-1, 2))
def test_with_k_0_it_is_the_inner_method(family: Family, l: float, scale: float):  # noqa: E741
    merged = family.merge("consensus", k=0, l=l, scale=scale)
    assert np.array_equal(merged, family.merge("task_arithmetic", scale=scale))
    options = {"density": 0.4, "mode": "sum", "scale": scale}
    merged = family.merge("consensus", inner="ties", k=0, l=l, **options)
    assert np.array_equal(merged, family.merge("ties", **options))


@given(families(low=0.25), st.integers(1, 5))
def test_with_l_0_it_is_the_inner_method_where_all_experts_move_all_entries(family: Family, k: int):
    family.experts = [family.base + np.where(tau == 0, 1.0, tau) for tau in family.taus]
    assume(k <= len(family.experts))
    assert np.array_equal(family.merge("consensus", k=k, l=0.0), family.merge("task_arithmetic"))


@given(families())
def test_with_k_beyond_the_experts_it_is_the_base(family: Family):
    assert np.array_equal(family.merge("consensus", k=len(family.experts) + 1), family.base)


@given(families(fewest=2))
def test_the_masks_do_not_depend_on_the_weights(family: Family):
    family.weights = [0.5] * len(family.weights)
    half = family.merge("consensus") - family.base
    family.weights = [1.0] * len(family.weights)
    assert_close(2 * half, family.merge("consensus") - family.base)


def test_by_hand():
    """Entries that two experts agree on, that one needs (selfish), that two cancel, that none moves."""
    base = torch.zeros(4)
    experts = [torch.tensor([1.0, 2.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, -1.0, 0.0])]
    merged = merge_state_dicts("consensus", {"w": base}, [{"w": e} for e in experts], weights=[1, 1], k=2, l=0.4)
    assert merged["w"].tolist() == [2, 0, 0, 0]
    merged = merge_state_dicts("consensus", {"w": base}, [{"w": e} for e in experts], weights=[1, 1], k=1, l=0.4)
    assert merged["w"].tolist() == [2, 2, 0, 0]
    # What an expert does not move it does not need, however lenient the masks are.
    merged = merge_state_dicts("consensus", {"w": base}, [{"w": e} for e in experts], weights=[1, 1], k=2, l=0)
    assert merged["w"].tolist() == [2, 0, 0, 0]


def test_prepares_thresholds_for_ties_only():
    method = METHODS["consensus"]
    base, expert = torch.zeros(8), torch.arange(8.0)
    sources = [(TensorInfo("w", shape=(8,)), base, [expert])]
    assert method.prepare(sources, inner="task_arithmetic", density=0.5) is None
    assert method.prepare(sources, density=0.5) is None  # the inner method varies
    state = method.prepare(sources, inner="ties", density=0.5)
    assert method.chunked_with(state, inner="ties", density=0.5)
    assert method.chunked_with(None, inner="task_arithmetic", density=0.5)
    with pytest.raises(MethodError, match="whole model"):
        method.chunked_with(None, inner="ties", density=0.5, scope="model")


@pytest.mark.parametrize(("name", "values"), [("k", (-1, 1.5, True)), ("l", (-0.1, "much")), ("inner", ("dare",))])
def test_refuses_what_is_out_of_range(name: str, values: tuple):
    for value in values:
        with pytest.raises(MethodError, match=name):
            check_params("consensus", METHODS["consensus"], {name: value})
