"""CMA-ES: pycma by ask and tell, with a generator of its own.

Hansen, "The CMA Evolution Strategy: A Tutorial" (arXiv:1604.00772); restarts with a doubled population as in Auger and
Hansen, "A restart CMA evolution strategy with increasing population size" (CEC 2005).

Choices that a reader may want to question:

Coordinates are shares of each dimension's range: the box is the unit cube, and one ``sigma`` fits all dimensions.

Bounds: pycma searches a cube that is wider by 0.05 on each side, and ``squash`` maps it onto the unit cube: the
identity but for the outermost 0.05 within, which it flattens. A sample beyond the wider cube is moved to its nearest
point before it is used, and pycma is told the moved sample. So every candidate lies inside, bounds are reached exactly,
the distribution's mean cannot leave, and the map is monotone (pycma's BoundTransform mirrors the landscape beyond its
margin, so that samples far apart become one candidate). On spheres and ellipsoids in 3, 6 and 18 dimensions with the
optimum inside, on some bounds or in a corner, started inside or on a bound (weights at 0 are a natural start), it was
the best way or near it throughout, as no other was. What is left of the start value of a sphere in 18 dimensions after
400 evaluations (means of five seeds), started on the bound, and with a third of the optimum's coordinates on bounds:
0.011 and 0.013; with BoundTransform 0.020 and 0.012; with BoundPenalty 0.082 and 0.015; with samples moved into the
unit cube itself 0.007 and 0.046, as steps towards a bound die out early. On a linear function the penalty is better.

Ranks: pycma is told the rank of each trial in its generation, never a score. CMA-ES uses nothing else; so constraints
need no penalty, a failure is "worse than all" without a number, ties are broken by trial number, and no stop on equal
scores can trigger.
"""

from __future__ import annotations

import bisect
import math
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from evomerge.errors import SpecError
from evomerge.objectives import Merit
from evomerge.params import Param
from evomerge.searchers.base import Point, Searcher, Told, keyed_generator

MARGIN = 0.05  # of a range: how far beyond the bounds pycma may go, and how far within them ``squash`` begins
SMALLEST_STEP = 1e-5  # of a range: candidates closer together than this are the same merge
RESTART_STREAM = 1  # keys the start of a restart apart from the noise of proposals (keyed by one number, n)


def default_sigma(num_dimensions: int) -> float:
    """The first step size as a share of the range: min(0.25, 0.4 / sqrt(dimensions)).

    A first candidate is about sigma * sqrt(dimensions) away from the initial point, so it must shrink with the
    dimension: 0.25 up to 2 dimensions, 0.23 in 3, 0.094 in 18, 0.041 in 96.
    """
    return min(0.25, 0.4 / math.sqrt(num_dimensions))


def squash(x: np.ndarray) -> np.ndarray:
    """[-MARGIN, 1 + MARGIN] onto [0, 1], monotone and smooth: the identity between MARGIN and 1 - MARGIN."""
    low, high = (x + MARGIN) ** 2 / (4 * MARGIN), 1 - (1 + MARGIN - x) ** 2 / (4 * MARGIN)
    return np.where(x < MARGIN, low, np.where(x > 1 - MARGIN, high, x))


def unsquash(u: np.ndarray) -> np.ndarray:
    """The inverse of ``squash`` on [0, 1]."""
    low, high = 2 * np.sqrt(MARGIN * u) - MARGIN, 1 + MARGIN - 2 * np.sqrt(MARGIN * (1 - u))
    return np.where(u < MARGIN, low, np.where(u > 1 - MARGIN, high, u))


class CMASearcher(Searcher):
    """CMA-ES on the unit cube; maximises. It begins at the first start, which is one sample of the first generation.

    Further starts are samples, too: pycma shortens their steps to what the distribution makes likely, as for any
    solution from outside (Hansen, "Injecting external solutions into CMA-ES", arXiv:1110.4181).

    Proposal n's noise comes from a generator keyed by (seed, n), so asking again with the same tells in between is an
    exact replay. A generation is over when ``population`` trials have been told since the last one ended. On the
    reproducible schedule these are the trials of that generation; told in order of arrival, they are the next to
    arrive, and proposals beyond the population are further samples of the current distribution.

    A generation in which no trial is better than another (all failed, or all with the same score) changes nothing.
    Trials that miss a constraint rank below all that miss none, failed and pruned ones below all others.

    When the distribution has collapsed (every step below 1e-5 of its range, or numerically degenerate), the search
    starts anew from a uniformly drawn point with twice the population, at most ``restarts`` times; after that it goes
    on sampling.
    """

    name = "cma"
    summary = "CMA-ES (pycma); one generation at a time"
    params: ClassVar[Mapping[str, Param]] = {
        "sigma": Param(
            float,
            None,
            "first step size as a share of each dimension's range; by default min(0.25, 0.4 / sqrt(dimensions))",
            low=0,
            high=1,
            low_open=True,
        ),
        "population": Param(int, None, "trials in a generation; by default 4 + floor(3 ln(dimensions))", low=4),
        "restarts": Param(
            int, 9, "how often to start anew, with twice the population, once the search has converged", low=0
        ),
    }

    def __init__(self, space: Any, *, seed: int = 0, **options: Any):
        super().__init__(space, seed=seed, **options)
        chosen = [d.name for d in space.dimensions if d.choices]
        if chosen:
            raise SpecError(
                f"searcher cma moves numbers, but {', '.join(chosen)} is a choice between words",
                remedy="Use search.method tpe or random, or give it one value in the space.",
            )
        self._names = [d.name for d in space.dimensions]
        self._generator = keyed_generator(seed)  # replaced before every draw
        self._starts = [0]  # the number of trials told when each generation began, over all restarts
        self._told = 0
        self._asked: dict[int, tuple[int, np.ndarray]] = {}  # open proposals: n -> (run, pycma's point)
        self._generation: list[tuple[Told, np.ndarray]] = []  # trials of the current run told since its last update
        self._run = 0
        self._means: list[tuple[Merit, np.ndarray]] = []  # of each run: (median merit of its last generation, its mean)
        self._begin(self._shares(self.starts[0]))

    @property
    def population(self) -> int:
        """Trials in a generation of the current run."""
        return self._es.popsize

    def needs(self, n: int) -> int:
        """All trials of earlier generations. Beyond the next generation this assumes that no restart comes between."""
        start = self._starts[-1]
        if n < start:
            return self._starts[bisect.bisect_right(self._starts, n) - 1]
        return start + (n - start) // self.population * self.population

    def ask(self, n: int) -> Point:
        if n == 0:
            self._asked[n] = (self._run, self._es.mean.copy())
            return dict(self.starts[n])
        self._generator = keyed_generator(self.seed, n)
        x = np.clip(self._es.ask(1)[0], -MARGIN, 1 + MARGIN)
        given = n < len(self.starts)  # pycma wants to be asked in every generation, even if all of it is given
        self._asked[n] = (self._run, unsquash(self._shares(self.starts[n])) if given else x)
        return dict(self.starts[n]) if given else self._point(x)

    def tell(self, trial: Told) -> None:
        run, x = self._asked.pop(trial.n)
        self._told += 1
        if run != self._run:
            return  # asynchronous schedule: a late trial of a run that has ended
        self._generation.append((trial, x))
        if len(self._generation) == self.population:
            self._update()
            self._starts.append(self._told)

    def recommend(self) -> Point | None:
        """The mean of the distribution: of the run whose last generation had the best median."""
        if not self._means:
            return None
        return self._point(max(self._means, key=lambda run: run[0])[1])

    def _shares(self, point: Point) -> np.ndarray:
        return np.array([d.share(point[d.name]) for d in self.space.dimensions])

    def _point(self, x: np.ndarray) -> Point:
        """x: (dimensions,), pycma's -> a point in the space's units."""
        return self.space.at(squash(x).tolist())

    def _begin(self, start: np.ndarray) -> None:
        """A new run of pycma from ``start``: (dimensions,) in the unit cube."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no matplotlib; one dimension; equal ranks: none is the user's concern
            import cma

            sigma = self.options["sigma"] or default_sigma(len(start))
            population = self.options["population"] or 4 + int(3 * math.log(len(start)))
            self._es = cma.CMAEvolutionStrategy(
                unsquash(start),
                sigma,
                {
                    "popsize": population * 2**self._run,
                    "randn": lambda *shape: self._generator.standard_normal(shape),
                    "seed": np.nan,  # leaves numpy's global generator alone
                    "tolx": SMALLEST_STEP,
                    # Ranks say nothing about convergence; budgets are the study's.
                    **dict.fromkeys(("tolfun", "tolfunhist", "tolfunrel"), -1),
                    **dict.fromkeys(("tolflatfitness", "tolstagnation", "maxiter"), math.inf),
                    # Samples are drawn one at a time: no mirrored ones, and no pair along the mean's last step, which
                    # pycma would adapt the step size by from 300 dimensions on.
                    "CMA_mirrors": 0,
                    "AdaptSigma": cma.sigma_adaptation.CMAAdaptSigmaCSA,
                    "verbose": -10,
                    "verb_log": 0,
                    "signals_filename": "",
                },
            )

    def _update(self) -> None:
        """The one place where trials become ranks: by merit; ties by trial number."""
        ranked = sorted(self._generation, key=lambda pair: (pair[0].merit, -pair[0].n), reverse=True)
        self._generation = []
        merits = [trial.merit for trial, _ in ranked]
        if merits[0] == merits[-1]:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._es.tell([x for _, x in ranked], list(range(len(ranked))))
            stop = self._es.stop()
        del self._means[self._run :]
        self._means.append((merits[len(merits) // 2], np.clip(self._es.mean, -MARGIN, 1 + MARGIN)))
        if stop and self._run < self.options["restarts"]:
            self._run += 1
            self._begin(keyed_generator(self.seed, self._run, RESTART_STREAM).random(len(self._names)))
