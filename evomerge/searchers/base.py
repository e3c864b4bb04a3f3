"""What a searcher is: ask and tell, and nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from evomerge.params import Param
    from evomerge.space import Space

Point = dict[str, float]  # dimension name -> value, in the space's own units


@dataclass(frozen=True)
class Told:
    """One trial that has ended. ``score`` is higher-is-better, and None unless ``state`` is complete."""

    n: int
    point: Point
    state: Literal["complete", "fail", "pruned"]
    score: float | None


class Searcher(ABC):
    """Proposes points and learns from scores. Its state is a function of (seed, the asks and tells so far).

    Args:
        space: the dimensions that may move.
        seed: all random draws derive from it; no global random state is used.
        options: values for ``params``; checked there.
    """

    params: Mapping[str, Param] = {}

    def __init__(self, space: Space, *, seed: int = 0, **options: Any):
        self.space, self.seed = space, seed

    @abstractmethod
    def needs(self, n: int) -> int:
        """How many of the first trials must be told before trial ``n`` is proposed (reproducible schedule)."""

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
            raise RuntimeError(f"replaying proposal {n} gave {again}, but the study holds {point}")

    def recommend(self) -> Point | None:
        """A point the searcher believes in beyond any it proposed (such as a distribution's mean), or None."""
        return None
