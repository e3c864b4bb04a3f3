"""What a searcher is: ask and tell, and nothing else."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np

from evomerge.dimensions import Point
from evomerge.errors import MethodError, SpecError, StudyError, nearest
from evomerge.objectives import Merit, merit, violation
from evomerge.params import Param

if TYPE_CHECKING:
    from evomerge.descent import Chain
    from evomerge.learned import Layout
    from evomerge.pools import BatchGradient
    from evomerge.space import Space


@dataclass(frozen=True)
class Told:
    """One trial that has ended. ``score`` is higher-is-better, and None unless ``state`` is complete.

    ``values`` are the objectives, higher is better, where there are several (``score`` is then their mean). ``margins``
    are the constraints', in their order: above 0 by how far one is missed, 0 or below where it holds.

    ``merit`` says which of two trials is better: a searcher that ranks uses it, and nothing else.
    """

    n: int
    point: Point
    state: Literal["complete", "fail", "pruned"]
    score: float | None
    values: tuple[float, ...] = ()
    margins: tuple[float, ...] = ()

    @property
    def violation(self) -> float:
        """The sum of what the constraints are missed by: 0 if all hold."""
        return violation(self.margins)

    @property
    def usable(self) -> bool:
        """Complete, with finite numbers: something to learn from. Everything else ranks as a failure."""
        numbers = (self.score, *self.values, *self.margins)
        return self.state == "complete" and all(x is not None and math.isfinite(x) for x in numbers)

    @property
    def merit(self) -> Merit:
        """Higher is better: feasible by score, then infeasible by violation, then all that failed, alike."""
        return merit(self.score, self.violation) if self.usable else merit(None)


def keyed_generator(seed: int, *key: int) -> np.random.Generator:
    """A private generator that depends on (seed, key) alone: never on what was drawn before, nor on global state."""
    return np.random.default_rng(np.random.SeedSequence(entropy=seed, spawn_key=key))


def uniform_point(space: Space, generator: np.random.Generator) -> Point:
    """A point drawn uniformly from the box of ``space``."""
    return space.at(generator.random(len(space.dimensions)).tolist())


def check_options(name: str, params: Mapping[str, Param], options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of searcher ``name`` with defaults filled in.

    Raises:
        SpecError: an unknown option (with the nearest right one) or an illegal value (with the legal range).
    """
    for key in options:
        if key not in params:
            raise SpecError(
                f"searcher {name} has no option {key!r}",
                remedy=nearest(key, params) if params else f"{name} has no options.",
            )
    try:
        return {k: p.check(k, options.get(k, p.default), f"searcher {name}") for k, p in params.items()}
    except MethodError as error:
        raise SpecError(error.problem, remedy=error.remedy) from error


class SearcherDrift(StudyError):
    """Replaying a stored study gave another point than the study holds, so it cannot be continued exactly."""

    def __init__(self, n: int, again: Point, stored: Point):
        name = next((k for k in stored if again.get(k) != stored[k]), "?")
        super().__init__(
            f"replaying proposal {n} gave {name}={again.get(name)!r}, but the study holds {stored.get(name)!r}",
            remedy="The searcher's libraries, its options or the seed differ from those the study was made with: use "
            "the same versions, or start a new study under another name.",
        )


class Oracle(Protocol):
    """Where a searcher that wants gradients gets them: losses at a point, and their gradients by the weights there."""

    @property
    def items(self) -> Mapping[str, Sequence[str]]:
        """Task -> the items to train on, in an order that never changes."""
        ...

    @property
    def held(self) -> Mapping[str, Sequence[str]]:
        """Task -> items that are never trained on, to see when to stop; none where nothing is held out."""
        ...

    @property
    def weights(self) -> Mapping[str, float]:
        """Task -> how much it counts."""
        ...

    @property
    def piece(self) -> int:
        """How many items a batch may have."""
        ...

    def gradients(
        self,
        step: int,
        point: Point,
        batches: Sequence[tuple[str, Sequence[str]]],
        *,
        shares: Sequence[float],
        learn: bool = True,
        numbers: np.ndarray | None = None,
    ) -> Sequence[BatchGradient]:
        """The loss of each batch, (task, items), at ``point``, in the order of the batches, and gradients whose sum is
        that of the sum of share times loss; which of the batches have them is the oracle's affair.

        Args:
            step: names the place in the training, for messages.
            shares: what each batch counts.
            learn: False: the losses are enough.
            numbers: what the merge is learned by inside its task vectors, of a searcher that ``learns`` any.

        Raises:
            CandidateError: of kind nan, if a loss or a gradient is not finite.
            Interrupted: the user asked to stop.
        """
        ...


class Searcher(ABC):
    """Proposes points and learns from scores. Its state is a function of (seed, the asks and tells so far).

    Args:
        space: the dimensions that may move.
        starts: the first proposals, points of the space; none: its initial point.
        seed: all random draws derive from it; no global random state is used.
        num_objectives: how many values every trial is told with.
        options: values for ``params``; checked here, and in ``self.options`` with defaults filled in.

    Raises:
        SpecError: an option is unknown or outside its legal range, or there are more objectives than it can take.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""  # one line for the docs and the schema
    params: ClassVar[Mapping[str, Param]] = {}
    objectives: ClassVar[Literal["one", "many"]] = "one"  # many: looks at ``Told.values``, or learns nothing
    asynchronous: ClassVar[bool] = True  # False: cannot propose before all that ``needs`` names were told

    def __init__(
        self, space: Space, *, seed: int = 0, starts: Sequence[Point] = (), num_objectives: int = 1, **options: Any
    ):
        if num_objectives > 1 and self.objectives == "one":
            from evomerge.searchers import SEARCHERS

            able = ", ".join(name for name, searcher in SEARCHERS.items() if searcher.objectives == "many")
            raise SpecError(
                f"searcher {self.name} takes one objective, but there are {num_objectives}",
                remedy=f"Use a search.method that takes several ({able}), or one objective, such as `of: mean`.",
            )
        self.space, self.seed, self.num_objectives = space, seed, num_objectives
        self.starts = [dict(point) for point in starts] or [space.initial()]
        self.options = check_options(self.name or type(self).__name__, self.params, options)

    @property
    def size(self) -> int | None:
        """How many proposals there are, the initial point included; None: as many as wanted."""
        return None

    def ended(self, n: int) -> str | None:
        """Why trial ``n`` is not proposed, nor any after it, although ``size`` allows for it; None: it is."""
        return None

    def at_once(self, budget: int) -> int:
        """How many of ``budget`` trials can be open at the same time on the reproducible schedule. Asked at first."""
        budget = min(budget, self.size or budget)
        return next((n for n in range(budget) if self.needs(n) > 0), budget)

    def note(self, budget: int) -> str | None:
        """What a user should know before a search of ``budget`` trials, such as how slow its proposals become."""
        return None

    @abstractmethod
    def needs(self, n: int) -> int:
        """How many of the first trials must be told before trial ``n`` is proposed (reproducible schedule).

        Asked for the next proposal. Never depends on the number of workers.
        """

    @abstractmethod
    def ask(self, n: int) -> Point:
        """The point of trial ``n``. Called once for each n, in order 0, 1, 2, ..."""

    @abstractmethod
    def tell(self, trial: Told) -> None:
        """A trial has ended: complete with a finite score, failed, or pruned. Each is told once."""

    def replay(self, n: int, point: Point) -> None:
        """On resume: proposal ``n`` was ``point``. The default asks again, which must give the same point."""
        again = self.ask(n)
        if again != point:
            raise SearcherDrift(n, again, point)

    def recommend(self) -> Point | None:
        """A point the searcher believes in beyond any it proposed (such as a distribution's mean), or None."""
        return None


class GradientSearcher(Searcher):
    """A searcher whose proposals are found by gradients, in ``ask``: it trains until trial n can be proposed.

    It moves weights only. The study sets ``oracle`` before it asks, stores ``state()`` and ``curve`` while ``ask``
    trains and before it stores the trial, and gives the last of them to ``restore`` on a resume.

    One that ``learns`` numbers inside task vectors, too many for a point, is told which there are (``lay_out``) before
    anything else, and says what they are in the candidate that it proposed last (``numbers``).

    Raises:
        SpecError: as Searcher; or the space has dimensions that are no weights, which are named.
    """

    asynchronous = False
    learns: ClassVar[str | None] = None  # the kind of the numbers, among methods.statistics.LEARNED
    number_bytes: ClassVar[int] = 8  # of each of these numbers
    oracle: Oracle | None = None  # there from the study's first ask on
    curve: list[dict[str, Any]]  # a row a step since the last proposal: step, loss, tasks, gradient
    trains_on: Literal["search", "test"] = "search"  # test: without labels
    parts: int = 2  # how many workers can share a step; part of what makes the bits
    restored: int = 0  # a state on the way to this trial was restored
    held_out: float = 0.0  # the share of each task's search items that are not trained on

    def __init__(self, space: Space, **options: Any):
        from evomerge.space import Moving

        super().__init__(space, **options)
        weights = {w.dimension for region in space.regions for w in region.weights if isinstance(w, Moving)}
        others = [d.name for d in space.dimensions if d.name not in weights or d.choices or d.integer]
        if others:
            raise SpecError(
                f"searcher {self.name} moves weights only, but {', '.join(others)} would have to move as well",
                remedy="Give it one value in the space, or use search.method tpe or random.",
            )

    def at_once(self, budget: int) -> int:
        """How many trials are evaluated beside a step of the training."""
        return 1

    @property
    @abstractmethod
    def progress(self) -> tuple[int, int]:
        """(steps made, steps in all)."""

    @abstractmethod
    def loss_options(self) -> dict[str, Any]:
        """What a worker must know of the loss: its name, ``over``, and whether gradients are freed at once."""

    def lay_out(self, layout: Layout) -> None:
        """Begin with the numbers that there are to learn."""
        raise NotImplementedError(f"searcher {self.name} learns no numbers inside task vectors")

    def numbers(self) -> np.ndarray:
        """(size,) those of the last proposal, in the order of the layout."""
        raise NotImplementedError(f"searcher {self.name} learns no numbers inside task vectors")

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """All that the training rests on, as plain data that JSON keeps bit for bit; and arrays, at its top level only,
        which the study keeps in files."""

    @abstractmethod
    def restore(self, state: Mapping[str, Any], curve: Sequence[Mapping[str, Any]]) -> None:
        """Go on from ``state``."""

    def needs(self, n: int) -> int:
        """No score: the default searcher by gradient learns nothing from them."""
        return 0

    def tell(self, trial: Told) -> None:
        """Nothing is learned."""

    def failure(self, n: int) -> str | None:
        """Why the training did not reach trial ``n``, if it did not: the trial is then a failed one."""
        return None

    def replay(self, n: int, point: Point) -> None:
        """What came before a state that was restored is not trained for again."""
        if n >= self.restored:
            super().replay(n, point)

    # --- for subclasses

    def named(self, values: np.ndarray) -> Point:
        """The point with ``values`` (dims,), in the order of the space's dimensions."""
        return dict(zip((d.name for d in self.space.dimensions), values.tolist(), strict=True))

    @cached_property
    def _chain(self) -> Chain:
        from evomerge.descent import Chain

        return Chain(self.space)

    def gradient(
        self, step: int, values: np.ndarray, items: Mapping[str, Sequence[str]], *, learn: bool = True
    ) -> tuple[float, np.ndarray, dict[str, float]]:
        """(loss, its gradient (dims,), task -> loss) at ``values`` (dims,) on ``items`` of each task.

        The loss is the mean over tasks by their weights, of the mean over a task's items; the weights of regions have
        the gradients of the dimensions that they are. Bit for bit the same from any number of workers.

        Args:
            step: names the place in the training, for messages.
            learn: False: the gradient is zeros, and costs nothing.

        Raises:
            CandidateError: of kind nan, if a loss or a gradient is not finite.
            Interrupted: the user asked to stop.
        """
        return self._gradient(step, values, None, items, learn)[:3]

    def gradient_inside(
        self,
        step: int,
        values: np.ndarray,
        numbers: np.ndarray,
        items: Mapping[str, Sequence[str]],
        *,
        learn: bool = True,
    ) -> tuple[float, np.ndarray, dict[str, float], np.ndarray]:
        """As ``gradient``, for a searcher that ``learns`` numbers; and the gradient by these, in their type.

        Args:
            numbers: (size,), in the order of the layout.
        """
        return self._gradient(step, values, numbers, items, learn)

    def _gradient(
        self,
        step: int,
        values: np.ndarray,
        numbers: np.ndarray | None,
        items: Mapping[str, Sequence[str]],
        learn: bool,
    ) -> tuple[float, np.ndarray, dict[str, float], np.ndarray]:
        from evomerge.descent import pieces

        assert self.oracle is not None, "a searcher that wants gradients was asked before it had an oracle"
        batches = [(task, piece) for task, ids in items.items() for piece in pieces(ids, self.oracle.piece)]
        more = {} if numbers is None else {"numbers": numbers}
        parts = [len(piece) / len(items[task]) for task, piece in batches]  # of a task's items
        counts = [self.oracle.weights[task] * part for (task, _), part in zip(batches, parts, strict=True)]
        shares = [count / math.fsum(counts) for count in counts]
        found = self.oracle.gradients(step, self.named(values), batches, shares=shares, learn=learn, **more)
        loss, gradient, by_task = 0.0, np.zeros(len(values)), dict.fromkeys(items, 0.0)
        inside = np.zeros(0) if numbers is None else np.zeros_like(numbers)
        for one, (task, _), part, share in zip(found, batches, parts, shares, strict=True):
            by_task[task] += one.loss * part
            loss += one.loss * share
            if one.gradient:
                gradient += self._chain.to_dimensions(one.gradient)
                if numbers is not None:
                    inside += np.frombuffer(one.learned, numbers.dtype)
        return loss, gradient, by_task, inside
