"""Methods that are about weight matrices: what they share, and what becomes of all other tensors."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from evomerge.methods.arithmetic import add_low_rank, add_to_base, task_vectors, weighted_sum
from evomerge.methods.base import LowRank, Method, State, TensorInfo
from evomerge.methods.chunks import CHUNK
from evomerge.params import Param

INNER = ("attention", "mlp")

ALL_MATRICES = Param(
    str,
    "all",
    "which matrices the method merges: all of them, or the inner ones, those of attention and mlp; "
    "the other tensors get the mean of their task vectors",
    choices=("all", "inner"),
)
INNER_MATRICES = Param(str, "inner", ALL_MATRICES.meaning, choices=ALL_MATRICES.choices)


class MatrixMethod(Method):
    """theta_0 + scale tau, where tau of a matrix is the method's (``combine_matrix``) and else the mean task vector.

    The mean is sum_t w_t tau_t / T over the T experts whose weight is not zero; one that *is* the base counts with its
    zeros. So it is merged what has not two dimensions, what is empty, and what ``matrices`` leaves out. A matrix is
    merged as a whole.

    A method has the parameters ``matrices`` (ALL_MATRICES or INNER_MATRICES) and ``scale`` among its own.
    """

    chunked = False

    @abstractmethod
    def combine_matrix(
        self,
        base: Tensor,
        experts: Sequence[Any],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        info: TensorInfo,
        state: State | None,
        seed: int,
        **params: Any,
    ) -> Tensor | None:
        """The merged task vector of one matrix, in fresh memory; None if there is none.

        Args:
            base: (out, in), not empty.
            experts: all T, of the base's shape; LowRank only where ``factors``. One that *is* ``base`` has no task
                vector, one of weight zero must leave no trace (``arithmetic.task_vectors`` sees to both).
            weights: one an expert, not all of them zero.
            params: all of the method's parameters. ``scale`` is not to be applied here.
        """

    def takes(self, info: TensorInfo, matrices: str) -> bool:
        """Is this tensor a matrix that the method merges its own way?"""
        return is_matrix(info, matrices)

    def combine(
        self,
        base: Tensor,
        experts: Sequence[Any],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        info: TensorInfo,
        state: State | None,
        seed: int,
        matrices: str,
        scale: float,
        **params: Any,
    ) -> Tensor:
        if scale == 0 or not any(weights):
            return base.to(dtype, copy=True)
        if not self.takes(info, matrices):
            return add_mean(base, experts, weights, dtype, scale=scale)
        tau = self.combine_matrix(
            base,
            experts,
            weights=weights,
            dtype=dtype,
            info=info,
            state=state,
            seed=seed,
            matrices=matrices,
            scale=scale,
            **params,
        )
        return add_to_base(base, tau, dtype, scale=scale)


def is_matrix(info: TensorInfo, matrices: str) -> bool:
    """Is this a matrix that is not empty, and one of ``matrices``: "all", or the "inner" ones?"""
    return len(info.shape) == 2 and math.prod(info.shape) > 0 and (matrices == "all" or info.kind in INNER)


def task_matrix(base: Tensor, expert: Tensor, dtype: torch.dtype) -> Tensor:
    """tau in fresh contiguous memory: the last bits of a product depend on the strides."""
    return expert.to(dtype, copy=True, memory_format=torch.contiguous_format).sub_(base)


def num_kept(weights: Sequence[float]) -> int:
    """T: how many experts the weights leave in."""
    return sum(weight != 0 for weight in weights)


def task_matrices(
    base: Tensor, experts: Sequence[Any], weights: Sequence[float], dtype: torch.dtype
) -> Iterator[tuple[float, Any]]:
    """(w_t, tau_t) for the experts that have a task vector and a weight: fresh contiguous memory, or LowRank."""
    for expert, weight in zip(experts, weights, strict=True):
        if weight == 0 or expert is base:
            continue
        if isinstance(expert, LowRank):
            yield weight, expert
        else:
            yield weight, task_matrix(base, expert, dtype)


def total_matrix(base: Tensor, experts: Sequence[Any], weights: Sequence[float], dtype: torch.dtype) -> Any:
    """sum w_t tau_t; as LowRank (float64) if all task vectors are and their ranks add up to less than the matrix's.

    None if there are no task vectors.
    """
    low = [(w, e) for w, e in zip(weights, experts, strict=True) if isinstance(e, LowRank) and w != 0]
    dense = [(w, e) for w, e in zip(weights, experts, strict=True) if isinstance(e, Tensor)]
    vectors = task_matrices(base, [expert for _, expert in dense], [weight for weight, _ in dense], dtype)
    total = weighted_sum(vectors)
    if not low:
        return total
    if total is None and sum(len(factors.A) for _, factors in low) < min(base.shape):
        B = torch.cat([factors.B.to(torch.float64) * (weight * factors.scaling) for weight, factors in low], dim=1)
        return LowRank(B, torch.cat([factors.A.to(torch.float64) for _, factors in low]), 1.0)
    if total is None:
        total = torch.zeros(base.shape, dtype=dtype, device=base.device)
    return add_low_rank(total, low)


def add_mean(
    base: Tensor,
    experts: Sequence[Tensor | LowRank],
    weights: Sequence[float],
    dtype: torch.dtype,
    *,
    scale: float = 1.0,
) -> Tensor:
    """theta_0 + scale sum_t w_t tau_t / T over the T experts with a weight; by chunks: nothing else is tensor-sized."""
    shares = [scale * weight / max(1, num_kept(weights)) for weight in weights]
    pairs = list(zip(shares, experts, strict=True))
    dense = [(share, expert) for share, expert in pairs if isinstance(expert, Tensor) and expert is not base]
    merged = base.to(dtype, copy=True, memory_format=torch.contiguous_format)
    flat, theta_0 = merged.view(-1), base.reshape(-1)
    flats = [expert.reshape(-1) for _, expert in dense]
    for start in range(0, flat.numel() if dense else 0, CHUNK):
        part = slice(start, start + CHUNK)
        vectors = task_vectors(theta_0[part], [expert[part] for expert in flats], [share for share, _ in dense], dtype)
        tau = weighted_sum((share, vector) for _, share, vector in vectors)
        if tau is not None:
            flat[part] += tau
    return add_low_rank(merged, [(share, expert) for share, expert in pairs if isinstance(expert, LowRank)])
