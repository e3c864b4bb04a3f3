"""Evaluators, items, outcomes: what turns a model into one outcome per item, per task."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import math
import numbers
import sys
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from evomerge import installed
from evomerge.errors import CandidateError, EvaluatorError, nearest
from evomerge.plugins import (
    EVALUATOR,
    code_files,
    explain,
    hash_files,
    load_module,
    names_file,
    run_user_code,
    split_reference,
)
from evomerge.splits import SPLITS, assign_splits

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "SPLITS",
    "Evaluator",
    "EvaluatorContext",
    "FunctionEvaluator",
    "Item",
    "Likelihoods",
    "Outcome",
    "Predictions",
    "Target",
    "TaskSpec",
    "assign_splits",
    "check_outcomes",
    "load_evaluator",
    "task_scores",
]


@dataclass(frozen=True)
class TaskSpec:
    """One task of an experiment file. ``metric=None``: the evaluator's default; ``options`` are the evaluator's own."""

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
class Likelihoods:
    """What a model gives the possible answers to one item, as a differentiable function of its parameters.

    Attributes:
        logs: (answers,) natural logarithms of the answers' probabilities given the item. They need not add up to 1
            over the answers.
        right: which answer is right.
        tokens: how many tokens the right answer has; 1 for a class.
    """

    logs: Tensor
    right: int
    tokens: int = 1


@dataclass(frozen=True)
class Predictions:
    """What a model predicts on a batch of items of one task, as a differentiable function of its parameters.

    A row is one prediction: an item's class, its choice among the answers, or the next token at one of its positions.
    The rows of an item stand together, and items come in the order in which they were asked for.

    Attributes:
        logits: (rows, classes) natural logarithms of probabilities, up to a constant in each row. An item with fewer
            classes than another of its batch has -inf in the columns that it lacks.
        weights: (rows,) each row's share of its item; the shares of one item sum to 1.
        right: (rows,) int64, the right class; None where labels were not asked for.
        hidden: (positions, width) the last hidden states, those that the model's head makes the rows from; None where
            not asked for.
        hidden_weights: (positions,) each position's share of its item, as ``weights``; None without ``hidden``.
    """

    logits: Tensor
    weights: Tensor
    right: Tensor | None = None
    hidden: Tensor | None = None
    hidden_weights: Tensor | None = None


@dataclass(frozen=True)
class Target:
    """What an evaluator looks at: a resident model and its tokenizer, or a checkpoint on disk.

    For an evaluator that needs a checkpoint, ``model`` and ``tokenizer`` are None, ``checkpoint`` is the folder of a
    whole Hugging Face checkpoint, and ``scratch`` is an empty folder for files of its own. Both are gone after it.

    ``adapters`` stand behind the model (surgery): task -> a function of pooled features, (items, width) to the same.
    Only evaluators that say so (``Evaluator.adapts``) are given any.
    """

    model: Any = None
    tokenizer: Any = None
    device: str = "cpu"
    checkpoint: Path | None = None
    scratch: Path | None = None
    adapters: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict, hash=False)

    def adapted(self, task: str, features: Tensor) -> Tensor:
        """A task's pooled ``features`` through its adapter; as they are where there is none."""
        return self.adapters[task](features) if task in self.adapters else features


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

    needs: Literal["model", "checkpoint"] = "model"  # a resident model, or a folder on disk for an engine of its own
    auto_class: str = "AutoModelForCausalLM"  # the transformers class that loads the resident model
    unused: Sequence[str] = ()  # beginnings of names of its parameters that are never looked at: a base may lack them

    def __init__(self, context: EvaluatorContext):
        self.context = context

    def load(self) -> list[Item]:
        """All items of all tasks, in the driver and again in each worker, without a model. ``split`` is not set yet."""
        raise NotImplementedError

    def check(self, items: Sequence[Item]) -> None:
        """In the driver, once the splits are set: refuse (EvaluatorError) what could not be evaluated, before any model
        is loaded. ``items`` are the study's, all of them."""

    def prepare(self, target: Target | None, items: Sequence[Item]) -> None:
        """Once a worker: tokenise and lay out batches. ``items`` are the study's, all of them, with their splits. A
        batch never mixes splits, and the layout is a function of the items alone, so that an item's outcome does not
        depend on which others are asked for. ``target`` is None for an evaluator that needs a checkpoint: there is
        none yet."""

    def evaluate(self, target: Target, item_ids: Sequence[str]) -> list[Outcome]:
        """One outcome for each id, in the order of ``item_ids``."""
        raise NotImplementedError

    def likelihoods(
        self, target: Target, item_ids: Sequence[str], *, alternatives: bool = True
    ) -> Iterator[Likelihoods]:
        """What losses and their gradients are made of: the answers' probabilities, item by item, in order. Optional.

        One item's graph is alive at a time. Nothing but the item is in the model's input: no padding, no other items.

        Args:
            alternatives: False: the right answer is enough (its ``right`` is then 0 if it is alone).
        """
        raise NotImplementedError

    @property
    def has_likelihoods(self) -> bool:
        """True if ``likelihoods`` is written, so that statistics of experts can be collected."""
        return type(self).likelihoods is not Evaluator.likelihoods

    def predictions(
        self,
        target: Target,
        item_ids: Sequence[str],
        *,
        over: str = "answers",
        labels: bool = False,
        hidden: bool = False,
    ) -> Predictions:
        """What the model predicts on some items of one task, run as one batch: what a search by gradient learns from.
        Optional.

        All rows' graphs are alive together, so that memory grows with the batch. Padding is masked: an item's rows are
        those that it has alone, up to rounding.

        Args:
            item_ids: of one task, each at most once, in the order in which their rows are wanted.
            over: "answers", the item's classes or possible answers; or "tokens", the next token over the vocabulary at
                the positions that predict the right answer. Without labels these are unknown: then it is the position
                where the answer begins, and all positions of an item that is nothing but a text.
            labels: say what is right. If False no label is read, and items without any will do.
            hidden: give the last hidden states too.

        Raises:
            NotImplementedError: ``predicts`` does not name what is asked for.
            EvaluatorError: labels are asked for, but an item has none.
        """
        raise NotImplementedError(f"{type(self).__name__} gives no predictions")

    def predicts(self, task: str) -> frozenset[str]:
        """Which of "answers", "tokens", "labels" and "hidden" ``predictions`` serves for a task; empty: none at all."""
        return frozenset()

    def adapts(self, task: str) -> bool:
        """Can adapters stand between the model and this task's head? Optional: by default they cannot.

        Then ``predictions(over="answers", hidden=True)`` gives one row an item as ``hidden``, which is what the head
        looks at before it normalises; and ``evaluate``, ``likelihoods`` and the logits of ``predictions`` put these
        rows through ``Target.adapted`` on the way. ``hidden`` itself is what the adapter is given.
        """
        return False

    def check_predictable(self, items: Sequence[Item], over: str, *, labels: bool, hidden: bool) -> str:
        """The task of ``items``, for ``predictions`` to begin with.

        Raises:
            NotImplementedError: ``predicts`` does not name all that is asked for.
            ValueError: there is no item, or one comes twice, or they are of several tasks; ``over`` is no such thing.
        """
        if over not in ("answers", "tokens"):
            raise ValueError(f"predictions are over 'answers' or 'tokens', not {over!r}")
        tasks = {item.task for item in items}
        if len(tasks) != 1 or len({item.id for item in items}) != len(items):
            raise ValueError(
                f"predictions are of items of one task, each at most once, but were asked for on {len(items)} items of "
                f"the tasks {sorted(tasks)}"
            )
        (task,) = tasks
        asked = [over, *(["labels"] if labels else []), *(["hidden"] if hidden else [])]
        lacking = [word for word in asked if word not in self.predicts(task)]
        if lacking:
            raise NotImplementedError(
                f"{type(self).__name__} predicts {', '.join(sorted(self.predicts(task))) or 'nothing'} of task "
                f"{task!r}, but was asked for {', '.join(lacking)}"
            )
        return task

    def aggregate(self, task: str, outcomes: Sequence[Outcome]) -> float:
        """The task's score: the weighted mean of its metric, higher is better."""
        metric = self.metric(task)
        total = math.fsum(o.weight for o in outcomes)
        return math.fsum(o.values[metric] * o.weight for o in outcomes) / total

    def check_options(self, known: Sequence[str]) -> None:
        """EvaluatorError for an option of a task that is not among ``known``, or any of the experiment's own."""
        for key in self.context.options:
            raise EvaluatorError(f"this evaluator takes no option {key!r} here", where=f"evaluate.{key}")
        for task in self.context.tasks.values():
            for key in task.options:
                if key not in known:
                    raise EvaluatorError(
                        f"there is no option {key!r}", where=f"evaluate.tasks.{task.name}", remedy=nearest(key, known)
                    )

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
        """Hashes of every file (code, YAML, data) that the outcomes depend on, by a name a user would recognise.

        The default is the file of the evaluator's class and the files beside it that it imports.
        """
        return self.hash_files(code_files(Path(inspect.getfile(type(self)))))

    def hash_files(self, files: Iterable[Path]) -> dict[str, str]:
        """SHA-256 of each file by its path below the experiment's folder, or by its own and its folder's name."""
        return hash_files(files, self.context.folder)


class FunctionEvaluator(Evaluator):
    """A plain function as an evaluator: ``my_eval.py@score``.

    The file holds ``score(model, tokenizer, items) -> list[float]``, one finite number an item, higher is better, and
    ``items() -> list[dict]``. An item is plain JSON data with a ``task`` and, if wanted, a ``text`` (what duplicates
    are found by; else all of its data), an ``id`` (else the hash of its data) and a ``split`` (the data's own).
    ``score`` is always called with whole batches of one task and split, in an order that depends on nothing but the
    study's items. A module-level ``auto_class = "AutoModel"`` names another transformers class to load the model with.
    """

    def __init__(self, context: EvaluatorContext, module: ModuleType, name: str):
        super().__init__(context)
        self._path, self._name = Path(str(module.__file__)), name
        self._score: Callable[..., Any] = getattr(module, name)
        self._items: Callable[[], Any] | None = getattr(module, "items", None)
        self.auto_class = getattr(module, "auto_class", type(self).auto_class)
        self._batches: list[list[Item]] = []
        if not callable(self._items):
            raise EvaluatorError(
                f"{name} has no items() beside it",
                where=str(self._path),
                remedy="Define items() -> list[dict] in the same file; each dict needs a 'task'.",
            )
        if context.options:
            key = next(iter(context.options))
            raise EvaluatorError(f"{name} is a function and takes no option {key!r}", where=f"evaluate.{key}")
        for task in context.tasks.values():
            where = f"evaluate.tasks.{task.name}"
            if task.options:
                raise EvaluatorError(
                    f"{name} is a function and takes no task option {next(iter(task.options))!r}", where=where
                )
            if task.metric not in (None, "score"):
                raise EvaluatorError(
                    f"{name} gives one metric, 'score', but the task asks for {task.metric!r}", where=where
                )

    def load(self) -> list[Item]:
        assert self._items is not None
        given = run_user_code(self._items, self._path)
        if not isinstance(given, list | tuple):
            raise EvaluatorError(
                f"items() must give a list of dicts, but gave {type(given).__name__}", where=str(self._path)
            )
        items = [self._item(n, data) for n, data in enumerate(given)]
        have = Counter(item.task for item in items)
        for task in self.context.tasks:
            if not have[task]:
                raise EvaluatorError(
                    f"items() has none of task {task!r}", where=str(self._path), remedy=nearest(task, have)
                )
        items = [item for item in items if item.task in self.context.tasks]
        twice = [i for i, count in Counter(item.id for item in items if "id" in item.data).items() if count > 1]
        if twice:
            raise EvaluatorError(
                f"items() gives the id {twice[0]!r} more than once",
                where=str(self._path),
                remedy="Make ids unique a task.",
            )
        return list({item.id: item for item in items}.values())

    def _item(self, n: int, data: Any) -> Item:
        where = f"{self._path}: items()[{n}]"
        if not isinstance(data, dict) or not isinstance(data.get("task"), str):
            raise EvaluatorError(f"an item must be a dict with a 'task' name, but is {data!r:.200}", where=where)
        try:
            payload = json.dumps(data, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise EvaluatorError(f"an item must be plain JSON data: {error}", where=where) from None
        text = data.get("text", payload)
        identity = f"{data['task']}:{data['id']}" if "id" in data else hashlib.sha256(payload.encode()).hexdigest()
        return Item(identity, data["task"], str(text), data, own_split=data.get("split"))

    def prepare(self, target: Target, items: Sequence[Item]) -> None:
        groups: dict[tuple[str, str], list[Item]] = defaultdict(list)
        for item in sorted(items, key=lambda item: item.id):
            groups[item.task, item.split or ""].append(item)
        size = self.context.batch_size
        self._batches = [group[i : i + size] for _, group in sorted(groups.items()) for i in range(0, len(group), size)]

    def evaluate(self, target: Target, item_ids: Sequence[str]) -> list[Outcome]:
        wanted, values = set(item_ids), {}
        for batch in self._batches:
            if any(item.id in wanted for item in batch):
                values.update(zip((item.id for item in batch), self._score_batch(target, batch), strict=True))
        return [Outcome(i, {"score": values[i]}) for i in item_ids]

    def _score_batch(self, target: Target, batch: Sequence[Item]) -> list[float]:
        copies = [copy.deepcopy(dict(item.data)) for item in batch]
        try:
            scores = self._score(target.model, target.tokenizer, copies)
        except (CandidateError, MemoryError):
            raise
        except Exception as error:
            if type(error).__name__ == "OutOfMemoryError":  # torch's; the worker knows what to do about memory
                raise
            raise CandidateError("error", explain(error, self._path), traceback.format_exc()) from error
        try:
            scores = list(scores)
        except TypeError:
            raise CandidateError("incomplete", f"{self._name} gave {scores!r:.80}, not a list of numbers") from None
        if len(scores) != len(batch):
            raise CandidateError("incomplete", f"{self._name} gave {len(scores)} values for {len(batch)} items")
        values = []
        for item, score in zip(batch, scores, strict=True):
            if score is None:
                raise CandidateError("incomplete", f"{self._name} gave None for item {item.id}")
            try:
                values.append(float(score))
            except (TypeError, ValueError):
                raise CandidateError(
                    "error", f"{self._name} gave {score!r:.80} for item {item.id}, not a number"
                ) from None
            if not math.isfinite(values[-1]):
                raise CandidateError("nan", f"{self._name} gave {values[-1]} for item {item.id}")
        return values

    def fingerprint(self) -> dict[str, str]:
        items = sorted(json.dumps([item.id, dict(item.data)], sort_keys=True) for item in self.load())
        files = self.hash_files(code_files(self._path))
        return {**files, f"items of {self._path.name}": hashlib.sha256("\n".join(items).encode()).hexdigest()}


def load_evaluator(path_at_name: str, context: EvaluatorContext) -> Evaluator:
    """The evaluator that ``file.py`` (its one Evaluator class) or ``file.py@name`` (that class or function) names, or
    that an installed package offers under a name.

    A relative path starts at ``context.folder``. The file is run as a module of its own, under a private name, with its
    folder importable while it runs.

    Raises:
        EvaluatorError: there is no such file or name, it cannot be run, or it is not one evaluator.
    """
    if not names_file(path_at_name):
        return _installed(path_at_name, context)
    file, name = split_reference(path_at_name)
    path = (context.folder / file).resolve()
    module = load_module(path)
    here = {key: value for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
    classes = {k: v for k, v in here.items() if isinstance(v, type) and issubclass(v, Evaluator)}
    if not name:
        if len(classes) != 1:
            functions = sorted(k for k, v in here.items() if inspect.isfunction(v) and k != "items")
            hint = f" or a function ({', '.join(functions)})" if functions else ""
            raise EvaluatorError(
                f"a file named without @ must define exactly one Evaluator, but defines {len(classes)}",
                where=str(path),
                remedy=f"Name a class{hint} of it: {path.name}@NAME." if here else None,
            )
        return _known_needs(run_user_code(lambda: next(iter(classes.values()))(context), path), path)
    found = getattr(module, name, None)
    if isinstance(found, type) and issubclass(found, Evaluator):
        return _known_needs(run_user_code(lambda: found(context), path), path)
    if isinstance(found, type) or not callable(found):
        kind = "is not there" if found is None else "is neither a function nor an Evaluator class"
        names = [k for k, v in here.items() if callable(v) and not k.startswith("_")]
        raise EvaluatorError(f"{name!r} {kind}", where=str(path), remedy=nearest(name, names) if names else None)
    return FunctionEvaluator(context, module, name)


def _known_needs(evaluator: Evaluator, path: Path) -> Evaluator:
    if evaluator.needs not in ("model", "checkpoint"):
        raise EvaluatorError(f"needs is 'model' or 'checkpoint', but is {evaluator.needs!r:.80}", where=str(path))
    return evaluator


def _installed(name: str, context: EvaluatorContext) -> Evaluator:
    found, code = installed.load(EVALUATOR, name)
    path = Path(inspect.getfile(found)) if inspect.isclass(found) or inspect.isfunction(found) else Path(code.package)
    if isinstance(found, type) and issubclass(found, Evaluator):
        return _known_needs(run_user_code(lambda: found(context), path), path)
    if not inspect.isfunction(found):
        raise EvaluatorError(
            f"evaluator {name!r} of the installed package {code.package} is neither a function nor an Evaluator class"
        )
    return FunctionEvaluator(context, sys.modules[found.__module__], found.__name__)


def check_outcomes(outcomes: Sequence[Outcome], item_ids: Sequence[str]) -> None:
    """One outcome for each id, in order, with finite values.

    Raises:
        CandidateError: kind ``incomplete`` (too few or many, out of order, None) or ``nan`` (NaN, inf).
    """
    if len(outcomes) != len(item_ids):
        raise CandidateError("incomplete", f"the evaluator gave {len(outcomes)} outcomes for {len(item_ids)} items")
    for outcome, item_id in zip(outcomes, item_ids, strict=True):
        if not isinstance(outcome, Outcome):
            raise CandidateError("incomplete", f"the evaluator gave {outcome!r:.80} for item {item_id}")
        if outcome.item_id != item_id:
            raise CandidateError(
                "incomplete", f"the evaluator gave item {outcome.item_id} where {item_id} was asked for"
            )
        if not outcome.values:
            raise CandidateError("incomplete", f"the evaluator gave no value for item {item_id}")
        for metric, value in {**outcome.values, "weight": outcome.weight}.items():
            if value is None:
                raise CandidateError("incomplete", f"{metric} of item {item_id} is None")
            if not isinstance(value, numbers.Real):
                raise CandidateError("error", f"{metric} of item {item_id} is {value!r:.80}, not a number")
            if not math.isfinite(value):
                raise CandidateError("nan", f"{metric} of item {item_id} is {value}")


def task_scores(evaluator: Evaluator, items: Sequence[Item], outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Each task's score over those of its ``items`` that have an outcome, in the order of the experiment's tasks.

    Raises:
        CandidateError: a score is not finite (kind ``nan``).
    """
    task_of = {item.id: item.task for item in items}
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[task_of[outcome.item_id]].append(outcome)
    scores = {task: float(evaluator.aggregate(task, groups[task])) for task in evaluator.context.tasks if groups[task]}
    for task, score in scores.items():
        if not math.isfinite(score):
            raise CandidateError("nan", f"the score of task {task} is {score}")
    return scores
