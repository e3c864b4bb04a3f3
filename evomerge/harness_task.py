"""One lm-eval task: its options, documents, prompts and metrics, by lm-eval's own Task API."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evomerge.errors import EvaluatorError, nearest
from evomerge.evaluation import EvaluatorContext, Item, Outcome, TaskSpec
from evomerge.harness_index import TaskFinder, quiet, task_files
from evomerge.questions import Questionnaire
from evomerge.splits import normalise_text

FEWSHOT_SEED = 1234  # lm_eval.simple_evaluate's default
OPTIONS = ("include_path",)
TASK_OPTIONS = (
    "task", "num_fewshot", "limit", "data_splits", "apply_chat_template", "system_instruction", "fewshot_as_multiturn",
    "generation_kwargs", "confirm_run_unsafe_code",
)  # fmt: skip
DATA_SPLITS = ("test", "validation", "train")  # a document in two of them counts for the first
INSTEAD = {
    "perplexity": "loglikelihood",
    "word_perplexity": "loglikelihood_per_word",
    "byte_perplexity": "loglikelihood_per_byte",
    "bits_per_byte": "loglikelihood_per_byte",
}
OF_A_WHOLE_SET = ("f1", "mcc", "brier_score", "likelihood", "bleu", "chrf", "ter")  # not numbers item by item


def harness_tasks(context: EvaluatorContext, also: Sequence[str] = ()) -> dict[str, HarnessTask]:
    """The lm-eval task behind each task of the experiment, with its documents loaded.

    Args:
        also: options of the experiment, beyond this module's, that somebody else takes.

    Raises:
        EvaluatorError: an option or a task is unknown, or a task cannot be loaded or scored.
    """
    known = (*OPTIONS, *also)
    for key in context.options:
        if key not in known:
            raise EvaluatorError(f"there is no option {key!r}", where=f"evaluate.{key}", remedy=nearest(key, known))
    with quiet():
        finder = TaskFinder(context.options.get("include_path") or [], context.folder)
        return {name: HarnessTask(spec, finder) for name, spec in context.tasks.items()}


class HarnessTask:
    """One task of an experiment and the lm-eval task behind it.

    Attributes:
        generation: (most new tokens, stop strings); (0, ()) for a task that does not generate.
        metric, default_metric: names in the outcomes' values.
        aggregations: of those metrics whose aggregation is not a mean, by name.
        files: the YAML and Python files that define the task.
    """

    def __init__(self, spec: TaskSpec, finder: TaskFinder):
        from lm_eval.api.task import ConfigurableTask

        self.spec, self.options = spec, dict(spec.options)
        self.where = f"evaluate.tasks.{spec.name}"
        for key in self.options:
            if key not in TASK_OPTIONS:
                remedy = nearest(key, (*TASK_OPTIONS, "weight", "metric"))
                raise EvaluatorError(f"there is no option {key!r}", where=f"{self.where}.{key}", remedy=remedy)
        self.lm, path = finder.find(self.options.get("task", spec.name), self.where)
        if not isinstance(self.lm, ConfigurableTask):
            raise EvaluatorError("tasks that are Python classes cannot be run, only YAML ones", where=self.where)
        self.files = task_files(path)
        config = self.lm.config
        if getattr(self.lm, "MULTIMODAL", False):
            raise EvaluatorError("the task needs images or sound; only text tasks can be run", where=self.where)
        if getattr(self.lm, "UNSAFE_CODE", False) and not self.options.get("confirm_run_unsafe_code"):
            remedy = "Say confirm_run_unsafe_code: true for this task if you accept that."
            raise EvaluatorError("the task runs code that the model writes", where=self.where, remedy=remedy)
        self.kind: str = str(self.lm.OUTPUT_TYPE)
        self.num_fewshot = self._number("num_fewshot", config.num_fewshot or 0, least=0)
        self.limit = self._number("limit", None, least=1)
        if self.options.get("fewshot_as_multiturn") and not self.options.get("apply_chat_template"):
            raise EvaluatorError("fewshot_as_multiturn needs apply_chat_template: true", where=self.where)
        self.generation = self._generation() if self.kind == "generate_until" else (0, ())
        self.docs = self._documents()
        self.filters = [f.name for f in self.lm._filters]
        self.aggregations, self.default_metric = self._metrics()
        self.metric = self.default_metric if spec.metric is None else spec.metric
        self._pool = list(self.lm.sampler.df) if self.num_fewshot else []

    def _number(self, key: str, default: int | None, *, least: int) -> Any:
        value = self.options.get(key, default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise EvaluatorError(f"must be a whole number from {least}, but is {value!r}", where=f"{self.where}.{key}")
        return value

    def _generation(self) -> tuple[int, tuple[str, ...]]:
        """(most new tokens, stop strings); refuses what is not greedy, since an outcome must not be a draw."""
        from lm_eval.models.utils import normalize_gen_kwargs

        if "generation_kwargs" in self.options:
            self.lm.set_config("generation_kwargs", dict(self.options["generation_kwargs"]), update=True)
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(dict(self.lm.config.generation_kwargs or {})))
        if kwargs.get("do_sample") or kwargs.get("temperature", 0.0) > 0 or kwargs.get("num_beams", 1) > 1:
            remedy = "Say generation_kwargs: {do_sample: false, temperature: 0.0} for this task."
            raise EvaluatorError(f"only greedy generation can be scored, not {kwargs}", where=self.where, remedy=remedy)
        return int(kwargs["max_gen_toks"]), tuple(str(stop) for stop in kwargs["until"])

    def _documents(self) -> dict[str, list[dict[str, Any]]]:
        lm = self.lm
        have: dict[str, Any] = {
            "test": lm.test_docs if lm.has_test_docs() else None,
            "validation": lm.validation_docs if lm.has_validation_docs() else None,
            "train": lm.training_docs if lm.has_training_docs() else None,
        }
        asked = self.options.get("data_splits", [s for s in ("test", "validation") if have[s]])
        asked = [asked] if isinstance(asked, str) else asked
        for split in asked:
            if not have.get(split):
                there = [s for s in DATA_SPLITS if have[s]]
                raise EvaluatorError(
                    f"the task has no data split {split!r}", where=self.where, remedy=nearest(str(split), there)
                )
        return {split: list(have[split]())[: self.limit] for split in DATA_SPLITS if split in asked}

    def _metrics(self) -> tuple[dict[str, Any], str]:
        """Aggregations that are not a mean, by metric; and the default metric. Checks the experiment's choice."""
        from lm_eval.api.metrics import mean

        better, aggregation = self.lm.higher_is_better(), self.lm.aggregation()
        own_code = callable(self.lm.config.process_results)
        usable: dict[str, Any] = {}
        refused: dict[str, str] = {}
        for base in self.lm._metric_fn_list:
            for metric in self._names(base):
                if base in INSTEAD and not own_code:
                    usable[INSTEAD[base]] = mean
                    refused[metric] = f"is lower-is-better; {INSTEAD[base]} orders models the other way round"
                elif base in OF_A_WHOLE_SET and not own_code:
                    refused[metric] = "is no number item by item"
                elif not better.get(base, True):
                    refused[metric] = "is lower-is-better"
                else:
                    usable[metric] = aggregation.get(base, mean)
        default = next(iter(usable), None)
        if self.kind in ("multiple_choice", "loglikelihood"):
            usable |= dict.fromkeys(("loglikelihood", "margin")[: 2 if self.kind == "multiple_choice" else 1], mean)
        chosen = self.spec.metric if self.spec.metric is not None else default
        if chosen is None:
            raise EvaluatorError("none of the task's metrics can be used", where=self.where, remedy=str(refused))
        if chosen in refused:
            remedy = f"Choose one of: {', '.join(usable)}."
            raise EvaluatorError(f"{chosen} {refused[chosen]}", where=f"{self.where}.metric", remedy=remedy)
        if chosen not in usable and not own_code:
            remedy = nearest(str(chosen), usable)
            raise EvaluatorError(f"the task has no metric {chosen!r}", where=f"{self.where}.metric", remedy=remedy)
        return {name: how for name, how in usable.items() if how is not mean}, str(default if default else chosen)

    def _names(self, metric: str) -> list[str]:
        """A metric's names in outcomes: its own with one filter, "metric,filter" with several."""
        return [metric] if len(self.filters) == 1 else [f"{metric},{name}" for name in self.filters]

    def items(self) -> list[Item]:
        """The documents as items; of identical ones the first."""
        found: dict[str, Item] = {}
        for split, docs in self.docs.items():
            for i, doc in enumerate(docs):
                identity = hashlib.sha256(_plain_json([self.spec.name, doc]).encode()).hexdigest()
                if identity not in found:
                    data = {"data_split": split, "index": i}
                    found[identity] = Item(identity, self.spec.name, self._text(doc), data, own_split=split)
        return list(found.values())

    @functools.cached_property
    def _choices_differ(self) -> bool:
        docs = [doc for docs in self.docs.values() for doc in docs]
        return len({tuple(map(str, self.lm.doc_to_choice(doc))) for doc in docs}) > 1

    @functools.cached_property
    def _template(self) -> Any:
        """doc_to_text where it is a template, compiled once: lm-eval compiles it anew for every document (0.5 ms)."""
        from lm_eval.utils import env

        text = self.lm.config.doc_to_text
        plain = isinstance(text, str) and text not in self.lm.features and self.lm.prompt is None
        return env.from_string(text) if plain else None

    def _text(self, doc: Mapping[str, Any]) -> str:
        """The document's own part of the prompt, and its choices (in no order) where they tell documents apart."""
        if self.lm.multiple_input:
            return "\n".join(map(str, self.lm.doc_to_choice(doc)))
        parts = [self._template.render(**doc) if self._template else str(self.lm.doc_to_text(doc))]
        if self.kind == "multiple_choice" and self._choices_differ:
            parts += sorted(map(str, self.lm.doc_to_choice(doc)))
        elif self.kind in ("loglikelihood", "loglikelihood_rolling"):
            parts.append(str(self.lm.doc_to_target(doc)))
        return "\n".join(parts)

    def data_hash(self) -> str:
        rows = [_plain_json(doc) for docs in [*self.docs.values(), self._pool] for doc in docs]
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()

    def separate_fewshot(self, items: Sequence[Item]) -> None:
        """Take the items of the study, and documents with the same text, out of the few-shot examples."""
        if not self.num_fewshot:
            return
        taken = {normalise_text(item.text) for item in items}
        pool = [doc for doc in self._pool if normalise_text(self._example_text(doc)) not in taken]
        need = self.num_fewshot + int(self._draws_one_more())
        if len(pool) < need:
            raise EvaluatorError(
                f"{self.num_fewshot} few-shot examples must come from none of the items, but {len(pool)} of "
                f"{len(self._pool)} examples are left ({need} needed)",
                where=f"{self.where}.num_fewshot",
                remedy="Give the task a fewshot_split or training_split of its own, or ask for fewer items or shots.",
            )
        self.lm.sampler.replace_df(pool)

    def _example_text(self, doc: Mapping[str, Any]) -> str:
        try:
            return self._text(doc)
        except Exception:  # an example written by hand may have other fields than the documents
            return str(self.lm.doc_to_text(doc, self.lm.fewshot_cfg.doc_to_text))

    def _draws_one_more(self) -> bool:
        """lm-eval's rule (ConfigurableTask.fewshot_context): one more is drawn where it could be the document."""
        return self.lm.fewshot_cfg.split == self.lm.config.test_split

    def instances(self, items: Sequence[Item], tokenizer: Any) -> dict[str, list[Any]]:
        """lm-eval's request instances of each item, by item id.

        Documents are gone through in their order, so that examples are drawn as ``simple_evaluate`` draws them.
        """
        chat = bool(self.options.get("apply_chat_template"))
        template = functools.partial(_chat_text, tokenizer, self.where) if chat else None
        by_place = {(item.data["data_split"], item.data["index"]): item for item in items}
        result: dict[str, list[Any]] = {}
        for split, docs in self.docs.items():
            self.lm.set_fewshot_seed(FEWSHOT_SEED)
            for i, doc in enumerate(docs):
                item = by_place.get((split, i))
                if item is None:
                    if self.num_fewshot:
                        self.lm.sampler.sample(n=self.num_fewshot, eval_doc=doc if self._draws_one_more() else None)
                    continue
                context = self.lm.fewshot_context(
                    doc=doc,
                    num_fewshot=self.num_fewshot,
                    system_instruction=self.options.get("system_instruction"),
                    apply_chat_template=chat,
                    fewshot_as_multiturn=bool(self.options.get("fewshot_as_multiturn")),
                    chat_template=template,
                    gen_prefix=self.lm.doc_to_prefix(doc),
                )
                made = self.lm.construct_requests(
                    doc=doc,
                    ctx=context,
                    metadata=(self.spec.name, i, self.lm.config.repeats),
                    apply_chat_template=chat,
                    chat_template=template,
                )
                result[item.id] = sorted(made, key=lambda m: m.idx) if isinstance(made, list) else [made]
        return result

    def ask(self, questions: Questionnaire, item: Item, instances: Sequence[Any]) -> None:
        """Put an item's requests to a model's questionnaire."""
        if self.kind == "generate_until":
            questions.ask_prompts(item.id, [instance.args[0] for instance in instances])
        elif self.kind == "loglikelihood_rolling":
            questions.ask_text(item.id, instances[0].args[0])
        else:
            questions.ask_pairs(item.id, [instance.args[:2] for instance in instances])

    def outcome(self, item_id: str, instances: Sequence[Any], answers: Sequence[Any]) -> Outcome:
        """What lm-eval's filters and process_results make of a model's ``answers``: all that are numbers."""
        instances = [copy.copy(instance) for instance in instances]
        for instance, answer in zip(instances, answers, strict=True):
            instance.resps, instance.filtered_resps = [answer] * (instance.repeats or 1), {}
        doc = instances[0].doc
        values: dict[str, float] = {}
        sizes: dict[str, float] = {}
        for ensemble in self.lm._filters:
            ensemble.apply(instances)
            results = self.lm.process_results(doc, [i.filtered_resps[ensemble.name] for i in instances])
            for base, value in results.items():
                name = base if len(self.filters) == 1 else f"{base},{ensemble.name}"
                if base in INSTEAD and not callable(self.lm.config.process_results):
                    total, size = value if isinstance(value, tuple) else (value, 1.0)
                    values[INSTEAD[base]], sizes[INSTEAD[base]] = float(total) / max(size, 1), float(size)
                elif isinstance(value, (numbers.Real, np.bool_)):
                    values[name] = float(value)
        for name, value in self._fine_values(doc, instances).items():
            values.setdefault(name, value)
        if self.metric not in values:
            raise EvaluatorError(
                f"process_results gives no number {self.metric!r}, but {', '.join(values) or 'none at all'}",
                where=f"{self.where}.metric",
            )
        return Outcome(item_id, values, weight=sizes.get(self.metric, 1.0))

    def answer_pairs(self, item: Item, instances: Sequence[Any]) -> tuple[list[tuple[str | None, str]], int]:
        """(context, continuation) of each possible answer, and which is right: what a loss is made of.

        The choices of a multiple-choice task; for the others the one right answer. That of a task that generates is its
        target, and that of a rolling likelihood the whole text, without a context (None).

        Raises EvaluatorError if the document has no right answer.
        """
        doc = instances[0].doc
        if self.kind == "multiple_choice":
            right = self._right(doc)
            if not right:
                raise EvaluatorError(f"item {item.id} has no right choice, so that it has no loss", where=self.where)
            return [*self.choices(instances)], right[0]
        if self.kind == "loglikelihood_rolling":
            return [(None, instances[0].args[0])], 0
        if self.kind == "loglikelihood":
            return [instances[0].args[:2]], 0
        answer = self.lm.doc_to_target(doc)
        answer = answer[0] if isinstance(answer, list) and answer else answer
        if not isinstance(answer, str) or not answer:
            raise EvaluatorError(f"item {item.id} has no target, so that it has no loss", where=self.where)
        return [(instances[0].args[0], f"{self.lm.config.target_delimiter}{answer}")], 0

    def choices(self, instances: Sequence[Any]) -> list[tuple[str, str]]:
        """(context, continuation) of each choice of a multiple-choice document. No label is read."""
        return [instance.args[:2] for instance in instances[: len(self.lm.doc_to_choice(instances[0].doc))]]

    def prompts(self, instances: Sequence[Any]) -> list[str]:
        """What the model reads before it answers: one text, or those that are to be chosen from where the choices are
        the contexts. No label is read. A space at the end is the answer's, except where the model itself writes on."""
        if self.kind == "generate_until":
            return [instances[0].args[0]]
        pairs = self.choices(instances) if self.kind == "multiple_choice" else [instances[0].args[:2]]
        return list(dict.fromkeys(context.rstrip() for context, _ in pairs))

    def _right(self, doc: Any) -> list[int]:
        """The right choices of a multiple-choice document."""
        choices = self.lm.doc_to_choice(doc)
        gold = self.lm.doc_to_text(doc) if self.lm.multiple_input else self.lm.doc_to_target(doc)
        golds = gold if isinstance(gold, list) else [gold]
        right = [choices.index(g) if isinstance(g, str) and g in choices else g for g in golds]
        return [g for g in right if isinstance(g, int) and 0 <= g < len(choices)]

    def _fine_values(self, doc: Any, instances: Sequence[Any]) -> dict[str, float]:
        if self.kind == "loglikelihood":
            return {"loglikelihood": instances[0].resps[0][0]}
        if self.kind != "multiple_choice":
            return {}
        values = [instance.resps[0][0] for instance in instances[: len(self.lm.doc_to_choice(doc))]]
        right = self._right(doc)
        wrong = [value for i, value in enumerate(values) if i not in right]
        if not right or not wrong:
            return {}
        best = max(values[g] for g in right)
        return {"loglikelihood": best, "margin": best - max(wrong)}


def _chat_text(tokenizer: Any, where: str, history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """HFLM.apply_chat_template: without the system turn where the template does not know one."""
    from jinja2.exceptions import TemplateError

    render = functools.partial(
        tokenizer.apply_chat_template,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=not add_generation_prompt,
    )
    if not getattr(tokenizer, "chat_template", None):
        remedy = "Leave apply_chat_template out."
        raise EvaluatorError("the base's tokenizer has no chat template", where=where, remedy=remedy)
    try:
        return render(history)
    except TemplateError:
        return render([message for message in history if message["role"] != "system"])


def _plain_json(data: Any) -> str:
    return json.dumps(data, sort_keys=True, default=str, ensure_ascii=False)
