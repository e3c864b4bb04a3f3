"""Representation surgery: a small adapter for each task, behind the merged encoder, and the file that holds them.

The features of a merged model lie elsewhere than those of each task's own expert, in a way that differs from task to
task. For task t with the merged model's pooled features Z (items, width) an adapter subtracts what it takes for this
bias:

    Z' = Z - ReLU(Z down^T) up^T        down: (rank, width), up: (width, rank)

Yang et al. 2024, "Representation surgery for multi-task model merging", arXiv:2402.02705, equations 2 and 3 (its W_down
and W_up). The start is that of its authors' code: down as torch initialises a linear layer, up at zero, so that an
adapter without training changes nothing. How they are trained is in ``surgery_training``.

Adapters are kept beside the experiment, in a file that is called by the hash of what it holds; a recipe names it. In
the file of N tasks there are 2 N tensors in float32, TASK.down and TASK.up:

    surgery/HASH.safetensors
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from evomerge.collected import TensorFile
from evomerge.errors import CheckpointError
from evomerge.evaluation import Evaluator
from evomerge.recipe import Surgery
from evomerge.safetensor_files import ShardWriter
from evomerge.writing import sync

FOLDER = "surgery"  # beside the experiment file
FILE = "surgery.safetensors"  # in an export
FORMULA = "Z' = Z - ReLU(Z down^T) up^T"


@dataclass(frozen=True)
class Adapter:
    """What is done to a task's pooled features: down (rank, width), up (width, rank)."""

    down: Tensor
    up: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """(items, width), in the type of ``features``."""
        down, up = self.down.to(features), self.up.to(features)
        return features - torch.relu(features @ down.T) @ up.T

    @property
    def size(self) -> int:
        """How many parameters it has."""
        return self.down.numel() + self.up.numel()


def write(folder: Path, adapters: Mapping[str, Adapter]) -> Surgery:
    """Keep ``adapters`` (task -> adapter) in ``folder``; a file of the same content is left as it is.

    Raises CheckpointError, naming the folder, if it cannot be written.
    """
    tensors = {f"{task}.{side}": getattr(a, side) for task, a in adapters.items() for side in ("down", "up")}
    header = {name: (torch.float32, tuple(tensor.shape)) for name, tensor in tensors.items()}
    folder = folder.absolute()
    partial = folder / f".{os.getpid()}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        with ShardWriter(partial, header, metadata={"evomerge_surgery": FORMULA}) as writer:
            for tensor in tensors.values():
                writer.write(tensor)
        place = folder / f"{writer.sha256}.safetensors"
        partial.replace(place)
        sync(folder)
    except OSError as error:
        raise CheckpointError(
            f"{folder}, where the adapters of surgery are kept, cannot be written: {error.strerror or error}",
            remedy="Check the folder and its rights, and the room on its disk; then go on with evomerge resume.",
        ) from error
    return Surgery(str(place), writer.sha256)


def verify(surgery: Surgery) -> Surgery:
    """``surgery`` with its hash filled in; CheckpointError if its file is gone, or not the one that is named."""
    path = Path(surgery.path)
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(
            f"{path}, which holds the adapters of surgery, cannot be read: {error.strerror or error}",
            remedy="Restore the file, or leave the adapters out (surgery in the recipe, --no-surgery).",
        ) from None
    if surgery.sha256 and found != surgery.sha256:
        raise CheckpointError(
            f"{path} holds other adapters than before: its SHA-256 is {found}, but {surgery.sha256} is asked for",
            remedy="Restore the file, or leave the adapters out (surgery in the recipe, --no-surgery).",
        )
    return Surgery(surgery.path, found)


def read(surgery: Surgery) -> dict[str, Adapter]:
    """Task -> adapter, on the CPU.

    Raises CheckpointError as ``verify`` does, and for a file that does not hold adapters.
    """
    verify(surgery)
    file, adapters = TensorFile(Path(surgery.path)), {}
    sides = {task: {} for task in dict.fromkeys(name.rpartition(".")[0] for name in file)}
    for name, tensor in file.items():
        task, _, side = name.rpartition(".")
        sides[task][side] = tensor.clone()
    for task, pair in sides.items():
        down, up = pair.get("down"), pair.get("up")
        if len(pair) != 2 or down is None or up is None or down.dim() != 2 or up.shape != down.T.shape:
            raise CheckpointError(
                f"the tensors of {task!r} are no adapter: there must be {task}.down (rank, width) and {task}.up "
                "(width, rank)",
                where=surgery.path,
                remedy="Restore the file.",
            )
        adapters[task] = Adapter(down, up)
    return adapters


def in_words(adapters: Mapping[str, Adapter]) -> str:
    """``4 adapters of 12,288 parameters``"""
    return count_in_words(len(adapters), sum(adapter.size for adapter in adapters.values()))


def count_in_words(adapters: int, parameters: int) -> str:
    """``4 adapters of 12,288 parameters``: how many there are, and the parameters of all of them."""
    return f"{adapters} adapter{'s' if adapters != 1 else ''} of {parameters:,} parameters"


def lacking(evaluator: Evaluator, tasks: Sequence[str]) -> list[str]:
    """The tasks whose features ``evaluator`` cannot put through an adapter."""
    return [task for task in tasks if evaluator.needs != "model" or not evaluator.adapts(task)]
