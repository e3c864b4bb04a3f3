"""What a checkpoint is, as one number: each file is read once, for its SHA-256 and for NaN and infinity together."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from evomerge.errors import CheckpointError
from evomerge.folders import find_folder
from evomerge.safetensor_files import Entry, read_header

PIECE = 8 << 20  # bytes read at a time; a multiple of every dtype's size
SETTLED_SECONDS = 2.0  # a file changed more recently than this may change again without a visible change of its time
MAX_CACHED = 20_000

Progress = Callable[[int, int], None]


def content_hash(path: str | Path, *, progress: Progress | None = None, cache: str | Path | None = None) -> str:
    """SHA-256 (hex) of what a checkpoint or adapter folder holds, wherever it lies.

    It covers the names and contents of the weights (and their index), config.json, generation_config.json,
    adapter_config.json, and the tokenizer's and chat template's files; not README files, licences or training state.

    Args:
        path: the folder, or a Hugging Face id.
        progress: called with (bytes done, bytes in all).
        cache: a JSON file in which hashes are kept by device, inode, size and time of change, so that an unchanged
            file is not read again. By default ``hashes.json`` under EVOMERGE_CACHE or ~/.cache/evomerge.

    Raises CheckpointError for a folder that cannot be opened, and for NaN or infinity in a tensor, by name.
    """
    files = _content_files(path)
    kept = HashCache(Path(cache) if cache is not None else cache_folder() / "hashes.json")
    total, done = sum(file.stat().st_size for file in files), 0
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):

        def report(bytes_read: int, before: int = done) -> None:
            if progress is not None:
                progress(before + bytes_read, total)

        digest.update(f"{kept.of(file, report)}  {file.name}\n".encode())
        done += file.stat().st_size
        if progress is not None:
            progress(done, total)
    kept.save()
    return digest.hexdigest()


def _content_files(path: str | Path) -> list[Path]:
    from evomerge.adapters import adapter_files
    from evomerge.checkpoints import open_checkpoint

    folder = find_folder(path)
    if (folder / "adapter_config.json").exists():
        return adapter_files(folder)
    return open_checkpoint(folder).files()


def cache_folder() -> Path:
    """Where evomerge keeps what can be computed again: EVOMERGE_CACHE, or ~/.cache/evomerge."""
    folder = os.environ.get("EVOMERGE_CACHE")
    return Path(folder) if folder else Path.home() / ".cache" / "evomerge"


def _hash_and_scan(file: Path, report: Callable[[int], None]) -> str:
    """SHA-256 of one file, read once from begin to end; tensors are looked through on the way."""
    digest = hashlib.sha256()
    before = _identity(file)
    buffer = bytearray(PIECE)
    with file.open("rb", buffering=0) as handle:
        for name, entry, size in _stretches(file):
            for offset in range(0, size, PIECE):
                piece = memoryview(buffer)[: min(PIECE, size - offset)]
                _fill(handle, piece, file)
                digest.update(piece)
                if entry is not None and entry.dtype.is_floating_point and not _finite(piece, entry.dtype):
                    first = offset // entry.dtype.itemsize + _first_bad(piece, entry.dtype)
                    raise CheckpointError(
                        f"{file}: tensor {name} holds NaN or infinity (first at flat index {first})",
                        remedy="The checkpoint is damaged or its training diverged: use another one.",
                    )
                report(handle.tell())
    if _identity(file) != before:
        raise CheckpointError(f"{file} changed while it was read", remedy="Wait until it is complete, and start again.")
    return digest.hexdigest()


def _stretches(file: Path) -> Iterator[tuple[str, Entry | None, int]]:
    """(name, entry, bytes) of the parts of a file in order: the header (or all of another file), then the tensors."""
    if file.suffix != ".safetensors":
        yield "", None, file.stat().st_size
        return
    header = read_header(file)
    yield "", None, min((e.begin for e in header.values()), default=file.stat().st_size)
    for name, entry in header.items():
        yield name, entry, entry.end - entry.begin


def _fill(handle: Any, piece: memoryview, file: Path) -> None:
    place = 0
    while place < len(piece):
        count = handle.readinto(piece[place:])
        if not count:
            raise CheckpointError(f"{file} became shorter while it was read", remedy="Restore it and start again.")
        place += count


def _finite(piece: memoryview, dtype: torch.dtype) -> bool:
    """A sum is finite only if all its terms are, and the fastest look. It may overflow: then the extremes decide."""
    values = torch.frombuffer(piece, dtype=dtype)
    wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    if torch.isfinite(values.sum(dtype=wide)):
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(values))


def _first_bad(piece: memoryview, dtype: torch.dtype) -> int:
    return int(torch.isfinite(torch.frombuffer(piece, dtype=dtype)).logical_not().nonzero()[0])


def _identity(file: Path) -> str:
    stat = file.stat()
    return f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}"


class HashCache:
    """File hashes by device, inode, size and time of change. Safe to delete; a damaged one counts as empty."""

    def __init__(self, path: Path):
        self.path = path
        self._hashes = self._read()
        self._new: dict[str, str] = {}

    def _read(self) -> dict[str, str]:
        try:
            data = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return {k: v for k, v in data.items() if isinstance(v, str)} if isinstance(data, dict) else {}

    def of(self, file: Path, report: Callable[[int], None] = lambda done: None) -> str:
        """SHA-256 of one file, known or taken now.

        Args:
            report: called with the bytes read.

        Raises CheckpointError for NaN and infinity in a tensor, if the file is read.
        """
        known = self.get(file)
        if known is None:
            known = _hash_and_scan(file, report)
            self.put(file, known)
        return known

    def get(self, file: Path) -> str | None:
        return self._hashes.get(_identity(file))

    def put(self, file: Path, file_hash: str) -> None:
        if time.time() - file.stat().st_mtime > SETTLED_SECONDS:
            self._new[_identity(file)] = file_hash

    def save(self) -> None:
        """Add what is new to what others have written meanwhile. A cache that cannot be written is done without."""
        if not self._new:
            return
        merged = list({**self._read(), **self._new}.items())[-MAX_CACHED:]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name)
            with os.fdopen(handle, "w") as file:
                json.dump(dict(merged), file)
            Path(temporary).replace(self.path)
        except OSError:
            return
        self._new.clear()
