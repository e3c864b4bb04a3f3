"""When CMA-ES has converged: how large the next run's population is, and how far it looks. Pure bookkeeping.

IPOP: Auger and Hansen, "A restart CMA evolution strategy with increasing population size" (CEC 2005). BIPOP: Hansen,
"Benchmarking a BI-population CMA-ES on the BBOB-2009 function testbed" (GECCO 2009), section 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Run:
    """One run of CMA-ES between restarts.

    ``large``: a restart with a doubled population. ``most``: trials after which it ends, converged or not.
    """

    population: int
    sigma: float
    large: bool = False
    most: float = math.inf


def next_run(kind: str, runs: Sequence[tuple[Run, int]], most_large: int, generator: np.random.Generator) -> Run | None:
    """The run after ``runs``, or None: there are to be no more.

    ``ipop`` doubles the population every time. ``bipop`` does so only when its small runs have had as many trials as
    its large ones. A small run has a population between the first one and half the last large one, most often near the
    first; a first step down to a hundredth of the usual; and at most half as many trials as the last large run. The
    first run of all counts as small, as in pycma.

    Args:
        runs: those so far, each with its number of trials.
        most_large: how often the population may be doubled.
        generator: of the draws for this run.
    """
    first, last = runs[0][0], max((run.population for run, _ in runs if run.large), default=0)
    large = [trials for run, trials in runs if run.large]
    small = [trials for run, trials in runs if not run.large]
    if kind == "bipop" and sum(small) < sum(large):
        share, depth = generator.random(2)
        population = math.floor(first.population * (last / 2 / first.population) ** (share**2))
        return Run(population, first.sigma * 10 ** (-2 * depth), most=large[-1] / 2)
    if len(large) >= most_large:
        return None
    return Run(first.population * 2 ** (len(large) + 1), first.sigma, large=True)
