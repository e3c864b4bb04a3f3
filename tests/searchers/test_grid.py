"""Grid: the contract, and that it is the grid."""

from __future__ import annotations

import itertools

import pytest

from evomerge.searchers.grid import GridSearcher
from evomerge.testing.searchers import MemoryStudy, SearcherContract, make_mixed_space, make_space


class TestGrid(SearcherContract):
    searcher = GridSearcher
    improves_within = None
    draws = False


def points(space, budget: int = 10**6, **options) -> list[tuple]:
    study = MemoryStudy(lambda: GridSearcher(space, **options), lambda point: 0.0).run(budget)
    return [tuple(point.values()) for point in study.points]


@pytest.mark.parametrize("initial", [1.0, 0.3], ids=["on the grid", "between"])
def test_every_combination_once_and_the_initial_point(initial: float):
    space = make_space(experts=3, groups=1, initial=initial)
    expected = set(itertools.product([0.0, 0.5, 1.0, 1.5, 2.0], repeat=3)) | {(initial,) * 3}
    found = points(space, steps=5)
    assert found[0] == (initial,) * 3
    assert len(found) == len(expected) == GridSearcher(space, steps=5).size and set(found) == expected


def test_choices_and_methods():
    """ties: 3 densities x 2 truth values x 3 x 3 weights; dare_ties: 3 x 3 x 3; task_arithmetic: 3 x 3."""
    space = make_mixed_space()
    searcher = GridSearcher(space)
    found = [searcher.ask(n) for n in range(searcher.size)]
    assert found[0] == space.initial()
    assert len({str(sorted(point.items())) for point in found}) == len(found)
    counts = {m: sum(p["method"] == m for p in found[1:]) for m in ("ties", "dare_ties", "task_arithmetic")}
    assert counts == {"ties": 54, "dare_ties": 27, "task_arithmetic": 9}
    for point in found:
        assert space.encode(space.decode(point)) == point


def test_a_small_budget_covers_the_grid_evenly():
    """A quarter of a grid of 5 x 5 x 5: every value of every dimension is there."""
    found = points(make_space(experts=3, groups=1, initial=0.3), budget=32, steps=5)[1:]
    for values in zip(*found, strict=True):
        counts = [values.count(v) for v in (0.0, 0.5, 1.0, 1.5, 2.0)]
        assert min(counts) >= 3 and sum(counts) == 31
