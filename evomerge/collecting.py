"""`evomerge collect`: statistics of each expert, measured on items of the search split, for methods weighted by data.

One model is resident; the experts are written into it one after the other, as a study writes the control of that
expert. A file is written as a whole or not at all, and says in its header what it was made from: a run that was
stopped, however that was, goes on with the experts that are missing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from evomerge import __version__
from evomerge.collected import FORMAT, MANIFEST, read_manifest
from evomerge.errors import CandidateError, CheckpointError, EvaluatorError, SpecError, UserError, nearest
from evomerge.exporting import check_room
from evomerge.hashing import HashCache, cache_folder
from evomerge.methods.statistics import STATISTICS
from evomerge.planning import Plan, build_plan, statistics_needed
from evomerge.progress import Progress
from evomerge.recipe import Group, Recipe
from evomerge.safetensor_files import ShardWriter, read_header, read_metadata
from evomerge.spec import Spec
from evomerge.stages import keep
from evomerge.training import own_experts
from evomerge.validation import at
from evomerge.writing import sync, umask

DEFAULT_ITEMS, DEFAULT_FOLDER = 256, "statistics"
MERGED = "gram_merged"
METADATA = "evomerge"


@dataclass(frozen=True)
class Wanted:
    """The options of the command.

    Attributes:
        kinds: fisher, gram, gram_merged, loss; none: what the methods of the experiment's space need.
        items: how many of each task; None: 256, or all of the search split if it has fewer.
        out: the folder; None: the experiment's ``statistics``, or ``statistics`` beside it.
        labels: of fisher; see ``measuring.fisher``.
        rho: of gram_merged, whose layers are merged with it.
        tasks: expert -> tasks that are its own, where names do not say it.
    """

    kinds: tuple[str, ...] = ()
    items: int | None = None
    out: Path | None = None
    labels: str = "model"
    rho: float = 0.9
    tasks: Mapping[str, Sequence[str]] | None = None


@dataclass(frozen=True)
class Collection:
    """What was collected: the folder, and a line for each file."""

    folder: Path
    kinds: tuple[str, ...]
    lines: tuple[str, ...]


def collect(spec: Spec, wanted: Wanted, progress: Progress) -> Collection:
    """Measure what is missing, and write the manifest when all is there.

    Raises:
        UserError: whatever stands against it, before any model is loaded; or numbers that are not finite.
    """
    for kind in wanted.kinds:
        if kind not in STATISTICS:
            raise UserError(f"there are no statistics {kind!r}", where="--what", remedy=nearest(kind, STATISTICS))
    out = wanted.out or spec.statistics_path or spec.folder / DEFAULT_FOLDER
    own = own_tasks(spec, wanted.tasks or {})
    plan = build_plan(spec, progress, workers=1, statistics=False)
    kinds = wanted.kinds or _needed(plan)
    if not plan.evaluator.has_likelihoods:
        raise EvaluatorError(
            f"{plan.worker.evaluator} says nothing of an answer's likelihood, so that nothing can be collected with it",
            where=at(str(spec.path or "experiment"), "evaluate.with"),
            remedy="Use evaluators/harness.py, classification.py or perplexity.py, or write Evaluator.likelihoods.",
        )
    jobs = [job for kind in kinds for job in _jobs(plan, kind, own, wanted)]
    with _folder(out.absolute()) as folder:
        todo = [job for job in jobs if not job.is_done(folder)]
        if any(job.kind == MERGED for job in todo):  # of one merge: all experts' or none
            todo += [job for job in jobs if job.kind == MERGED and job not in todo]
        if todo:
            _forget(folder, {job.kind for job in todo})
            _measure(plan, todo, folder, progress)
        _complete(folder, plan, jobs)
    kept = len(jobs) - len(todo)
    if kept:
        progress.log(f"{kept} of {len(jobs)} files were there and have been kept")
    return Collection(folder, kinds, tuple(job.line() for job in jobs))


def own_tasks(spec: Spec, given: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Expert -> the tasks that are its own.

    What is ``given`` goes first; then ``objective.experts``, and a task that is called like the expert. Where no task
    is, and there are as many tasks as experts, they belong together in the order of the file.

    Raises SpecError if an expert has no task.
    """
    tasks, experts = list(spec.evaluate.tasks), list(spec.experts)
    for expert, names in given.items():
        if expert not in experts:
            raise SpecError(f"there is no expert {expert!r}", where="--task", remedy=nearest(expert, experts))
        for name in names:
            if name not in tasks:
                raise SpecError(f"there is no task {name!r}", where="--task", remedy=nearest(name, tasks))
    owner = own_experts(spec)
    own = {expert: [task for task in tasks if owner.get(task) == expert] for expert in experts}
    own |= {expert: list(names) for expert, names in given.items()}
    without = [expert for expert, names in own.items() if not names]
    if without:
        raise SpecError(
            f"no task belongs to expert {without[0]!r}: none is called like it",
            where=at(str(spec.path or "experiment"), "evaluate.tasks"),
            remedy=f"Say which with --task {without[0]}=TASK, one of {', '.join(tasks)}.",
        )
    return own


def _needed(plan: Plan) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys(statistics_needed(plan.space, plan.spec).values()))
    if not kinds:
        raise SpecError(
            f"no method of the space ({', '.join(plan.space.methods)}) needs statistics",
            where=at(str(plan.spec.path or "experiment"), "space.method"),
            remedy=f"Say which to collect with --what: {', '.join(STATISTICS)}.",
        )
    return kinds


@dataclass(frozen=True)
class _Job:
    """One file: the statistics of one kind of one expert."""

    kind: str
    expert: str
    sha256: str  # of the expert
    recipe: Recipe  # the expert alone
    tasks: Mapping[str, tuple[str, ...]]  # task -> items
    facts: str  # JSON: all that the numbers depend on
    labels: str
    rho: float

    @property
    def file(self) -> str:
        return f"{self.expert}.{self.kind}.safetensors"

    @property
    def item_ids(self) -> list[str]:
        return [item_id for items in self.tasks.values() for item_id in items]

    @property
    def num_items(self) -> int:
        return sum(map(len, self.tasks.values()))

    def is_done(self, folder: Path) -> bool:
        """Is the file there, whole, and made from the same?"""
        path = folder / self.file
        if not path.is_file() or read_metadata(path).get(METADATA) != self.facts:
            return False
        try:
            read_header(path)
        except CheckpointError:
            return False
        return True

    def line(self) -> str:
        counts = ", ".join(f"{task} {len(ids)}" for task, ids in self.tasks.items())
        more = {"fisher": f", labels: {self.labels}", MERGED: f", rho: {self.rho:g}"}.get(self.kind, "")
        return f"{self.file}: search items of {counts}{more}"


def _jobs(plan: Plan, kind: str, own: Mapping[str, Sequence[str]], wanted: Wanted) -> Iterator[_Job]:
    evaluator = hashlib.sha256(json.dumps(plan.evaluator.fingerprint(), sort_keys=True).encode()).hexdigest()
    limit = DEFAULT_ITEMS if wanted.items is None else wanted.items
    search: dict[str, list[str]] = {task: [] for task in plan.tasks}
    for item in plan.items:
        if item.split == "search":
            search[item.task].append(item.id)
    experts = plan.template.experts
    for t, source in enumerate(experts):
        names = list(plan.tasks) if kind == "loss" else own[source.name]
        tasks = {task: tuple(search[task][:limit]) for task in names}
        alone = Group(weights=tuple(1.0 if i == t else 0.0 for i in range(len(experts))))
        facts = {
            "evomerge": __version__,
            "kind": kind,
            "base": plan.template.base.sha256 if plan.template.base else "",
            "expert": source.sha256,
            "items": {task: hashlib.sha256("\n".join(ids).encode()).hexdigest() for task, ids in tasks.items()},
            "labels": wanted.labels if kind == "fisher" else None,
            **({"rho": wanted.rho, "experts": [e.sha256 for e in experts], "own": own} if kind == MERGED else {}),
            "evaluator": evaluator,
            **{key: getattr(plan.worker, key) for key in ("export_dtype", "compute_dtype", "threads", "options")},
            "task options": {task: dict(plan.worker.tasks[task]) for task in names},
            "device": plan.worker.device.partition(":")[0],
            **({"tokenizer": plan.worker.tokenizer} if plan.worker.tokenizer else {}),
        }
        yield _Job(
            kind,
            source.name,
            source.sha256,
            replace(plan.template, groups=(alone,)),
            tasks,
            json.dumps(facts, sort_keys=True, default=str),
            wanted.labels,
            wanted.rho,
        )


def _measure(plan: Plan, todo: Sequence[_Job], folder: Path, progress: Progress) -> None:
    """Write the files of ``todo``, expert by expert."""
    from evomerge.prefix import num_steps
    from evomerge.worker import Worker

    check_room(folder, _bytes(plan, todo), "the statistics need about")
    keep(plan.template, progress)
    worker = Worker(plan.worker)
    assert worker.target is not None
    names = [source.name for source in plan.template.experts]
    ordered = sorted((job for job in todo if job.kind != MERGED), key=lambda job: names.index(job.expert))
    together = sorted((job for job in todo if job.kind == MERGED), key=lambda job: names.index(job.expert))
    steps = num_steps(worker.merger)
    total = sum(job.num_items for job in ordered) + steps * sum(job.num_items for job in together)
    with progress.stage("collecting", total) as stage:
        if together:
            _measure_together(worker, together, folder, lambda t: stage.advance(1, f"{MERGED} of {names[t]}"))
        for job in ordered:
            worker.merger.into(worker.target.model, job.recipe)
            try:
                tensors = _statistics(worker, job, lambda job=job: stage.advance(1, f"{job.kind} of {job.expert}"))
            except CandidateError as error:
                raise UserError(f"{job.kind} of expert {job.expert} cannot be measured: {error.reason}") from error
            if not tensors:
                raise UserError(f"expert {job.expert} has no tensor of which {job.kind} can be measured")
            _write(folder / job.file, tensors, job.facts)


def _measure_together(worker: Any, jobs: Sequence[_Job], folder: Path, advance: Callable[[int], None]) -> None:
    from evomerge.merging import torch_dtype
    from evomerge.prefix import merged_grams

    try:
        found = merged_grams(
            worker.merger,
            worker.evaluator,
            worker.target,
            [job.item_ids for job in jobs],
            rho=jobs[0].rho,
            export_dtype=torch_dtype(worker.spec.export_dtype),
            advance=advance,
        )
    except CandidateError as error:
        raise UserError(f"{MERGED} cannot be measured: {error.reason}") from error
    for job, tensors in zip(jobs, found, strict=True):
        _write(folder / job.file, tensors, job.facts)


def _statistics(worker: Any, job: _Job, advance: Callable[[], None]) -> dict[str, Tensor]:
    from evomerge import measuring

    target, evaluator = worker.target, worker.evaluator
    if job.kind == "loss":
        return measuring.loss(evaluator, target, job.tasks, advance=advance)
    placement = worker.merger.adopt(target.model).placement
    if job.kind == "gram":
        return measuring.gram(evaluator, target, placement, job.item_ids, advance=advance)
    return measuring.fisher(evaluator, target, placement, job.item_ids, labels=job.labels, advance=advance)


def _bytes(plan: Plan, todo: Sequence[_Job]) -> int:
    """About how much is to be written: float32 squares of all weights, or of the widths of all matrices."""
    base = plan.sources.reference
    floats = [name for name in base.names if plan.sources.is_float(name)]
    inner = [base.shape(name) for name in floats if len(base.shape(name)) == 2 and base.info(name).layer is not None]
    sizes = {
        "fisher": 4 * sum(base.numel(name) for name in floats),
        "gram": 4 * sum(shape[1] ** 2 for shape in inner),
        "loss": 0,
    }
    sizes[MERGED] = sizes["gram"]
    return sum(sizes[job.kind] for job in todo)


def _write(path: Path, tensors: Mapping[str, Tensor], facts: str) -> None:
    """One file, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        with ShardWriter(partial, entries, metadata={METADATA: facts}) as writer:
            for tensor in tensors.values():
                writer.write(tensor)
        partial.replace(path)
        sync(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error.strerror}", remedy="Is the disk full?") from error
    finally:
        partial.unlink(missing_ok=True)


def _kinds(folder: Path) -> dict[str, Any]:
    """What the manifest says; nothing if there is none."""
    try:
        return dict(read_manifest(folder)["kinds"])
    except CheckpointError:
        return {}


def _forget(folder: Path, kinds: set[str]) -> None:
    """Take kinds out of the manifest whose files are about to be replaced."""
    known = _kinds(folder)
    if kinds & known.keys():
        _write_manifest(folder, {kind: entry for kind, entry in known.items() if kind not in kinds})


def _complete(folder: Path, plan: Plan, jobs: Sequence[_Job]) -> None:
    """All files are there: the manifest says so, beside what it says of other kinds."""
    kinds = _kinds(folder)
    kept = HashCache(cache_folder() / "hashes.json")
    for kind in dict.fromkeys(job.kind for job in jobs):
        files = []
        for job in jobs:
            if job.kind == kind:
                path = folder / job.file
                files.append(
                    {
                        "file": job.file,
                        "name": job.expert,
                        "expert": job.sha256,
                        "size": path.stat().st_size,
                        "sha256": kept.of(path),
                        "items": {task: list(ids) for task, ids in job.tasks.items()},
                    }
                )
        entry: dict[str, Any] = {"base": plan.template.base.sha256 if plan.template.base else "", "split": "search"}
        if plan.worker.tokenizer:
            entry["tokenizer"] = plan.worker.tokenizer
        if kind == "fisher":
            entry["labels"] = jobs[0].labels
        if kind == MERGED:
            entry["rho"] = jobs[0].rho
        kinds[kind] = {**entry, "dtype": "float64" if kind == "loss" else "float32", "files": files}
    kept.save()
    _write_manifest(folder, kinds)


def _write_manifest(folder: Path, kinds: Mapping[str, Any]) -> None:
    text = json.dumps({"evomerge_statistics": FORMAT, "evomerge": __version__, "kinds": kinds}, indent=2) + "\n"
    partial = folder / f".{MANIFEST}.partial"
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(folder / MANIFEST)
    sync(folder)


@contextlib.contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """The output folder, this process's alone while the block lasts."""
    try:
        out.mkdir(parents=True, exist_ok=True, mode=0o777 & ~umask())
        handle = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be used as a folder: {error.strerror}", remedy="Choose another.") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(
                f"another process is collecting into {out}", remedy="Wait for it, or choose another --out."
            ) from None
        foreign = [
            path.name for path in out.iterdir() if not path.name.endswith((".safetensors", ".partial", MANIFEST))
        ]
        if foreign:
            raise CheckpointError(
                f"{out} holds other things than statistics ({foreign[0]})", remedy="Choose a folder of its own: --out."
            )
        yield out
    finally:
        os.close(handle)
