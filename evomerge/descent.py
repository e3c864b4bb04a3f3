"""Gradient descent on merging coefficients: Adam, constraints, batches, all as pure functions of explicit state.

Nothing here loads a model. A step is a function of its state and of the gradient at its values; the items of a step are
a function of (seed, task, how often the task has had a turn). So a state that was stored resumes exactly, and who
computes the gradients, in how many processes, makes no difference.

Adam: Kingma and Ba 2015, arXiv:1412.6980, algorithm 1. Descent on merging coefficients: Yang et al. 2024, "AdaMerging:
Adaptive model merging for multi-task learning", arXiv:2310.02575.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from evomerge.errors import SpecError
from evomerge.searchers.base import keyed_generator
from evomerge.space import Moving

if TYPE_CHECKING:
    from evomerge.space import Space

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # the paper's defaults
SHUFFLE, HOLDOUT, NOISE = 0, 1, 2  # key the order of items, the choice of those held out and noise apart
AT_ONCE = 2**20  # numbers in one go where there may be very many, so that what is found on the way is small

T = TypeVar("T")


@dataclass(frozen=True)
class State:
    """Where a descent is: ``step`` steps were made; the arrays are (dims,), of one float type.

    ``x`` is what Adam moves (see the constraint); ``m`` and ``v`` are its running means of gradients and of their
    squares.
    """

    step: int
    x: np.ndarray
    m: np.ndarray
    v: np.ndarray

    @classmethod
    def at(cls, x: np.ndarray) -> State:
        """The state before the first step."""
        return cls(0, x, np.zeros_like(x), np.zeros_like(x))

    @property
    def is_finite(self) -> bool:
        return all(bool(np.isfinite(part).all()) for part in (self.x, self.m, self.v))

    def to_dict(self) -> dict[str, Any]:
        """Plain data. JSON keeps every float64, so that ``from_dict`` gives back the same bits."""
        return {"step": self.step, "x": self.x.tolist(), "m": self.m.tolist(), "v": self.v.tolist()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> State:
        return cls(int(data["step"]), *(np.array(data[key], dtype=np.float64) for key in ("x", "m", "v")))


class Constraint(Protocol):
    """Which values are legal, and the coordinates in which Adam moves them. All arrays are (dims,)."""

    def values(self, x: np.ndarray) -> np.ndarray:
        """The weights that ``x`` stands for."""
        ...

    def coordinates(self, values: np.ndarray) -> np.ndarray:
        """An ``x`` that stands for ``values``."""
        ...

    def pull_back(self, x: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        """The gradient by ``x`` of what has ``gradient`` by the values."""
        ...

    def project(self, x: np.ndarray) -> np.ndarray:
        """The legal coordinates nearest to ``x``."""
        ...


@dataclass(frozen=True)
class Box:
    """Every weight in its own range: the weights are the coordinates, and a step that leaves the box is moved back."""

    low: np.ndarray
    high: np.ndarray

    def values(self, x: np.ndarray) -> np.ndarray:
        return x

    def coordinates(self, values: np.ndarray) -> np.ndarray:
        return values

    def pull_back(self, x: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        return gradient

    def project(self, x: np.ndarray) -> np.ndarray:
        return np.clip(x, self.low, self.high)


@dataclass(frozen=True)
class Simplex:
    """The weights of a region are positive and keep their sum: ``total`` times the softmax of the coordinates.

    Attributes:
        parts: for each region (the places of its dimensions, how many experts share each, the sum of the experts'
            weights); no dimension is in two.
        high: the upper ends of the ranges; met but for the rounding of the last bit, which is cut off.
    """

    parts: tuple[tuple[np.ndarray, np.ndarray, float], ...]
    high: np.ndarray

    def values(self, x: np.ndarray) -> np.ndarray:
        values = np.zeros_like(x)
        for places, counts, total in self.parts:
            values[places] = total * _softmax(x[places]) / counts
        return np.minimum(values, self.high)

    def coordinates(self, values: np.ndarray) -> np.ndarray:
        x = np.zeros_like(values)
        for places, counts, total in self.parts:
            x[places] = np.log(values[places] * counts / total)
        return x

    def pull_back(self, x: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        back = np.zeros_like(x)
        for places, counts, total in self.parts:
            share, slope = _softmax(x[places]), gradient[places] / counts
            back[places] = total * share * (slope - (share * slope).sum())
        return back

    def project(self, x: np.ndarray) -> np.ndarray:
        return x


def _softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max())
    return powers / powers.sum()


@dataclass(frozen=True)
class Descent:
    """Adam from ``start`` within a constraint.

    Args:
        start: (dims,) the first weights.
        lr: the step size of Adam.
        pull: adds ``0.5 * pull * ||values - start||^2`` to the loss.
    """

    start: np.ndarray
    constraint: Constraint
    lr: float = 1e-3
    pull: float = 0.0

    def begin(self) -> State:
        return State.at(self.constraint.coordinates(np.array(self.start, dtype=np.float64)))

    def values(self, state: State) -> np.ndarray:
        """(dims,) the weights at ``state``."""
        return self.constraint.values(state.x)

    def step(self, state: State, gradient: np.ndarray) -> State:
        """The state after one step of Adam.

        Args:
            gradient: (dims,) of the loss by the weights, at ``values(state)``.
        """
        t = state.step + 1
        by_values = gradient + self.pull * (self.values(state) - self.start) if self.pull else gradient
        slope = self.constraint.pull_back(state.x, by_values)
        x, m, v = (np.empty_like(state.x) for _ in range(3))
        with np.errstate(invalid="ignore", over="ignore"):  # the caller asks the state whether it is finite
            for part in _parts(len(slope)):
                m[part] = BETA1 * state.m[part] + (1 - BETA1) * slope[part]
                v[part] = BETA2 * state.v[part] + (1 - BETA2) * slope[part] * slope[part]
                x[part] = state.x[part] - self.lr * (m[part] / (1 - BETA1**t)) / (
                    np.sqrt(v[part] / (1 - BETA2**t)) + EPSILON
                )
        return State(t, self.constraint.project(x), m, v)


def norm(*vectors: np.ndarray) -> float:
    """The length of all that the vectors hold, as one vector; all finite."""
    most = max((float(np.abs(vector[part]).max()) for vector in vectors for part in _parts(len(vector))), default=0.0)
    if most == 0:
        return 0.0
    shares = (np.divide(vector[part], most, dtype=np.float64) for vector in vectors for part in _parts(len(vector)))
    return most * math.sqrt(math.fsum(float(np.square(share).sum()) for share in shares))


def _parts(size: int) -> Iterator[slice]:
    return (slice(first, first + AT_ONCE) for first in range(0, size, AT_ONCE))


# --- weights and dimensions ------------------------------------------------------------------------------------------


def box(space: Space) -> Box:
    """The ranges of the space."""
    return Box(np.array([d.low for d in space.dimensions]), np.array([d.high for d in space.dimensions]))


def simplex(space: Space, start: Mapping[str, float]) -> Simplex:
    """Each region's weights that may move, positive and with the sum that they have at ``start``.

    Raises:
        SpecError: a weight starts at 0 or below, a region has one that may move, regions share some of their dimensions
            but not all, or a range cuts off what the sum allows.
    """
    places = {d.name: i for i, d in enumerate(space.dimensions)}
    parts: dict[frozenset[int], dict[int, int]] = {}  # places -> place -> how many experts
    for region in space.regions:
        used: dict[int, int] = {}
        for weight in region.weights:
            if isinstance(weight, Moving):
                used[places[weight.dimension]] = used.get(places[weight.dimension], 0) + 1
        if used:
            parts[frozenset(used)] = used
    seen: set[int] = set()
    made = []
    for group, used in parts.items():
        names = ", ".join(space.dimensions[i].name for i in sorted(group))
        if len(group) < 2:
            raise _no_simplex(f"{names} is the only weight of its part of the model that may move", "Leave more free")
        if group & seen:
            raise _no_simplex(f"{names} are weights of several parts of the model", "Leave out `tied` and `fixed`")
        seen |= group
        order = sorted(group)
        counts = np.array([used[i] for i in order], dtype=np.float64)
        values = np.array([start[space.dimensions[i].name] for i in order])
        total = float((counts * values).sum())
        for i, value, count in zip(order, values.tolist(), counts.tolist(), strict=True):
            d = space.dimensions[i]
            if value <= 0:
                raise _no_simplex(f"{d.name} starts at {value:g}, and a share of 0 stays 0", "Start above 0")
            if d.low > 0 or d.high < total / count:
                raise _no_simplex(
                    f"{d.name} must lie in [{d.low:g}, {d.high:g}], but the sum allows 0 to {total / count:g}",
                    f"Set weights.range: [0, {total / count:g}]",
                )
        made.append((np.array(order), counts, total))
    return Simplex(tuple(made), np.array([d.high for d in space.dimensions]))


def _no_simplex(problem: str, remedy: str) -> SpecError:
    return SpecError(
        f"constraint softmax keeps the sum of the weights of each part of the model, but {problem}",
        remedy=f"{remedy}, or use constraint: box.",
    )


class Chain:
    """The chain rule from the weights of regions to the dimensions of ``space``."""

    def __init__(self, space: Space):
        places = {d.name: i for i, d in enumerate(space.dimensions)}
        self.num_dimensions = len(space.dimensions)
        self.shape = len(space.regions), len(space.template.experts)
        moving = [
            (cell, places[weight.dimension])
            for cell, weight in enumerate(weight for region in space.regions for weight in region.weights)
            if isinstance(weight, Moving)
        ]
        self._cells = np.array([cell for cell, _ in moving], dtype=np.intp)
        self._places = np.array([place for _, place in moving], dtype=np.intp)

    def to_dimensions(self, gradient: Sequence[float] | np.ndarray) -> np.ndarray:
        """(dims,) from (regions * experts,), row by row: a dimension gets the sum over all weights that it is."""
        flat = np.asarray(gradient, dtype=np.float64)
        if flat.shape != (math.prod(self.shape),):
            raise ValueError(f"a gradient has {math.prod(self.shape)} numbers, but this one has shape {flat.shape}")
        total = np.zeros(self.num_dimensions)
        np.add.at(total, self._places, flat[self._cells])
        return total


# --- items ----------------------------------------------------------------------------------------------------------


def turns(step: int, tasks: Sequence[str], count: int) -> list[tuple[str, int]]:
    """(task, how many turns it has had before) of step ``step``: ``count`` tasks a step, one after the other.

    ``count`` 0, or as many as there are tasks: all of them.
    """
    count = count if 0 < count < len(tasks) else len(tasks)
    places = range(step * count, (step + 1) * count)
    return [(tasks[place % len(tasks)], place // len(tasks)) for place in places]


def batch(items: Sequence[T], *, seed: int, task: str, turn: int, size: int) -> tuple[T, ...]:
    """The items of a task's turn number ``turn``.

    Turns go through the items again and again, in a new order each time (an epoch). An epoch is cut into the fewest
    batches of at most ``size`` items; their sizes differ by at most one.
    """
    epoch, place = divmod(turn, math.ceil(len(items) / size))
    order = keyed_generator(seed, SHUFFLE, task_key(task), epoch).permutation(len(items))
    return pieces([items[int(i)] for i in order], size)[place]


def hold_out(items: Sequence[str], *, seed: int, task: str, share: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(items to train on, items held out), each in the order given: ``share`` of them is held out.

    With a share above 0 each side has at least one, if there are two; a single item is trained on.
    """
    count = 0 if share == 0 else min(max(1, round(share * len(items))), len(items) - 1)
    held = set(keyed_generator(seed, HOLDOUT, task_key(task)).permutation(len(items))[:count].tolist())
    return (
        tuple(item for i, item in enumerate(items) if i not in held),
        tuple(item for i, item in enumerate(items) if i in held),
    )


def task_key(task: str) -> int:
    """A number for a task's name, so that no task's items depend on which others there are."""
    return int.from_bytes(hashlib.sha256(task.encode()).digest()[:8], "big")


def pieces(items: Sequence[T], size: int) -> list[tuple[T, ...]]:
    """``items`` in the fewest runs of at most ``size``, whose lengths differ by at most one."""
    count = math.ceil(len(items) / size)
    edges = [edge * len(items) // count for edge in range(count + 1)]
    return [tuple(items[first:last]) for first, last in pairwise(edges)]
