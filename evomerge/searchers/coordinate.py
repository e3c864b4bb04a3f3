"""Coordinate search: one dimension at a time, a step up and a step down, with steps that grow and shrink.

The axes-wise pattern search of Hooke and Jeeves, "Direct search solution of numerical and statistical problems" (1961),
without pattern moves; a step of its own for each dimension that grows after a success and shrinks after a failure, as
in Rosenbrock, "An automatic method for finding the greatest or least value of a function" (1960).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from evomerge.dimensions import Dimension, Point, Value
from evomerge.params import Param
from evomerge.searchers.base import Searcher, Told, keyed_generator, uniform_point
from evomerge.space import METHOD

SMALLEST_STEP = 1e-5  # of a range: candidates closer together than this are the same merge
LARGEST_STEP = 0.5


class CoordinateSearcher(Searcher):
    """Polls the dimensions in turn and moves to the best point found, if it is better than the best so far.

    A poll of a number proposes the two points one step away, clipped to the bounds (whole numbers move by at least 1);
    that of a choice (the method too) all its other values. They are evaluated at the same time, and the next poll waits
    for them. After a success the dimension's step doubles, otherwise it halves. No point is proposed twice. Once all
    steps are below 1e-5 of the range it starts anew from a random point. Failed trials never win; equal ones neither.

    The first poll are the starts. Nothing is random before the first new start.
    """

    name = "coordinate"
    summary = "one dimension at a time, a step up and a step down; deterministic, any kind of dimension"
    asynchronous = False
    params: ClassVar[Mapping[str, Param]] = {
        "step": Param(float, 0.25, "first step, as a share of each dimension's range", low=0, high=1, low_open=True),
    }

    def __init__(self, space: Any, *, seed: int = 0, **options: Any):
        super().__init__(space, seed=seed, **options)
        self._seen: set[str] = set()  # keys of all points proposed so far
        self._first = 0  # the number of the current poll's first proposal
        self._poll: list[Point] = []
        self._told: list[Told] = []  # of the current poll
        self._begin(self.starts)

    @property
    def size(self) -> int | None:
        """The number of points, if no dimension is a number with decimals."""
        dimensions = self.space.dimensions
        if any(not (d.choices or d.integer) for d in dimensions):
            return None
        return sum(math.prod(len(_values(d)) for d in block) for block in self._blocks())

    def at_once(self, budget: int) -> int:
        return min(budget, max(len(self.starts), 2, *(len(d.choices) - 1 for d in self.space.dimensions)))

    def needs(self, n: int) -> int:
        end = self._first + len(self._poll)
        return self._first if n < end else end

    def ask(self, n: int) -> Point:
        return dict(self._poll[n - self._first])

    def tell(self, trial: Told) -> None:
        self._told.append(trial)
        if len(self._told) < len(self._poll):
            return
        best = max(self._told, key=lambda told: told.merit)  # the first of equal ones
        success = best.usable and (self._best is None or best.merit > self._best.merit)
        if success or self._best is None:  # the best start is where to begin, even if it failed
            self._values |= best.point
            self._best = best
        if self._axis is not None:
            step = self._steps[self._axis.name] * (2 if success else 0.5)
            self._steps[self._axis.name] = min(step, LARGEST_STEP)
        self._first += len(self._poll)
        self._continue()

    def _begin(self, starts: list[Point]) -> None:
        """A new search from the best of ``starts``."""
        self._values: Point = {d.name: d.initial for d in self.space.dimensions}  # those of other methods too
        self._best: Told | None = None  # what was told of these values
        self._steps: dict[str, float] = dict.fromkeys(self._values, float(self.options["step"]))
        self._place = 0  # of the dimension to be polled next
        self._axis: Dimension | None = None
        self._set_poll(starts)

    def _set_poll(self, points: list[Point]) -> None:
        self._poll, self._told = points, []
        self._seen.update(map(_key, points))

    def _continue(self) -> None:
        """The next poll: of the next dimension that has a point left, with smaller steps where there is none."""
        dimensions = self.space.dimensions
        active = self._point(self._values)
        while max(self._steps[name] for name in active) >= SMALLEST_STEP:
            for _ in dimensions:
                dimension = dimensions[self._place]
                self._place = (self._place + 1) % len(dimensions)
                if dimension.name not in active:
                    continue
                points = self._moves(dimension)
                if points:
                    self._axis = dimension
                    self._set_poll(points)
                    return
                self._steps[dimension.name] /= 2
        if self.size is None or len(self._seen) < self.size:
            self._begin([self._unseen()])

    def _moves(self, d: Dimension) -> list[Point]:
        """The points of a poll of ``d`` that have not been proposed, without repetitions."""
        here = self._values[d.name]
        values: list[Value] = []
        if d.choices:
            values = list(d.choices)
        elif (step := self._steps[d.name]) >= SMALLEST_STEP:
            for sign in (1, -1):
                value = d.at(min(max(d.share(here) + sign * step, 0.0), 1.0))
                values.append(d.clip(here + sign) if d.integer and value == here else value)
        moves = {_key(point): point for v in values for point in [self._point(self._values | {d.name: v})]}
        return [point for key, point in moves.items() if key not in self._seen]

    def _point(self, values: Point) -> Point:
        return {d.name: values[d.name] for d in self.space.active(values.get(METHOD, self.space.methods[0]))}

    def _unseen(self) -> Point:
        """A random point that has not been proposed, or the first in order where these are few."""
        generator = keyed_generator(self.seed, self._first)
        for _ in range(100):
            point = uniform_point(self.space, generator)
            if _key(point) not in self._seen:
                return point
        blocks = [b for b in self._blocks() if all(d.choices or d.integer for d in b)]
        combinations = (zip(b, values, strict=True) for b in blocks for values in itertools.product(*map(_values, b)))
        points = ({d.name: value for d, value in pairs} for pairs in combinations)
        return next(point for point in points if _key(point) not in self._seen)

    def _blocks(self) -> list[tuple[Dimension, ...]]:
        """The dimensions of each method's points; the method itself is held at that one."""
        dimensions = self.space.dimensions
        if all(d.name != METHOD for d in dimensions):
            return [dimensions]
        return [
            tuple(replace(d, choices=(method,)) if d.name == METHOD else d for d in self.space.active(method))
            for method in self.space.methods
        ]


def _values(d: Dimension) -> list[Value]:
    return list(d.choices) if d.choices else list(range(int(d.low), int(d.high) + 1))


def _key(point: Point) -> str:
    return json.dumps(point, sort_keys=True)
