"""Searches by gradient that learn numbers inside the task vectors, and the space's weights along with them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from evomerge import descent
from evomerge.params import Param
from evomerge.searchers.adamerging import AdaMergingSearcher

if TYPE_CHECKING:
    from evomerge.learned import Layout

WEIGHTS = Param(
    str,
    "learned",
    "the space's weights: learned along with the rest, or fixed where they start",
    choices=("learned", "fixed"),
)


@dataclass(frozen=True)
class Joined:
    """A constraint (``descent.Constraint``) for the first ``count`` values, and another for the rest."""

    first: descent.Constraint
    count: int
    rest: descent.Constraint

    def values(self, x: np.ndarray) -> np.ndarray:
        return np.concatenate([self.first.values(x[: self.count]), self.rest.values(x[self.count :])])

    def coordinates(self, values: np.ndarray) -> np.ndarray:
        parts = self.first.coordinates(values[: self.count]), self.rest.coordinates(values[self.count :])
        return np.concatenate(parts)

    def pull_back(self, x: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        n = self.count
        return np.concatenate([self.first.pull_back(x[:n], gradient[:n]), self.rest.pull_back(x[n:], gradient[n:])])

    def project(self, x: np.ndarray) -> np.ndarray:
        return np.concatenate([self.first.project(x[: self.count]), self.rest.project(x[self.count :])])


@dataclass(frozen=True)
class Still:
    """Values that stay where they are."""

    def values(self, x: np.ndarray) -> np.ndarray:
        return x

    def coordinates(self, values: np.ndarray) -> np.ndarray:
        return values

    def pull_back(self, x: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        return np.zeros_like(gradient)

    def project(self, x: np.ndarray) -> np.ndarray:
        return x


class LearnedSearcher(AdaMergingSearcher):
    """Trial n is the weights and the numbers after n * ``every`` steps of Adam on both. Options are AdaMerging's.

    A point of the space holds the weights only; the study keeps the numbers in a file that the recipe names.
    """

    params: ClassVar[Mapping[str, Param]] = {**AdaMergingSearcher.params, "weights": WEIGHTS}

    @abstractmethod
    def begin_numbers(self, layout: Layout) -> tuple[np.ndarray, descent.Constraint]:
        """(size,) the numbers of trial 0, and the constraint under which they are learned."""

    def lay_out(self, layout: Layout) -> None:
        numbers, constraint = self.begin_numbers(layout)
        weights = self._descent
        first = Still() if self.options["weights"] == "fixed" else weights.constraint
        self._descent = descent.Descent(
            np.concatenate([weights.start, numbers]),
            Joined(first, len(weights.start), constraint),
            lr=weights.lr,
            pull=weights.pull,
        )
        self._state = self._descent.begin()

    def numbers(self) -> np.ndarray:
        return self._descent.values(self._state)[len(self._names) :]

    def state(self) -> dict[str, Any]:
        """As AdaMerging's, with Adam's coordinates and means as arrays."""
        now = self._state
        steps = {"descent": {"step": now.step}, "learns": self.learns}
        return {**super().state(), **steps, "x": now.x, "m": now.m, "v": now.v}

    def restore(self, state: Mapping[str, Any], curve: Sequence[Mapping[str, Any]]) -> None:
        arrays = {key: state[key] for key in ("x", "m", "v")}
        super().restore({**state, "descent": {**state["descent"], **arrays}}, curve)
