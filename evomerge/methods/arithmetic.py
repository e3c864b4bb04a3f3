"""What the methods share: task vectors, and the way back to the base."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from evomerge.methods import fused
from evomerge.methods.base import LowRank
from evomerge.params import Param

TASK_WEIGHT = Param(float, 0.3, "what multiplies this expert's task vector; any sign, 0 leaves the expert out")
SCALE = Param(float, 1.0, "what multiplies the merged task vector")


def task_vectors(
    base: Tensor, experts: Sequence[Tensor], weights: Sequence[float], dtype: torch.dtype
) -> Iterator[tuple[int, float, Tensor]]:
    """(t, w_t, tau_t) for the experts that have a task vector and a weight; tau_t is fresh memory in ``dtype``.

    Experts that *are* the base object and experts of weight zero are left out, so that they leave no trace.
    """
    theta_0 = base.to(dtype)
    for t, (expert, weight) in enumerate(zip(experts, weights, strict=True)):
        if expert is not base and weight != 0:
            yield t, weight, torch.sub(expert, theta_0)


def weighted_sum(vectors: Iterable[tuple[float, Tensor]]) -> Tensor | None:
    """sum w v over (w, v), reusing the memory of the first; None if there are none."""
    total: Tensor | None = None
    for weight, vector in vectors:
        if total is None:
            total = vector.mul_(weight)
        else:
            total.add_(vector, alpha=weight)
    return total


def add_to_base(base: Tensor, tau: Tensor | None, dtype: torch.dtype, *, scale: float = 1.0) -> Tensor:
    """theta_0 + scale tau in ``dtype``, reusing tau's memory; a copy of the base if there is no tau.

    The task vectors are summed before the base is added: one rounding at the base's magnitude instead of T.
    """
    if tau is None or scale == 0:
        return base.to(dtype, copy=True)
    return (tau if scale == 1 else tau.mul_(scale)).add_(base)


def sum_experts(
    experts: Sequence[Tensor], weights: Sequence[float], dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """sum w_t theta_t, each of the T >= 1 experts with its weight, in their order.

    In ``out`` (contiguous, in ``dtype``) if it is given and the compiled loop runs, else in fresh memory.
    """
    kernels = fused.kernels()
    if kernels is None or not fused.on_cpu(*experts):
        total = experts[0].to(dtype, copy=True).mul_(weights[0])
        for expert, weight in zip(experts[1:], weights[1:], strict=True):
            total.add_(expert, alpha=weight)
        return total
    alike = fused.alike(experts, dtype)
    total = torch.empty(experts[0].shape, dtype=dtype) if out is None else out
    sums = fused.array(total)
    kernels.sum_experts(fused.addresses(alike), fused.array(alike[0]), fused.scalars(weights, sums), sums)
    return total


def sum_task_vectors(
    base: Tensor, experts: Sequence[Tensor], weights: Sequence[float], dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """theta_0 + sum w_t tau_t, in ``out`` as above.

    Experts that *are* the base and those of weight zero leave no trace.
    """
    kernels = fused.kernels()
    chosen = [t for t, expert in enumerate(experts) if expert is not base and weights[t] != 0]
    if kernels is None or not chosen or not fused.on_cpu(base, *experts):
        vectors = task_vectors(base, experts, weights, dtype)
        return add_to_base(base, weighted_sum((weight, vector) for _, weight, vector in vectors), dtype)
    theta_0, *alike = fused.alike([base, *(experts[t] for t in chosen)], dtype)
    merged = torch.empty(base.shape, dtype=dtype) if out is None else out
    sums = fused.array(merged)
    numbers = fused.scalars([weights[t] for t in chosen], sums)
    kernels.sum_task_vectors(fused.array(theta_0), fused.addresses(alike), numbers, sums)
    return merged


def add_low_rank(total: Tensor, vectors: Sequence[tuple[float, LowRank]]) -> Tensor:
    """``total`` + sum w scaling B A over (w, LowRank), in place and in one product of the factors side by side.

    Args:
        total: (out, in), fresh memory in the arithmetic dtype.
        vectors: as many as wanted; those of weight zero leave no trace.
    """
    chosen = [(weight * factors.scaling, factors) for weight, factors in vectors if weight != 0]
    if chosen:
        # Copies, because a product's last bits may depend on the alignment of what it reads.
        B = torch.cat([factors.B.to(total.dtype, copy=True).mul_(weight) for weight, factors in chosen], dim=1)
        A = torch.cat([factors.A.to(total.dtype) for _, factors in chosen])
        total.addmm_(B, A)
    return total
