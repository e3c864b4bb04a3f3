"""What the methods share: checking a call, task vectors, and the way back to the base."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import MethodError
from evomerge.methods.base import LowRank, Method, SourceIterable, State, TensorInfo, check_params
from evomerge.params import Param

ANY_WEIGHT = Param(float, 1.0, "what multiplies this expert's task vector; any sign, 0 leaves the expert out")
TASK_WEIGHT = Param(float, 0.3, "what multiplies this expert's task vector; any sign, 0 leaves the expert out")
SCALE = Param(float, 1.0, "what multiplies the merged task vector")


class MethodDefaults:
    """The Method protocol for what most methods are: entry by entry, without state, around a base.

    A method is a small final class that sets ``name``, ``summary``, ``reference`` and ``merge``, and what differs.
    """

    name: str
    summary: str
    reference: str
    params: Mapping[str, Param] = MappingProxyType({})
    weight: Param = ANY_WEIGHT
    needs_base: bool = True
    num_experts: tuple[int, int | None] = (1, None)
    factors: bool = False
    chunked: bool = True
    keeps_base: bool = True

    def is_linear(self, **params: Any) -> bool:
        return False

    def chunked_with(self, state: State | None, **params: Any) -> bool:
        return self.chunked

    def prepare(self, sources: SourceIterable, statistics: Any = None, **fixed: Any) -> State | None:
        return None


def check_call(
    method: Method,
    base: Tensor | None,
    experts: Sequence[Tensor | LowRank],
    weights: Sequence[float],
    params: Mapping[str, Any],
) -> dict[str, Any]:
    """All parameters of ``method`` with defaults; MethodError if base, experts, weights or parameters break a rule."""
    check_experts(method, base is not None, len(experts))
    check_weights(method, weights, len(experts))
    return check_params(method.name, method, params)


def check_experts(method: Method, has_base: bool, num_experts: int) -> None:
    """MethodError if ``method`` needs a base that is not there, or does not take that many experts."""
    if method.needs_base and not has_base:
        raise MethodError(f"method {method.name} works on task vectors, but there is no base", remedy="Name a base.")
    fewest, most = method.num_experts
    if num_experts < fewest or (most is not None and num_experts > most):
        allowed = (
            f"exactly {fewest}" if most == fewest else f"at least {fewest}" if most is None else f"{fewest}..{most}"
        )
        raise MethodError(f"method {method.name} takes {allowed} experts, but got {num_experts}")


def check_weights(method: Method, weights: Sequence[float], num_experts: int) -> list[float]:
    """One legal weight an expert, as floats, or MethodError."""
    if len(weights) != num_experts:
        raise MethodError(
            f"method {method.name} takes one weight an expert, but {num_experts} experts have {len(weights)} weights"
        )
    return [method.weight.check(f"weights[{t}]", w, f"method {method.name}") for t, w in enumerate(weights)]


def is_slice(info: TensorInfo, tensor: Tensor) -> bool:
    """Is ``tensor`` only a part of the tensor that ``info`` describes?"""
    return info.start != 0 or tensor.numel() != math.prod(info.shape)


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
