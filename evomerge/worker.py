"""One prepared evaluator, and a resident model or checkpoints on disk: recipes in, outcomes out."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import socket
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from evomerge.checkpoints import Sources, Unbuilt
from evomerge.errors import CandidateError, CheckpointError, EvaluatorError, ResourceError, UserError
from evomerge.evaluation import (
    Evaluator,
    EvaluatorContext,
    Item,
    Outcome,
    Target,
    TaskSpec,
    check_outcomes,
    load_evaluator,
)
from evomerge.folders import find_folder
from evomerge.keeping import choose, dense_bytes, keep, rooms
from evomerge.merging import Merger, load_resident, open_sources, torch_dtype, written_bytes
from evomerge.methods import fused
from evomerge.methods.base import InputsChanged
from evomerge.methods.lookup import load_codes
from evomerge.pools import BatchGradient, Failure, Job, Result, Trained, WorkerSpec, one_line
from evomerge.recipe import Group, Recipe, Source
from evomerge.scratch import check_scratch, remove_stale, written
from evomerge.surgery import read
from evomerge.tokenizer_choice import TokenizerChoice

if TYPE_CHECKING:
    from evomerge.aligned import Alignment
    from evomerge.batch_losses import BatchLosses
    from evomerge.surgery_training import SurgeryTraining

DETAIL_LIMIT = 20_000  # characters of a traceback that are kept


class Worker:
    """Builds itself from ``spec`` (paths and plain data) and evaluates jobs, one at a time.

    For an evaluator that needs a checkpoint no model is loaded: every candidate is written to a scratch folder, and
    removed when it has been evaluated.

    An outcome is a function of recipe and item: torch's thread counts are set to ``spec.threads`` and its deterministic
    algorithms are switched on for the whole process, global random generators start every evaluation from
    ``spec.seed``, and the model is always built from the sources.

    Raises:
        UserError: sources, evaluator or device cannot be used, or the data are not those of ``spec.splits``.
    """

    def __init__(self, spec: WorkerSpec):
        self.spec = spec
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        settle(threads=spec.threads, device=spec.device)
        # A Hugging Face id comes with its commit: each machine fetches it into its own cache.
        base_path = find_folder(spec.base["path"], beside=spec.folder)
        self.sources = self._open(base_path)
        load_codes(spec.codes)
        self.merger = Merger(self.sources, device=spec.device, fixed_params=spec.fixed_params)
        fused.kernels()  # looked for now, since an evaluation has a time limit, and building a worker has none

        self.evaluator = make_evaluator(spec)
        self.items = self._load_items()
        keep(self.sources, self._place(), spec.device)
        self.target: Target | None = None
        self._losses: BatchLosses | None = None
        self._surgery: SurgeryTraining | None = None
        if self.evaluator.needs == "model":
            model = load_resident(
                base_path,
                auto_class=self.evaluator.auto_class,
                compute_dtype=spec.compute_dtype,
                device=spec.device,
                unused=self.evaluator.unused,
                alignment=self.sources.alignment,
            )
            self.target = Target(model, load_tokenizer(base_path, self.sources.alignment), spec.device)
        else:
            remove_stale(spec.scratch)
            check_scratch(spec.scratch, written_bytes(self.sources, spec.export_dtype))
        with _evaluators_fault(spec.evaluator, "prepare"):
            self.evaluator.prepare(self.target, list(self.items.values()))
        if self.target is not None:
            self.merger.adopt(self.target.model)  # after prepare, which may have given it to accelerate

    def _open(self, base_path: Path) -> Sources:
        """The sources, in one vocabulary."""
        spec = self.spec

        def source(data: Mapping[str, str]) -> Source:
            return Source(data["name"], str(find_folder(data["path"], beside=spec.folder)))

        tokenizer = None if spec.tokenizer is None else TokenizerChoice.model_validate(spec.tokenizer)
        experts = tuple(source(data) for data in spec.experts)
        base = Source(spec.base["name"], str(base_path))
        groups = (Group((0.0,) * len(experts)),)
        return open_sources(Recipe(base, experts, "task_arithmetic", groups, tokenizer=tokenizer))

    def _place(self) -> str:
        """Where the sources are to be kept, ``auto`` resolved by what this machine has free."""
        spec, base = self.spec, self.sources.reference
        device_room, ram = rooms(spec.device, spec.gpus)
        return choose(
            spec.sources,
            spec.device,
            sources=dense_bytes(self.sources),
            model=Unbuilt(base, torch_dtype(spec.compute_dtype)).total_bytes,
            device_room=device_room,
            ram=ram,
            workers=spec.count,
            engine=self.evaluator.needs == "checkpoint",
        )

    def _load_items(self) -> dict[str, Item]:
        """The study's items by id, with their splits; EvaluatorError if one is gone."""
        with _evaluators_fault(self.spec.evaluator, "load its items"):
            loaded = {item.id: item for item in reversed(self.evaluator.load())}
        missing = [i for i in self.spec.splits if i not in loaded]
        if missing:
            raise EvaluatorError(
                f"{len(missing)} of the study's {len(self.spec.splits)} items are not in the data any more "
                f"(such as {missing[0]})",
                where=self.spec.evaluator,
                remedy="The data changed since the study was made, or differ on this machine: bring them back.",
            )
        return {i: replace(loaded[i], split=split) for i, split in self.spec.splits.items()}

    def evaluate(self, job: Job) -> Result:
        """Merge the job's recipe, into the model or to disk, and evaluate it on the job's items, or differentiate it,
        or train adapters for it.

        Whatever goes wrong with the candidate comes back as a Failure.

        Raises:
            CheckpointError: the recipe is not of this worker's sources.
            MethodError: the method wrote into them.
        """
        began = time.perf_counter()
        seconds: dict[str, float] = {}
        outcomes: tuple[Outcome, ...] | None = None
        gradients: tuple[BatchGradient, ...] | None = None
        trained: Trained | None = None
        failure: Failure | None = None
        recipe = Recipe.from_dict(job.recipe)
        self._check_sources(recipe)
        try:
            if job.gradient is not None:
                gradients = self._batch_losses().of(recipe, job.gradient)
            elif job.surgery is not None:
                trained = self._surgery_training().of(recipe, job.surgery)
            else:
                outcomes = self._outcomes(recipe, job.item_ids, seconds)
        except InputsChanged:
            raise  # every candidate after this one would be built from spoiled sources
        except (Exception, SystemExit) as error:
            failure = failure_of(error)
        if failure is not None and failure.kind == "memory":
            _free_memory()
        seconds["total"] = time.perf_counter() - began
        return Result(job.key, job.attempt, outcomes, failure, seconds, self.name, gradients, trained)

    def _outcomes(self, recipe: Recipe, item_ids: Sequence[str], seconds: dict[str, float]) -> tuple[Outcome, ...]:
        with contextlib.ExitStack() as stack:
            with _seconds(seconds, "merge"):
                target = stack.enter_context(self._candidate(recipe))
            with _seconds(seconds, "evaluate"), _seeded(self.spec.seed):
                answer = self.evaluator.evaluate(target, list(item_ids))
            return _checked(answer, item_ids)

    def _batch_losses(self) -> BatchLosses:
        if self._losses is None:
            from evomerge.batch_losses import BatchLosses
            from evomerge.memory import keep_freed_memory

            keep_freed_memory()  # from now on this worker does the same again and again
            assert self.target is not None  # planning refuses evaluators that need a checkpoint
            self._losses = BatchLosses(
                self.merger, self.evaluator, self.target, lambda: _seeded(self.spec.seed), Path(self.spec.folder)
            )
        return self._losses

    def _surgery_training(self) -> SurgeryTraining:
        if self._surgery is None:
            from evomerge.surgery_training import SurgeryTraining

            assert self.target is not None  # planning refuses evaluators that need a checkpoint
            seeded = partial(_seeded, self.spec.seed)
            self._surgery = SurgeryTraining(self.merger, self.evaluator, self.target, seeded)
        return self._surgery

    @contextlib.contextmanager
    def _candidate(self, recipe: Recipe) -> Iterator[Target]:
        """The merge as the evaluator wants it: in the resident model, or on disk for as long as the block lasts."""
        if self.target is not None:
            self.merger.into(self.target.model, recipe)
            yield self.target if recipe.surgery is None else replace(self.target, adapters=read(recipe.surgery))
            return
        with written(self.merger, recipe, self.spec.scratch, self.spec.device) as target:
            _free_memory()  # the engine is another process, and may need what a merge on the GPU has left
            yield target

    def _check_sources(self, recipe: Recipe) -> None:
        """The recipe must be of this worker's sources, in their order; its names for them do not matter."""

        def content(sha256: str, path: str) -> str:
            return sha256 or str(Path(self.spec.folder, path))  # the place stands for content that was not hashed

        ours = [content(s["sha256"], s["path"]) for s in (self.spec.base, *self.spec.experts)]
        theirs = [content(s.sha256, s.path) for s in (recipe.base, *recipe.experts) if s is not None]
        if theirs != (ours if recipe.base is not None else ours[1:]):
            raise CheckpointError(
                f"a recipe must name the sources that the workers hold, in their order: the recipe has "
                f"{_listed(theirs)}, the workers have {_listed(ours)}",
                where="recipe",
                remedy="Evaluate it with an experiment file that names its base and experts.",
            )
        written = None if recipe.tokenizer is None else recipe.tokenizer.short()
        if written != self.spec.tokenizer:
            raise CheckpointError(
                f"a recipe must have the vocabulary of the workers' sources: it has {written}, they have "
                f"{self.spec.tokenizer}",
                where="recipe: tokenizer",
                remedy="Evaluate it with an experiment file that has the same tokenizer.",
            )


def failure_of(error: BaseException) -> Failure:
    """What is told and stored of an error that ended an evaluation."""
    detail = "".join(traceback.format_exception(error))[-DETAIL_LIMIT:]
    if isinstance(error, CandidateError):
        return Failure(error.kind, one_line(error.reason), error.detail or detail)
    if isinstance(error, SystemExit):
        return Failure("error", f"the evaluator called sys.exit({error.code!r})", detail)
    kind = "memory" if _is_out_of_memory(error) else "error"
    return Failure(kind, one_line(f"{type(error).__name__}: {error}".rstrip(": ")), detail)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    # torch's CPU allocator raises a plain RuntimeError
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in str(error) or "not enough memory" in str(error)
    )


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _checked(answer: Any, item_ids: Sequence[str]) -> tuple[Outcome, ...]:
    """The evaluator's answer with plain Python numbers; CandidateError if it is not one finite outcome an item."""
    if answer is None:
        raise CandidateError("incomplete", "the evaluator returned None instead of a list of outcomes")
    outcomes = list(answer)
    for outcome in outcomes:
        if not isinstance(outcome, Outcome):
            raise CandidateError("error", f"the evaluator returned a {type(outcome).__name__} instead of an Outcome")
    check_outcomes(outcomes, item_ids)
    return tuple(
        Outcome(o.item_id, {name: float(value) for name, value in o.values.items()}, float(o.weight)) for o in outcomes
    )


def _context(spec: WorkerSpec) -> EvaluatorContext:
    return EvaluatorContext(
        folder=Path(spec.folder),
        tasks={name: TaskSpec(**task) for name, task in spec.tasks.items()},
        options=dict(spec.options),
        batch_size=spec.batch_size,
        seed=spec.seed,
    )


def make_evaluator(spec: WorkerSpec) -> Evaluator:
    """The study's evaluator, not yet prepared for a model; raises EvaluatorError if its code fails."""
    with _evaluators_fault(spec.evaluator, "be made"):
        return load_evaluator(spec.evaluator, _context(spec))


def settle(*, threads: int, device: str = "cpu") -> None:
    """Threads, determinism and silence of this process: what a study's numbers rest on, in a worker and elsewhere."""
    torch.set_num_threads(threads)
    with contextlib.suppress(RuntimeError):  # can be set once, before the first parallel work
        torch.set_num_interop_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore  # costs a pass over every new tensor
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ResourceError(
            f"the device is to be {device}, but torch sees no GPU here",
            remedy="Use cpu (workers.device, or --device in export and merge), or give each worker a GPU with "
            "workers.gpus.",
        )
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def load_tokenizer(folder: Path, alignment: Alignment | None = None) -> Any:
    """The merge's tokenizer: that of ``alignment``, or the base's; None if the folder holds none (as for models of
    other things than text)."""
    from transformers import AutoTokenizer

    if alignment is not None:
        return alignment.tokenizer()
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")
    if not any((folder / name).exists() for name in names):
        return None
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@contextlib.contextmanager
def _evaluators_fault(path: str, what: str) -> Iterator[None]:
    """Turns an exception of the evaluator's own code into an EvaluatorError that shows where it came from."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise EvaluatorError(
            f"the evaluator could not {what}: {one_line(f'{type(error).__name__}: {error}')}",
            where=path,
            remedy=f"It was raised in {place.filename}, line {place.lineno}: {place.line}",
        ) from error


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Global random generators that start from ``seed`` inside, and go on outside as if nothing had been."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextlib.contextmanager
def _seconds(record: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        record[name] = time.perf_counter() - began


def _listed(contents: Sequence[str]) -> str:
    return ", ".join(content[-12:] for content in contents)
