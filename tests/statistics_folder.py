"""Random statistics of a family's experts, in the documented format of `evomerge collect`."""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from evomerge.checkpoints import content_hash, open_checkpoint
from evomerge.methods.statistics import example_statistics
from evomerge.recipe import Collected


def write_statistics(family: Path, experts: Sequence[str], folder: Path, *kinds: str, seed: int = 0) -> Path:
    """Write ``folder`` for ``family/base`` and ``family/EXPERT`` of each name, and return it."""
    base = open_checkpoint(family / "base")
    shapes = {name: base.shape(name) for name in base.names if base.dtype(name).is_floating_point}
    folder.mkdir(exist_ok=True)
    manifest: dict[str, Any] = {"evomerge_statistics": 1, "kinds": {}}
    for kind in kinds:
        files = []
        made = example_statistics(kind, shapes, len(experts), seed=seed) or []
        for name, tensors in zip(experts, made, strict=True):
            path = folder / f"{name}.{kind}.safetensors"
            save_file(tensors, path)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            content = content_hash(family / name)
            files.append({"file": path.name, "expert": content, "sha256": digest, "size": path.stat().st_size})
        manifest["kinds"][kind] = {"base": content_hash(family / "base"), "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@functools.cache
def _kept(family: Path, experts: tuple[str, ...], kind: str) -> tuple[Collected, Any]:
    folder = tempfile.TemporaryDirectory()  # lives as long as the tests
    return Collected(str(write_statistics(family, experts, Path(folder.name), kind))), folder


def statistics_of(family: Path, experts: Sequence[str], kind: str | None) -> Collected | None:
    """What a recipe with these experts needs for a method of this kind."""
    return None if kind is None else _kept(family, tuple(experts), kind)[0]
