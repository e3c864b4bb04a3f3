"""lm-evaluation-harness tasks as an evaluator.

    evaluate:
      with: evaluators/harness.py
      include_path: tasks            # folder(s) of task YAML, from the experiment's folder; lm-eval's own come after
      tasks:
        add: {}
        gsm5: {task: gsm8k, num_fewshot: 5, limit: 2000, metric: "exact_match,strict-match"}

Documents, prompts, few-shot examples, filters and per-item metrics are lm-eval's own (its Task API: fewshot_context,
construct_requests, process_results); only the model is run by evomerge's engine. Few-shot examples are drawn as
``lm_eval.simple_evaluate`` draws them with its default seed, so the prompts are the same as its, with one exception:
examples never come from items of this study, nor from documents with the same text.

Items are the documents of a task's validation and test splits (``data_splits`` names others; ``split: {search:
validation, test: test}`` keeps them apart). Scores are higher-is-better: a metric that is not is refused; instead of
perplexities there are the log-likelihoods they are made of, which order models the other way round:

    perplexity                      loglikelihood            mean of the items' log-likelihoods (nats)
    word_perplexity                 loglikelihood_per_word   weighted by the items' words
    byte_perplexity, bits_per_byte  loglikelihood_per_byte   weighted by the items' bytes

Multiple-choice items also have ``loglikelihood`` (of the right choice) and ``margin`` (that less the best wrong
choice's: above 0 where it is right, near 0 at a tie), both finer than accuracy.

A search by gradient learns from ``answers`` of multiple-choice tasks: the choices' log-likelihoods. All tasks have
``tokens``: the next token at the positions that predict the right choice, the target or the text. Without labels it is
the first token after the prompt, where the model begins its answer; for a text (rolling likelihood) nothing changes.

A task's options: ``task`` (lm-eval's name or a YAML file, if not the experiment's name for it), ``num_fewshot``,
``limit`` (the first so many documents of each data split), ``metric``, ``weight``, ``data_splits`` (of test,
validation, train), ``apply_chat_template``, ``system_instruction``, ``fewshot_as_multiturn``, ``generation_kwargs``,
``confirm_run_unsafe_code``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from evomerge import (
    EvaluatorContext,
    HarnessEvaluator,
    Item,
    Likelihoods,
    Outcome,
    Predictions,
    Questionnaire,
    Target,
    answer_loglikelihood,
    answer_predictions,
    prompt_predictions,
    token_predictions,
)


class Harness(HarnessEvaluator):
    """lm-eval tasks on the resident model; see the top of this file for what an experiment may say."""

    def __init__(self, context: EvaluatorContext):
        super().__init__(context)
        self._items: dict[str, Item] = {}
        self._instances: dict[str, list[Any]] = {}  # lm-eval's requests of each item
        self._questions: dict[tuple[str, str], Questionnaire] = {}  # of each task and split

    def prepare(self, target: Target, items: Sequence[Item]) -> None:
        self.check(items)
        self._items = {item.id: item for item in items}
        self._instances, self._questions = {}, {}
        for name, task in self.tasks.items():
            mine = [item for item in items if item.task == name]
            instances = task.instances(mine, target.tokenizer)
            self._instances |= instances
            most, stop = task.generation
            for item in mine:
                key = (name, item.split or "")
                if key not in self._questions:
                    self._questions[key] = Questionnaire(
                        target.model,
                        target.tokenizer,
                        batch_size=self.context.batch_size,
                        max_tokens=most,
                        stop=stop,
                    )
                task.ask(self._questions[key], item, instances[item.id])

    def evaluate(self, target: Target, item_ids: Sequence[str]) -> list[Outcome]:
        wanted: dict[tuple[str, str], list[str]] = defaultdict(list)
        for item_id in item_ids:
            item = self._items[item_id]
            wanted[item.task, item.split or ""].append(item_id)
        outcomes = {}
        for (name, split), ids in wanted.items():
            for item_id, answers in self._questions[name, split].answers(target.model, ids).items():
                outcomes[item_id] = self.tasks[name].outcome(item_id, self._instances[item_id], answers)
        return [outcomes[item_id] for item_id in item_ids]

    def likelihoods(
        self, target: Target, item_ids: Sequence[str], *, alternatives: bool = True
    ) -> Iterator[Likelihoods]:
        """Each choice's likelihood given the context; of other tasks the target's, or the text's."""
        for item_id in item_ids:
            item = self._items[item_id]
            pairs, right = self.tasks[item.task].answer_pairs(item, self._instances[item_id])
            if not alternatives:
                pairs, right = [pairs[right]], 0
            answers = [answer_loglikelihood(target.model, target.tokenizer, *pair) for pair in pairs]
            yield Likelihoods(torch.stack([log for log, _ in answers]), right, answers[right][1])

    def predicts(self, task: str) -> frozenset[str]:
        answers = ["answers"] if self.tasks[task].kind == "multiple_choice" else []
        return frozenset([*answers, "tokens", "labels", "hidden"])

    def predictions(
        self,
        target: Target,
        item_ids: Sequence[str],
        *,
        over: str = "answers",
        labels: bool = False,
        hidden: bool = False,
    ) -> Predictions:
        """The choices' likelihoods, or next tokens; see the top of this file."""
        items = [self._items[item_id] for item_id in item_ids]
        task = self.tasks[self.check_predictable(items, over, labels=labels, hidden=hidden)]
        instances = [self._instances[item_id] for item_id in item_ids]
        model, tokenizer = target.model, target.tokenizer
        if over == "tokens" and task.kind == "loglikelihood_rolling":
            texts = [(None, requests[0].args[0]) for requests in instances]
            return token_predictions(model, tokenizer, texts, labels=labels, hidden=hidden)
        if over == "tokens" and not labels:
            prompts = [task.prompts(requests) for requests in instances]
            return prompt_predictions(model, tokenizer, prompts, spare=task.generation[0], hidden=hidden)
        if not labels:
            choices = [task.choices(requests) for requests in instances]
            return answer_predictions(model, tokenizer, choices, hidden=hidden)
        answers = [task.answer_pairs(item, requests) for item, requests in zip(items, instances, strict=True)]
        if over == "tokens":
            texts = [pairs[right] for pairs, right in answers]
            return token_predictions(model, tokenizer, texts, labels=True, hidden=hidden)
        choices = [[(str(context), answer) for context, answer in pairs] for pairs, _ in answers]
        return answer_predictions(model, tokenizer, choices, [right for _, right in answers], hidden=hidden)
