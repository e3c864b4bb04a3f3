"""Classifiers that share one encoder: texts or images, with a frozen head for each task.

    evaluate:
      with: evaluators/classification.py
      tasks:
        topic: {file: data/topic.jsonl, head: heads/topic.safetensors}             # rows of {"text": ..., "label": ...}
        digits: {file: data/digits.npz, head: heads/digits.safetensors, metric: macro_f1}       # images, labels

Only the encoder is merged; heads stay as they are (as CLIP's zero-shot heads do in papers on merging vision models). A
head file holds ``weight`` (classes x features) and may hold ``bias`` (classes): logits are features x weight^T + bias.
Labels are whole numbers from 0 on, or words if the classes have names: in the head file's metadata, as a JSON list
under ``labels`` (so that names and rows of the head stay together), or in the task's ``labels: [sport, politics]``.

Features are pooled from the model's last hidden state: ``pooling: mean`` over the tokens that are no padding (the
default for texts), ``first`` (the class token; the default for images), or ``pooler`` (the model's own pooled output).
``normalize: true`` scales them to length 1. Texts are cut to ``max_length`` tokens (256). Images are arrays of numbers
(items, channels, height, width); integers are divided by 255, then ``mean`` and ``std`` are applied if given.

Every item has ``acc``, ``loglikelihood`` (of the right class), ``margin`` (its logit less the best wrong one's) and
``neg_entropy`` (of the prediction, in nats; 0 is certain). As a task's ``metric``, ``macro_f1`` and ``mcc``
(Matthews correlation) are computed over all its items. ``limit`` keeps the first so many items.

A search by gradient learns from ``answers``, the head's logits. ``hidden`` are pooled features, before ``normalize``.
They are what adapters are put behind (``surgery``).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evomerge import (
    Evaluator,
    EvaluatorContext,
    EvaluatorError,
    Item,
    Likelihoods,
    Outcome,
    Predictions,
    Target,
    TaskSpec,
)

METRICS = ("acc", "loglikelihood", "margin", "neg_entropy")
AGGREGATED = ("macro_f1", "mcc")
POOLINGS = ("mean", "first", "pooler")
OPTIONS = ("file", "head", "labels", "pooling", "normalize", "max_length", "mean", "std", "limit")


class Classification(Evaluator):
    """Frozen heads on a merged encoder; see the top of this file for what an experiment may say."""

    auto_class = "AutoModel"

    def __init__(self, context: EvaluatorContext):
        super().__init__(context)
        self.check_options(OPTIONS)
        for task in context.tasks.values():
            _check_options(task)
        if all(task.options.get("pooling") != "pooler" for task in context.tasks.values()):
            self.unused = ("pooler.",)
        self._items: dict[str, Item] = {}
        self._batches: list[tuple[list[Item], dict[str, Tensor]]] = []
        self._heads: dict[str, tuple[Tensor, Tensor | None]] = {}

    # --- data ------------------------------------------------------------------------------------------------------

    def load(self) -> list[Item]:
        items: dict[str, Item] = {}
        for name, task in self.context.tasks.items():
            classes = self._head(name)[0].shape[0]
            loaded = self._images(name) if self._path(name, "file").suffix == ".npz" else self._texts(name)
            for item in loaded[: task.options.get("limit")]:
                if not 0 <= item.data["label"] < classes:
                    raise EvaluatorError(
                        f"a label is {item.data['label']}, but the head has the classes 0 to {classes - 1}",
                        where=str(self._path(name, "file")),
                    )
                items.setdefault(item.id, item)
        return list(items.values())

    def _path(self, task: str, key: str) -> Path:
        return self.context.folder / Path(self.context.tasks[task].options[key]).expanduser()

    def _texts(self, task: str) -> list[Item]:
        path, items = self._path(task, "file"), []
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise EvaluatorError(f"{path} cannot be read: {error}", where=f"evaluate.tasks.{task}.file") from None
        for n, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                text, label = str(row["text"]), self._label(task, row["label"])
            except (ValueError, KeyError, TypeError) as error:
                raise EvaluatorError(
                    f"line {n} must be a JSON object with text and label: {error!r}", where=str(path)
                ) from None
            items.append(_item(task, text, {"text": text, "label": label}))
        return items

    def _images(self, task: str) -> list[Item]:
        images, labels = self._arrays(task)
        items = []
        for n, (image, label) in enumerate(zip(images, labels, strict=True)):
            digest = hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()
            items.append(_item(task, digest, {"image": n, "sha256": digest, "label": self._label(task, label.item())}))
        return items

    @functools.cache  # noqa: B019  # lives as long as the evaluator, which is as long as the process
    def _arrays(self, task: str) -> tuple[np.ndarray, np.ndarray]:
        path = self._path(task, "file")
        try:
            with np.load(path, allow_pickle=False) as file:
                images, labels = file["images"], file["labels"]
        except (OSError, ValueError, KeyError) as error:
            raise EvaluatorError(f"{path} must hold the arrays images and labels: {error}", where=str(path)) from None
        if images.ndim != 4 or len(images) != len(labels):
            raise EvaluatorError(
                f"images must be (items, channels, height, width) with a label each, but are {images.shape} with "
                f"{len(labels)} labels",
                where=str(path),
            )
        return images, labels

    def _label(self, task: str, label: Any) -> int:
        names = self._names(task)
        if names and isinstance(label, str):
            if label not in names:
                raise ValueError(f"the label {label!r} is not among {names}")
            return names.index(label)
        if isinstance(label, bool) or not isinstance(label, int):
            raise ValueError(f"the label {label!r} is not a whole number, and neither task nor head names labels")
        return label

    @functools.cache  # noqa: B019
    def _names(self, task: str) -> list[str] | None:
        """The classes' names in the order of the head's rows; None if they have none."""
        from safetensors import safe_open

        path = self._path(task, "head")
        where = f"evaluate.tasks.{task}.labels"
        given = self.context.tasks[task].options.get("labels")
        with safe_open(path, "pt") as file:
            written = (file.metadata() or {}).get("labels")
        if written is None:
            return given
        try:
            names = json.loads(written)
        except ValueError:
            names = None
        if not isinstance(names, list) or len(names) != len(self._head(task)[0]):
            raise EvaluatorError(f"the head's labels must be a JSON list of a name a class: {written}", where=str(path))
        if given and given != names:
            raise EvaluatorError(
                f"the task names its classes {given}, but its head {names}",
                where=where,
                remedy="Leave the task's labels out: the head's are in the order of its rows.",
            )
        return names

    @functools.cache  # noqa: B019
    def _head(self, task: str) -> tuple[Tensor, Tensor | None]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._path(task, "head")
        try:
            tensors = load_file(path)
            weight, bias = tensors["weight"].float(), tensors.get("bias")
        except (OSError, SafetensorError, KeyError) as error:
            raise EvaluatorError(f"{path} is no head: {error!r}", where=f"evaluate.tasks.{task}.head") from None
        if weight.ndim != 2 or len(weight) < 2 or (bias is not None and bias.shape != weight.shape[:1]):
            raise EvaluatorError("weight must be (2 or more classes, features), and bias (classes)", where=str(path))
        return weight, None if bias is None else bias.float()

    # --- evaluation ------------------------------------------------------------------------------------------------

    def prepare(self, target: Target, items: Sequence[Item]) -> None:
        self._items = {item.id: item for item in items}
        self._heads, self._batches = {}, []
        width = target.model.config.hidden_size
        groups: dict[tuple[str, str], list[Item]] = defaultdict(list)
        for item in items:
            groups[item.task, item.split or ""].append(item)
        for (task, _), group in sorted(groups.items()):
            weight, bias = self._head(task)
            if weight.shape[1] != width:
                raise EvaluatorError(
                    f"the head has {weight.shape[1]} features, but the model gives {width}",
                    where=str(self._path(task, "head")),
                )
            self._heads[task] = weight.to(target.device), None if bias is None else bias.to(target.device)
            group.sort(key=lambda item: (-len(item.data.get("text", "")), item.id))  # texts of like length together
            for start in range(0, len(group), self.context.batch_size):
                batch = group[start : start + self.context.batch_size]
                self._batches.append((batch, self._inputs(target, batch)))

    def _inputs(self, target: Target, batch: Sequence[Item]) -> dict[str, Tensor]:
        """What the model is called with: token ids and mask, or pixel_values (items, channels, height, width)."""
        options = self.context.tasks[batch[0].task].options
        if "text" in batch[0].data:
            if target.tokenizer is None:
                raise EvaluatorError("the base has no tokenizer, so its tasks cannot be texts")
            length = options.get("max_length", 256)
            texts = [item.data["text"] for item in batch]
            encoded = target.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
            return {key: value.to(target.device) for key, value in encoded.items()}
        images, _ = self._arrays(batch[0].task)
        chosen = images[[item.data["image"] for item in batch]]
        pixels = torch.from_numpy(chosen).to(torch.float32)
        if np.issubdtype(images.dtype, np.integer):
            pixels /= 255
        for key, operation in (("mean", torch.sub), ("std", torch.div)):
            if key in options:
                pixels = operation(pixels, torch.tensor(options[key], dtype=torch.float32).reshape(1, -1, 1, 1))
        return {"pixel_values": pixels.to(target.device, target.model.dtype)}

    @torch.no_grad()
    def evaluate(self, target: Target, item_ids: Sequence[str]) -> list[Outcome]:
        wanted, outcomes = set(item_ids), {}
        for batch, inputs in self._batches:
            if any(item.id in wanted for item in batch):
                logits = self._logits(target, batch[0].task, inputs).double()
                labels = torch.tensor([item.data["label"] for item in batch], device=logits.device)
                for item, values in zip(batch, _values(logits, labels), strict=True):
                    outcomes[item.id] = Outcome(item.id, values)
        return [outcomes[item_id] for item_id in item_ids]

    def likelihoods(
        self, target: Target, item_ids: Sequence[str], *, alternatives: bool = True
    ) -> Iterator[Likelihoods]:
        """Each class's probability by the frozen head."""
        for item_id in item_ids:
            item = self._items[item_id]
            logits = self._logits(target, item.task, self._inputs(target, [item]))[0]
            yield Likelihoods(logits.log_softmax(-1), item.data["label"])

    def predicts(self, task: str) -> frozenset[str]:
        return frozenset(("answers", "labels", "hidden"))

    def adapts(self, task: str) -> bool:
        return True

    def predictions(
        self,
        target: Target,
        item_ids: Sequence[str],
        *,
        over: str = "answers",
        labels: bool = False,
        hidden: bool = False,
    ) -> Predictions:
        """Each item's class by the frozen head; ``hidden`` are the features that are pooled for it."""
        items = [self._items[item_id] for item_id in item_ids]
        task = self.check_predictable(items, over, labels=labels, hidden=hidden)
        features = self._features(target, task, self._inputs(target, items))
        logits = self._classify(task, target.adapted(task, features))
        ones = torch.ones(len(items), dtype=logits.dtype, device=logits.device)
        right = torch.tensor([item.data["label"] for item in items], device=logits.device) if labels else None
        return Predictions(logits, ones, right, features if hidden else None, ones if hidden else None)

    def _logits(self, target: Target, task: str, inputs: dict[str, Tensor]) -> Tensor:
        """(items, classes)"""
        return self._classify(task, target.adapted(task, self._features(target, task, inputs)))

    def _features(self, target: Target, task: str, inputs: dict[str, Tensor]) -> Tensor:
        """(items, features), pooled, in float32 or wider"""
        options = self.context.tasks[task].options
        output = target.model(**inputs)
        pooling = options.get("pooling") or ("mean" if "input_ids" in inputs else "first")
        hidden = _wide(output.last_hidden_state)
        if pooling == "pooler":
            pooled = getattr(output, "pooler_output", None)
            if pooled is None:
                raise EvaluatorError("the model has no pooled output", where=f"evaluate.tasks.{task}.pooling")
            return _wide(pooled)
        if pooling == "first":
            return hidden[:, 0]
        mask = inputs.get("attention_mask", torch.ones(hidden.shape[:2], device=hidden.device)).unsqueeze(-1)
        return (hidden * mask).sum(1) / mask.sum(1)

    def _classify(self, task: str, features: Tensor) -> Tensor:
        """(items, classes) from pooled features (items, features)"""
        if self.context.tasks[task].options.get("normalize", False):
            features = torch.nn.functional.normalize(features, dim=-1)
        weight, bias = self._heads[task]
        return torch.nn.functional.linear(features, weight.to(features), None if bias is None else bias.to(features))

    # --- scores ----------------------------------------------------------------------------------------------------

    def default_metric(self, task: str) -> str:
        return "acc"

    def is_item_mean(self, task: str) -> bool:
        return self.metric(task) not in AGGREGATED

    def aggregate(self, task: str, outcomes: Sequence[Outcome]) -> float:
        if self.is_item_mean(task):
            return super().aggregate(task, outcomes)
        pairs = np.array([(o.values["label"], o.values["prediction"]) for o in outcomes], dtype=np.intp)
        return (matthews if self.metric(task) == "mcc" else macro_f1)(pairs)

    def fingerprint(self) -> dict[str, str]:
        """This file, the data and the heads."""
        paths = {self._path(task, key) for task in self.context.tasks for key in ("file", "head")}
        return {**super().fingerprint(), **self.hash_files(sorted(paths))}


# scikit-learn has both, at a millisecond a call, and a leaderboard's bootstrap asks some ten thousand times.


def macro_f1(pairs: np.ndarray) -> float:
    """The mean over classes of F1 = 2 TP / (labelled + predicted), from (items, 2) labels and predictions.

    A class that is neither labelled nor predicted does not count (as in scikit-learn).
    """
    size = int(pairs.max()) + 1
    hits = np.bincount(pairs[pairs[:, 0] == pairs[:, 1], 0], minlength=size)
    both = np.bincount(pairs[:, 0], minlength=size) + np.bincount(pairs[:, 1], minlength=size)
    return float((2 * hits[both > 0] / both[both > 0]).mean())


def matthews(pairs: np.ndarray) -> float:
    """Matthews correlation for any number of classes (Gorodkin 2004, equation 8), from (items, 2); 0 if undefined."""
    size, n = int(pairs.max()) + 1, len(pairs)
    labelled, predicted = (np.bincount(column, minlength=size).astype(np.float64) for column in pairs.T)
    right = float((pairs[:, 0] == pairs[:, 1]).sum())
    spread = (n**2 - predicted @ predicted) * (n**2 - labelled @ labelled)
    return float((right * n - labelled @ predicted) / np.sqrt(spread)) if spread > 0 else 0.0


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _item(task: str, text: str, data: dict[str, Any]) -> Item:
    identity = hashlib.sha256(json.dumps([task, text, data["label"]]).encode()).hexdigest()
    return Item(identity, task, text, data)


def _values(logits: Tensor, labels: Tensor) -> list[dict[str, float]]:
    """Each item's metrics, from logits (items, classes) in float64."""
    logs = logits.log_softmax(-1)
    right = logits.gather(1, labels[:, None])[:, 0]
    wrong = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    predictions = logits.argmax(1)
    columns = {
        "acc": (predictions == labels).double(),
        "loglikelihood": logs.gather(1, labels[:, None])[:, 0],
        "margin": right - wrong,
        "neg_entropy": (logs.exp() * logs).sum(1),
        "label": labels.double(),
        "prediction": predictions.double(),
    }
    rows = torch.stack(list(columns.values()), dim=1).tolist()
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _check_options(task: TaskSpec) -> None:
    where = f"evaluate.tasks.{task.name}"
    for key in ("file", "head"):
        if not isinstance(task.options.get(key), str):
            raise EvaluatorError(f"{key} must name a file", where=f"{where}.{key}")
    if task.options.get("pooling", "mean") not in POOLINGS:
        raise EvaluatorError(f"pooling is one of {', '.join(POOLINGS)}", where=f"{where}.pooling")
    if task.metric not in (None, *METRICS, *AGGREGATED):
        raise EvaluatorError(
            f"there is no metric {task.metric!r}", where=where, remedy=f"Known: {', '.join((*METRICS, *AGGREGATED))}."
        )
