"""Dense task vectors of many tensors at once, by compiled loops: their weighted sums, their products with gradients.

What Python does for each tensor, and each slice of one, costs more than the arithmetic where batches are small. So
where the entries lie is found out once, and a step's merge and its inner products are one call each. What does not
fit here (adapters, other vocabularies, mixed types, other devices, no numba) goes the plain way, slice by slice; merges
have the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evomerge.checkpoints import Checkpoint, Sources
from evomerge.methods import fused
from evomerge.methods.base import arithmetic_dtype

Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor's entries lie, of the base and of each expert.

    Attributes:
        experts: addresses; 0 for an expert that leaves the tensor alone.
        dtype: of all of them.
        memory: what must stay alive.
    """

    base: int
    experts: tuple[int, ...]
    numel: int
    dtype: torch.dtype
    memory: tuple[Tensor, ...]


class TaskVectors:
    """Where the task vectors of ``sources`` lie, as far as they are mapped files. Found out at the first question."""

    def __init__(self, sources: Sources):
        self.sources = sources
        self._places: dict[str, Place | None] = {}

    def place(self, name: str) -> Place | None:
        """None if base and experts are not all mapped, of one type that the compiled loops take."""
        if self.sources.kept:  # copies are read then, not the files
            return None
        if name not in self._places:
            self._places[name] = self._find(name)
        return self._places[name]

    def _find(self, name: str) -> Place | None:
        base = None if self.sources.base is None else _mapped(self.sources.base, name)
        if base is None or base.dtype not in fused.WIDENED:
            return None
        memory, addresses = [base], []
        for expert in self.sources.experts:
            if name not in expert:
                addresses.append(0)
                continue
            tensor = _mapped(expert, name) if isinstance(expert, Checkpoint) else None
            if tensor is None or tensor.dtype != base.dtype:
                return None
            memory.append(tensor)
            addresses.append(tensor.data_ptr())
        return Place(base.data_ptr(), tuple(addresses), base.numel(), base.dtype, tuple(memory))


def _mapped(checkpoint: Checkpoint, name: str) -> Tensor | None:
    """A tensor whose memory is the file's, contiguous; None for one that is copied or gathered when it is asked for."""
    first, second = checkpoint.rows(name), checkpoint.rows(name)
    if not isinstance(first, Tensor) or not isinstance(second, Tensor) or first.data_ptr() != second.data_ptr():
        return None
    return first if first.is_contiguous() else None


def merge(places: Sequence[Place], weights: Sequence[Sequence[float]], outs: Sequence[Tensor]) -> None:
    """out = theta_0 + sum w_t tau_t for each tensor; experts of weight zero leave no trace.

    Args:
        places: all of one dtype.
        weights: (T,) a tensor.
        outs: contiguous CPU tensors in the type that the dtype is widened to.
    """
    kernels = fused.kernels()
    assert kernels is not None
    stored, wide = _typed(places[0].dtype), _typed(outs[0].dtype)
    exact = np.array(weights, dtype=np.float64)
    experts = np.where(exact != 0, _experts(places), 0)
    numbers = fused.scalars(exact.reshape(-1).tolist(), wide).reshape(exact.shape)
    kernels.merge_task_vectors(_bases(places), experts, _counts(places), numbers, fused.addresses(outs), stored, wide)
    torch.autograd.graph.increment_version(outs)  # a graph that has saved the old numbers must not use these


def products(places: Sequence[Place], gradients: Sequence[Tensor]) -> Numbers:
    """(K, T) float64: <g, tau_t> of K tensors, in one pass over the sources.

    Each number is the same, to the bit, whatever else it is computed with.

    Args:
        places: K, all of one dtype.
        gradients: K contiguous CPU tensors, all of one of the types in ``fused.WIDENED``.
    """
    from evomerge.methods import gradient_kernels

    found = np.zeros((len(places), len(places[0].experts)))
    slope, stored = _typed(gradients[0].dtype), _typed(places[0].dtype)
    gradient_kernels.task_products(
        fused.addresses(gradients), _bases(places), _experts(places), _counts(places), slope, stored, found
    )
    return found


def slice_products(gradient: Tensor, base: Tensor, experts: Sequence[Tensor]) -> Numbers:
    """(T,) float64: <g, tau_t> of flat tensors on the CPU, of whatever types."""
    dtype = arithmetic_dtype(base, *experts)
    theta_0, *alike = fused.alike([base, *experts], dtype)
    place = Place(
        theta_0.data_ptr(), tuple(t.data_ptr() for t in alike), base.numel(), theta_0.dtype, (theta_0, *alike)
    )
    (slope,) = fused.alike([gradient], gradient.dtype if gradient.dtype == torch.float64 else torch.float32)
    return products([place], [slope])[0]


def _typed(dtype: torch.dtype) -> Numbers:
    """An array that says which type numbers at an address have."""
    return fused.array(torch.empty(0, dtype=dtype))


def _bases(places: Sequence[Place]) -> Numbers:
    return np.array([place.base for place in places], dtype=np.int64)


def _experts(places: Sequence[Place]) -> Numbers:
    return np.array([place.experts for place in places], dtype=np.int64)


def _counts(places: Sequence[Place]) -> Numbers:
    return np.array([place.numel for place in places], dtype=np.int64)
