"""Fronts, crowding and constraint domination, against their definitions said directly."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from evomerge import pareto

tables = st.integers(1, 4).flatmap(
    lambda objectives: st.integers(1, 14).flatmap(
        lambda n: arrays(float, (n, objectives), elements=st.integers(0, 4).map(float))
    )
)


def is_dominated(row, by) -> bool:
    return all(b >= a for a, b in zip(row, by, strict=True)) and any(b > a for a, b in zip(row, by, strict=True))


@settings(max_examples=200)
@given(tables)
def test_a_front_is_what_nothing_dominates(values):
    expected = [i for i, row in enumerate(values) if not any(is_dominated(row, other) for other in values)]
    assert pareto.front(values) == expected
    assert pareto.front(np.empty((0, 2))) == []


@settings(max_examples=100)
@given(tables, st.randoms(use_true_random=False))
def test_fronts_follow_constraint_domination(values, random):
    """Deb 2002, definition 1: peel off, again and again, what nothing left constraint-dominates."""
    violations = [random.choice([0.0, 0.0, 0.5, 1.0]) for _ in values]

    def beats(i: int, j: int) -> bool:
        if violations[i] == 0 and violations[j] == 0:
            return is_dominated(values[j], values[i])
        return violations[i] < violations[j]

    left, expected = set(range(len(values))), []
    while left:
        group = sorted(j for j in left if not any(beats(i, j) for i in left))
        expected.append(group)
        left -= set(group)
    assert list(pareto.fronts(values, violations)) == expected


@settings(max_examples=100)
@given(st.permutations(range(9)), st.permutations(range(9)))
def test_crowding_is_the_perimeter_of_the_box_between_neighbours(first, second):
    """Distinct values, so that each row has one neighbour on either side: half the box's perimeter, range by range."""
    values = np.array([first, second], dtype=float).T
    for row, room in zip(values, pareto.crowding(values), strict=True):
        expected = 0.0
        for k in range(2):
            below = [v for v in values[:, k] if v < row[k]]
            above = [v for v in values[:, k] if v > row[k]]
            expected += (min(above) - max(below)) / 8 if below and above else math.inf
        assert room == expected or math.isclose(room, expected)


def test_crowding_of_equal_rows_is_none():
    assert list(pareto.crowding(np.ones((4, 2)))) == [0.0] * 4
    assert list(pareto.crowding(np.ones((1, 2)))) == [0.0]


@settings(max_examples=100)
@given(tables, st.data())
def test_the_best_come_from_earlier_fronts_and_the_ends_of_the_last_one(values, data):
    count = data.draw(st.integers(0, len(values) + 2))
    violations = data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=len(values), max_size=len(values)))
    chosen = pareto.best(values, violations, count)
    assert len(chosen) == len(set(chosen)) == min(count, len(values))
    assert chosen == pareto.best(values, violations, len(values))[:count]
    group_of = {i: g for g, group in enumerate(pareto.fronts(values, violations)) for i in group}
    assert [group_of[i] for i in chosen] == sorted(group_of.values())[: len(chosen)]
    for _, group in itertools.groupby(pareto.best(values, violations, len(values)), key=group_of.__getitem__):
        members = list(group)
        room = pareto.crowding(values[sorted(members)])
        rooms = dict(zip(sorted(members), room, strict=True))
        assert [rooms[i] for i in members] == sorted(rooms.values(), reverse=True)
