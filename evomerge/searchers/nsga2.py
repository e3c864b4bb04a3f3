"""NSGA-II: a genetic algorithm for several objectives, by generations.

Deb, Pratap, Agarwal and Meyarivan, "A fast and elitist multiobjective genetic algorithm: NSGA-II", IEEE Trans. Evol.
Comput. 6 (2002); simulated binary crossover: Deb and Agrawal, Complex Systems 9 (1995); polynomial mutation: Deb and
Goyal (1996).

Why not Optuna's sampler of that name: it counts complete trials only, so that a failure moves all later generations;
it draws the dimensions of one method at random where the method is a dimension; and its generations live in attributes
of its own trials, which a resume would have to forge. Here a generation is a number of trials, whatever became of them,
and all that is remembered are the parents.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from evomerge import pareto
from evomerge.dimensions import Dimension, Point, Value
from evomerge.params import Param
from evomerge.searchers.base import Searcher, Told, keyed_generator, uniform_point
from evomerge.space import METHOD

CROSSOVER = 0.9  # how often a child has two parents
SPREAD_OF_CHILDREN = 5.0  # distribution index of crossover: higher, closer to the parents
SPREAD_OF_MUTANTS = 10.0  # distribution index of mutation
TRIES = 50  # at a child that was not proposed before


class NSGA2Searcher(Searcher):
    """NSGA-II, maximising. The first generation are the starts and uniform points.

    Numbers move as shares of their ranges; what leaves a range is moved to its bound, so that bounds are reached
    exactly. Choices come from either parent, and mutate to any other. A child whose method is not that of a parent
    takes the other dimensions from whichever parent has them, and else uniformly. Every child is mutated in at least
    one dimension.

    Parents of the next generation are the best ``population`` of the parents and the generation that has ended: by
    fronts, and by room within a front. Trials that miss a constraint come after all that miss none; failed trials are
    nobody's parents. Proposal n is drawn by a generator keyed by (seed, n), from the parents of its time.
    """

    name = "nsga2"
    summary = "NSGA-II for several objectives; one generation at a time"
    objectives = "many"
    params: ClassVar[Mapping[str, Param]] = {
        "population": Param(int, 12, "trials in a generation, and parents of the next", low=4),
    }

    def __init__(self, space: Any, *, seed: int = 0, **options: Any):
        super().__init__(space, seed=seed, **options)
        self._dimensions = {d.name: d for d in space.dimensions}
        self._parents: list[Told] = []  # best first
        self._generation: list[Told] = []
        self._proposed: set[str] = set()

    def needs(self, n: int) -> int:
        """All trials of earlier generations."""
        return n // self.options["population"] * self.options["population"]

    def ask(self, n: int) -> Point:
        generator = keyed_generator(self.seed, n)
        point = dict(self.starts[n]) if n < len(self.starts) else self._propose(generator)
        self._proposed.add(json.dumps(point))
        return point

    def tell(self, trial: Told) -> None:
        self._generation.append(trial)
        if len(self._generation) < self.options["population"]:
            return
        able = [t for t in (*self._parents, *self._generation) if t.usable]
        self._generation = []
        if able:
            values = np.array([t.values or (t.score,) for t in able], dtype=float)  # (trials, objectives)
            chosen = pareto.best(values, [t.violation for t in able], self.options["population"])
            self._parents = [able[i] for i in chosen]

    def _propose(self, generator: np.random.Generator) -> Point:
        """A child of the parents of now (a uniform point while there are none) that was not proposed before, if any."""
        point: Point = {}
        for _ in range(TRIES):
            point = self._child(generator) if self._parents else uniform_point(self.space, generator)
            if json.dumps(point) not in self._proposed:
                break
        return point

    def _child(self, generator: np.random.Generator) -> Point:
        one, other = self._tournament(generator), self._tournament(generator)
        parents = [one, other] if generator.random() < CROSSOVER else [one]
        method = None
        if METHOD in self._dimensions:
            method = self._cross(self._dimensions[METHOD], parents, generator)
        active = [d for d in self.space.active(method) if d.name != METHOD]
        point = {d.name: self._cross(d, parents, generator) for d in active}
        point |= {METHOD: method} if method is not None else {}
        rate, moved = 1 / len(point), generator.integers(len(point))
        for i, name in enumerate([*point]):
            if i == moved or generator.random() < rate:
                point[name] = _mutated(self._dimensions[name], point[name], generator)
        if point.get(METHOD) != method:  # the mutant has other dimensions
            for d in self.space.active(point[METHOD]):
                point.setdefault(d.name, self._cross(d, parents, generator))
            active = {d.name for d in self.space.active(point[METHOD])}
            point = {name: value for name, value in point.items() if name in active}
        return {name: point[name] for name in self._dimensions if name in point}

    def _tournament(self, generator: np.random.Generator) -> Point:
        """The better of two parents: the parents stand in their order."""
        return self._parents[int(generator.integers(len(self._parents), size=2).min())].point

    def _cross(self, dimension: Dimension, parents: Sequence[Point], generator: np.random.Generator) -> Value:
        """A value of ``dimension`` from those of the (first two) parents that have it; a uniform one if none has."""
        values = [p[dimension.name] for p in parents if dimension.name in p][:2]
        if not values:
            return dimension.at(generator.random())
        if len(values) == 1 or values[0] == values[1]:
            return values[0]
        if dimension.choices or generator.random() < 0.5:
            return values[int(generator.integers(2))]
        a, b = dimension.share(values[0]), dimension.share(values[1])
        u = generator.random()
        power = 1 / (SPREAD_OF_CHILDREN + 1)
        beta = (2 * u) ** power if u < 0.5 else (1 / (2 * (1 - u))) ** power
        sign = 1 if generator.random() < 0.5 else -1
        return dimension.at(float(np.clip(0.5 * (a + b) + sign * 0.5 * beta * (a - b), 0, 1)))


def _mutated(dimension: Dimension, value: Value, generator: np.random.Generator) -> Value:
    if dimension.choices:
        others = [c for c in dimension.choices if c != value]
        return others[int(generator.integers(len(others)))] if others else value
    u, power = generator.random(), 1 / (SPREAD_OF_MUTANTS + 1)
    step = (2 * u) ** power - 1 if u < 0.5 else 1 - (2 * (1 - u)) ** power
    return dimension.at(float(np.clip(dimension.share(value) + step, 0, 1)))
