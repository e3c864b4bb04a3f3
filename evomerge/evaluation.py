"""Evaluators, items, outcomes: what turns a model into one outcome per item, per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

SPLITS = ("search", "select", "test")


@dataclass(frozen=True)
class TaskSpec:
    """One task of an experiment file: its weight in the objective, its metric (None: the evaluator's first), options."""

    name: str
    weight: float = 1.0
    metric: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """One question.

    ``id`` is a content hash (task and payload). ``text`` is what duplicates are found by. ``data`` is the evaluator's
    own, plain (JSON) payload. ``own_split`` is the split the data set itself puts the item in, if it has splits;
    ``split`` is the experiment's: search, select or test, set by ``assign_splits``.
    """

    id: str
    task: str
    text: str
    data: Mapping[str, Any] = field(default_factory=dict)
    own_split: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What a model did on one item: finite metric values (higher is better unless the evaluator says otherwise)."""

    item_id: str
    values: Mapping[str, float]
    weight: float = 1.0


@dataclass(frozen=True)
class Target:
    """What an evaluator looks at: a resident model and its tokenizer."""

    model: Any
    tokenizer: Any
    device: str = "cpu"


@dataclass(frozen=True)
class EvaluatorContext:
    """What an evaluator is built from: paths and plain data, so that a worker can build it anew."""

    folder: Path  # of the experiment file; relative paths start here
    tasks: Mapping[str, TaskSpec]
    options: Mapping[str, Any] = field(default_factory=dict)  # evaluate: keys beyond with, tasks, split
    batch_size: int = 32
    seed: int = 0


class Evaluator:
    """The base class of evaluators: ``load`` and ``evaluate`` are theirs to write, the rest has useful defaults."""

    needs: Literal["model", "checkpoint"] = "model"
    auto_class: str = "AutoModelForCausalLM"  # the transformers class that loads the resident model

    def __init__(self, context: EvaluatorContext):
        self.context = context

    def load(self) -> list[Item]:
        """All items of all tasks, in the driver and again in each worker, without a model. ``split`` is not set yet."""
        raise NotImplementedError

    def prepare(self, target: Target, items: Sequence[Item]) -> None:
        """Once a worker: tokenise and lay out batches. A batch never mixes splits, and the layout is a function of
        the items alone, so that an item's outcome does not depend on which others are asked for."""

    def evaluate(self, target: Target, item_ids: Sequence[str]) -> list[Outcome]:
        """One outcome for each id, in the order of ``item_ids``."""
        raise NotImplementedError

    def aggregate(self, task: str, outcomes: Sequence[Outcome]) -> float:
        """The task's score: the weighted mean of its metric, higher is better."""
        metric = self.metric(task)
        total = sum(o.weight for o in outcomes)
        return sum(o.values[metric] * o.weight for o in outcomes) / total

    def metric(self, task: str) -> str:
        """The metric that counts for ``task``: the experiment's choice, or this evaluator's default."""
        chosen = self.context.tasks[task].metric
        return chosen if chosen is not None else self.default_metric(task)

    def default_metric(self, task: str) -> str:
        return "score"

    def is_item_mean(self, task: str) -> bool:
        """True if the task's score is the weighted mean of its items' metric (intervals and tests rest on it)."""
        return True

    def fingerprint(self) -> dict[str, str]:
        """Hashes of every file (code, YAML, data) that the outcomes depend on, by a name a user would recognise."""
        return {}
