"""In a worker: losses of a merge on batches of items, and their gradients by the merge's weights.

Workers keep nothing of a training but what they could work out anew: a batch's numbers are a function of recipe and
batch. The predictions of experts, which some losses look at, are made item by item, so that they do not depend on which
batches came before, and kept as far as there is room.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evomerge.errors import CandidateError
from evomerge.evaluation import Evaluator, Predictions, Target
from evomerge.learned_gradients import LearnedGradients, lend
from evomerge.losses import Loss, find
from evomerge.merging import Merger
from evomerge.pools import BatchGradient
from evomerge.recipe import Group, Recipe

KEPT_BYTES = 2**30  # of experts' predictions, in the worker's RAM


class BatchLosses:
    """Losses and gradients of whatever recipe of the worker's sources, on batches of the study's items.

    Args:
        seeded: a context in which global random generators start from the study's seed.
        folder: of the experiment, where a loss of the user's own is.
        kept_bytes: how much of experts' predictions is kept.
    """

    def __init__(
        self,
        merger: Merger,
        evaluator: Evaluator,
        target: Target,
        seeded: Callable[[], AbstractContextManager[None]],
        folder: Path,
        kept_bytes: int = KEPT_BYTES,
    ):
        self.merger, self.evaluator, self.target, self.seeded = merger, evaluator, target, seeded
        self.folder, self.kept_bytes = folder, kept_bytes
        self._losses: dict[str, Loss] = {}
        self._kept: OrderedDict[tuple[Any, ...], Predictions] = OrderedDict()  # the one used last is the last
        self._gradients: dict[bool, LearnedGradients] = {}

    def of(self, recipe: Recipe, wanted: Mapping[str, Any]) -> tuple[BatchGradient, ...]:
        """The losses of ``wanted["batches"]``, in order; the first has the gradient of the sum of share times loss.

        Args:
            wanted: as ``Job.gradient``.

        Raises:
            CandidateError: a loss or a gradient is not finite; names the task. Or an error in one, under its name.
        """
        loss = self._loss(wanted["loss"])
        coefficients = self._coefficients(bool(wanted["free"]))
        numbers = wanted.get("learned")
        if numbers is not None:
            lend(self.merger, recipe, numbers)
        ask = {"over": wanted["over"], "labels": loss.labels, "hidden": loss.hidden}
        experts = self._experts(recipe, coefficients, wanted, ask) if loss.teacher else {}
        coefficients.into(recipe)
        values = [self._value(loss, list(ids), ask, experts.get(task, {})) for task, ids in wanted["batches"]]
        tasks = [task for task, _ in wanted["batches"]]
        if not wanted["learn"]:
            losses, gradient, learned = [self._without_gradient(value) for value in values], None, np.zeros(0)
        else:
            losses, gradient = coefficients.together(values, wanted["shares"], recipe, self.seeded)
            learned = np.zeros(0) if numbers is None else coefficients.by_numbers(numbers["tensors"])
        for task, number in zip(tasks, losses, strict=True):
            if not math.isfinite(number):
                raise CandidateError("nan", f"task {task}: the loss is {number}")
        found = [BatchGradient(task, number) for task, number in zip(tasks, losses, strict=True)]
        if gradient is not None:
            if not bool(gradient.isfinite().all()) or not np.isfinite(learned).all():
                raise CandidateError("nan", f"task {' or '.join(dict.fromkeys(tasks))}: the gradient is not finite")
            flat = tuple(gradient.T.reshape(-1).tolist())
            found[0] = replace(found[0], gradient=flat, learned=learned.tobytes())
        return tuple(found)

    def _loss(self, name: str) -> Loss:
        if name not in self._losses:
            self._losses[name] = find(name, self.folder).loss
        return self._losses[name]

    def _coefficients(self, free: bool) -> LearnedGradients:
        if free not in self._gradients:
            self._gradients[free] = LearnedGradients(self.merger, self.target.model, free=free)
        return self._gradients[free]

    def _value(
        self, loss: Loss, ids: list[str], ask: Mapping[str, Any], expert: Mapping[str, Predictions]
    ) -> Callable[[], Tensor]:
        """The loss on one batch, to be called once the merge is in the model."""

        def value() -> Tensor:
            theirs = _together([expert[i] for i in ids], self.target.device) if expert else None
            return loss.of(self.evaluator.predictions(self.target, ids, **ask), theirs)

        return value

    def _without_gradient(self, value: Callable[[], Tensor]) -> float:
        with self.seeded(), torch.no_grad():
            return float(value())

    def _experts(
        self, recipe: Recipe, coefficients: LearnedGradients, wanted: Mapping[str, Any], ask: Mapping[str, Any]
    ) -> dict[str, dict[str, Predictions]]:
        """Task -> item -> what the task's own expert predicts on the item alone; on the CPU."""
        found: dict[str, dict[str, Predictions]] = {}
        for task, ids in wanted["batches"]:
            t = wanted["experts"][task]
            for item_id in ids:
                key = (t, item_id, ask["over"], ask["hidden"])
                if key not in self._kept:
                    coefficients.into(alone(recipe, t))
                    with self.seeded(), torch.no_grad():
                        self._kept[key] = _on_cpu(self.evaluator.predictions(self.target, [item_id], **ask))
                self._kept.move_to_end(key)
                found.setdefault(task, {})[item_id] = self._kept[key]
        room = self.kept_bytes - sum(_bytes(one) for one in self._kept.values())
        while room < 0 and self._kept:
            room += _bytes(self._kept.popitem(last=False)[1])
        return found


def alone(recipe: Recipe, t: int) -> Recipe:
    """Expert ``t`` itself."""
    weights = tuple(float(i == t) for i in range(len(recipe.experts)))
    return replace(
        recipe, method="task_arithmetic", code=None, params={}, groups=(Group(weights=weights),), statistics=None
    )


def _together(items: Sequence[Predictions], device: str) -> Predictions:
    """The rows of one item after the other's, as one batch of them has; -inf where an item lacks a class."""
    classes = max(one.logits.shape[1] for one in items)
    logits = [
        torch.nn.functional.pad(one.logits, (0, classes - one.logits.shape[1]), value=-torch.inf) for one in items
    ]

    def joined(parts: Sequence[Tensor | None]) -> Tensor | None:
        there = [part for part in parts if part is not None]
        return torch.cat(there).to(device) if there else None

    return Predictions(
        torch.cat(logits).to(device),
        torch.cat([one.weights for one in items]).to(device),
        None,
        joined([one.hidden for one in items]),
        joined([one.hidden_weights for one in items]),
    )


def _tensors(predictions: Predictions) -> list[Tensor]:
    parts = (predictions.logits, predictions.weights, predictions.hidden, predictions.hidden_weights)
    return [part for part in parts if part is not None]


def _bytes(predictions: Predictions) -> int:
    return sum(part.nbytes for part in _tensors(predictions))


def _on_cpu(predictions: Predictions) -> Predictions:
    """Without labels."""

    def moved(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.detach().to("cpu", copy=True)

    logits, weights = predictions.logits, predictions.weights
    return Predictions(
        logits.detach().to("cpu", copy=True),
        weights.detach().to("cpu", copy=True),
        None,
        moved(predictions.hidden),
        moved(predictions.hidden_weights),
    )
