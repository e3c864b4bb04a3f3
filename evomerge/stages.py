"""Stages: sources that are recipes themselves, built as checkpoints before the merge that uses them.

A stage is rounded once, to its own export_dtype, as if it had been exported by hand. It is computed on the CPU with one
thread, wherever it is used, so that its bytes are a function of its recipe alone. A study keeps its stages in the cache
folder, by the hash of their recipes, where all its workers (and later studies, merges and exports) find them; any other
merge takes them from there, or builds them in a folder beside its result that is removed afterwards.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from evomerge.errors import CandidateError, CheckpointError
from evomerge.hashing import HashCache, cache_folder
from evomerge.progress import Progress
from evomerge.recipe import Recipe, Source
from evomerge.scratch import remove_stale, scratch_folder

FolderOf = Callable[[str], Path]  # hash of a stage's recipe -> where it is built


def stages(recipe: Recipe, name: str = "") -> dict[str, tuple[str, Recipe]]:
    """hash -> (name such as ``math/base``, recipe) of every stage of ``recipe``: each once, inner ones first."""
    found: dict[str, tuple[str, Recipe]] = {}
    for source in (recipe.base, *recipe.experts):
        if source is not None and source.recipe is not None:
            label = f"{name}/{source.name}" if name else source.name
            found |= {h: s for h, s in stages(source.recipe, label).items() if h not in found}
            found.setdefault(source.recipe.hash, (label, source.recipe))
    return found


def kept_folder(stage_hash: str) -> Path:
    """Where a stage is kept for studies: by the hash of its recipe, under EVOMERGE_CACHE or ~/.cache/evomerge."""
    return (cache_folder() / "stages" / stage_hash).absolute()


def placed(recipe: Recipe, folder_of: FolderOf = kept_folder) -> Recipe:
    """``recipe`` with the folder of each of its stages, there or not. Still the same recipe: places do not count."""

    def place(source: Source) -> Source:
        return source if source.recipe is None else replace(source, path=str(folder_of(source.recipe.hash)))

    base = None if recipe.base is None else place(recipe.base)
    return replace(recipe, base=base, experts=tuple(place(source) for source in recipe.experts))


def keep(recipe: Recipe, progress: Progress) -> Recipe:
    """``recipe`` with its stages in the cache folder: those that are not there, or damaged, are built.

    Args:
        recipe: with the hashes of all sources (``merging.verify_sources``).

    Raises CheckpointError if a source cannot be used, or the disk cannot take all that is to be built.
    """
    return _build(recipe, kept_folder, progress)


@contextmanager
def built(recipe: Recipe, beside: Path, progress: Progress | None = None, *, more: int = 0) -> Iterator[Recipe]:
    """``recipe`` with folders for its stages: those that a study has kept, or new ones that are removed at the end.

    Args:
        beside: the folder that new ones are put in.
        more: bytes that the same disk must take besides.

    Raises CheckpointError if a source cannot be used, or the disk cannot take all that is to be built.
    """
    there = stages(recipe)
    kept = {h for h, (_, stage) in there.items() if _is_hashed(stage) and _is_intact(kept_folder(h), h)}
    if kept >= there.keys():
        yield placed(recipe)
        return
    existing = str(next(folder for folder in (beside, *beside.parents) if folder.is_dir()))
    remove_stale(existing)
    with ExitStack() as stack:
        try:
            own = stack.enter_context(scratch_folder(existing))
        except CandidateError as error:
            raise CheckpointError(
                f"the stages cannot be written to {existing} (or its disk is full)",
                remedy="Check the folder and its rights, or choose another one.",
            ) from error
        yield _build(recipe, lambda h: kept_folder(h) if h in kept else own / h, progress or Progress(), more)


def _build(recipe: Recipe, folder_of: FolderOf, progress: Progress, more: int = 0) -> Recipe:
    from evomerge.exporting import check_room, export, merged_bytes

    todo = {h: s for h, s in stages(recipe).items() if not _is_intact(folder_of(h), h)}
    for stage_hash, (name, _) in todo.items():
        if folder_of(stage_hash).exists():
            progress.log(f"stage {name} is damaged and will be built again: {folder_of(stage_hash)}")
            shutil.rmtree(folder_of(stage_hash))
    if todo:
        check_room(folder_of(next(iter(todo))), more + sum(merged_bytes(stage) for _, stage in todo.values()))
    for stage_hash, (name, stage) in todo.items():
        out = folder_of(stage_hash)
        with _one_thread(), progress.stage(f"building stage {name}", 1, unit="B") as step:

            def report(done: int, total: int, step=step) -> None:
                step.total = total
                step.update(done)

            try:
                export(placed(stage, folder_of), out, progress=report)
            except CheckpointError as error:
                if not _is_intact(out, stage_hash):  # otherwise another process was faster
                    raise CheckpointError(
                        error.problem, where=f"stage {name}" + (f": {error.where}" if error.where else ""),
                        remedy=error.remedy,
                    ) from error  # fmt: skip
    return placed(recipe, folder_of)


def _is_hashed(recipe: Recipe) -> bool:
    """Do content hashes stand for all that the recipe is made of?"""
    sources = [source for source in (recipe.base, *recipe.experts) if source is not None]
    return all(_is_hashed(s.recipe) if s.recipe is not None else bool(s.sha256) for s in sources)


def _is_intact(folder: Path, stage_hash: str) -> bool:
    """Does ``folder`` hold that stage, whole and unchanged? Weights are read once, and then only when they change."""
    from evomerge.exporting import MANIFEST, is_complete_export

    if not is_complete_export(folder):
        return False
    kept = HashCache(cache_folder() / "hashes.json")
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        same = manifest["recipe"] == stage_hash and all(
            kept.of(folder / name) == facts["sha256"] for name, facts in manifest["files"].items()
        )
    except (CheckpointError, OSError, ValueError, KeyError):
        return False
    kept.save()
    return same


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    from evomerge.worker import settle

    before = torch.get_num_threads()
    settle(threads=1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
