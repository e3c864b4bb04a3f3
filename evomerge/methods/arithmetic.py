"""What the methods share: task vectors, and the way back to the base."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

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
