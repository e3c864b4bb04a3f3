"""How much memory a worker needs: the rule that docs/architecture.md states and benchmarks/memory.py measures.

What a search takes that learns numbers inside task vectors; and what becomes of memory that is freed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import TYPE_CHECKING

from evomerge.checkpoints import Sources
from evomerge.merging import torch_dtype
from evomerge.methods.masks import MOST_BYTES

if TYPE_CHECKING:
    from evomerge.learned import Layout
    from evomerge.searchers.base import GradientSearcher

PROCESS_BYTES = 600_000_000  # the interpreter, torch, transformers, and scratch memory of a few million numbers
DRIVER_COPIES, WORKER_COPIES = 12, 5  # of all numbers that a search learns, at the most at once
WHOLE_COPIES = 2  # of the largest tensor, in float32, where a method looks at a whole tensor: a sum and what is added


def worker_bytes(sources: Sources, compute_dtype: str, *, kept_bits: Iterable[int] = ()) -> int:
    """Bytes that a worker needs for itself, beside memory-mapped files and the activations of its evaluator.

    It is the model in ``compute_dtype``, two copies in float32 of the largest tensor that an expert changes (the
    control of random vectors takes that much, as do most methods), and PROCESS_BYTES; and what methods keep between
    candidates, ``Method.kept_bits`` of each for every entry and expert, MOST_BYTES at most.
    """
    reference, width = sources.reference, torch_dtype(compute_dtype).itemsize
    model = sum(reference.numel(name) for name in sources.names) * width
    largest = max((reference.numel(name) for name in sources.names if sources.touched(name)), default=0)
    drawn = sum(reference.numel(name) for expert in sources.experts for name in sources.names if name in expert)
    kept = sum(min(drawn * bits // 8, MOST_BYTES) for bits in kept_bits)
    return model + WHOLE_COPIES * 4 * largest + kept + PROCESS_BYTES


def learning_bytes(layout: Layout, searcher: GradientSearcher, *, workers: int) -> int:
    """Bytes that the numbers which ``searcher`` learns take in the driver and in ``workers`` workers beside it.

    The driver has them and Adam's means before and after a step, their start, what they come to, and gradients
    (DRIVER_COPIES); a worker has the numbers and their gradient, and what it sends of it (WORKER_COPIES).
    """
    return layout.size * searcher.number_bytes * (DRIVER_COPIES + WORKER_COPIES * workers)


# Numbers of mallopt(3), and what they are set to: never give the top of the heap back; take what is up to 32 MB, the
# most that glibc allows here, from the heap.
_KEEP = {-1: -1, -3: 2**25}  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for its own next use; False where the C library is not glibc.

    A backward pass takes what the one before has freed. In between glibc would give it back to the system, which fills
    every page with zeros when it comes again: half of what gradients and activations cost where batches are small. The
    most memory that the process takes stays what it is, but it keeps that until it ends.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return False
    answers = [mallopt(option, value) for option, value in _KEEP.items()]
    return all(answers)
