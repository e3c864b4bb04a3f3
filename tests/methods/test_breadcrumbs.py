"""Model Breadcrumbs against a reference written from its paper, and what it reduces to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import MethodError
from evomerge.methods import METHODS, merge_state_dicts
from evomerge.methods.base import TensorInfo, check_params

from .families import Family, assert_close, families
from .references import densities, elect_and_merge, modes

gammas = st.floats(0, 1)


def crumbs(tau: np.ndarray, density: float, gamma: float) -> np.ndarray:
    """Section 3: both tails of the sorted magnitudes of a layer are masked out, by counts; equal magnitudes stay."""
    if density == 1:
        return tau
    descending = np.sort(np.abs(tau).reshape(-1))[::-1]
    keep = max(1, round(density * tau.size))
    top = min(round(gamma * tau.size), tau.size - keep)
    stay = descending[top : top + keep]
    return np.where((np.abs(tau) >= stay[-1]) & (np.abs(tau) <= stay[0]), tau, 0.0)


@given(families(), densities, gammas, st.floats(-1, 2))
def test_breadcrumbs(family: Family, density: float, gamma: float, scale: float):
    cut = [crumbs(tau, density, gamma) for tau in family.taus]
    expected = family.base + scale * sum(w * tau for w, tau in zip(family.weights, cut, strict=True))
    assert_close(family.merge("breadcrumbs", density=density, gamma=gamma, scale=scale), expected)


@given(families(), densities, gammas, modes)
def test_breadcrumbs_ties(family: Family, density: float, gamma: float, mode: str):
    cut = [crumbs(tau, density, gamma) for tau in family.taus]
    expected = family.base + elect_and_merge(cut, family.weights, mode, False)
    assert_close(family.merge("breadcrumbs_ties", density=density, gamma=gamma, mode=mode), expected)


@given(families(), gammas)
def test_without_cuts_it_is_what_follows(family: Family, gamma: float):
    whole = {"density": 1.0, "gamma": gamma}
    assert np.array_equal(family.merge("breadcrumbs", **whole), family.merge("task_arithmetic"))
    assert np.array_equal(family.merge("breadcrumbs_ties", **whole), family.merge("ties", density=1.0))


@given(families(), densities, modes, st.booleans())
def test_with_gamma_0_it_trims_as_ties(family: Family, density: float, mode: str, normalize: bool):
    options = {"density": density, "mode": mode, "normalize": normalize}
    assert np.array_equal(family.merge("breadcrumbs_ties", gamma=0.0, **options), family.merge("ties", **options))


def test_counts_by_hand():
    """Ten entries: the largest 20 % go, then 30 % stay."""
    tau = torch.tensor([5.0, -10, 1, 7, -9, 8, -2, 6, 3, 4])
    merged = merge_state_dicts("breadcrumbs", {"w": torch.zeros(10)}, [{"w": tau}], weights=[1], density=0.3, gamma=0.2)
    assert merged["w"].tolist() == [0, 0, 0, 7, 0, 8, 0, 6, 0, 0]


def test_where_there_is_no_room_fewer_are_dropped_on_top():
    tau = torch.tensor([4.0, 3, 2, 1])
    for gamma in (0.25, 0.5, 1.0):
        merged = merge_state_dicts("breadcrumbs", {"w": 0 * tau}, [{"w": tau}], weights=[1], density=0.75, gamma=gamma)
        assert merged["w"].tolist() == [0, 3, 2, 1]


def test_equal_magnitudes_at_either_threshold_stay():
    tau = torch.tensor([2.0, -2, 2, 1, -1, 1, 0.5, 0, 0, 0])  # 2, [2, 2, 1, 1], 1, ...
    merged = merge_state_dicts("breadcrumbs", {"w": 0 * tau}, [{"w": tau}], weights=[1], density=0.4, gamma=0.1)
    assert merged["w"].tolist() == [2, -2, 2, 1, -1, 1, 0, 0, 0, 0]


def test_lets_nan_through():
    expert = torch.tensor([float("nan"), 5.0, 3.0, 1.0])
    info = TensorInfo("w", shape=(4,))
    for method in ("breadcrumbs", "breadcrumbs_ties"):
        merged = METHODS[method].merge(torch.zeros(4), [expert], weights=[1.0], info=info, density=0.5, gamma=0.25)
        assert torch.isnan(merged[0]) and merged[1:].tolist() == [5, 3, 0]


def test_prepares_only_what_no_candidate_changes():
    method = METHODS["breadcrumbs"]
    base, expert = torch.zeros(8), torch.arange(8.0)
    sources = [(TensorInfo("w", shape=(8,)), base, [expert])]
    assert method.prepare(sources, density=0.5) is None  # gamma varies
    state = method.prepare(sources, density=0.5, gamma=0.125)
    assert method.chunked_with(state, density=0.5, gamma=0.125)
    assert not method.chunked_with(state, density=0.5, gamma=0.25)
    assert method.chunked_with(None, density=1.0, gamma=0.25)


@pytest.mark.parametrize("name", ["density", "gamma"])
def test_shares_must_be_shares(name: str):
    for value in (-0.1, 1.5, float("nan"), True, "half"):
        with pytest.raises(MethodError, match=name):
            check_params("breadcrumbs", METHODS["breadcrumbs"], {name: value})
