"""Training by gradient, as the study sees it: what it is possible for, and where the gradients come from.

The searcher holds the coefficients and the optimiser, the store what it needs to go on, the workers nothing: to them a
gradient is a function of a recipe and a batch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from evomerge.descent import hold_out
from evomerge.dimensions import Point
from evomerge.errors import EvaluatorError, MethodError, ResourceError, SpecError, StudyError
from evomerge.pools import BatchGradient
from evomerge.progress import Progress, Stage, size
from evomerge.searchers.base import GradientSearcher
from evomerge.validation import at

if TYPE_CHECKING:
    from evomerge.checkpoints import Sources
    from evomerge.evaluation import Evaluator
    from evomerge.learned import Layout, LearnedFiles
    from evomerge.planning import Plan
    from evomerge.recipe import Recipe
    from evomerge.running import Runner
    from evomerge.space import Space
    from evomerge.spec import Spec
    from evomerge.store import Store, TrainingRecord

ARRAYS = "arrays"  # in a stored state: the hash of the file that has them
SAVE_SECONDS = 30.0  # of training that a driver which dies may lose


def own_experts(spec: Spec) -> dict[str, str]:
    """Task -> its own expert, of those tasks that have one.

    That is what ``objective.experts`` says, or the expert that is called like the task. Where no task has one, and
    there are as many tasks as experts, they belong together in the order of the file.
    """
    tasks, experts = list(spec.evaluate.tasks), list(spec.experts)
    own = {task: spec.objective.own_expert(task) for task in tasks if spec.objective.own_expert(task) in experts}
    if not own and len(tasks) == len(experts):
        own = dict(zip(tasks, experts, strict=True))
    return own


def check_gradients(searcher: GradientSearcher, spec: Spec, space: Space, evaluator: Evaluator) -> None:
    """Refuse what no gradient can be had of, before any model is loaded.

    Raises:
        SpecError: labels on test items, more than one start, a task without an expert of its own.
        MethodError: a method that is not affine in its weights.
        EvaluatorError: an evaluator, or one of its tasks, that does not predict what the loss is made of.
    """
    from evomerge.gradients import require_gradients
    from evomerge.learned import check_learned
    from evomerge.losses import find

    where = str(spec.path or "experiment")
    options = searcher.loss_options()
    try:
        loss = find(options["loss"], spec.folder).loss
    except SpecError as error:
        place = at(where, "search.loss") + (f": {error.where}" if error.where else "")
        raise SpecError(error.problem, where=place, remedy=error.remedy) from error
    check_learned(searcher, spec, space)
    try:
        require_gradients(space.decode(space.initial()))
    except MethodError as error:
        raise MethodError(error.problem, where=error.where or spec.space_where, remedy=error.remedy) from None
    if len(spec.search.initial) > 1:
        raise SpecError(
            f"searcher {searcher.name} begins at one point, but there are {len(spec.search.initial)}",
            where=at(where, "search.initial"),
            remedy="Leave one of them.",
        )
    if searcher.trains_on == "test" and loss.labels:
        raise SpecError(
            f"loss {loss.name} needs labels, and protocol transductive trains on test items, whose labels are not seen",
            where=at(where, "search.protocol"),
            remedy="Use protocol: inductive, or a loss without labels, such as entropy.",
        )
    if evaluator.needs != "model":
        raise EvaluatorError(
            "this evaluator looks at checkpoints on disk, by which there are no gradients",
            where=at(where, "evaluate.with"),
            remedy="Use evaluators/classification.py, harness.py or perplexity.py, or search.method cma or tpe.",
        )
    needed = loss.needs(options["over"])
    for task in spec.evaluate.tasks:
        lacking = sorted(needed - evaluator.predicts(task))
        if lacking:
            raise EvaluatorError(
                f"loss {loss.name} over {options['over']} needs {', '.join(lacking)} of task {task!r}, but its "
                f"evaluator predicts {', '.join(sorted(evaluator.predicts(task))) or 'nothing'}",
                where=at(where, "search.loss"),
                remedy="Choose another loss or search.over, an evaluator that predicts this (Evaluator.predictions), "
                "or search.method cma or tpe, which need no gradients.",
            )
    if loss.teacher:
        without = [task for task in spec.evaluate.tasks if task not in own_experts(spec)]
        if without:
            raise SpecError(
                f"loss {loss.name} compares with each task's own expert, and task {without[0]!r} has none: no expert "
                "is called like it",
                where=at(where, "search.loss"),
                remedy=f"Say whose it is: objective: {{experts: {{{without[0]}: EXPERT}}}}, EXPERT being one of "
                f"{', '.join(spec.experts)}.",
            )


def learned_layout(searcher: GradientSearcher, sources: Sources, space: Space, where: str) -> Layout | None:
    """Which numbers ``searcher`` learns, if any; SpecError, at ``where``, if it should but there are none."""
    from evomerge.learned import layout_of

    if searcher.learns is None:
        return None
    layout = layout_of(searcher.learns, sources, space.decode(space.initial()))
    if not layout.size:
        raise SpecError(
            f"searcher {searcher.name} has nothing to learn: no expert changes a matrix that its method takes",
            where=where,
            remedy="Set params.matrices: all, or search.method: adamerging, which learns weights alone.",
        )
    return layout


def check_room(searcher: GradientSearcher, layout: Layout, where: str, *, workers: int) -> None:
    """ResourceError, at ``where``, if what ``searcher`` learns takes more memory than this machine has to give.

    Args:
        workers: of this machine.
    """
    import psutil

    from evomerge.memory import learning_bytes

    needed, there = learning_bytes(layout, searcher, workers=workers), int(psutil.virtual_memory().available)
    if needed > there:
        raise ResourceError(
            f"searcher {searcher.name} learns {layout.size:,} numbers, which take up to {size(needed)} of memory here "
            f"while it trains, with {workers} worker{'' if workers == 1 else 's'} beside it, but {size(there)} are "
            "available",
            where=where,
            remedy="Let it learn fewer: params.matrices: inner, a space.filter or space.methods that leave it fewer "
            "tensors, or search.method: columns or adarank, which have numbers for rows or singular components. Or use "
            "a machine with more memory.",
        )


def batches_at_once(searcher: GradientSearcher, plan: Plan) -> int:
    """How many workers a step of the training can use."""
    piece = plan.spec.evaluate.batch_size
    batches = sum(
        -(-min(searcher.options.get("batch", piece), count) // piece)
        for count in plan.split_sizes()[searcher.trains_on].values()
    )
    return min(searcher.parts, batches)


class Training:
    """The oracle of a study's searcher; it stores what the training rests on."""

    def __init__(self, searcher: GradientSearcher, plan: Plan, store: Store, runner: Runner, progress: Progress):
        self.searcher, self.plan, self.store, self.runner, self.progress = searcher, plan, store, runner, progress
        split = searcher.trains_on
        self.items = {task: _items(plan, task, split) for task in plan.tasks}
        cut = {
            task: hold_out(_items(plan, task, "search"), seed=plan.spec.seed, task=task, share=searcher.held_out)
            for task in plan.tasks
        }
        self.held = {task: held for task, (_, held) in cut.items()}
        if split == "search":
            self.items = {task: kept for task, (kept, _) in cut.items()}
        self.weights = {task: spec.weight for task, spec in plan.tasks.items()}
        self.piece = plan.spec.evaluate.batch_size
        names = [source.name for source in plan.template.experts]
        own = {task: names.index(expert) for task, expert in own_experts(plan.spec).items()}
        self._options = {**searcher.loss_options(), "experts": own}
        self._n, self._saved = 0, time.monotonic()
        self._stage: Stage | None = None
        searcher.oracle = self
        self._layout = learned_layout(searcher, plan.sources, plan.space, plan.spec.space_where)
        if self._layout is not None:
            searcher.lay_out(self._layout)

    @cached_property
    def _files(self) -> LearnedFiles:
        from evomerge.learned import LearnedFiles

        created = float(self.store.record.get("created", 0.0))
        return LearnedFiles(self.plan.spec.folder, f"{self.plan.spec.name}-{created:.6f}")

    def restore(self) -> None:
        """Take up the training where the store says it was."""
        kept = self.store.trainings()
        if kept:
            state = dict(kept[-1].state)
            if (file := state.pop(ARRAYS, None)) is not None:
                state |= self._files.training_at(file)
            self.searcher.restored = kept[-1].n
            self.searcher.restore(state, kept[-1].curve)

    def recipe(self, point: Point) -> Recipe:
        """What the searcher, which has just proposed ``point``, wants to be evaluated."""
        recipe = self.plan.space.decode(point)
        if self._layout is None:
            return recipe
        return self._files.named(self._layout, self.searcher.numbers(), recipe)

    def ask(self, n: int) -> Point:
        """Train until the searcher can propose trial ``n``; what led there is stored, also if it does not get there."""
        self._n = n
        try:
            point = self.searcher.ask(n)
        except StudyError:
            raise
        except Exception:
            self._save()
            raise
        self._save()
        return point

    def gradients(
        self,
        step: int,
        point: Point,
        batches: Sequence[tuple[str, Sequence[str]]],
        *,
        shares: Sequence[float],
        learn: bool = True,
        numbers: np.ndarray | None = None,
    ) -> list[BatchGradient]:
        """See ``Oracle``."""
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self._save()
        self._show()
        recipe, options = self.plan.space.decode(point), {**self._options, "learn": learn}
        if numbers is not None:
            from evomerge.learned import in_job

            assert self._layout is not None
            recipe, options["learned"] = in_job(self._layout, numbers, recipe)
        parts = {"shares": shares, "parts": self.searcher.parts} if learn else {}
        return self.runner.gradients(step, recipe, batches, options, **parts)

    def _save(self) -> None:
        state = {**self.searcher.state(), "trains_on": self.searcher.trains_on}
        arrays = {key: value for key, value in state.items() if isinstance(value, np.ndarray)}
        if arrays:  # the file before the store names it, the one before it when the store does no longer
            file = self._files.keep_training(arrays)
            state = {key: value for key, value in state.items() if key not in arrays} | {ARRAYS: file}
        self.store.save_training(self._n, state, self.searcher.curve)
        if arrays:
            self._files.forget_trainings(state[ARRAYS])
        self._saved = time.monotonic()

    def _show(self) -> None:
        step, total = self.searcher.progress
        if self._stage is None:
            self._stage = Stage(self.progress, "training", total, "", before=step)
        loss = f"loss {self.searcher.curve[-1]['loss']:.4g}" if self.searcher.curve else None
        self._stage.update(step, loss)


def _items(plan: Plan, task: str, split: str) -> tuple[str, ...]:
    return tuple(item.id for item in plan.items if item.task == task and item.split == split)


def in_short(states: Sequence[Mapping[str, Any]]) -> str | None:
    """What a training came to, in a sentence; None if there was none.

    Args:
        states: of the store's records, in their order.
    """
    if not states:
        return None
    last = states[-1]
    options = last.get("options", {})
    step = last.get("descent", {}).get("step", 0)
    named = {
        "columns": "coefficients of output columns",
        "components": "masks over singular components",
        "entries": "masks over single entries",
    }
    what = named.get(str(last.get("learns")), "coefficients")
    text = f"The {what} were learned by gradient"
    if "descent" in last:
        text = f"The {what} were learned in {step} of {options.get('steps')} steps on {options.get('loss')}"
    if last.get("failure"):
        text += f", where the training failed ({last['failure']})"
    if (refined := last.get("refined")) is not None:
        text += f", by CMA-ES from there, and in {refined['step']} steps from its best"
        if last.get("refine_failure"):
            text += f", where the training failed ({last['refine_failure']})"
    if is_transductive(last):
        return (
            f"{text}, on the test items without their labels (transductive): the scores on test are of items that the "
            "training has seen."
        )
    return f"{text}, on search items (inductive)."


def is_transductive(state: Mapping[str, Any]) -> bool:
    """Did the training see the test items?"""
    return state.get("trains_on") == "test"


def curve_in_short(trainings: Sequence[TrainingRecord], n: int) -> list[str]:
    """Lines about the training for trial ``n``: the first and the last of its steps; none if there was no training."""
    rows = [row for training in trainings if training.n <= n for row in training.curve]
    if not rows:
        return []
    chosen = {row["step"]: row for row in (rows[0], rows[-1])}
    lines = [f"training  {rows[-1]['step'] + 1} steps"]
    for step, row in chosen.items():
        tasks = ", ".join(f"{task} {loss:.4f}" for task, loss in row["tasks"].items())
        lines.append(f"  step {step:<6} loss {row['loss']:.4f} ({tasks}), gradient {row['gradient']:.3g}")
    return lines
