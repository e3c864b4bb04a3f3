"""Restarts of CMA-ES: the two regimes, by hand and by what must hold of any sequence of runs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.searchers.base import keyed_generator
from evomerge.searchers.restarts import Run, next_run


class Draws:
    """A generator that gives what it is told to."""

    def __init__(self, *values: float):
        self.values = values

    def random(self, n: int) -> np.ndarray:
        assert n == len(self.values)
        return np.array(self.values)


FIRST = Run(10, 0.2)


def test_ipop_doubles_and_ends():
    runs = [(FIRST, 500)]
    for population in (20, 40, 80):
        run = next_run("ipop", runs, 3, keyed_generator(0))
        assert run is not None and run == Run(population, 0.2, large=True)
        runs.append((run, 10))
    assert next_run("ipop", runs, 3, keyed_generator(0)) is None


@pytest.mark.parametrize(
    ("share", "depth", "population", "sigma"),
    [(0.0, 0.0, 10, 0.2), (1.0, 0.0, 40, 0.2), (0.5, 0.5, 14, 0.02), (0.0, 1.0, 10, 0.002)],
)
def test_a_small_run_by_hand(share: float, depth: float, population: int, sigma: float):
    """lambda 10, last large one 80: 10 * (40 / 10) ** (share ** 2), rounded down; half of that run's 800 trials."""
    runs = [(FIRST, 100), (Run(20, 0.2, large=True), 300), (Run(40, 0.2, large=True), 400)]
    runs.append((Run(80, 0.2, large=True), 800))
    run = next_run("bipop", runs, 9, Draws(share, depth))  # type: ignore[arg-type]
    assert run is not None
    assert (run.population, run.large, run.most) == (population, False, 400)
    assert run.sigma == pytest.approx(sigma)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=40), st.integers(0, 2**32))
def test_bipop_keeps_its_two_budgets_level(lengths: list[int], seed: int):
    """A regime gets the next run only while it has had no more than the other; large populations are all doublings."""
    runs = [(FIRST, lengths[0])]
    for k, trials in enumerate(lengths[1:], 1):
        run = next_run("bipop", runs, 10**6, keyed_generator(seed, k))
        assert run is not None
        large, small = (sum(t for r, t in runs if r.large == kind) for kind in (True, False))
        assert run.large == (large <= small)
        last = max((r.population for r, _ in runs if r.large), default=FIRST.population)
        if run.large:
            assert (run.population, run.sigma) == (2 * last, FIRST.sigma)
        else:
            assert FIRST.population <= run.population <= max(FIRST.population, last / 2)
            assert 0.01 * FIRST.sigma <= run.sigma <= FIRST.sigma
        runs.append((run, int(min(trials, run.most))))


def test_bipop_counts_large_runs_only():
    runs = [(FIRST, 100), (Run(20, 0.2, large=True), 300)]
    small = next_run("bipop", runs, 1, keyed_generator(0))
    assert small is not None and not small.large
    assert next_run("bipop", [*runs, (small, 300)], 1, keyed_generator(0)) is None
