"""Surgery as the study sees it: what it is refused for, who gets adapters, and what is stored of them.

When the winner is known, adapters are trained for it and, so that what surgery gives is not taken for what the search
found, for the best control. Both are then evaluated as subjects of their own, ``surgery:trial:31`` beside ``trial:31``.
They choose nothing: the winner is whom `select` has made it, without adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from evomerge.errors import EvaluatorError, SpecError, StudyError
from evomerge.ranking import SURGERY
from evomerge.recipe import Recipe, Surgery
from evomerge.surgery import FOLDER, Adapter, count_in_words, lacking, verify, write
from evomerge.training import own_experts
from evomerge.validation import at

if TYPE_CHECKING:
    from evomerge.evaluation import Evaluator
    from evomerge.planning import Plan
    from evomerge.pools import Trained
    from evomerge.spec import Spec
    from evomerge.store import Store

TRAINING = "training"  # in keys of attempts: what no split is


def check_surgery(spec: Spec, evaluator: Evaluator) -> None:
    """Refuse what no adapters can be had for, before any model is loaded.

    Raises:
        EvaluatorError: an evaluator, or one of its tasks, that cannot put features through an adapter.
        SpecError: a task without an expert of its own.
    """
    if spec.surgery is None:
        return
    where = at(str(spec.path or "experiment"), "surgery")
    tasks = list(spec.evaluate.tasks)
    if without := lacking(evaluator, tasks):
        raise EvaluatorError(
            f"adapters stand between a model and a task's head, and evaluator {spec.evaluate.evaluator} has no such "
            f"place for task {without[0]!r}",
            where=where,
            remedy="Leave surgery out, or use evaluators/classification.py or one of your own (Evaluator.adapts).",
        )
    if without := [task for task in tasks if task not in own_experts(spec)]:
        raise SpecError(
            f"surgery brings features near those of each task's own expert, and task {without[0]!r} has none: no "
            "expert is called like it",
            where=where,
            remedy=f"Say whose it is: objective: {{experts: {{{without[0]}: EXPERT}}}}, EXPERT being one of "
            f"{', '.join(spec.experts)}.",
        )


def refuse_other_surgery(spec: Spec, record: Mapping[str, Any]) -> None:
    """StudyError if the study has adapters that were trained by other options than ``spec`` gives."""
    if spec.surgery is None:
        return
    now = spec.surgery.model_dump()
    for subject, kept in record.get("surgery", {}).items():
        if kept["options"] != now:
            raise StudyError(
                f"the adapters of {subject} were trained with {_listed(kept['options'])}, but the experiment says "
                f"{_listed(now)}",
                where=at(str(spec.path or "experiment"), "surgery"),
                remedy="Restore the options, leave surgery out, or give the experiment a new name.",
            )


def _listed(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in options.items())


class Surgeries:
    """The adapters of one study: how they are asked for, kept, and found again."""

    def __init__(self, plan: Plan, store: Store):
        self.plan, self.store = plan, store

    def job(self) -> dict[str, Any]:
        """``Job.surgery``: the search items of each task and its own expert; no label is looked at."""
        assert self.plan.spec.surgery is not None
        own, names = own_experts(self.plan.spec), [source.name for source in self.plan.template.experts]
        tasks = {
            task: [
                names.index(own[task]),
                [item.id for item in self.plan.items if item.task == task and item.split == "search"],
            ]
            for task in self.plan.tasks
        }
        return {"tasks": tasks, "seed": self.plan.spec.seed, **self.plan.spec.surgery.model_dump()}

    def keep(self, subject: str, trained: Trained) -> None:
        """Store the adapters of ``subject``: their file, and then its name."""
        import torch

        assert self.plan.spec.surgery is not None
        adapters = {
            task: Adapter(*(torch.from_numpy(side) for side in pair)) for task, pair in trained.adapters.items()
        }
        made = write(self.plan.spec.folder / FOLDER, adapters)
        kept = {
            "sha256": made.sha256,
            "options": self.plan.spec.surgery.model_dump(),
            "adapters": len(adapters),
            "parameters": sum(adapter.size for adapter in adapters.values()),
            "distances": {task: list(pair) for task, pair in trained.distances.items()},
        }
        self.store.update_record(surgery={**self.store.record.get("surgery", {}), subject: kept})

    def recipes(self, recipes: Mapping[str, Recipe]) -> dict[str, Recipe]:
        """``surgery:SUBJECT`` -> the recipe with its adapters, of those subjects that have any.

        Raises CheckpointError if a file is gone or was changed.
        """
        record, found = self.store.record.get("surgery", {}), {}
        for subject, recipe in recipes.items():
            if subject in record:
                sha256 = record[subject]["sha256"]
                path = self.plan.spec.folder / FOLDER / f"{sha256}.safetensors"
                found[SURGERY + subject] = replace(recipe, surgery=verify(Surgery(str(path), sha256)))
        return found


def in_short(record: Mapping[str, Any], subject: str) -> str | None:
    """``4 adapters of 12,288 parameters`` behind ``subject`` (surgery:trial:31); None where a study knows of none."""
    kept = record.get("surgery", {}).get(subject.removeprefix(SURGERY))
    return None if kept is None else count_in_words(kept["adapters"], kept["parameters"])


def lines(record: Mapping[str, Any], subject: str) -> list[str]:
    """What `evomerge show` says of the adapters behind ``subject``."""
    kept = record.get("surgery", {}).get(subject.removeprefix(SURGERY))
    if kept is None or not subject.startswith(SURGERY):
        return []
    text = [
        f"surgery   {in_short(record, subject)} behind the merge, so that it is not a plain checkpoint",
        f"  trained with {_listed(kept['options'])}",
        "  L1 distance to the features of the task's own expert, on search",
    ]
    return text + [f"  {task:<24} {old:.4f} -> {new:.4f}" for task, (old, new) in kept["distances"].items()]
