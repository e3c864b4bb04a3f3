"""Merging task vectors that keep a part of their entries: what TIES, DARE and Model Breadcrumbs have in common."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.methods import fused
from evomerge.methods.arithmetic import add_to_base, task_vectors, weighted_sum
from evomerge.methods.election import elect_and_merge
from evomerge.methods.masks import Mask


@dataclass(frozen=True)
class Election:
    """How TIES merges: ``mode`` and ``normalize`` as ``elect_and_merge`` has them."""

    mode: str
    normalize: bool


@dataclass(frozen=True)
class Thinned:
    """One expert and what stays of its task vector: either what a mask keeps, or what lies between two magnitudes.

    Attributes:
        mask: which entries stay.
        low: smaller magnitudes become zero; one of the task vector's, or 0.
        high: larger magnitudes become zero.
        factor: what is left is multiplied by it, before the weight.
    """

    expert: Tensor
    weight: float
    mask: Mask | None = None
    low: float = 0.0
    high: float = math.inf
    factor: float = 1.0


def experts_in(base: Tensor, experts: Sequence[Tensor], weights: Sequence[float]) -> Iterator[tuple[int, float]]:
    """(t, w_t) of the experts that have a task vector and a weight."""
    return ((t, weights[t]) for t, expert in enumerate(experts) if expert is not base and weights[t] != 0)


def merge_thinned(
    base: Tensor,
    parts: Sequence[Thinned],
    *,
    dtype: torch.dtype,
    election: Election | None = None,
    scale: float = 1.0,
) -> Tensor:
    """theta_0 + scale x the sum of the w_t times thinned tau_t, or with an ``election`` what TIES makes of them.

    Args:
        base: any shape and type.
        parts: of the base's shape, none of them the base itself and none of weight zero (``experts_in``).
        dtype: of the arithmetic and of the result, which is fresh memory.
    """
    kernels = fused.kernels()
    if kernels is None or not parts or scale == 0 or not fused.on_cpu(base, *(part.expert for part in parts)):
        vectors = thinned_vectors(base, parts, dtype)
        return add_vectors(base, vectors, dtype=dtype, election=election, scale=scale)
    theta_0, *experts = fused.alike([base, *(part.expert for part in parts)], dtype)
    words = [None if part.mask is None else part.mask.words for part in parts]
    merged = torch.empty(base.shape, dtype=dtype)
    out = fused.array(merged)
    kernels.merge_thinned(
        fused.array(theta_0),
        fused.addresses(experts),
        fused.scalars([part.weight for part in parts], out),
        fused.scalars([part.low for part in parts], out),
        fused.scalars([part.high for part in parts], out),
        fused.addresses(words),
        fused.scalars([part.factor for part in parts], out),
        election is not None,
        election is not None and election.mode == "mean",
        election is not None and election.normalize,
        out.dtype.type(scale),
        out,
    )
    return merged


def add_vectors(
    base: Tensor,
    vectors: Iterable[tuple[float, Tensor]],
    *,
    dtype: torch.dtype,
    election: Election | None,
    scale: float,
) -> Tensor:
    """theta_0 + scale x the sum of w v over (w, v), or with an ``election`` what TIES makes of them: the plain code.

    The vectors are in ``dtype``; their memory is reused.
    """
    if election is None:
        merged = weighted_sum(vectors)
    else:
        merged = elect_and_merge(vectors, mode=election.mode, normalize=election.normalize)
    return add_to_base(base, merged, dtype, scale=scale)


def thinned_vectors(base: Tensor, parts: Sequence[Thinned], dtype: torch.dtype) -> Iterator[tuple[float, Tensor]]:
    """(w_t, what stays of tau_t), in fresh memory in ``dtype``."""
    experts, weights = [part.expert for part in parts], [part.weight for part in parts]
    for t, weight, tau in task_vectors(base, experts, weights, dtype):
        part = parts[t]
        thinned = cut(tau, part.low, part.high) if part.mask is None else tau.mul_(part.mask.values(tau))
        yield weight, thinned if part.factor == 1 else thinned.mul_(part.factor)


def thinned_directions(
    base: Tensor, experts: Sequence[Tensor], parts: Sequence[Thinned], dtype: torch.dtype, scale: float
) -> Iterator[tuple[int, Tensor]]:
    """(t, scale x what stays of tau_t), in fresh memory in ``dtype``: ``Method.directions``.

    Args:
        parts: of all experts that have a task vector, with weights of 1.
    """
    present = [t for t, expert in enumerate(experts) if expert is not base]
    for t, (_, vector) in zip(present, thinned_vectors(base, parts, dtype), strict=True):
        yield t, vector if scale == 1 else vector.mul_(scale)


def cut(tau: Tensor, low: float, high: float = math.inf) -> Tensor:
    """``tau`` with what is smaller than ``low`` or larger than ``high`` in magnitude set to zero; NaN stays.

    ``low`` must be one of its magnitudes, or 0.
    """
    larger = None if high == math.inf else torch.nn.functional.hardshrink(tau, high)
    if low > 0:
        below = torch.nextafter(torch.tensor(low, dtype=tau.dtype), torch.zeros((), dtype=tau.dtype))
        tau = torch.nn.functional.hardshrink(tau, float(below))
    return tau if larger is None else tau - larger
