"""nearswap, magmax and ram against their formulas, entry by entry."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from .families import Family, assert_close, families


@given(families(most=1), st.floats(0, 2))
def test_nearswap(family: Family, t: float):
    """The model card's weights: s = min(1, t / |b - a|), then (1 - s) a + s b."""
    a, b = family.base, family.experts[0]
    s = np.minimum(1, np.divide(t, np.abs(b - a), out=np.ones_like(a), where=b != a))
    swapped = (1 - s) * a + s * b
    family.weights = [1.0]
    assert_close(family.merge("nearswap", t=t), swapped)
    family.weights = [-0.5]
    assert_close(family.merge("nearswap", t=t), a - 0.5 * (swapped - a))


@given(families(most=1))
def test_nearswap_with_a_wide_t_is_the_expert_and_with_none_the_base(family: Family):
    family.weights = [1.0]
    assert_close(family.merge("nearswap", t=1e6), family.experts[0])
    assert np.array_equal(family.merge("nearswap", t=0.0), family.base)


@given(families(), st.floats(-2, 2))
def test_magmax(family: Family, scale: float):
    """Section 4: argmax of |tau| for every parameter; the last of several that are equal."""
    weighted = [w * tau for w, tau in zip(family.weights, family.taus, strict=True) if w != 0]
    expected = family.base.copy()
    for place in np.ndindex(family.base.shape):
        best = 0.0
        for tau in weighted:
            if abs(tau[place]) >= abs(best):
                best = tau[place]
        expected[place] += scale * best
    assert_close(family.merge("magmax", scale=scale), expected)


@given(families(), st.sampled_from([0.0, 0.5, 1e-5, 0.02]), st.floats(-2, 2))
def test_ram(family: Family, epsilon: float, scale: float):
    """Section 4: shared changes are averaged over those that share them, a unique one is kept."""
    expected = family.base.copy()
    chosen = [(w, tau) for w, tau in zip(family.weights, family.taus, strict=True) if w != 0]
    for place in np.ndindex(family.base.shape):
        changes = [w * tau[place] for w, tau in chosen if abs(tau[place]) > epsilon]
        expected[place] += scale * sum(changes) / max(1, len(changes))
    assert_close(family.merge("ram", epsilon=epsilon, scale=scale), expected)


def test_ram_by_hand():
    """A change of epsilon itself counts as none."""
    family = Family(np.zeros(3), [np.array([0.0, 0.5, 1.0]), np.array([1.0, 0.5, 0.25])], [1.0, 1.0])
    assert_close(family.merge("ram", epsilon=0.5), np.array([1.0, 0.0, 1.0]))
    assert_close(family.merge("ram", epsilon=0.2), np.array([1.0, 0.5, 0.625]))
    assert_close(family.merge("ram", epsilon=0.0), np.array([1.0, 0.5, 0.625]))


@given(families(fewest=2))
def test_ram_of_changes_in_different_places_is_their_sum(family: Family):
    """Disjoint task vectors: nothing is averaged away."""
    count = len(family.experts)
    owner = np.arange(family.base.size).reshape(family.base.shape) % count
    family.experts = [np.where(owner == t, e, family.base) for t, e in enumerate(family.experts)]
    family.weights = [1.0] * count
    kept = [np.where(np.abs(tau) > 1e-5, tau, 0) for tau in family.taus]
    assert_close(family.merge("ram"), family.base + sum(kept))
