"""How well a language model predicts texts, in bits per byte or as perplexity: for tasks that are corpora.

    evaluate:
      with: evaluators/perplexity.py
      tasks:
        law: {file: texts/law.txt}                      # one or several files, from the experiment's folder
        news: {dataset: {path: json, data_files: texts/news.jsonl, split: train}, column: text}

Items are paragraphs of a file (blank lines part them; ``unit: line`` or ``unit: file``), or the rows of a source that
``datasets.load_dataset`` takes. ``limit`` keeps the first so many.

The metric ``neg_bits_per_byte`` is log2 of a text's probability over its bytes in UTF-8: below 0, higher is better. A
task's score is that of all its texts together (each weighs as many as it has bytes), so that models with other tokens
can be compared. A text longer than the model's context is predicted in windows, as lm-evaluation-harness does
(``loglikelihood_rolling``).

Three more metrics (``metric: neg_perplexity``) are perplexities, below 0 so that higher is better: -exp(N / n), where N
is the negative log-likelihood of all texts of the task together and n the number of their tokens (``neg_perplexity``),
words (``neg_word_perplexity``) or bytes (``neg_byte_perplexity``). No mean over texts gives that number, so their
intervals are bootstrapped over texts. They order models as N does, but a few hard texts move them more than bits.

A search by gradient learns from ``tokens``: the next token at every position of a text, with labels or without.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evomerge import (
    Evaluator,
    EvaluatorContext,
    EvaluatorError,
    Item,
    Likelihoods,
    Outcome,
    Predictions,
    Questionnaire,
    Target,
    TaskSpec,
    answer_loglikelihood,
    token_predictions,
)

METRIC = "neg_bits_per_byte"
PERPLEXITIES = {"neg_perplexity": "tokens", "neg_word_perplexity": "words", "neg_byte_perplexity": "bytes"}
LARGEST = 700.0  # nats a token: exp of more is no number, and a merge that bad is still to have a rank
UNITS = {"paragraph": re.compile(r"\n\s*\n"), "line": re.compile(r"\n"), "file": None}
OPTIONS = ("file", "unit", "dataset", "column", "limit")


def neg_perplexity(loglikelihood: float, count: float) -> float:
    """-exp of the mean negative log-likelihood (in nats) of ``count`` tokens, words or bytes."""
    return -math.exp(min(-loglikelihood / count, LARGEST))


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
        return [self._outcome(self._items[item_id], found[item_id]) for item_id in item_ids]

    def likelihoods(
        self, target: Target, item_ids: Sequence[str], *, alternatives: bool = True
    ) -> Iterator[Likelihoods]:
        """The text's own likelihood: the one answer."""
        for item_id in item_ids:
            text = self._items[item_id].data["text"]
            log, tokens = answer_loglikelihood(target.model, target.tokenizer, None, text)
            yield Likelihoods(log[None], 0, tokens)

    def predicts(self, task: str) -> frozenset[str]:
        return frozenset(("tokens", "labels", "hidden"))

    def predictions(
        self,
        target: Target,
        item_ids: Sequence[str],
        *,
        over: str = "answers",
        labels: bool = False,
        hidden: bool = False,
    ) -> Predictions:
        """The next token at each position of each text, in the windows in which it is scored."""
        items = [self._items[item_id] for item_id in item_ids]
        self.check_predictable(items, over, labels=labels, hidden=hidden)
        texts = [(None, item.data["text"]) for item in items]
        return token_predictions(target.model, target.tokenizer, texts, labels=labels, hidden=hidden)

    def _outcome(self, item: Item, loglikelihood: float) -> Outcome:
        """What one text's log-likelihood in nats comes to, with what a perplexity of many texts is made of."""
        text = item.data["text"]
        size = float(len(text.encode()))
        values = {
            METRIC: loglikelihood / math.log(2) / size,
            "loglikelihood": loglikelihood,
            "tokens": float(self._questions[item.task, item.split or ""].num_tokens(item.id)),
            "words": float(len(re.split(r"\s+", text))),  # as lm-evaluation-harness counts them
            "bytes": size,
        }
        metric = self.metric(item.task)
        if metric in PERPLEXITIES:
            values[metric] = neg_perplexity(loglikelihood, values[PERPLEXITIES[metric]])
        return Outcome(item.id, values, weight=size)

    def default_metric(self, task: str) -> str:
        return METRIC

    def is_item_mean(self, task: str) -> bool:
        return self.metric(task) not in PERPLEXITIES

    def aggregate(self, task: str, outcomes: Sequence[Outcome]) -> float:
        """The weighted mean of bits per byte, or the perplexity of all texts together."""
        if self.is_item_mean(task):
            return super().aggregate(task, outcomes)
        unit = PERPLEXITIES[self.metric(task)]
        total = math.fsum(o.values["loglikelihood"] for o in outcomes)
        return neg_perplexity(total, math.fsum(o.values[unit] for o in outcomes))

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
        known = (METRIC, *PERPLEXITIES)
        if task.metric not in (None, *known):
            remedy = f"Choose one of: {', '.join(known)}."
            raise EvaluatorError(f"there is no metric {task.metric!r}", where=f"{where}.metric", remedy=remedy)
