"""From an experiment file to everything that is known before a model is loaded: the plan of a study."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evomerge import installed, searchers
from evomerge.checkpoints import Sources
from evomerge.collected import MANIFEST, verify_collected
from evomerge.dimensions import Point
from evomerge.errors import CheckpointError, EvaluatorError, MethodError, ResourceError, SpecError, StudyError
from evomerge.evaluation import SPLITS, Evaluator, EvaluatorContext, Item, TaskSpec, assign_splits, load_evaluator
from evomerge.hub import pin
from evomerge.keeping import refuse_pinned
from evomerge.losses import find as find_loss
from evomerge.merging import open_sources, pin_sources, verify_sources, written_bytes
from evomerge.methods.lookup import find as find_method
from evomerge.methods.lookup import permit
from evomerge.methods.statistics import LEARNED, how_to_collect
from evomerge.objectives import Objective
from evomerge.parts import check_parts
from evomerge.plugins import EVALUATOR, Code, code_files, hash_files, names_file
from evomerge.pools import WorkerSpec
from evomerge.progress import Progress
from evomerge.recipe import Collected, Group, Recipe, Source, is_recipe_file, source_at
from evomerge.scratch import check_scratch
from evomerge.searchers.base import GradientSearcher, Searcher
from evomerge.searchers.lookup import find as find_searcher
from evomerge.space import Space
from evomerge.spec import Spec, resolve_evaluator
from evomerge.stages import placed
from evomerge.surgery_stage import check_surgery
from evomerge.training import check_gradients, check_room, learned_layout
from evomerge.validation import at

# Recorded with a study: another version may change scores in their last bits, so a resume says so (and goes on).
LIBRARIES = ("torch", "transformers", "lm-eval", "cma", "optuna", "numpy", "evomerge")


@dataclass(frozen=True)
class Plan:
    """A checked experiment: sources, space, items and their splits, and what a worker is built from."""

    spec: Spec
    sources: Sources
    template: Recipe  # sources with their hashes; its one group has zero weights
    space: Space
    evaluator: Evaluator
    objective: Objective  # not bound: what it is relative to is evaluated first
    items: tuple[Item, ...]  # those in a split
    worker: WorkerSpec
    fingerprint: Mapping[str, str]  # what must not change before a resume, by a name that a user recognises
    libraries: Mapping[str, str]

    @property
    def codes(self) -> dict[str, Code]:
        """The plug-ins in methods, searcher and loss: what the experiment calls them, and their code."""
        searcher = self.spec.search.method, find_searcher(self.spec.search.method, self.spec.folder).code
        loss = _loss_of(self.spec, self.space)
        return {**self.space.codes, **{name: code for name, code in (searcher, *loss) if code is not None}}

    @property
    def tasks(self) -> dict[str, TaskSpec]:
        return dict(self.evaluator.context.tasks)

    def item_ids(self, split: str) -> tuple[str, ...]:
        return tuple(item.id for item in self.items if item.split == split)

    def split_sizes(self) -> dict[str, Counter[str]]:
        """Items by split, then by task."""
        return {s: Counter(i.task for i in self.items if i.split == s) for s in SPLITS}


def check_device(device: str, gpus: float) -> str:
    """The device a worker runs on; ResourceError if GPUs are asked for where this machine's torch sees none.

    With Ray on an address the cluster's own check applies, since the driver may have no GPU.
    """
    if device == "auto":
        return "cuda" if gpus else "cpu"
    if device.startswith("cuda") and not gpus:
        raise ResourceError(
            f"workers.device is {device}, but workers.gpus is 0",
            remedy="Set workers.gpus to the share of a GPU that one worker gets, such as 1.",
        )
    return device


def check_local_gpus(count: int, gpus: float) -> None:
    """ResourceError unless this machine has the GPUs that ``count`` workers with ``gpus`` each need."""
    if not gpus:
        return
    import torch

    have = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count * gpus > have:
        raise ResourceError(
            f"{count} workers with {gpus:g} GPUs each were asked for, but this machine has {have} GPUs",
            remedy="Lower workers.count or workers.gpus, or name a cluster with --address.",
        )


def build_plan(
    spec: Spec,
    progress: Progress,
    *,
    workers: int | None = None,
    address: str | None = None,
    recorded: Mapping[str, str] | None = None,
    statistics: bool = True,
) -> Plan:
    """Check everything that can be checked without loading a model, cheapest first.

    Args:
        statistics: False: those that the space's methods need are not looked for. They are about to be collected.
        recorded: Hugging Face id as the experiment has it -> the same with the commit that a study recorded.

    Raises:
        UserError: whatever is wrong with the experiment, by name, with the remedy.
    """
    count = workers or spec.workers.count
    device = check_device(spec.workers.device, spec.workers.gpus)
    refuse_pinned(spec.workers.sources, device)
    if (address or spec.workers.address) is None:
        check_local_gpus(count, spec.workers.gpus)

    base, *experts = named_sources(spec, progress, recorded or {})
    unhashed = _permitted(
        Recipe(
            base=base,
            experts=tuple(experts),
            method="task_arithmetic",
            groups=(Group(weights=(0.0,) * len(spec.experts)),),
            seed=spec.seed,
            export_dtype=spec.export_dtype,
            tokenizer=spec.tokenizer,
        )
    )
    sources = open_sources(unhashed)
    base = sources.reference
    shape: dict[str, Any] = {
        "num_layers": base.num_layers,
        "tensors": [sources.info(n) for n in sources.names if sources.touched(n)],
        "where": spec.space_where,
        "folder": spec.code_folder,
    }
    unplaced = Space.from_dict(spec.space, template=unhashed, **shape)
    check_parts(unplaced.decode(unplaced.initial()), [sources.info(n) for n in sources.names if sources.is_float(n)])
    searcher = make_searcher(spec, unplaced)
    if statistics:
        require_statistics(unplaced, spec)
    for method in unplaced.all_methods:
        if find_method(method, spec.code_folder).method.needs_factors:
            sources.require_factors(method)

    evaluator_file = resolve_evaluator(spec)
    context = EvaluatorContext(
        folder=spec.folder,
        tasks=spec.task_specs(),
        options=spec.evaluate.options,
        batch_size=spec.evaluate.batch_size,
        seed=spec.seed,
    )
    evaluator = load_evaluator(evaluator_file, context)
    items = tuple(assign_splits(evaluator.load(), spec.evaluate.split, seed=spec.seed))
    evaluator.check(items)
    here = count if (address or spec.workers.address) is None else 0  # workers on this machine
    if isinstance(searcher, GradientSearcher):
        check_gradients(searcher, spec, unplaced, evaluator)
        layout = learned_layout(searcher, sources, unplaced, spec.space_where)
        if layout is not None:
            check_room(searcher, layout, at(str(spec.path or "experiment"), "search.method"), workers=here)
    check_surgery(spec, evaluator)
    _require_every_split(items, context.tasks)

    scratch = str(spec.scratch_path or "")
    if evaluator.needs == "checkpoint":  # other machines are asked by their workers
        check_scratch(scratch, here * written_bytes(sources, spec.export_dtype), workers=here)

    template = placed(hash_sources(unhashed, progress))
    space = Space.from_dict(spec.space, template=template, **shape)
    if statistics:
        space = with_statistics(space, spec)
    worker = WorkerSpec(
        folder=str(spec.folder),
        base=_plain(template.base),
        experts=tuple(_plain(s) for s in template.experts),
        evaluator=evaluator_file,
        tasks={n: _task_dict(t) for n, t in context.tasks.items()},
        options=dict(context.options),
        splits={item.id: item.split or "" for item in items},
        batch_size=context.batch_size,
        seed=spec.seed,
        export_dtype=spec.export_dtype,
        compute_dtype=spec.compute_dtype,
        device=device,
        threads=spec.workers.threads,
        fixed_params=space.fixed_params,
        sources=spec.workers.sources,
        gpus=spec.workers.gpus,
        count=count,
        scratch=scratch,
        tokenizer=spec.tokenizer and spec.tokenizer.short(),
        codes={name: code.to_dict() for name, code in space.codes.items()},
    )
    plan_parts = _fingerprint(spec, template, space, evaluator, items, worker)
    return Plan(
        spec=spec,
        sources=sources,
        template=template,
        space=space,
        evaluator=evaluator,
        objective=Objective.of_spec(spec.objective, {n: t.weight for n, t in context.tasks.items()}, spec.experts),
        items=items,
        worker=worker,
        fingerprint=plan_parts,
        libraries=library_versions(),
    )


def _permitted(recipe: Recipe) -> Recipe:
    """``permit``, with the remedy that an experiment has: it can make no code of its stages run."""
    try:
        return permit(recipe)
    except MethodError as error:
        remedy = (error.remedy or "").replace(
            "say --allow-code, or give the experiment file that names it",
            "make the stage by `evomerge merge RECIPE --allow-code --out DIR`, and name DIR in its place",
        )
        raise MethodError(error.problem, where=error.where, remedy=remedy) from error


def named_sources(spec: Spec, progress: Progress, recorded: Mapping[str, str]) -> list[Source]:
    """The base and the experts, in order: absolute folders, recipes, and Hugging Face ids with their commits, fetched.

    Raises CheckpointError, naming the key, for a model that cannot be had.
    """
    keys = [("base", "base", spec.base, spec.base_path)]
    keys += [(f"experts.{name}", name, spec.experts[name], path) for name, path in spec.expert_paths.items()]
    sources = []
    for key, name, typed, path in keys:
        try:
            if path.is_dir():
                sources.append(Source(name, str(path)))
            elif is_recipe_file(typed):
                stage = source_at(name, str(path))
                sources.append(replace(stage, recipe=stage.recipe and pin_sources(stage.recipe, progress)))
            else:
                sources.append(Source(name, pin(recorded.get(typed, typed), progress)))
        except CheckpointError as error:
            where = at(str(spec.path or "experiment"), key) + (f": {error.where}" if error.where else "")
            raise CheckpointError(error.problem, where=where, remedy=error.remedy) from error
    return sources


def statistics_needed(space: Space, spec: Spec) -> dict[str, str]:
    """Method -> the kind of statistics that it needs, of those methods of the space that need any, and whose are not
    what the search learns."""
    searcher = find_searcher(spec.search.method, spec.folder).searcher
    learns = searcher.learns if issubclass(searcher, GradientSearcher) else None
    kinds = {name: find_method(name, spec.code_folder).method.statistics for name in space.all_methods}
    return {name: kind for name, kind in kinds.items() if kind is not None and kind != learns}


def require_statistics(space: Space, spec: Spec) -> None:
    """SpecError if a method of the space is weighted by data, and the experiment names none, or a folder without."""
    where, folder = at(str(spec.path or "experiment"), "statistics"), spec.statistics_path
    for method, kind in statistics_needed(space, spec).items():
        if folder is None or not (folder / MANIFEST).is_file():
            problem = "is missing" if folder is None else f"{folder} holds none"
            typed = str(spec.path or "EXPERIMENT")
            raise SpecError(
                f"{problem}: method {method} needs statistics of the experts ({kind})",
                where=where,
                remedy=how_to_collect(kind)
                if kind in LEARNED
                else f"Run `evomerge collect {typed} --what {kind}`"
                + (", and name its folder as `statistics`." if folder is None else "."),
            )


def with_statistics(space: Space, spec: Spec) -> Space:
    """``space`` with the statistics that its methods need, read once and hashed; CheckpointError if they do not fit."""
    needed = statistics_needed(space, spec)
    if not needed:
        return space
    place = Collected(str(spec.statistics_path))
    try:
        found = {kind: verify_collected(place, [kind], space.template) for kind in set(needed.values())}
    except CheckpointError as error:
        where = at(str(spec.path or "experiment"), "statistics")
        remedy = (error.remedy or "").replace("EXPERIMENT", str(spec.path or "EXPERIMENT"))
        raise CheckpointError(error.problem, where=where, remedy=remedy) from None
    return replace(space, statistics={method: found[kind] for method, kind in needed.items()})


def _loss_of(spec: Spec, space: Space) -> list[tuple[str, Code | None]]:
    """(name, its code if that is not evomerge's own) of what a search by gradient makes small; else nothing."""
    searcher = make_searcher(spec, space)
    if not isinstance(searcher, GradientSearcher):
        return []
    name = str(searcher.loss_options()["loss"])
    return [(name, find_loss(name, spec.folder).code)]


def make_searcher(spec: Spec, space: Space, starts: Sequence[Point] = ()) -> Searcher:
    """The experiment's searcher; SpecError if it cannot take the space or the objectives."""
    try:
        searcher = searchers.make(
            find_searcher(spec.search.method, spec.folder).searcher,
            space,
            seed=spec.seed,
            starts=starts,
            num_objectives=len(spec.objective.of),
            **spec.search.options,
        )
        if spec.search.schedule == "asynchronous" and not searcher.asynchronous:
            raise SpecError(
                f"searcher {searcher.name} decides by all that it proposed before: it cannot take scores in any order",
                remedy="Use schedule: reproducible, or another search.method, such as random or tpe.",
            )
        return searcher
    except SpecError as error:
        where = error.where or at(str(spec.path or "experiment"), "search.method")
        raise SpecError(error.problem, where=where, remedy=error.remedy) from None


def hash_sources(recipe: Recipe, progress: Progress) -> Recipe:
    """``recipe`` with the content hash of every source; reads each file once, unless a cached hash still holds."""
    with progress.stage("checking sources", 1, unit="B") as stage:

        def report(name: str, done: int, total: int) -> None:
            stage.total = total
            stage.update(done, name)

        return verify_sources(recipe, report)


def library_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def drift(stored: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs between a study's fingerprint and the present one, a line each."""
    lines = []
    for key in sorted({*stored, *now}):
        old, new = stored.get(key), now.get(key)
        if old == new:
            continue
        if old is None:
            lines.append(f"{key}: is new ({_short(new)})")
        elif new is None:
            lines.append(f"{key}: is gone (was {_short(old)})")
        else:
            lines.append(f"{key}: was {_short(old)}, is {_short(new)}")
    return lines


def refuse_drift(name: str, changes: list[str]) -> StudyError:
    listed = "\n".join(f"    {line}" for line in changes)
    return StudyError(
        f"study {name!r} was made with other inputs than are there now:\n{listed}",
        remedy="Restore them, or give the experiment a new name, or go on all the same with --allow-drift "
        "(scores before and after are then not comparable).",
    )


def _short(value: str | None) -> str:
    value = str(value)
    return value if len(value) <= 60 else value[:12]


def _plain(source: Source | None) -> dict[str, str]:
    assert source is not None
    return {"name": source.name, "path": source.path, "sha256": source.sha256}


def _task_dict(task: TaskSpec) -> dict[str, Any]:
    return {"name": task.name, "weight": task.weight, "metric": task.metric, "options": dict(task.options)}


def _require_every_split(items: tuple[Item, ...], tasks: Mapping[str, TaskSpec]) -> None:
    counts = Counter((item.task, item.split) for item in items)
    for task in tasks:
        for split in SPLITS:
            if not counts[task, split]:
                raise EvaluatorError(
                    f"task {task!r} has no items in the split {split!r}",
                    where="evaluate.split",
                    remedy="Every task needs at least one item to search on, to select on and to test on.",
                )


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


def _starts(spec: Spec) -> dict[str, Any]:
    return {"initial": [s.model_dump(by_alias=True) for s in spec.search.initial]} if spec.search.initial else {}


def code_parts(kind: str, name: str, code: Code | None, folder: Path) -> dict[str, str]:
    """What must not change of a plug-in's code: its files, or the package it came with; nothing of evomerge's own."""
    if code is None:
        return {}
    if code.path:
        hashes = hash_files(code_files(Path(code.path)), folder)
        return {f"{kind} {file}": digest for file, digest in hashes.items()}
    return {f"{kind} {name}": f"{code.sha256[:12]} ({code.package})"}


def _fingerprint(
    spec: Spec, template: Recipe, space: Space, evaluator: Evaluator, items: tuple[Item, ...], worker: WorkerSpec
) -> dict[str, str]:
    parts = {"base": template.base.sha256 if template.base else ""}
    parts |= {f"expert {s.name}": s.sha256 for s in template.experts}
    parts["space"] = json.dumps(space.to_dict(), sort_keys=True, default=str)
    parts["search"] = json.dumps(
        {"method": spec.search.method, "schedule": spec.search.schedule, **spec.search.options, **_starts(spec)},
        sort_keys=True,
    )
    parts |= {f"evaluator {name}": digest for name, digest in evaluator.fingerprint().items()}
    for name, code in space.codes.items():
        parts |= code_parts("method", name, code, spec.folder)
    for method, collected in space.statistics.items():
        parts |= {f"statistics of {method}": ", ".join(collected.sha256.values())}
    searcher = find_searcher(spec.search.method, spec.folder).code
    parts |= code_parts("searcher", spec.search.method, searcher, spec.folder)
    for name, code in _loss_of(spec, space):
        parts |= code_parts("loss", name, code, spec.folder)
    if not names_file(worker.evaluator):
        code = installed.code_of(EVALUATOR, worker.evaluator)
        parts |= code_parts("evaluator", worker.evaluator, code, spec.folder)
    for split in SPLITS:
        parts[f"items in {split}"] = _digest([i.id for i in items if i.split == split])
    for name, task in evaluator.context.tasks.items():
        parts[f"task {name}"] = json.dumps(_task_dict(task), sort_keys=True, default=str)
    if spec.tokenizer is not None:
        parts["tokenizer"] = json.dumps(spec.tokenizer.short(), sort_keys=True)
    parts["objective"] = json.dumps(spec.objective.short(), sort_keys=True)
    parts["evaluate options"] = json.dumps(spec.evaluate.options, sort_keys=True, default=str)
    parts["seed"] = str(spec.seed)
    for key in ("export_dtype", "compute_dtype", "threads", "batch_size"):
        parts[key] = str(getattr(worker, key))
    parts["device"] = worker.device.partition(":")[0]
    return parts
