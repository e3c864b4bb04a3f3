"""Coordinate search: the contract, its steps by hand, every kind of dimension, failures and new starts."""

from __future__ import annotations

import itertools
import math

import pytest

from evomerge.dimensions import Dimension, Point
from evomerge.searchers.base import Told
from evomerge.searchers.coordinate import CoordinateSearcher
from evomerge.space import Space
from evomerge.testing.searchers import MemoryStudy, SearcherContract, make_mixed_space, make_space, smooth


class TestCoordinate(SearcherContract):
    searcher = CoordinateSearcher
    draws = False


class TestCoordinateWithWideSteps(SearcherContract):
    """A first step of the whole range: bounds everywhere."""

    searcher = CoordinateSearcher
    options = {"step": 1.0}  # noqa: RUF012
    draws = False


def space_of(*dimensions: Dimension) -> Space:
    """A space of these dimensions; for points only, nothing of it can be decoded."""
    whole = make_space(experts=1, groups=None)
    return Space(whole.template, whole.params, whole.regions, dimensions)


def run(space: Space, score, budget: int, **options) -> MemoryStudy:
    return MemoryStudy(lambda: CoordinateSearcher(space, **options), score).run(budget)


def test_the_first_polls_by_hand():
    """From (1, 1) in [0, 2] squared, step 0.25 of 2: x to 1.5 wins, y fails, x doubles its step and is clipped."""
    points = run(make_space(experts=2, groups=1), lambda p: 2 * p["e0[0-7]"] - abs(p["e1[0-7]"] - 1), 10).points
    assert [tuple(p.values()) for p in points] == [
        (1.0, 1.0),
        (1.5, 1.0), (0.5, 1.0),
        (1.5, 1.5), (1.5, 0.5),
        (2.0, 1.0),  # clipped; 0.5 is known
        (2.0, 1.25), (2.0, 0.75),
        (2.0, 1.125), (2.0, 0.875),  # x has no new point a step away
    ]  # fmt: skip


def test_reaches_the_optimum_of_a_smooth_function():
    study = run(make_space(), smooth, 300)
    best = max(study.results.values(), key=lambda told: told.merit)
    assert smooth(best.point) > 1e-4 * smooth(make_space().initial())


def test_both_directions_wait_for_nothing_but_the_last_poll():
    searcher = CoordinateSearcher(make_space())
    assert searcher.needs(0) == 0 and searcher.needs(1) == 1
    searcher.tell(Told(0, searcher.ask(0), "complete", 0.0))
    assert [searcher.needs(n) for n in (1, 2, 3)] == [1, 1, 3]
    assert searcher.at_once(60) == 2


@pytest.mark.parametrize("log", [False, True], ids=["equal parts", "by factors"])
def test_whole_numbers_are_searched_to_the_last_one(log: bool):
    """However small its step, a whole number still moves by 1: the optimum is met exactly, and points are whole."""
    space = space_of(
        Dimension("rank", 1, 100, 90, log=log, integer=True), Dimension("depth", 1, 9, 1, log=log, integer=True)
    )
    score = lambda p: -abs(p["rank"] - 37) - 10 * abs(p["depth"] - 6)  # noqa: E731
    study = run(space, score, 60)
    assert max(told.score for told in study.results.values() if told.score is not None) == 0
    assert all(type(value) is int for point in study.points for value in point.values())


def test_choices_and_methods_are_polled_whole():
    space = make_mixed_space()
    optimum = {"method": "dare_ties", "dare_ties.density": 0.4}

    def score(point: Point) -> float:
        return (point["method"] == "dare_ties") - abs(point.get("dare_ties.density", 0.9) - 0.4)

    study = run(space, score, 60)
    assert {p["method"] for p in study.points[:3]} == {"ties", "dare_ties", "task_arithmetic"}
    best = max(study.results.values(), key=lambda told: told.merit).point
    assert best["method"] == optimum["method"] and best["dare_ties.density"] == pytest.approx(0.4, abs=0.01)


def test_a_finite_space_is_searched_whole_and_then_over():
    space = space_of(Dimension("a", 0, 2, "x", choices=("x", "y", "z")), Dimension("b", 1, 4, 2, integer=True))
    study = run(space, lambda p: float(p["b"]), 100)
    assert {(p["a"], p["b"]) for p in study.points} == set(itertools.product("xyz", (1, 2, 3, 4)))
    assert len(study.points) == CoordinateSearcher(space).size == 12


def test_a_failed_start_is_left_and_failures_are_not_entered():
    """The start fails, and so does all above 1.2: what follows climbs up to the wall and stays before it."""
    space = make_space(experts=1, groups=1)
    study = run(space, lambda p: p["e0[0-7]"] if p["e0[0-7]"] < 0.9 else None, 40)
    assert study.results[0].score is None
    best = max(study.results.values(), key=lambda told: told.merit)
    assert 0.89 < best.point["e0[0-7]"] < 0.9


def test_starts_anew_from_a_random_point_once_its_steps_are_spent():
    space = make_space(experts=1, groups=1)
    first, other = (
        MemoryStudy(lambda s=s: CoordinateSearcher(space, seed=s), lambda p: -abs(p["e0[0-7]"] - 1.0)).run(60).points
        for s in (0, 1)
    )
    spent = next(n for n, (a, b) in enumerate(zip(first, other, strict=True)) if a != b)
    assert spent == 1 + 2 * sum(0.25 * 0.5**k >= 1e-5 for k in range(60))  # the start is the best: every poll fails
    assert math.isclose(abs(first[spent - 1]["e0[0-7]"] - 1.0), 2.0 * 0.25 * 0.5**14)
