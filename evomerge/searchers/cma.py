"""CMA-ES: pycma by ask and tell, with a generator of its own.

Hansen, "The CMA Evolution Strategy: A Tutorial" (arXiv:1604.00772); with a diagonal covariance, Ros and Hansen, "A
simple modification in CMA-ES achieving linear time and space complexity" (PPSN 2008). Restarts and whole numbers:
restarts.py, whole_numbers.py.

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

Covariance: what is left of the start value after 5,000 evaluations, full against diagonal (geometric means of three
seeds). A quadratic with curvatures over two orders of magnitude, turned at random: 1e-10 and 3e-6 in 24 dimensions,
4e-5 and 3e-4 in 48, 7e-4 and 7e-4 in 64, 2e-3 and 2e-3 in 96, 0.04 and 0.04 in 300. The same with neighbouring layers
and experts correlated (0.6 and 0.3): 3e-9 and 2e-11, 1e-4 and 2e-6, 5e-4 and 3e-5, 1e-3 and 4e-4, 0.01 and 0.009. So
from 64 dimensions on a diagonal matrix loses nothing within the trials that a merge search has, and below it may.

Noise: a merge's score is exact on its items; what is noisy is which items there are, and they are the same for every
candidate. Evaluating again, as noise handlers do, would say nothing. What else there is was tried and is not here,
since it does not help. On landscapes whose items have optima and difficulties of their own (100 items to search and
100 to select on, accuracy or log-likelihood, 6 or 18 dimensions, 150 or 600 trials: eight cases, means of 20 seeds,
the true score of the winner): wider steps where bootstrapped items change the ranks of a generation, after UH-CMA-ES
(Hansen et al. 2009, "A method for handling uncertainty in evolutionary optimization"), lost or changed nothing in
most cases and gained 0.003 at best; twice the population gained 0.002 and 0.004 in two cases and lost up to 0.1 in
the others; adapted learning rates (LRA-CMA-ES, Nomura et al. 2023) gained 0.018 +- 0.009 once and lost up to 0.09
elsewhere. What helps is in the study: the best are tested again on other items, the distribution's mean among them.

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
from evomerge.searchers.restarts import Run, next_run
from evomerge.searchers.whole_numbers import WholeNumbers

MARGIN = 0.05  # of a range: how far beyond the bounds pycma may go, and how far within them ``squash`` begins
DIAGONAL_FROM = 64  # dimensions; measured, see above
SMALLEST_STEP = 1e-5  # of a range: candidates closer together than this are the same merge
RESTART_STREAM = 1  # keys the start of a restart apart from the noise of proposals (keyed by one number, n)


def default_sigma(num_dimensions: int) -> float:
    """The first step size as a share of the range: min(0.25, 0.4 / sqrt(dimensions)).

    A first candidate is about sigma * sqrt(dimensions) away from the initial point, so it must shrink with the
    dimension: 0.25 up to 2 dimensions, 0.23 in 3, 0.094 in 18, 0.041 in 96.
    """
    return min(0.25, 0.4 / math.sqrt(num_dimensions))


def default_population(num_dimensions: int) -> int:
    """Trials in a generation: 4 + floor(3 ln(dimensions)) (Hansen, arXiv:1604.00772)."""
    return 4 + int(3 * math.log(num_dimensions))


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
    starts anew from a uniformly drawn point, as ``restart`` says; when there is to be no more, it goes on sampling.
    Steps of whole numbers never collapse; they count as done when the mean's have long been the same.

    Args:
        shape: what is known of how dimensions differ: the covariance of the first distribution over the squared step
            size, (dims,) variances or (dims, dims), in shares of the ranges. Restarts begin without it.
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
        "covariance": Param(
            str,
            "auto",
            "full learns how dimensions interact, which takes trials by the square of their number; diagonal learns a "
            f"scale for each; auto is diagonal from {DIAGONAL_FROM} dimensions on",
            choices=("auto", "full", "diagonal"),
        ),
        "restarts": Param(
            int, 9, "how often to start anew, with twice the population, once the search has converged", low=0
        ),
        "restart": Param(
            str,
            "ipop",
            "ipop: the population doubles at every restart; bipop: as many trials go to restarts with a small "
            "population and a small first step, which `restarts` does not count",
            choices=("ipop", "bipop"),
        ),
    }

    def __init__(self, space: Any, *, seed: int = 0, shape: np.ndarray | None = None, **options: Any):
        super().__init__(space, seed=seed, **options)
        self._shape = shape
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
        self._runs: list[tuple[Run, int]] = []  # those that have ended, with their numbers of trials
        self._current = Run(self.options["population"] or default_population(len(self._names)), self._sigma())
        self._trials = 0  # told in the current run
        self._whole = WholeNumbers(space.dimensions, lambda x: squash(np.clip(x, -MARGIN, 1 + MARGIN)), unsquash)
        self._still = 0, [math.nan]  # generations since the mean's whole numbers changed, and these
        self._means: list[tuple[Merit, np.ndarray]] = []  # of each run: (median merit of its last generation, its mean)
        self._begin(self._shares(self.starts[0]))

    def _sigma(self) -> float:
        return self.options["sigma"] or default_sigma(len(self.space.dimensions))

    @property
    def diagonal(self) -> bool:
        """Is the covariance matrix kept diagonal?"""
        chosen = self.options["covariance"]
        return chosen == "diagonal" or (chosen == "auto" and len(self._names) >= DIAGONAL_FROM)

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
            self._asked[n] = (len(self._runs), self._es.mean.copy())
            return dict(self.starts[n])
        self._generator = keyed_generator(self.seed, n)
        x = np.clip(self._es.ask(1)[0], -MARGIN, 1 + MARGIN)
        given = n < len(self.starts)  # pycma wants to be asked in every generation, even if all of it is given
        self._asked[n] = (len(self._runs), unsquash(self._shares(self.starts[n])) if given else x)
        return dict(self.starts[n]) if given else self._point(x)

    def tell(self, trial: Told) -> None:
        run, x = self._asked.pop(trial.n)
        self._told += 1
        if run != len(self._runs):
            return  # asynchronous schedule: a late trial of a run that has ended
        self._generation.append((trial, x))
        self._trials += 1
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
        shape = self._shape if not self._runs else None
        if shape is not None and shape.ndim == 2 and self.diagonal:
            shape = np.diag(shape)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no matplotlib; one dimension; equal ranks: none is the user's concern
            import cma

            self._es = cma.CMAEvolutionStrategy(
                unsquash(start),
                self._current.sigma,
                {
                    "popsize": self._current.population,
                    "CMA_diagonal": self.diagonal,
                    "CMA_stds": np.sqrt(shape) if shape is not None and shape.ndim == 1 else 1.0,
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
            if shape is not None and shape.ndim == 2:  # as pycma takes over another's distribution
                sampler: Any = self._es.sm
                sampler.C = shape.copy()
                sampler.update_now(-1)
                self._es._updateBDfromSM(sampler)

    def _update(self) -> None:
        """The one place where trials become ranks: by merit; ties by trial number."""
        ranked = sorted(self._generation, key=lambda pair: (pair[0].merit, -pair[0].n), reverse=True)
        self._generation = []
        merits = [trial.merit for trial, _ in ranked]
        if merits[0] == merits[-1]:
            return
        told = np.array([x for _, x in ranked])
        weights: Any = self._es.sp.weights  # pyright: ignore[reportAttributeAccessIssue]
        told[: weights.mu] = self._whole.centred(told[: weights.mu], self._es.mean)
        self._es.opts["minstd"] = self._whole.smallest_steps(self._es.mean, weights.mueff)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._es.tell(list(told), list(range(len(ranked))))
            stop = bool(self._es.stop())
        del self._means[len(self._runs) :]
        self._means.append((merits[len(merits) // 2], np.clip(self._es.mean, -MARGIN, 1 + MARGIN)))
        if stop or self._frozen() or self._trials >= self._current.most:
            self._restart()

    def _frozen(self) -> bool:
        """Have the numbers with decimals converged, and the whole ones, whose steps never do, long been the same?"""
        if not self._whole.places:
            return False
        now = self._whole.values(self._es.mean)
        self._still = (self._still[0] + 1 if now == self._still[1] else 0), now
        moving = np.delete(self._es.stds, [i for i, _ in self._whole.places])
        patience = 10 + 30 * len(self._names) / self.population
        return self._still[0] > patience and bool(np.all(moving < SMALLEST_STEP))

    def _restart(self) -> None:
        """A new run from a random point, if there is to be another."""
        runs = [*self._runs, (self._current, self._trials)]
        generator = keyed_generator(self.seed, len(runs), RESTART_STREAM)
        start = generator.random(len(self._names))
        run = next_run(self.options["restart"], runs, self.options["restarts"], generator)
        if run is not None:
            self._runs, self._current, self._trials = runs, run, 0
            self._begin(start)
