"""The safetensors format at the level evomerge needs: headers without data, and shards written tensor by tensor.

A file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, and the tensors'
bytes, row-major, in the order of their offsets and without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from evomerge.errors import CheckpointError

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies: its bytes are [begin, end) of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """Names, types, shapes and places of a file's tensors, in the order of their places. Reads no tensor data.

    Raises CheckpointError, naming the file, where it is truncated, corrupted, or holds a type that cannot be merged.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise _broken(path, f"its header should be {length} bytes long, but the file has {size} bytes in all")
            data = _parsed(file.read(length), 8 + length)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}", remedy="Check the file and its rights."
        ) from None
    except (UnicodeDecodeError, ValueError, RecursionError):
        raise _broken(path, "its header is not valid JSON") from None
    if not isinstance(data, dict):
        raise _broken(path, "its header is not a table of tensors")
    data.pop("__metadata__", None)
    for name, value in data.items():
        if not isinstance(value, Entry):
            raise _refused(path, name, value)
    # Checkpoints of a family have the same names: one string for all of them.
    entries = {sys.intern(name): data[name] for name in sorted(data, key=lambda n: (data[n].begin, data[n].end))}
    place = 8 + length
    for name, entry in entries.items():
        if entry.begin != place:
            raise _broken(
                path, f"tensor {name} starts at byte {entry.begin}, not where the one before it ends ({place})"
            )
        place = entry.end
    if place != size:
        raise _broken(path, f"its header describes {place} bytes, but the file has {size}")
    return entries


def _parsed(text: bytes, data_start: int) -> Any:
    """The header as JSON, with an Entry for each table that describes a tensor.

    They are made while it is read: a table of all tables takes several times as much memory.
    """
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # most tensors have another's

    def entry_or_table(pairs: list[tuple[str, Any]]) -> Any:
        table = dict(pairs)
        if _fault(table) is not None:
            return table
        shape = tuple(table["shape"])
        begin, end = table["data_offsets"]
        return Entry(DTYPES[table["dtype"]], shapes.setdefault(shape, shape), data_start + begin, data_start + end)

    return json.loads(text, object_pairs_hook=entry_or_table)


def _fault(table: dict[str, Any]) -> str | None:
    """Which key of what should describe a tensor is wrong."""
    code, shape, offsets = table.get("dtype"), table.get("shape"), table.get("data_offsets")
    if not (_whole_numbers(shape) and _whole_numbers(offsets) and len(offsets) == 2):
        return "shape"
    if not isinstance(code, str) or code not in DTYPES:
        return "dtype"
    return None if offsets[1] - offsets[0] == math.prod(shape) * DTYPES[code].itemsize else "data_offsets"


def _refused(path: Path, name: str, value: object) -> CheckpointError:
    if not isinstance(value, dict):
        return _broken(path, f"the header's entry for {name} is not a table")
    fault, code = _fault(value), value.get("dtype")
    if fault == "shape":
        return _broken(path, f"the header's entry for {name} has no valid shape and data_offsets")
    if fault == "dtype":
        return CheckpointError(
            f"{path}: tensor {name} has the type {code}, which cannot be merged",
            remedy=f"Convert the checkpoint to bfloat16, float16 or float32 first. Readable: {', '.join(DTYPES)}.",
        )
    begin, end = value["data_offsets"]
    return _broken(path, f"tensor {name} of shape {value['shape']} and type {code} cannot have {end - begin} bytes")


def _whole_numbers(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _broken(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is truncated or corrupted: {what}", remedy="Copy or download it again, and compare its checksum."
    )


def read_metadata(path: Path) -> dict[str, str]:
    """What a file says of itself beside its tensors; nothing if it cannot be read."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            data = json.loads(file.read(length)).get("__metadata__") if length <= MAX_HEADER else None
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
    return {k: v for k, v in data.items() if isinstance(v, str)} if isinstance(data, dict) else {}


def write_header(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The first bytes of a file that holds ``tensors`` in this order, padded so that the data starts 8-byte aligned."""
    compact = json.JSONEncoder(separators=(",", ":")).encode
    # Entry by entry: a table of all tables takes several times the header's memory.
    text = bytearray(b'{"__metadata__":' + compact({"format": "pt", **(metadata or {})}).encode())
    place = 0
    for name, (dtype, shape) in tensors.items():
        end = place + math.prod(shape) * dtype.itemsize
        table = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [place, end]}
        text += f",{compact(name)}:{compact(table)}".encode()
        place = end
    text += b"}"
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class ShardWriter:
    """Writes one new safetensors file piece by piece: the header at once, then the tensors' bytes in its order.

    A context manager: on leaving, everything announced must have been written, and is put on the disk. ``sha256`` is
    then the file's. Without ``durable`` it is neither synchronised nor hashed: for files that are soon removed.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
        *,
        durable: bool = True,
        metadata: Mapping[str, str] | None = None,
    ):
        header = write_header(tensors, metadata)
        self.size = len(header) + sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values())
        self._durable, self._digest = durable, hashlib.sha256()
        self._written = 0
        self._file = path.open("xb")
        self._write(header)

    def write(self, piece: Tensor) -> None:
        """The next entries, flat, in the type that the header says."""
        self._write(piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        if self._durable:
            self._digest.update(data)
        self._written += len(data)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if kind is not None:
                return
            if self._written != self.size:
                raise ValueError(f"{self._written} bytes were written of {self.size} announced")
            self._file.flush()
            if self._durable:
                os.fsync(self._file.fileno())

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()
