"""Whole numbers in CMA-ES: against pycma's own centring, and that they are found where plain rounding gets stuck."""

from __future__ import annotations

import warnings
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.dimensions import Dimension, Point
from evomerge.searchers.cma import CMASearcher
from evomerge.searchers.whole_numbers import WholeNumbers
from evomerge.space import Space
from evomerge.testing.searchers import MemoryStudy, SearcherContract, make_space


def mixed_space(floats: int, wholes: int, high: int, *, log: bool = False) -> Space:
    """Numbers x0.. in [0, 1] from 0.25, whole numbers k0.. from a low one; for points only, not to be decoded."""
    whole = make_space(experts=1, groups=None)
    low = int(log)
    dimensions = [Dimension(f"x{i}", 0.0, 1.0, 0.25) for i in range(floats)]
    dimensions += [Dimension(f"k{i}", low, high, min(low + 2, high), log=log, integer=True) for i in range(wholes)]
    return Space(whole.template, whole.params, whole.regions, tuple(dimensions))


class TestCMAWithWholeNumbers(SearcherContract):
    searcher = CMASearcher
    options = {"population": 6}  # noqa: RUF012
    kill_budget = 14

    def space(self) -> Space:
        return mixed_space(2, 3, 40, log=True)


TEN = [Dimension("k", 0, 9, 0, integer=True), Dimension("x", 0.0, 1.0, 0.0), Dimension("j", 0, 9, 0, integer=True)]
UNIT = WholeNumbers(TEN, lambda x: (x + 0.5) / 10, lambda u: 10 * u - 0.5)  # whole numbers at whole coordinates


@given(st.integers(0, 10**6), st.integers(1, 8))
def test_centring_is_pycmas(seed: int, mu: int):
    rng = np.random.default_rng(seed)
    best, mean = rng.uniform(0, 9, (mu, 3)), rng.uniform(0, 9, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cma.integer_centering import IntegerCentering

        theirs = IntegerCentering([0, 2])([x.copy() for x in best], mean)
    assert np.allclose(UNIT.centred(best, mean), theirs, atol=1e-9)


@given(st.integers(0, 10**6), st.booleans())
def test_centring_changes_no_value(seed: int, log: bool):
    dimensions = mixed_space(1, 3, 30, log=log).dimensions
    numbers = WholeNumbers(dimensions, lambda x: x, lambda u: u)
    rng = np.random.default_rng(seed)
    best, mean = rng.random((5, 4)), rng.random(4)
    moved = numbers.centred(best, mean)
    assert [numbers.values(x) for x in moved] == [numbers.values(x) for x in best]
    assert (moved[:, 0] == best[:, 0]).all()


@pytest.mark.parametrize("log", [False, True], ids=["equal parts", "by factors"])
def test_parts_tile_the_range(log: bool):
    d = Dimension("k", 1, 12, 1, log=log, integer=True)
    edges = [d.part(value) for value in range(1, 13)]
    assert edges[0][0] == pytest.approx(0) and edges[-1][1] == pytest.approx(1)
    for value, (low, high) in enumerate(edges, 1):
        assert d.at(low + 1e-9) == d.at(high - 1e-9) == value == d.at(d.share(value))
    assert all(one[1] == pytest.approx(other[0]) for one, other in pairwise(edges))


def test_steps_never_fall_below_their_bound():
    """The score depends on x alone, so that nothing holds the whole numbers' steps up; they are still sampled."""
    space = mixed_space(2, 2, 20)
    study = MemoryStudy(lambda: CMASearcher(space, restarts=0), lambda p: -abs(p["x0"] - 0.5) - abs(p["x1"] - 0.4))
    points = study.run(1500).points[-300:]
    assert np.ptp([p["x0"] for p in points]) < 0.01
    for name in ("k0", "k1"):
        values = [p[name] for p in points]
        assert sum(a != b for a, b in pairwise(values)) > 10


def solved(seed: int, floats: int, wholes: int, high: int) -> bool:
    """Whether 2,500 trials find the whole numbers where the numbers with decimals count a thousand times more."""
    rng = np.random.default_rng(seed)
    x, k = rng.uniform(0.3, 0.7, floats), rng.integers(0, high + 1, wholes)

    def score(p: Point) -> float:
        return -sum((p[f"x{i}"] - x[i]) ** 2 for i in range(floats)) - 1e-3 * sum(
            ((p[f"k{i}"] - k[i]) / high) ** 2 for i in range(wholes)
        )

    study = MemoryStudy(lambda: CMASearcher(mixed_space(floats, wholes, high), seed=seed, restarts=0), score).run(2500)
    best = max(study.results.values(), key=lambda told: told.merit).point
    return all(best[f"k{i}"] == k[i] for i in range(wholes))


@pytest.mark.slow
def test_finds_whole_numbers_after_the_others_have_converged():
    """Of 20 such searches all succeed; without bound and centring 8 did (7 of 10 and 1 of 10)."""
    assert all(solved(seed, 4, 4, 20) for seed in range(10))
    assert all(solved(seed, 4, 8, 1) for seed in range(10))


def test_restarts_although_whole_steps_never_vanish():
    space = mixed_space(1, 1, 3)
    study = MemoryStudy(lambda: CMASearcher(space), lambda p: -abs(p["x0"] - 0.5) - abs(p["k0"] - 1)).run(3000)
    assert isinstance(study.searcher, CMASearcher)
    assert study.searcher.population > CMASearcher(space).population
