"""AdaMerging: coefficients learned by gradient descent on a loss of the merged model, on items without labels or with.

Yang et al. 2024, "AdaMerging: Adaptive model merging for multi-task learning" (arXiv:2310.02575): entropy of the
predictions, Adam, a coefficient an expert (task-wise) or an expert and tensor (layer-wise, in the paper's words). Which
coefficients there are is the space's affair, what they multiply the method's, as in every other search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from evomerge import descent
from evomerge.errors import CandidateError, SpecError
from evomerge.params import Param
from evomerge.plugins import LOSS
from evomerge.searchers.base import GradientSearcher, Point

OWN_EXPERTS = ("kl_to_expert", "hidden_mse")  # losses that look at each task's own expert
LOSSES = ("entropy", "cross_entropy", *OWN_EXPERTS)  # those of evomerge.losses, which needs torch


def may_look_at_experts(loss: str | None) -> bool:
    """Is this a loss that looks at each task's own expert? One of a plug-in, which nobody has loaded yet, may."""
    return loss is not None and (loss in OWN_EXPERTS or loss not in LOSSES)


class AdaMergingSearcher(GradientSearcher):
    """Trial 0 is the start, trial n the coefficients after n * ``every`` steps of Adam; the best is chosen as ever.

    Scores teach it nothing: it waits for none, and none of its numbers depend on them.

    A step has a batch of each task (of ``tasks`` tasks in turn). The loss is the mean over tasks by their weights.

    Raises:
        SpecError: more than one start was given, or what ``simplex`` says.
    """

    name = "adamerging"
    summary = "coefficients by gradient descent on entropy or another loss; steps / every + 1 candidates"
    objectives = "many"
    params: ClassVar[Mapping[str, Param]] = {
        "steps": Param(int, 500, "steps of gradient descent", low=1),
        "every": Param(int, 50, "steps from one candidate to the next", low=1),
        "lr": Param(
            float, 1e-3, "Adam's step size: about how far a coefficient moves in one step", low=0, low_open=True
        ),
        "loss": Param(
            str,
            "entropy",
            "what is made small: entropy (of the predictions), cross_entropy (of the labels), kl_to_expert and "
            "hidden_mse (distance to each task's own expert: of its predictions, of its last hidden states), or your "
            "own file.py@name",
            choices=LOSSES,
            plugin=LOSS,
        ),
        "over": Param(
            str,
            "answers",
            "whose probabilities the loss is about: answers (classes, choices) or tokens (of the vocabulary)",
            choices=("answers", "tokens"),
        ),
        "batch": Param(int, 16, "items of a task in one step", low=1),
        "tasks": Param(int, 0, "tasks in one step, which have their turns; 0: all", low=0),
        "parts": Param(
            int, 2, "how many workers can share a step: its batches are summed in so many parts by whoever is there", 1
        ),
        "pull": Param(float, 0.0, "adds 0.5 * pull * the squared distance of all coefficients from the start", low=0),
        "constraint": Param(
            str,
            "box",
            "box: each coefficient in its range; softmax: those of each part of the model positive, with the sum they "
            "start with",
            choices=("box", "softmax"),
        ),
        "gradients": Param(
            str,
            "keep",
            "keep: a gradient of all parameters at once, as large as the model; free: each is dropped once it is used",
            choices=("keep", "free"),
        ),
        "patience": Param(
            int, 0, "stop when the loss on held-out items was not lower for so many candidates; 0: never", low=0
        ),
        "holdout": Param(float, 0.0, "share of each task's search items that are never trained on", low=0, high=0.9),
        "protocol": Param(
            str,
            "inductive",
            "inductive: train on the search items; transductive: on the test items, without their labels",
            choices=("inductive", "transductive"),
        ),
    }

    def __init__(self, space: Any, *, seed: int = 0, starts: Any = (), **options: Any):
        super().__init__(space, seed=seed, starts=starts, **options)
        if len(self.starts) > 1:
            raise SpecError(
                f"searcher {self.name} begins at one point, but was given {len(self.starts)}",
                remedy="Leave one entry in search.initial.",
            )
        if self.options["every"] > self.options["steps"]:
            raise SpecError(
                f"every <= steps must hold, but every={self.options['every']} and steps={self.options['steps']}",
                remedy="Lower every: it is how many steps lie between two candidates.",
            )
        if self.options["patience"] and not self.options["holdout"]:
            raise SpecError(
                f"patience {self.options['patience']} looks at held-out items, but none are held out",
                remedy="Set holdout, such as holdout: 0.2, or patience: 0.",
            )
        self.trains_on = "test" if self.options["protocol"] == "transductive" else "search"
        self.held_out, self.parts = self.options["holdout"], self.options["parts"]
        start = self.starts[0]
        softmax = self.options.get("constraint") == "softmax"
        self._names = [d.name for d in space.dimensions]
        self._descent = descent.Descent(
            np.array([float(start[name]) for name in self._names]),
            descent.simplex(space, start) if softmax else descent.box(space),
            lr=self.options["lr"],
            pull=self.options["pull"],
        )
        self._state = self._descent.begin()
        self._failure: str | None = None
        self._held: list[float] = []  # the loss on held-out items, of each candidate so far
        self.curve = []

    @property
    def size(self) -> int:
        return self.options["steps"] // self.options["every"] + 1

    @property
    def progress(self) -> tuple[int, int]:
        return self._state.step, self.options["steps"] // self.options["every"] * self.options["every"]

    def ended(self, n: int) -> str | None:
        if n and (failed := self._unreached(n - 1)) is not None:
            return f"the training failed ({failed})"
        held, patience = self._held[:n], self.options["patience"]
        best = held.index(min(held)) if held else 0
        if patience and len(held) > best + patience:
            at = best * self.options["every"]
            return f"the loss on held-out items was not lower than at step {at} for {patience} candidates"
        return None

    def ask(self, n: int) -> Point:
        """Trains up to trial ``n``, or to where the training fails. Raises ValueError beyond ``size``."""
        if n >= self.size:
            raise ValueError(f"the training is done after {self.size} proposals")
        goal = n * self.options["every"]
        try:
            while self._state.step < goal and self._failure is None:
                self._state = self._step(self._descent, self._state)
            if self._failure is None and self.options["patience"] and len(self._held) <= n:
                self._held.append(self._held_out_loss())
        except CandidateError as error:
            self._failure = reason_of(error)
        return self._point()

    def loss_options(self) -> dict[str, Any]:
        return {key: self.options[key] for key in ("loss", "over")} | {"free": self.options["gradients"] == "free"}

    def state(self) -> dict[str, Any]:
        return {
            "descent": self._state.to_dict(),
            "held": list(self._held),
            "failure": self._failure,
            "options": dict(self.options),
        }

    def restore(self, state: Mapping[str, Any], curve: Sequence[Mapping[str, Any]]) -> None:
        self._state = descent.State.from_dict(state["descent"])
        self._held, self._failure = list(state["held"]), state["failure"]
        self.curve = [dict(row) for row in curve]

    def failure(self, n: int) -> str | None:
        return self._unreached(n)

    def _unreached(self, n: int) -> str | None:
        reached = n * self.options["every"] <= self._state.step and (
            not self.options["patience"] or n < len(self._held)
        )
        return None if reached else self._failure

    # --- a step

    def _point(self) -> Point:
        return self.named(self._descent.values(self._state))

    def _step(self, path: descent.Descent, state: descent.State, first: int = 0) -> descent.State:
        """One step of ``path``, which began after ``first`` steps of this training; it has its row in the curve."""
        if state.step % self.options["every"] == 0:
            self.curve = []
        step = first + state.step
        items = self._items(step, self.options["batch"], self.options["tasks"])
        loss, gradient, by_task = self.gradient(step, path.values(state), items)
        after = path.step(state, gradient)
        self._note(step, loss, by_task, [gradient], [after])
        return after

    def _note(
        self,
        step: int,
        loss: float,
        by_task: dict[str, float],
        gradients: Sequence[np.ndarray],
        after: Sequence[descent.State],
    ) -> None:
        """The row of step ``step``, which led to ``after``; CandidateError if these are no numbers."""
        if not all(state.is_finite for state in after):
            raise CandidateError("nan", f"step {step}: the gradient is too large for numbers")
        size = descent.norm(*gradients)
        self.curve.append({"step": step, "loss": loss, "tasks": by_task, "gradient": size})

    def _items(self, step: int, size: int, tasks: int = 0) -> dict[str, tuple[str, ...]]:
        """Task -> ``size`` items of it, of the ``tasks`` tasks (0: all) whose turn step ``step`` is."""
        assert self.oracle is not None, "a searcher that wants gradients was asked before it had an oracle"
        return {
            task: descent.batch(self.oracle.items[task], seed=self.seed, task=task, turn=turn, size=size)
            for task, turn in descent.turns(step, list(self.oracle.items), tasks)
        }

    def _held_out_loss(self) -> float:
        """The loss on all that is held out."""
        assert self.oracle is not None, "a searcher that wants gradients was asked before it had an oracle"
        return self._loss_of({task: items for task, items in self.oracle.held.items() if items})

    def _loss_of(self, items: Mapping[str, Sequence[str]]) -> float:
        """Of the candidate that the training is at."""
        return self.gradient(self._state.step, self._descent.values(self._state), items, learn=False)[0]


def reason_of(error: CandidateError) -> str:
    """Why a training goes no further; anything but a number that is none is not its affair, and is raised again."""
    if error.kind != "nan":
        raise error
    return error.reason
