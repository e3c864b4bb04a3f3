"""Scoring a checkpoint or a recipe outside of a study, and holding it against what a study stored."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evomerge.aligned import Alignment
from evomerge.checkpoints import check_tokenizers, open_checkpoint, open_expert
from evomerge.errors import CandidateError, CheckpointError, EvaluatorError, SpecError, StudyError
from evomerge.evaluation import Item, Outcome, Target, check_outcomes, task_scores
from evomerge.exporting import RECIPE_FILE
from evomerge.folders import find_folder
from evomerge.hub import fetch, hub_id
from evomerge.merging import Merger, load_resident, open_sources, verify_sources
from evomerge.methods.lookup import permit
from evomerge.modelcard import listed
from evomerge.objectives import Judged
from evomerge.planning import Plan, drift
from evomerge.recipe import Recipe, Surgery
from evomerge.scratch import remove_stale, scratch_folder, written
from evomerge.stages import built, stages
from evomerge.store import Store
from evomerge.surgery import FILE as SURGERY_FILE
from evomerge.surgery import Adapter, in_words, lacking, read
from evomerge.vocabulary import has_tokenizer
from evomerge.worker import load_tokenizer, settle


@dataclass(frozen=True)
class Scores:
    """What a model did on one split of an experiment."""

    split: str
    items: tuple[Item, ...]
    outcomes: tuple[Outcome, ...]
    tasks: dict[str, float]
    judged: Judged | None  # None: the scores that the objective is relative to are not known here
    recipe: Recipe | None
    adapter: bool = False  # scored as a LoRA adapter beside its base
    surgery: str | None = None  # adapters behind the model, in words; None: it is scored as it is

    @property
    def objective(self) -> float | None:
        return None if self.judged is None else self.judged.score


@dataclass(frozen=True)
class Comparison:
    """Item by item: how many outcomes equal the stored ones, and the largest difference of any metric."""

    key: str
    items: int
    equal: int
    largest: float

    @property
    def identical(self) -> bool:
        return self.equal == self.items


def score_target(
    target: Path,
    plan: Plan,
    split: str,
    *,
    allow_code: bool = False,
    study: Store | None = None,
    surgery: bool = True,
) -> Scores:
    """Evaluate a checkpoint or LoRA adapter (loaded by plain transformers and PEFT), or a recipe file, on one split.

    Items, batch layout, thread count and compute dtype are the experiment's, so that the outcomes can be compared bit
    for bit with a study's.

    Args:
        study: holds the scores of the base and the experts, where the objective is relative to them.
        surgery: put the adapters that lie beside an export, or that a recipe names, behind the model.

    Raises:
        UserError: ``target`` is neither a checkpoint nor a recipe, or does not fit the experiment.
    """
    settle(threads=plan.worker.threads, device=plan.worker.device)
    if not target.exists() and (wanted := hub_id(str(target))) is not None:
        target = fetch(wanted)
    if target.is_dir():
        recipe = Recipe.load(target / RECIPE_FILE) if (target / RECIPE_FILE).is_file() else None
        if _is_adapter(target):
            _check_adapter(target, recipe, plan)
        else:
            _check_checkpoint(target, plan)
    elif target.is_file():
        recipe = permit(Recipe.load(target), allow=allow_code)
        if recipe.base is None:
            raise SpecError("a recipe without a base cannot be evaluated", where=str(target), remedy="Export it first.")
        if stages(recipe) or recipe.statistics is not None:
            recipe = verify_sources(recipe)
    else:
        raise SpecError(f"{target} is neither a checkpoint folder nor a recipe file", remedy="Check the path.")
    if recipe is not None and not surgery:
        recipe = replace(recipe, surgery=None)
    adapters = _adapters(target, recipe, plan) if surgery else {}
    ids = plan.item_ids(split)
    look = _at_model if plan.evaluator.needs == "model" else _on_disk
    try:
        with look(target, recipe, plan) as place:
            outcomes = plan.evaluator.evaluate(replace(place, adapters=adapters), ids)
            check_outcomes(outcomes, ids)
    except CandidateError as error:
        raise EvaluatorError(f"{target} could not be evaluated: {error}") from error
    items = tuple(item for item in plan.items if item.split == split)
    scores = task_scores(plan.evaluator, items, outcomes)
    judged = _judged(plan, split, scores, study)
    behind = f"{in_words(adapters)} for {listed(list(adapters))}" if adapters else None
    return Scores(split, items, tuple(outcomes), scores, judged, recipe, _is_adapter(target), behind)


def _adapters(target: Path, recipe: Recipe | None, plan: Plan) -> dict[str, Adapter]:
    """Those that lie beside the weights, or that the recipe names; none for a plain merge.

    Raises:
        CheckpointError: the file is gone, or is not the one that the recipe was made with.
        EvaluatorError: the experiment has no use for them.
    """
    beside = target / SURGERY_FILE
    named = None if recipe is None else recipe.surgery
    if target.is_dir() and (named is not None or beside.is_file()):
        named = Surgery(str(beside), "" if named is None else named.sha256)
    if named is None:
        return {}
    adapters, remedy = read(named), "Score it without them by --no-surgery."
    wanted = [task for task in plan.tasks if task in adapters]
    if not wanted:
        raise EvaluatorError(
            f"the adapters of {named.path} are for {listed(list(adapters))}, and the experiment's tasks are "
            f"{listed(list(plan.tasks))}",
            remedy=remedy,
        )
    if without := lacking(plan.evaluator, wanted):
        raise EvaluatorError(
            f"{named.path} has adapters for task {without[0]!r}, but this experiment's evaluator has no place for them",
            remedy=remedy,
        )
    return {task: adapters[task] for task in wanted}


def _check_checkpoint(target: Path, plan: Plan) -> None:
    """CheckpointError if the checkpoint cannot be opened, or its tokens are not the experiment's.

    Where the experiment's models differ in tokens, a checkpoint is scored with a tokenizer of its own.
    """
    checkpoint = open_checkpoint(target)
    if plan.sources.alignment is None or not has_tokenizer(target):
        check_tokenizers(checkpoint, [plan.sources.reference])


def _is_adapter(target: Path) -> bool:
    return (target / "adapter_config.json").is_file()


def _base_of(plan: Plan) -> Path:
    assert plan.template.base is not None
    return find_folder(plan.template.base.path)


def _check_adapter(target: Path, recipe: Recipe | None, plan: Plan) -> None:
    """UserError unless the adapter is plain LoRA on the experiment's base, and the evaluator takes models."""
    open_expert(target, open_checkpoint(_base_of(plan)))
    ours = plan.template.base.sha256 if plan.template.base else ""
    theirs = recipe.base.sha256 if recipe is not None and recipe.base is not None else ""
    if theirs and theirs != ours:
        raise CheckpointError(
            f"the adapter belongs to a base with the content {theirs[:16]}, but the experiment's base is {ours[:16]}",
            where=str(target),
            remedy="Name the experiment that it came from, or export it as a checkpoint.",
        )
    if plan.evaluator.needs != "model":
        raise EvaluatorError(
            f"an adapter is no checkpoint, which the evaluator needs: {target}",
            remedy=f"Evaluate its {RECIPE_FILE}, or an export that is a checkpoint.",
        )


def with_adapter(model: Any, folder: Path) -> Any:
    """``model`` with a LoRA adapter that PEFT puts into it beside its weights, as it is served: nothing is merged."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder)).get_base_model().eval().requires_grad_(False)


def _judged(plan: Plan, split: str, scores: dict[str, float], study: Store | None) -> Judged | None:
    objective, references = plan.objective, None
    if objective.subjects:
        references = study.record.get("references") if study is not None else None
        if study is None or references is None:
            return None
        objective = objective.bind(references)
        references = objective.references_in(study.scores(split))
    return objective.judge(scores, references)


@contextmanager
def _at_model(target: Path, recipe: Recipe | None, plan: Plan) -> Iterator[Target]:
    """The checkpoint, or the merge of a recipe's file, as the resident model of the prepared evaluator."""

    def resident(folder: Path, alignment: Alignment | None = None) -> Target:
        model = load_resident(
            folder,
            auto_class=plan.evaluator.auto_class,
            compute_dtype=plan.spec.compute_dtype,
            device=plan.worker.device,
            unused=plan.evaluator.unused,
            alignment=alignment,
        )
        return Target(model, load_tokenizer(folder, alignment), plan.worker.device)

    if _is_adapter(target):
        place = resident(_base_of(plan))
        place = replace(place, model=with_adapter(place.model, target))
    elif target.is_dir() or recipe is None:
        place = resident(target)
    else:
        with built(recipe, Path(tempfile.gettempdir())) as ready:
            sources = open_sources(ready)
            place = resident(sources.reference.path, sources.alignment)
            Merger(sources, device=plan.worker.device).into(place.model, recipe)
    plan.evaluator.prepare(place, plan.items)
    yield place


@contextmanager
def _on_disk(target: Path, recipe: Recipe | None, plan: Plan) -> Iterator[Target]:
    """The checkpoint as it is, or a recipe's merge written for the time of the evaluation."""
    worker = plan.worker
    remove_stale(worker.scratch)
    plan.evaluator.prepare(None, plan.items)
    if target.is_dir() or recipe is None:
        with scratch_folder(worker.scratch) as own:
            yield Target(device=worker.device, checkpoint=target.absolute(), scratch=own)
        return
    with built(recipe, Path(tempfile.gettempdir())) as ready:
        merger = Merger(open_sources(ready), device=worker.device)
        with written(merger, recipe, worker.scratch, worker.device) as place:
            yield place


def check_comparable(plan: Plan, store: Store) -> None:
    """StudyError, with a list, if the study was made with other items, batches, threads or sources than ``plan``."""
    changes = drift(store.record["fingerprint"], plan.fingerprint)
    if changes:
        listed = "\n".join(f"    {change}" for change in changes)
        raise StudyError(
            f"study {store.name!r} was made from another experiment; scores cannot be compared:\n{listed}",
            remedy="Use the experiment file of the study, or leave --compare out.",
        )


def compare(scores: Scores, store: Store) -> Comparison:
    """Hold ``scores`` against the study's own evaluation of the same recipe on the same split.

    Raises:
        StudyError: the study has not evaluated that recipe on that split.
    """
    stored = None
    for evaluation in store.evaluations(split=scores.split):
        if scores.recipe is not None and evaluation.recipe_hash == scores.recipe.hash:
            stored = store.evaluation(evaluation.key, with_outcomes=True)
            break
    if stored is None:
        raise StudyError(
            f"the study holds no evaluation of this recipe on {scores.split!r} to compare with",
            remedy="Compare an export of one of the study's own trials, on a split it was evaluated on.",
        )
    was = {o.item_id: o for o in stored.outcomes or ()}
    equal, largest = 0, 0.0
    for outcome in scores.outcomes:
        old = was.get(outcome.item_id)
        if old is None:
            continue
        equal += dict(old.values) == dict(outcome.values)
        largest = max([largest, *(abs(v - old.values.get(k, float("inf"))) for k, v in outcome.values.items())])
    return Comparison(stored.key, len(scores.outcomes), equal, largest)


def as_json(scores: Scores, comparison: Comparison | None) -> dict[str, Any]:
    tasks = {item.id: item.task for item in scores.items}
    data: dict[str, Any] = {
        "split": scores.split,
        "objective": scores.objective,
        "objectives": list(scores.judged.values) if scores.judged else None,
        "misses": list(scores.judged.misses) if scores.judged else None,
        "tasks": scores.tasks,
        "recipe": scores.recipe.hash if scores.recipe else None,
        "surgery": scores.surgery,
        "items": [{"id": o.item_id, "task": tasks[o.item_id], **_values(o)} for o in scores.outcomes],
    }
    if comparison is not None:
        data["compared_with"] = {
            "evaluation": comparison.key,
            "items": comparison.items,
            "equal": comparison.equal,
            "largest_difference": comparison.largest,
        }
    return data


def _values(outcome: Outcome) -> dict[str, Any]:
    return {"values": dict(outcome.values), "weight": outcome.weight}


def lines(scores: Scores, comparison: Comparison | None) -> Sequence[str]:
    """The result as text: a line a task, the objective, the comparison."""
    counts = {task: sum(i.task == task for i in scores.items) for task in scores.tasks}
    width = max(len(task) for task in [*scores.tasks, "objective"])
    text = [
        f"{task:<{width}}  {value:.4f}  ({counts[task]} {scores.split} items)" for task, value in scores.tasks.items()
    ]
    if scores.judged is None:
        text.append(f"{'objective':<{width}}  relative to scores of the base or the experts that no study here holds")
    else:
        text.append(f"{'objective':<{width}}  {scores.judged.score:.4f}")
        if len(scores.judged.values) > 1:
            text[-1] += f"  (mean of {', '.join(f'{value:.4f}' for value in scores.judged.values)})"
        text += [f"misses {miss}" for miss in scores.judged.misses]
    if scores.surgery is not None:
        text.append(f"with {scores.surgery}: not a plain checkpoint (--no-surgery leaves them out)")
    if comparison is not None:
        if comparison.identical:
            text.append(f"identical to the study's {comparison.key} on all {comparison.items} items, bit for bit")
        else:
            text.append(
                f"differs from the study's {comparison.key}: {comparison.equal} of {comparison.items} items equal, "
                f"largest difference of a metric {comparison.largest:.2e}"
            )
            if scores.adapter:
                text.append(
                    "an adapter promises the study's scores within rounding, not its numbers: it is not rounded"
                )
    return text
