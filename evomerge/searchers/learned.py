"""Searches by gradient that learn numbers inside the task vectors, and the space's weights along with them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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

    Weights and numbers have a descent each, whose steps are made together: Adam moves every coordinate by itself, so
    that this is one descent on all. A point of the space holds the weights only; the study keeps the numbers in a file
    that the recipe names.
    """

    params: ClassVar[Mapping[str, Param]] = {**AdaMergingSearcher.params, "weights": WEIGHTS}

    @abstractmethod
    def begin_numbers(self, layout: Layout) -> tuple[np.ndarray, descent.Constraint]:
        """(size,) the coordinates that the numbers of trial 0 have, and the constraint under which they are learned."""

    def in_training(self, step: int) -> descent.Constraint:
        """What coordinates stand for in step ``step`` of the training: what they do in a candidate, or nearly so."""
        return self._inside.constraint

    def lay_out(self, layout: Layout) -> None:
        if self.options["weights"] == "fixed":
            self._descent = replace(self._descent, constraint=Still())
            self._state = self._descent.begin()
        x, constraint = self.begin_numbers(layout)
        start = constraint.values(x)
        self._inside = descent.Descent(start, constraint, lr=self._descent.lr, pull=self._descent.pull)
        self._state_inside = descent.State.at(x)

    def numbers(self) -> np.ndarray:
        return self._inside.values(self._state_inside)

    def state(self) -> dict[str, Any]:
        """As AdaMerging's, with the coordinates of the numbers and Adam's means of them as arrays."""
        now = self._state_inside
        return {**super().state(), "learns": self.learns, "x": now.x, "m": now.m, "v": now.v}

    def restore(self, state: Mapping[str, Any], curve: Sequence[Mapping[str, Any]]) -> None:
        super().restore(state, curve)
        self._state_inside = descent.State(self._state.step, *(state[key] for key in ("x", "m", "v")))

    def _step(self, path: descent.Descent, state: descent.State, first: int = 0) -> descent.State:
        if state.step % self.options["every"] == 0:
            self.curve = []
        step = first + state.step
        items = self._items(step, self.options["batch"], self.options["tasks"])
        inside, now = replace(self._inside, constraint=self.in_training(step)), self._state_inside
        values, numbers = path.values(state), inside.values(now)
        loss, gradient, by_task, by_numbers = self.gradient_inside(step, values, numbers, items)
        del numbers  # as many as parameters, perhaps, and so are those that a step makes
        after, after_inside = path.step(state, gradient), inside.step(now, by_numbers)
        self._note(step, loss, by_task, [gradient, by_numbers], [after, after_inside])
        self._state_inside = after_inside
        return after

    def _loss_of(self, held: Mapping[str, Sequence[str]]) -> float:
        values = self._descent.values(self._state)
        return self.gradient_inside(self._state.step, values, self.numbers(), held, learn=False)[0]
