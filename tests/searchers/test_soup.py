"""Greedy soup: the contract, algorithm 1 of the paper by an independent loop, and the spaces it refuses."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import SpecError
from evomerge.searchers.base import Point
from evomerge.searchers.soup import SoupSearcher
from evomerge.space import Space
from evomerge.testing.searchers import MemoryStudy, SearcherContract, make_space


class TestSoup(SearcherContract):
    searcher = SoupSearcher
    draws = False
    improves_within = None
    begins_with_initial = False

    def space(self) -> Space:
        return make_space(experts=10, groups=2)


def members(point: Point) -> frozenset[str]:
    return frozenset(name.partition("[")[0] for name, weight in point.items() if weight)


def greedy(score: dict[frozenset[str], float], experts: list[str]) -> tuple[frozenset[str], list[frozenset[str]]]:
    """Algorithm 1 as the paper prints it: (the soup, all that was evaluated)."""
    evaluated = [frozenset([e]) for e in experts]
    order = sorted(experts, key=lambda e: score[frozenset([e])], reverse=True)
    soup: frozenset[str] = frozenset()
    for expert in order:
        wider = soup | {expert}
        evaluated += [wider] if soup else []
        if not soup or score[wider] >= score[soup]:
            soup = wider
    return soup, evaluated


@pytest.mark.parametrize("workers", [1, 5])
@given(seed=st.integers(0, 10**6), ties=st.booleans())
def test_is_the_papers_algorithm(workers: int, seed: int, ties: bool):
    experts = [f"e{t}" for t in range(5)]
    rng = random.Random(seed)
    sets = [frozenset(e for t, e in enumerate(experts) if mask >> t & 1) for mask in range(32)]
    score = {s: float(rng.randrange(4)) if ties else rng.random() for s in sets}
    space = make_space(experts=5, groups=1)
    study = MemoryStudy(lambda: SoupSearcher(space), lambda p: score[members(p)], workers=workers).run(100)
    soup, evaluated = greedy(score, experts)
    assert [members(p) for p in study.points] == evaluated
    assert study.tell_all().searcher._soup == sorted(  # type: ignore[attr-defined]
        (experts.index(e) for e in soup), key=lambda i: (-score[frozenset([experts[i]])], i)
    )
    for point in study.points:
        assert math.isclose(math.fsum(point.values()), 1.0)
        assert len({w for w in point.values() if w}) == 1


def test_all_parts_of_the_model_have_the_same_members():
    space = make_space(experts=3, groups=4)
    study = MemoryStudy(lambda: SoupSearcher(space), lambda p: sum(p.values())).run(100)
    assert len(study.points) == SoupSearcher(space).size == 5
    for point in study.points:
        for expert in ("e0", "e1", "e2"):
            assert len({w for name, w in point.items() if name.startswith(expert)}) == 1


def test_failures_are_not_added_and_come_last():
    """e0 fails alone; any soup with e2 fails. The rest is {e1, e3}, and then e0, which may be added."""
    space = make_space(experts=4, groups=1)

    def score(point: Point) -> float | None:
        inside = members(point)
        if inside == {"e0"}:
            return None
        if "e2" in inside and len(inside) > 1:
            return math.nan
        return {frozenset(["e1"]): 0.4, frozenset(["e2"]): 0.5, frozenset(["e3"]): 0.6}.get(inside, 0.7)

    points = [members(p) for p in MemoryStudy(lambda: SoupSearcher(space), score).run(100).points]
    assert points[4:] == [{"e3", "e2"}, {"e3", "e1"}, {"e3", "e1", "e0"}]


def test_search_initial_comes_first_and_is_no_ingredient():
    space = make_space(experts=2, groups=1)
    starts = [{"e0[0-7]": 0.7, "e1[0-7]": 0.6}]
    study = MemoryStudy(lambda: SoupSearcher(space, starts=starts), lambda p: sum(p.values())).run(100)
    assert [list(p.values()) for p in study.points] == [[0.7, 0.6], [1, 0], [0, 1], [0.5, 0.5]]


def test_tied_experts_are_one_ingredient():
    data = {"method": "linear", "weights": {"granularity": "task", "range": [0, 1], "tied": [["e0", "e2"]]}}
    space = Space.from_dict(data, template=make_space(experts=3).template, num_layers=8)
    points = MemoryStudy(lambda: SoupSearcher(space), lambda p: 0.0).run(100).points
    assert [list(p.values()) for p in points] == [[0.5, 0.0], [0.0, 1.0], [pytest.approx(1 / 3)] * 2]


def weights(**keys: Any) -> dict[str, Any]:
    return {"granularity": "task", "range": [0.0, 1.0], **keys}


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ({"method": "linear", "weights": weights(range=[0.1, 1.0])}, "excludes 0"),
        ({"method": "task_arithmetic", "weights": weights(range=[0.0, 0.9])}, "excludes 1"),
        ({"method": "linear", "weights": weights(fixed={"e1": 0.5})}, "e1 is fixed"),
        ({"method": "task_arithmetic", "weights": weights(granularity="global")}, "share their weights"),
        ({"method": "task_arithmetic", "weights": weights(tied=[["e0", "e1", "e2"]])}, "share their weights"),
        ({"method": "ties", "params": {"density": {"range": [0.1, 0.9]}}, "weights": weights()}, "density"),
        ({"method": {"choices": ["linear", "ties"]}, "weights": weights()}, "method is a dimension"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_cannot_take(data: dict, why: str):
    space = Space.from_dict(data, template=make_space(experts=3).template, num_layers=8)
    with pytest.raises(SpecError, match=why) as caught:
        SoupSearcher(space)
    assert "coordinate" in str(caught.value)


def test_a_method_for_two_experts_is_refused():
    data = {"method": "slerp", "weights": weights()}
    space = Space.from_dict(data, template=make_space(experts=2).template, num_layers=8)
    with pytest.raises(SpecError, match="slerp takes 2"):
        SoupSearcher(space)


def test_an_expert_that_is_fixed_at_zero_is_left_out():
    data = {"method": "linear", "weights": weights(fixed={"e1": 0.0})}
    space = Space.from_dict(data, template=make_space(experts=3).template, num_layers=8)
    assert SoupSearcher(space).size == 3
