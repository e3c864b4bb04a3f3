"""Where a worker keeps its sources: mapped files, page-locked memory, or the device that merges.

The numbers are the same everywhere. Only dense tensors are kept elsewhere: what a method prepares, and a LoRA expert's
product B A, come from the mapped files and from the CPU, whatever the place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from evomerge.errors import ResourceError
from evomerge.progress import size

if TYPE_CHECKING:
    from torch import Tensor

    from evomerge.checkpoints import Sources

PLACES = ("mmap", "pinned", "device")
LEAST_RESERVE = 2_000_000_000  # bytes left for activations and what a merge needs on the way
RESERVED_SHARE = 0.2
RAM_SHARE = 0.5  # of what is available: the rest is for the page cache and everything else


def refuse_pinned(place: str, device: str) -> None:
    """ResourceError if page-locked memory is asked for where there is no GPU that it would be good for."""
    if place == "pinned" and not device.startswith("cuda"):
        raise ResourceError(
            f"page-locked memory (pinned) was asked for, but workers run on {device}: it speeds up copies to a GPU, "
            "and is nothing but a second copy elsewhere",
            where="workers.sources",
            remedy="Use mmap or auto, or give each worker a GPU with workers.gpus.",
        )


def choose(
    wanted: str,
    device: str,
    *,
    sources: int,
    model: int,
    device_room: int,
    ram: int,
    workers: int,
    engine: bool = False,
) -> str:
    """``wanted``, or what ``auto`` stands for.

    On a GPU: ``device`` if the sources fit beside the model with a fifth of the room (2 GB at least) left for
    activations; else ``pinned`` if a copy for each worker takes no more than half of the memory that is available; else
    ``mmap``. On the CPU ``mmap``.

    Args:
        sources, model: bytes of the dense sources, and of the resident model.
        device_room: bytes of the GPU that this worker may fill: what is free, at most its share of the whole.
        ram: bytes of memory available on the machine.
        workers: how many may share the machine.
        engine: an engine in another process needs the GPU, so that nothing is kept there.
    """
    if wanted != "auto":
        return wanted
    if not device.startswith("cuda"):
        return "mmap"
    reserve = max(LEAST_RESERVE, int(RESERVED_SHARE * device_room))
    if not engine and sources + model + reserve <= device_room:
        return "device"
    return "pinned" if sources * workers <= RAM_SHARE * ram else "mmap"


def rooms(device: str, gpus: float) -> tuple[int, int]:
    """(bytes of the GPU that a worker with ``gpus`` of it may fill, bytes of memory available)."""
    import psutil
    import torch

    ram = int(psutil.virtual_memory().available)
    if not device.startswith("cuda"):
        return 0, ram
    free, total = torch.cuda.mem_get_info(device)
    return min(free, int(total * min(gpus or 1.0, 1.0))), ram


def dense_bytes(sources: Sources) -> int:
    """Bytes of the tensors that ``keep`` copies."""
    return sum(tensor.numel() * tensor.element_size() for _, _, tensor in _dense(sources))


def keep(sources: Sources, place: str, device: str) -> None:
    """Copy the dense tensors of ``sources`` once to ``place``, from where merges read them from now on.

    Raises:
        ResourceError: page-locked memory is asked for without a GPU, or the memory does not suffice.
    """
    refuse_pinned(place, device)
    if place == "mmap":
        return
    try:
        for index, name, tensor in _dense(sources):
            kept = tensor.pin_memory() if place == "pinned" else tensor.to(device, copy=True)
            sources.kept[index, name] = kept
    except RuntimeError as error:  # out of memory, on either side
        sources.kept.clear()
        raise ResourceError(
            f"the sources, {size(dense_bytes(sources))}, cannot be kept in {place} memory ({device}): {error}",
            where="workers.sources",
            remedy="Use mmap, or auto, which looks at what is free.",
        ) from error


def _dense(sources: Sources) -> Iterator[tuple[int, str, Tensor]]:
    """(source, name, tensor) of all float tensors that are read as they are: the base is source -1."""
    from evomerge.checkpoints import Checkpoint

    for index, source in enumerate([sources.base, *sources.experts], start=-1):
        for name in sources.names:
            if source is None or name not in source or not sources.is_float(name):
                continue
            tensor = source.tensor(name) if isinstance(source, Checkpoint) else source.full(name)
            if tensor is not None:
                yield index, name, tensor
