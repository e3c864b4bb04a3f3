"""The uniform searcher: the contract, and that it is uniform."""

from __future__ import annotations

import numpy as np
from scipy import stats

from evomerge.searchers.random import RandomSearcher
from evomerge.testing.searchers import SearcherContract, make_space


class TestRandom(SearcherContract):
    searcher = RandomSearcher
    improves_within = None


def test_points_are_uniform_and_independent():
    space = make_space(experts=2, groups=1, low=-1.0, high=3.0)
    searcher = RandomSearcher(space, seed=5)
    points = np.array([list(searcher.ask(n).values()) for n in range(1, 1001)])  # (points, 2)
    for column in points.T:
        assert stats.kstest(column, "uniform", args=(-1.0, 4.0)).pvalue > 1e-3
    assert abs(stats.spearmanr(*points.T).statistic) < 0.1


def test_waits_for_nothing():
    searcher = RandomSearcher(make_space())
    assert [searcher.needs(n) for n in range(50)] == [0] * 50
