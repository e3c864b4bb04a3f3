"""What evaluators on lm-eval's tasks share: items, splits, metrics and fingerprint, whoever runs the model."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Sequence

from evomerge.evaluation import Evaluator, Item, Outcome
from evomerge.harness_task import HarnessTask, harness_tasks


class HarnessEvaluator(Evaluator):
    """lm-eval tasks by name or from ``include_path``, as evaluators/harness.py describes them.

    A subclass writes ``prepare`` and ``evaluate``, and names options of its own in ``own_options``.
    """

    own_options: Sequence[str] = ()  # of evaluate, beyond include_path

    @functools.cached_property
    def tasks(self) -> dict[str, HarnessTask]:
        """The lm-eval task behind each task of the experiment."""
        return harness_tasks(self.context, also=self.own_options)

    def load(self) -> list[Item]:
        return [item for task in self.tasks.values() for item in task.items()]

    def check(self, items: Sequence[Item]) -> None:
        """Keep the study's items out of the few-shot examples; EvaluatorError if too few are left."""
        for name, task in self.tasks.items():
            task.separate_fewshot([item for item in items if item.task == name])

    def metric(self, task: str) -> str:
        return self.tasks[task].metric

    def default_metric(self, task: str) -> str:
        return self.tasks[task].default_metric

    def is_item_mean(self, task: str) -> bool:
        return self.metric(task) not in self.tasks[task].aggregations

    def aggregate(self, task: str, outcomes: Sequence[Outcome]) -> float:
        """The weighted mean, or what the task's YAML names as its metric's aggregation."""
        if self.is_item_mean(task):
            return super().aggregate(task, outcomes)
        metric = self.metric(task)
        return float(self.tasks[task].aggregations[metric]([o.values[metric] for o in outcomes]))

    def fingerprint(self) -> dict[str, str]:
        """The evaluator's file, the tasks' YAML and Python, their documents, and lm-eval's version."""
        files = {file for task in self.tasks.values() for file in task.files}
        data = {f"data of task {name}": task.data_hash() for name, task in self.tasks.items()}
        version = {"lm-eval": importlib.metadata.version("lm-eval")}
        return {**super().fingerprint(), **self.hash_files(sorted(files)), **data, **version}
