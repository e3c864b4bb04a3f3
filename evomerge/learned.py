"""Numbers that a search by gradient learns inside task vectors: which there are, and the files that they are kept in.

They are too many for a point of a space, and for a row of a database. What a candidate is merged by lies in a folder of
its own, named by the hash of what it holds, in the very format of collected statistics (``collected``); so a recipe
names it as ``statistics``, and is verified and exported as any other. Where the training is lies in one file for the
optimiser. Beside the experiment file:

    learned/HASH/manifest.json                   of a candidate: written last, in a folder that is renamed when whole
    learned/HASH/EXPERT.components.safetensors   of each expert; or entries.safetensors, of a kind that all share
    learned/training-STUDY/HASH.safetensors      of the training: the one that the store names
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from evomerge.checkpoints import Checkpoint
from evomerge.collected import FORMAT, MANIFEST, TensorFile, hash_of_files
from evomerge.errors import CheckpointError, SpecError, StudyError
from evomerge.methods.base import check_params
from evomerge.methods.learned import LearnedMethod
from evomerge.methods.lookup import method_of
from evomerge.methods.statistics import SHARED
from evomerge.recipe import Collected, Recipe
from evomerge.safetensor_files import ShardWriter
from evomerge.validation import at
from evomerge.writing import sync

if TYPE_CHECKING:
    from evomerge.checkpoints import Sources
    from evomerge.searchers.base import GradientSearcher
    from evomerge.space import Space
    from evomerge.spec import Spec

FOLDER = "learned"
IN_MEMORY = "(with the job)"  # where numbers are said to lie that no file holds
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Layout:
    """Which numbers a search learns, one after the other: expert by expert, tensor by tensor.

    Attributes:
        kind: of the statistics that they are (``methods.statistics.LEARNED``).
        counts: for each expert, tensor name -> how many numbers; only one mapping where all experts share it
            (``methods.statistics.SHARED``).
    """

    kind: str
    counts: tuple[Mapping[str, int], ...]

    @property
    def size(self) -> int:
        return sum(sum(counts.values()) for counts in self.counts)

    def split(self, numbers: np.ndarray) -> list[dict[str, np.ndarray]]:
        """For each of ``counts``, tensor name -> its part of ``numbers``, (size,)."""
        parts: list[dict[str, np.ndarray]] = []
        place = 0
        for counts in self.counts:
            parts.append({})
            for name, count in counts.items():
                parts[-1][name] = numbers[place : place + count]
                place += count
        return parts

    def first(self, share: float) -> np.ndarray:
        """(size,) 1 for the first ``share`` of each tensor's numbers, rounded down, and 0 for the others."""
        each = [count for counts in self.counts for count in counts.values()]
        return np.concatenate([np.zeros(0), *(np.arange(n) < math.floor(share * n + 1e-9) for n in each)])


def layout_of(kind: str, sources: Sources, recipe: Recipe) -> Layout:
    """The numbers of ``kind`` for all tensors that ``recipe`` merges by the method which has such numbers."""
    counts: tuple[dict[str, int], ...] = tuple({} for _ in ([0] if kind in SHARED else recipe.experts))
    for name in sources.names:
        if not sources.touched(name):
            continue
        info = sources.info(name)
        group = recipe.group_for(info)
        method = method_of(recipe, group)
        if not isinstance(method, LearnedMethod) or method.statistics != kind:
            continue
        if method.takes(info, check_params(method.name, method, recipe.params_of(group))["matrices"]):
            if kind in SHARED:
                counts[0][name] = method.count(info.shape, None)
                continue
            for t, expert in enumerate(sources.experts):
                if name in expert:
                    counts[t][name] = method.count(info.shape, _rank(expert, name))
    return Layout(kind, counts)


def _rank(expert: Any, name: str) -> int | None:
    """Of the factors that an expert's task vector is; None where it is dense."""
    if isinstance(expert, Checkpoint) or expert.full(name) is not None:
        return None
    factors = expert.low_rank(name)
    return None if factors is None else len(factors.A)


def check_learned(searcher: GradientSearcher, spec: Spec, space: Space) -> None:
    """SpecError unless the space has the method whose numbers ``searcher`` learns, and nobody else brings any."""
    from evomerge.methods import METHODS

    kind, where = searcher.learns, str(spec.path or "experiment")
    if kind is None:
        return
    wanted = " or ".join(name for name, method in METHODS.items() if method.statistics == kind)
    if kind not in {METHODS[name].statistics for name in space.all_methods if name in METHODS}:
        raise SpecError(
            f"searcher {searcher.name} learns what method {wanted} merges by, but the space's method is "
            f"{', '.join(space.all_methods)}",
            where=spec.space_where,
            remedy=f"Set space.method: {wanted}, or search.method: adamerging, which learns weights alone.",
        )
    if spec.statistics is not None:
        raise SpecError(
            f"searcher {searcher.name} learns the statistics of its merges, so that none can be given",
            where=at(where, "statistics"),
            remedy="Leave it out; or search the weights around these statistics by adamerging, cma or tpe.",
        )


def in_job(layout: Layout, numbers: np.ndarray, recipe: Recipe) -> tuple[Recipe, dict[str, Any]]:
    """(``recipe`` merged by ``numbers``, these as ``Job.gradient["learned"]``): nothing is written for a step."""
    sha256 = hashlib.sha256(np.ascontiguousarray(numbers).data).hexdigest()
    named = replace(recipe, statistics=Collected(IN_MEMORY, {layout.kind: sha256}))
    return named, {"kind": layout.kind, "tensors": layout.split(numbers)}


class LearnedFiles:
    """The files of one study.

    Args:
        folder: of the experiment.
        study: what tells this study from all others that have the folder.
    """

    def __init__(self, folder: Path, study: str):
        self.folder = folder.absolute() / FOLDER
        self.training = self.folder / f"training-{study}"

    def named(self, layout: Layout, numbers: np.ndarray, recipe: Recipe) -> Recipe:
        """``recipe`` merged by ``numbers``, which are written unless they are there.

        Masks of 0 and 1 are stored as booleans, all else in the type that it has.
        """
        kind, partial = layout.kind, self.training / "writing"
        with _writing(self.folder):
            shutil.rmtree(partial, ignore_errors=True)  # of a driver that died
            partial.mkdir(parents=True)
            names = [f"{kind}.safetensors"]  # one for all experts
            if kind not in SHARED:
                names = [f"{source.name}.{kind}.safetensors" for source in recipe.experts]
            written = []
            for name, arrays in zip(names, layout.split(numbers), strict=True):
                sha256 = _write_file(partial / name, {n: _stored(kind, array) for n, array in arrays.items()})
                written.append({"file": name, "sha256": sha256, "size": (partial / name).stat().st_size})
            if kind in SHARED:
                written *= len(recipe.experts)
            files = [{**file, "expert": s.sha256} for file, s in zip(written, recipe.experts, strict=True)]
            entry: dict[str, Any] = {"base": recipe.base.sha256 if recipe.base else "", "files": files}
            if recipe.tokenizer is not None:
                entry["tokenizer"] = recipe.tokenizer.short()
            text = json.dumps({"evomerge_statistics": FORMAT, "kinds": {kind: entry}}, indent=2) + "\n"
            (partial / MANIFEST).write_text(text, encoding="utf-8")
            sync(partial / MANIFEST)
            sync(partial)
            place = self.folder / hashlib.sha256(text.encode()).hexdigest()
            try:
                partial.rename(place)
                sync(self.folder)
            except OSError:
                if not place.is_dir():  # else it is there already: whole, since it got its name last
                    raise
                shutil.rmtree(partial)
        content = hash_of_files([(place / file["file"], file["sha256"]) for file in files])
        return replace(recipe, statistics=Collected(str(place), {kind: content}))

    def keep_training(self, arrays: Arrays) -> str:
        """Write where the training is; the file's hash, by which ``training_at`` finds it again."""
        with _writing(self.training):
            self.training.mkdir(parents=True, exist_ok=True)
            partial = self.training / ".partial"
            partial.unlink(missing_ok=True)
            tensors = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in arrays.items()}
            sha256 = _write_file(partial, tensors)
            partial.replace(self.training / f"{sha256}.safetensors")
            sync(self.training)
        return sha256

    def forget_trainings(self, but: str) -> None:
        """Remove what ``keep_training`` wrote before ``but``, which the store names by now."""
        for file in self.training.glob("*.safetensors"):
            if file.stem != but:
                file.unlink(missing_ok=True)

    def training_at(self, sha256: str) -> dict[str, np.ndarray]:
        """What ``keep_training`` was given. Raises StudyError if it is gone, or is not what it was."""
        path = self.training / f"{sha256}.safetensors"
        try:
            with path.open("rb") as handle:
                found = hashlib.file_digest(handle, "sha256").hexdigest()
        except OSError:
            found = None
        if found != sha256:
            raise StudyError(
                f"{path}, from which the training goes on, {'is gone' if found is None else 'is damaged'}",
                remedy="Restore it, or start the experiment again under another name.",
            )
        return {key: tensor.clone().numpy() for key, tensor in TensorFile(path).items()}


def _stored(kind: str, numbers: np.ndarray) -> Tensor:
    stored = torch.from_numpy(np.ascontiguousarray(numbers))
    mask = kind in ("components", "entries") and bool(((numbers == 0) | (numbers == 1)).all())
    return stored.to(torch.bool) if mask else stored


def _write_file(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """The file's SHA-256; it is on the disk then."""
    with ShardWriter(path, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}) as writer:
        for tensor in tensors.values():
            writer.write(tensor)
    return writer.sha256


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """CheckpointError, naming the folder, for what the system says against it."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{folder}, where what is learned is kept, cannot be written: {error.strerror or error}",
            remedy="Check the folder and its rights, and the room on its disk; then go on with evomerge resume.",
        ) from error
