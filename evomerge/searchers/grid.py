"""A grid: every combination of a few values of each dimension."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from evomerge.dimensions import Dimension, Point, Value
from evomerge.params import Param
from evomerge.searchers.base import Searcher, Told
from evomerge.space import METHOD

GOLDEN = (math.sqrt(5) - 1) / 2


class GridSearcher(Searcher):
    """The first proposals are the starts, the others the grid's, each once; then the search is over.

    A number has ``steps`` values from low to high, both included; a choice has all of its own. The grid is walked with
    a stride near the golden section of its size, so that a budget below its size covers it evenly.
    """

    name = "grid"
    summary = "every combination of `steps` values of each dimension; waits for nothing"
    objectives = "many"
    params: ClassVar[Mapping[str, Param]] = {
        "steps": Param(int, 3, "values of each dimension that is a number", low=2),
    }

    def __init__(self, space: Any, *, seed: int = 0, **options: Any):
        super().__init__(space, seed=seed, **options)
        methods = next((d.choices for d in space.dimensions if d.name == METHOD), (None,))
        self._blocks = [self._axes(method) for method in methods]  # one grid a method: they differ in dimensions
        self._sizes = [math.prod(len(values) for values in axes.values()) for axes in self._blocks]
        total = sum(self._sizes)
        self._stride = max(1, round(total * GOLDEN))
        while math.gcd(self._stride, total) > 1:
            self._stride += 1
        back = pow(self._stride, -1, total)
        found = {self._index(start) for start in self.starts}
        self._skipped = sorted(index * back % total for index in found if index is not None)  # steps of the starts

    @property
    def size(self) -> int:
        return len(self.starts) + sum(self._sizes) - len(self._skipped)

    def needs(self, n: int) -> int:
        return 0

    def ask(self, n: int) -> Point:
        """Raises ValueError beyond ``size``."""
        if n < len(self.starts):
            return dict(self.starts[n])
        if n >= self.size:
            raise ValueError(f"the grid has {self.size} points")
        total = sum(self._sizes)
        step = n - len(self.starts)
        for skipped in self._skipped:
            step += step >= skipped
        index = step * self._stride % total
        block = 0
        while index >= self._sizes[block]:
            index -= self._sizes[block]
            block += 1
        point: Point = {}
        for name, values in self._blocks[block].items():
            index, place = divmod(index, len(values))
            point[name] = values[place]
        return point

    def tell(self, trial: Told) -> None:
        """Nothing is learned."""

    def _axes(self, method: Value | None) -> dict[str, list[Value]]:
        """Dimension -> its values, for the points of one method."""
        axes = {d.name: self._values(d) for d in self.space.active(method if method else self.space.methods[0])}
        return axes | {METHOD: [method]} if method else axes

    def _values(self, dimension: Dimension) -> list[Value]:
        if dimension.choices:
            return list(dimension.choices)
        last = self.options["steps"] - 1
        if dimension.integer:
            low, high = dimension.low, dimension.high
            return sorted({dimension.clip(low + (high - low) * i / last) for i in range(last + 1)})
        return [dimension.at(i / last) for i in range(last + 1)]

    def _index(self, point: Point) -> int | None:
        """Where ``point`` is in the grid; None if it is between its values."""
        before = 0
        for axes, size in zip(self._blocks, self._sizes, strict=True):
            if set(axes) == set(point) and all(point[name] in values for name, values in axes.items()):
                index, factor = 0, 1
                for name, values in axes.items():
                    index, factor = index + factor * values.index(point[name]), factor * len(values)
                return before + index
            before += size
        return None
