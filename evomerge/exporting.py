"""Write a merge as an ordinary Hugging Face checkpoint that is whole or not there: the manifest last, then a rename."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from evomerge.companions import BASE_ONLY, Companions
from evomerge.errors import CheckpointError
from evomerge.folders import optional_files
from evomerge.merging import SHARD_SIZE, Merger, Report, open_source, open_sources
from evomerge.modelcard import NOT_PLAIN, all_sources, model_card
from evomerge.recipe import Recipe, Source, Surgery
from evomerge.surgery import FILE as SURGERY_FILE
from evomerge.writing import check_out, sync, whole_folder

MANIFEST, RECIPE_FILE, CARD_FILE = "evomerge_manifest.json", "recipe.yaml", "README.md"


def export(
    recipe: Recipe,
    out: Path,
    *,
    shard_size: int = SHARD_SIZE,
    card: Mapping[str, Any] | None = None,
    companions: Companions = BASE_ONLY,
    progress: Report | None = None,
    device: str = "cpu",
) -> Path:
    """Merge ``recipe`` and write a checkpoint that transformers loads: weights, config, tokenizer, recipe, model card.

    Adapters behind the merge lie beside it, in ``surgery.safetensors``: what transformers loads is the merge alone.
    All is written into a temporary folder beside ``out``, synchronised, and renamed at the end (``whole_folder``).

    Args:
        out: a folder that does not exist yet, or is empty.
        shard_size: bytes of tensors a weight file may hold.
        card: what a study knows of the merge, for the model card (see ``modelcard.model_card``).
        companions: the tokenizer and chat templates, if not the base's.
        progress: called with (bytes written, bytes in all).
        device: where the arithmetic is done; the study's, for the study's very numbers.

    Returns ``out``. Raises CheckpointError if ``out`` is not empty or cannot be written, if the disk is full, or if a
    source cannot be used.
    """
    out = Path(out).absolute()
    check_out(out)
    sources = open_sources(recipe)
    check_room(out, merged_bytes(recipe))
    with whole_folder(out) as folder:
        merger = Merger(sources, device=device)
        hashes = write_checkpoint(
            merger, recipe, folder, shard_size=shard_size, card=card, companions=companions, progress=progress
        )
        facts = {} if recipe.surgery is None else {"surgery": NOT_PLAIN}
        write_manifest(folder, recipe, hashes, companions.facts() | facts)
    return out


def write_checkpoint(
    merger: Merger,
    recipe: Recipe,
    folder: Path,
    *,
    shard_size: int = SHARD_SIZE,
    card: Mapping[str, Any] | None = None,
    companions: Companions = BASE_ONLY,
    progress: Report | None = None,
    durable: bool = True,
) -> dict[str, str]:
    """All of an export but its manifest, in the existing folder ``folder``: for exports and for evaluations on disk.

    Args:
        durable: False for a folder that lives for one evaluation (see ``Merger.stream``).

    Returns the weight files' SHA-256 (nothing without ``durable``).
    """
    hashes = merger.stream(recipe, folder, shard_size=shard_size, progress=progress, durable=durable)
    base = merger.sources.reference
    alignment = merger.sources.alignment
    if alignment is None:
        companions.write(folder, default=base.path)
    else:
        with alignment.written(base.path) as tokenizer:
            companions.write(folder, default=tokenizer)
    config = _config(base.config, recipe.export_dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for file in optional_files(base.path, ("generation_config.json",)):
        shutil.copyfile(file, folder / file.name)
    if alignment is not None and alignment.generation is not None:
        text = json.dumps(alignment.generation, indent=2) + "\n"
        (folder / "generation_config.json").write_text(text, encoding="utf-8")
    if recipe.surgery is not None:
        shutil.copyfile(recipe.surgery.path, folder / SURGERY_FILE)
        recipe = replace(recipe, surgery=Surgery(SURGERY_FILE, recipe.surgery.sha256))
    (folder / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
    text = model_card(recipe, base.config, {**(card or {}), **companions.facts()})
    (folder / CARD_FILE).write_text(text, encoding="utf-8")
    return hashes


def is_complete_export(path: str | Path, *, hashes: bool = False) -> bool:
    """True if ``path`` is an export that was finished, with every file of its manifest there in full.

    Args:
        hashes: compare the files' SHA-256, too, which reads them.
    """
    folder = Path(path)
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        for name, facts in files.items():
            file = folder / name
            if file.stat().st_size != facts["size"] or (hashes and _sha256(file) != facts["sha256"]):
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return bool(files)


def merged_bytes(recipe: Recipe) -> int:
    """How many bytes of tensors the merge has. Raises CheckpointError if a source cannot be opened."""
    return open_source(Source("", recipe=recipe)).total_bytes


def check_room(out: Path, needed: int, what: str = "the merge needs") -> None:
    """CheckpointError if the disk of ``out`` cannot take so many bytes: better before the work than after."""
    existing = next(folder for folder in (out, *out.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise CheckpointError(
            f"{what} {needed / 1e9:.2f} GB, but {existing} has {free / 1e9:.2f} GB left",
            remedy="Free some space, or choose another output folder. Nothing was written.",
        )


def _config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The base's configuration with the type of the merged weights, in its parts as well."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            changed[key] = dtype
        elif key == "auto_map":
            continue
        elif isinstance(value, dict) and ("dtype" in value or "torch_dtype" in value):
            changed[key] = _config(value, dtype)
        else:
            changed[key] = value
    changed.setdefault("dtype", dtype)
    return changed


def write_manifest(folder: Path, recipe: Recipe, hashes: Mapping[str, str], facts: Mapping[str, str]) -> None:
    """Names, sizes and hashes of all files, and more ``facts``. Written last, when all before it is on the disk."""
    files = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if name not in hashes:
            sync(file)
        if file.is_file():
            files[name] = {"size": file.stat().st_size, "sha256": hashes.get(name) or _sha256(file)}
    sources = [{"role": role, "name": source.name, "sha256": content} for role, source, content in all_sources(recipe)]
    manifest = {"evomerge_manifest": 1, "recipe": recipe.hash, "sources": sources, **facts, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
