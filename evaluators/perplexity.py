"""How well a language model predicts texts, in bits per byte: for tasks that are corpora.

    evaluate:
      with: evaluators/perplexity.py
      tasks:
        law: {file: texts/law.txt}                      # one or several files, from the experiment's folder
        news: {dataset: {path: json, data_files: texts/news.jsonl, split: train}, column: text}

Items are paragraphs of a file (blank lines part them; ``unit: line`` or ``unit: file``), or the rows of a source that
``datasets.load_dataset`` takes. ``limit`` keeps the first so many.

The metric ``neg_bits_per_byte`` is log2 of a text's probability over its bytes in UTF-8: below 0, higher is better. A
task's score is that of all its texts together (each weighs as many as it has bytes), so that models with other tokens
can be compared. exp2 of (-score x bytes per token) is the perplexity of a token. A text longer than the model's
context is predicted in windows, as lm-evaluation-harness does (``loglikelihood_rolling``).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evomerge import Evaluator, EvaluatorContext, EvaluatorError, Item, Outcome, Questionnaire, Target, TaskSpec

METRIC = "neg_bits_per_byte"
UNITS = {"paragraph": re.compile(r"\n\s*\n"), "line": re.compile(r"\n"), "file": None}
OPTIONS = ("file", "unit", "dataset", "column", "limit")


class Perplexity(Evaluator):
    """Bits per byte of texts; see the top of this file for what an experiment may say."""

    def __init__(self, context: EvaluatorContext):
        super().__init__(context)
        self.check_options(OPTIONS)
        for task in context.tasks.values():
            self._check_options(task)
        self._items: dict[str, Item] = {}
        self._questions: dict[tuple[str, str], Questionnaire] = {}  # of each task and split

    def load(self) -> list[Item]:
        items: dict[str, Item] = {}
        for name, task in self.context.tasks.items():
            texts = [text for text in self._texts(task) if text.strip()][: task.options.get("limit")]
            if not texts:
                raise EvaluatorError("there is no text", where=f"evaluate.tasks.{name}")
            for text in texts:
                digest = hashlib.sha256(json.dumps([name, text]).encode()).hexdigest()
                items.setdefault(digest, Item(digest, name, text, {"text": text}))
        return list(items.values())

    def prepare(self, target: Target, items: Sequence[Item]) -> None:
        self._items = {item.id: item for item in items}
        self._questions = {}
        for item in items:
            key = (item.task, item.split or "")
            if key not in self._questions:
                self._questions[key] = Questionnaire(target.model, target.tokenizer, batch_size=self.context.batch_size)
            self._questions[key].ask_text(item.id, item.data["text"])

    def evaluate(self, target: Target, item_ids: Sequence[str]) -> list[Outcome]:
        found: dict[str, float] = {}
        for key, questions in self._questions.items():
            wanted = [i for i in item_ids if (self._items[i].task, self._items[i].split or "") == key]
            if wanted:
                found |= {i: answers[0] for i, answers in questions.answers(target.model, wanted).items()}
        outcomes = []
        for item_id in item_ids:
            size = len(self._items[item_id].data["text"].encode())
            outcomes.append(Outcome(item_id, {METRIC: found[item_id] / math.log(2) / size}, weight=float(size)))
        return outcomes

    def default_metric(self, task: str) -> str:
        return METRIC

    def fingerprint(self) -> dict[str, str]:
        """This file, and the texts."""
        texts = hashlib.sha256("".join(item.id for item in self.load()).encode()).hexdigest()
        return {**super().fingerprint(), "texts": texts}

    def _texts(self, task: TaskSpec) -> list[str]:
        options, where = task.options, f"evaluate.tasks.{task.name}"
        if "dataset" in options:
            return self._rows(options, where)
        texts: list[str] = []
        files = options["file"] if isinstance(options["file"], list) else [options["file"]]
        for file in files:
            path = self.context.folder / Path(file).expanduser()
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise EvaluatorError(f"{path} cannot be read: {error}", where=f"{where}.file") from None
            pattern = UNITS[options.get("unit", "paragraph")]
            texts += [text] if pattern is None else pattern.split(text)
        return texts

    def _rows(self, options: Any, where: str) -> list[str]:
        import datasets

        source, column = dict(options["dataset"]), options.get("column", "text")
        for key in ("data_files", "data_dir"):
            if isinstance(source.get(key), str) and "://" not in source[key]:
                source[key] = str(self.context.folder / source[key])
        try:
            rows = datasets.load_dataset(**{"split": "train", **source})
            return [str(text) for text in rows[column]]
        except Exception as error:  # datasets raises all kinds
            raise EvaluatorError(
                f"the data set {source} has no texts in the column {column!r}: {error}",
                where=f"{where}.dataset",
                remedy="Its keys are those of datasets.load_dataset; `column` names the texts.",
            ) from error

    @staticmethod
    def _check_options(task: TaskSpec) -> None:
        where = f"evaluate.tasks.{task.name}"
        if ("file" in task.options) == ("dataset" in task.options):
            raise EvaluatorError("exactly one of file and dataset must be given", where=where)
        if task.options.get("unit", "paragraph") not in UNITS:
            raise EvaluatorError(f"unit is one of {', '.join(UNITS)}", where=f"{where}.unit")
        if task.metric not in (None, METRIC):
            raise EvaluatorError(f"the only metric is {METRIC}, but the task asks for {task.metric!r}", where=where)
