"""Losses that a search by gradient makes small: functions of what a model predicts, by name.

A loss is the mean over items, each of which weighs the same however many rows it has. All is computed in float32, or in
float64 where the predictions are: a model in bfloat16 is no reason for a loss in bfloat16.
"""

from __future__ import annotations

import functools
import traceback
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from evomerge.errors import CandidateError, SpecError
from evomerge.evaluation import Predictions
from evomerge.finding import find_plugin
from evomerge.plugins import LOSS, Code, explain, run_user_code

__all__ = ["LOSSES", "Found", "Loss", "find"]

T = TypeVar("T")


class Loss(ABC):
    """One loss: what it needs, and ``of``, its value on a batch of items of one task.

    Attributes:
        name, summary, reference: what it is called, what it is in one line, and where it comes from.
        labels: it looks at what is right.
        hidden: it looks at the last hidden states.
        teacher: it compares with what the task's own expert predicts on the same items.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    reference: ClassVar[str] = ""
    labels: ClassVar[bool] = False
    hidden: ClassVar[bool] = False
    teacher: ClassVar[bool] = False

    @abstractmethod
    def of(self, mine: Predictions, expert: Predictions | None) -> Tensor:
        """The mean over items, a scalar that can be differentiated by the model's parameters; in nats for all but
        ``hidden_mse``.

        Args:
            mine: what the merged model predicts.
            expert: what the task's own expert predicts on the same items, asked for in the same way; a constant,
                nothing flows back into it. Looked at by losses with ``teacher`` only.

        Raises:
            ValueError: ``mine`` or ``expert`` lacks what this loss needs, or the two are not of the same shape.
        """

    def needs(self, over: str) -> frozenset[str]:
        """What an evaluator must serve for a task (see ``Evaluator.predicts``) to give this loss ``over`` "answers" or
        "tokens"."""
        return frozenset([over, *(["labels"] if self.labels else []), *(["hidden"] if self.hidden else [])])


class Entropy(Loss):
    """How undecided the model is; needs no labels."""

    name = "entropy"
    summary = "the Shannon entropy of the predictions; without labels"
    reference = "AdaMerging: Yang et al. 2024, arXiv:2310.02575, section 3.2, entropy optimization"

    def of(self, mine: Predictions, expert: Predictions | None) -> Tensor:
        logs = _log_softmax(mine.logits)
        return _mean(-_expectation(logs, logs), mine.weights)


class CrossEntropy(Loss):
    """How improbable the model finds what is right."""

    name = "cross_entropy"
    summary = "the negative log-likelihood of the labels"
    reference = "Goodfellow et al. 2016, Deep Learning, section 5.5.1"
    labels = True

    def of(self, mine: Predictions, expert: Predictions | None) -> Tensor:
        right = _there(self, "labels", mine.right)
        logs = _log_softmax(mine.logits)
        return _mean(-logs.gather(1, right[:, None])[:, 0], mine.weights)


class KLToExpert(Loss):
    """How far the model's predictions are from those of each task's own expert: distillation into the merge."""

    name = "kl_to_expert"
    summary = "KL(expert || merged) of the predictions: distillation from each task's own expert; without labels"
    reference = "Hinton et al. 2015, arXiv:1503.02531, section 2, at temperature 1"
    teacher = True

    def of(self, mine: Predictions, expert: Predictions | None) -> Tensor:
        theirs = _there(self, "the expert's predictions", expert).logits
        _check_alike(self, "logits", mine.logits, theirs)
        theirs = _log_softmax(theirs.detach())
        return _mean(_expectation(theirs, theirs - _log_softmax(mine.logits)), mine.weights)


class HiddenMSE(Loss):
    """How far the model's last hidden states are from those of each task's own expert."""

    name = "hidden_mse"
    summary = "the mean squared error of the last hidden states to those of each task's own expert; without labels"
    reference = (
        "FitNets: Romero et al. 2015, arXiv:1412.6550, equation 3, without a regressor, as a mean over the width"
    )
    hidden = True
    teacher = True

    def of(self, mine: Predictions, expert: Predictions | None) -> Tensor:
        expert = _there(self, "the expert's predictions", expert)
        ours, theirs = (_there(self, "hidden states", p.hidden) for p in (mine, expert))
        _check_alike(self, "hidden states", ours, theirs)
        weights = _there(self, "weights of hidden states", mine.hidden_weights)
        return _mean((_wide(ours) - _wide(theirs.detach())).square().mean(1), weights)


LOSSES: Mapping[str, Loss] = {loss.name: loss for loss in (Entropy(), CrossEntropy(), KLToExpert(), HiddenMSE())}


@dataclass(frozen=True)
class Found:
    """A loss, and its code if that is not evomerge's own."""

    loss: Loss
    code: Code | None = None


def find(name: str, folder: Path) -> Found:
    """The loss that an experiment names: one of evomerge's own, of an installed package, or ``file.py@name``.

    Args:
        folder: of the experiment file; the code of a file below it runs.

    Raises:
        SpecError: there is none, its code fails, or it breaks a rule of losses.
    """
    return Found(*find_plugin(LOSS, name, folder, LOSSES, Loss, _guarded, "of"))


def _guarded(loss: type[Loss], where: str, path: Path) -> Loss:
    """An object of ``loss`` whose faults are a candidate's and name the line of its file, and whose values are
    checked."""
    for key in ("labels", "hidden", "teacher"):
        if not isinstance(getattr(loss, key), bool):
            raise SpecError(
                f"loss {loss.__name__}: {key} must be True or False, but is {getattr(loss, key)!r:.80}", where=where
            )

    class Guarded(loss):
        name = loss.name or loss.__name__

        @functools.wraps(loss.of)
        def of(self, mine: Predictions, expert: Predictions | None) -> Tensor:
            try:
                value = super().of(mine, expert)
            except (CandidateError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise CandidateError("error", explain(error, path), traceback.format_exc()) from error
            if not isinstance(value, Tensor) or value.dim() != 0 or not value.is_floating_point():
                raise CandidateError("error", f"loss {self.name} must give a scalar tensor, but gave {value!r:.80}")
            return value

    return run_user_code(Guarded, path, LOSS)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _log_softmax(logits: Tensor) -> Tensor:
    """(rows, classes), in float32 or wider."""
    return _wide(logits).log_softmax(1)


def _expectation(logs: Tensor, values: Tensor) -> Tensor:
    """(rows,): the mean of ``values`` (rows, classes) under the probabilities exp(``logs``). What has probability 0
    counts 0, in value and gradient, whatever its value: 0 log 0 = 0."""
    p = logs.exp()
    return (p * values.masked_fill(p == 0, 0.0)).sum(1)


def _mean(rows: Tensor, weights: Tensor) -> Tensor:
    """The mean over items: ``weights`` (rows,) are shares that sum to 1 for each."""
    weights = weights.to(rows)
    return (rows * weights).sum() / weights.sum()


def _there(loss: Loss, what: str, value: T | None) -> T:
    if value is None:
        raise ValueError(f"loss {loss.name} needs {what}, but there are none")
    return value


def _check_alike(loss: Loss, what: str, mine: Tensor, theirs: Tensor) -> None:
    if mine.shape != theirs.shape:
        raise ValueError(
            f"loss {loss.name} compares {what} of one shape, but the merge's are {tuple(mine.shape)} and the expert's "
            f"{tuple(theirs.shape)}"
        )
