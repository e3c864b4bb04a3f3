"""Objectives and constraints: which trial is better, what a score is worth against a reference, and what is refused."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.objectives import merit, violation
from evomerge.searchers.base import Told

numbers = st.integers(-3, 3).map(float)
margins = st.lists(st.integers(-2, 2).map(float), max_size=2).map(tuple)
told = st.builds(
    Told,
    n=st.just(0),
    point=st.just({}),
    state=st.sampled_from(["complete", "complete", "fail", "pruned"]),
    score=st.one_of(numbers, st.sampled_from([math.nan, math.inf, -math.inf, None])),
    values=st.just(()),
    margins=margins,
)


@settings(max_examples=300)
@given(told, told)
def test_feasible_before_infeasible_before_failed(a: Told, b: Told):
    """Deb's three rules, said directly."""
    for one, other in ((a, b), (b, a)):
        good = one.state == "complete" and one.score is not None and math.isfinite(one.score)
        also = other.state == "complete" and other.score is not None and math.isfinite(other.score)
        if good and not also:
            assert one.merit > other.merit
        elif good and also and not any(m > 0 for m in one.margins):
            assert one.score is not None and other.score is not None
            worse = any(m > 0 for m in other.margins) or one.score > other.score
            assert not worse or one.merit > other.merit
        elif good and also and one.violation < other.violation:
            assert one.merit > other.merit
        elif not good and not also:
            assert one.merit == other.merit


def test_nothing_that_is_not_a_number_ranks():
    for bad in (math.nan, math.inf, -math.inf):
        assert Told(0, {}, "complete", 1.0, (1.0, bad)).merit == merit(None)
        assert Told(0, {}, "complete", 1.0, (), (bad,)).merit == merit(None)
        assert merit(0.0, 1e9) > merit(bad) == merit(1.0, bad) == merit(None)


def test_violation_adds_what_is_missed_and_forgives_nothing_for_what_is_kept():
    assert violation(()) == violation((-5.0, 0.0)) == 0.0
    assert violation((-5.0, 0.25, 0.5)) == 0.75
