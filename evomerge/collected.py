"""What ``evomerge collect`` wrote, opened: statistics of experts, in a folder that says what they were taken from.

    manifest.json                 completion: written last, names, hashes and origin of every file
    add.fisher.safetensors        one file an expert and kind (see ``methods.statistics`` for what is in one)
    topic.fisher.safetensors

Experts are found by the hash of their content, wherever they lie and whatever they are called.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evomerge.checkpoints import map_tensor
from evomerge.errors import CheckpointError, MethodError
from evomerge.folders import inside, some
from evomerge.hashing import HashCache, cache_folder, content_hash
from evomerge.methods.statistics import LEARNED, STATISTICS, how_to_collect
from evomerge.recipe import Collected
from evomerge.safetensor_files import read_header

if TYPE_CHECKING:
    from evomerge.recipe import Recipe, Source

MANIFEST, FORMAT = "manifest.json", 1


class TensorFile(Mapping[str, Tensor]):
    """The tensors of one safetensors file by name: pages of the file, read when they are looked at."""

    def __init__(self, path: Path):
        self.path = path
        self._entries = read_header(path)
        self._storages: dict[Path, torch.UntypedStorage] = {}

    def __getitem__(self, name: str) -> Tensor:
        return map_tensor(self._storages, self.path, self._entries[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def open_collected(collected: Collected, kind: str, recipe: Recipe) -> list[TensorFile]:
    """Statistics of one kind, a mapping an expert of ``recipe``, in the recipe's order.

    Raises CheckpointError: no such folder or kind, statistics of another base or of other experts, files that are gone
    or not as long as they were, or not those that ``collected`` was made with.
    """
    files = _files(collected, kind, recipe)
    recorded = collected.sha256.get(kind)
    if recorded and recorded != hash_of_files(files):
        raise CheckpointError(
            f"the statistics ({kind}) in {collected.path} have the hash {hash_of_files(files)}, but the recipe was "
            f"made with {recorded}",
            remedy="Restore the folder, or take the sha256 out of the recipe to merge by what is there now.",
        )
    return [TensorFile(path) for path, _ in files]


def verify_collected(collected: Collected, kinds: Sequence[str], recipe: Recipe) -> Collected:
    """``collected`` with the hash of each of ``kinds``, whose files are read once (or known from the cache).

    Raises CheckpointError as ``open_collected`` does, and for a file that is not what its manifest says.
    """
    kept = HashCache(cache_folder() / "hashes.json")
    hashes = {}
    for kind in kinds:
        open_collected(collected, kind, recipe)
        files = _files(collected, kind, recipe)
        for path, sha256 in files:
            if kept.of(path) != sha256:
                raise CheckpointError(
                    f"{path} is not what {MANIFEST} beside it says",
                    remedy="It is damaged, or was changed: remove it and collect again.",
                )
        hashes[kind] = hash_of_files(files)
    kept.save()
    return replace(collected, sha256=hashes)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of statistics; CheckpointError if there is none, or it is of another format."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no statistics: there is no {path.name}",
            remedy="Give the folder that `evomerge collect EXPERIMENT --out FOLDER` has finished.",
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        known = data["evomerge_statistics"] == FORMAT and isinstance(data["kinds"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        known, data = False, {}
    if not known:
        raise CheckpointError(
            f"{path} does not describe statistics of the format {FORMAT}, the one that this version reads",
            remedy="Collect them again.",
        )
    return data


def _files(collected: Collected, kind: str, recipe: Recipe) -> list[tuple[Path, str]]:
    """(file, its SHA-256 by the manifest) of each expert."""
    folder = Path(collected.path)
    data = read_manifest(folder)
    try:
        kinds = {k: entry for k, entry in data["kinds"].items() if k in (*STATISTICS, *LEARNED)}
        if kind not in kinds:
            raise CheckpointError(
                f"{folder} holds no statistics of the kind {kind}, but {', '.join(kinds) or 'none'}",
                remedy=how_to_collect(kind),
            )
        entry = kinds[kind]
        if recipe.base is not None and entry["base"] != (base := _content(recipe.base)):
            raise CheckpointError(
                f"the statistics ({kind}) in {folder} were taken from experts of another base ({entry['base'][:12]} "
                f"instead of {base[:12]})",
                remedy=how_to_collect(kind),
            )
        tokenizer = None if recipe.tokenizer is None else recipe.tokenizer.short()
        if entry.get("tokenizer") != tokenizer:
            raise CheckpointError(
                f"the statistics ({kind}) in {folder} were taken with the vocabulary {entry.get('tokenizer')}, but the "
                f"merge has {tokenizer}",
                remedy=how_to_collect(kind),
            )
        by_content = {expert["expert"]: expert for expert in entry["files"]}
        contents = {source.name: _content(source) for source in recipe.experts}
        missing = [name for name, content in contents.items() if content not in by_content]
        if missing:
            raise CheckpointError(
                f"the statistics ({kind}) in {folder} are not of the expert {some(missing)}, but of others or of what "
                "it was before",
                remedy=how_to_collect(kind),
            )
        files = []
        for content in contents.values():
            facts = by_content[content]
            if Path(facts["file"]).name != facts["file"]:
                raise CheckpointError(f"{folder / MANIFEST} names {facts['file']!r}, which is no file of this folder")
            path = folder / facts["file"]
            if not path.is_file() or inside(path).stat().st_size != facts["size"]:
                raise CheckpointError(f"{path} is gone, or not as long as it was", remedy="Collect it again.")
            files.append((path, str(facts["sha256"])))
        return files
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{folder / MANIFEST} is damaged", remedy="Collect the statistics again.") from None


def _content(source: Source) -> str:
    return source.sha256 or (content_hash(source.path) if source.recipe is None else source.recipe.hash)


def hash_of_files(files: Sequence[tuple[Path, str]]) -> str:
    """What a recipe records of the statistics of one kind: of (file, its SHA-256) of each expert."""
    return hashlib.sha256("\n".join(sha256 for _, sha256 in files).encode()).hexdigest()


def statistics_for(recipe: Recipe, kind: str, method: str) -> list[TensorFile]:
    """What ``method``, which needs this kind, is given for ``recipe``.

    Raises MethodError if the recipe names no statistics, CheckpointError if they do not fit it.
    """
    if recipe.statistics is None:
        raise MethodError(
            f"method {method} needs statistics of each expert ({kind}), but the recipe names none",
            remedy=how_to_collect(kind),
        )
    return open_collected(recipe.statistics, kind, recipe)
