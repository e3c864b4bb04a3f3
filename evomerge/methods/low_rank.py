"""Task vectors merged by singular vectors: the first of them, made orthogonal (TSV-M), or all equally strong (Iso-C,
Iso-CTS)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from evomerge.methods.arithmetic import SCALE, TASK_WEIGHT, add_low_rank
from evomerge.methods.base import LowRank, Method, SourceIterable, State, TensorInfo, arithmetic_dtype, require_affine
from evomerge.methods.basic import TaskArithmetic
from evomerge.methods.decompositions import SVD, Decompositions, norm, polar, recombine, svd
from evomerge.methods.matrices import (
    ALL_MATRICES,
    MatrixMethod,
    is_matrix,
    num_kept,
    task_matrices,
    task_matrix,
    total_matrix,
)
from evomerge.params import Param


@final
class TSVM(MatrixMethod):
    """Task singular vectors: each task vector's largest singular triples, their vectors made orthogonal across tasks.

    Per matrix, with r = min(rows, columns): the top r / T triples of every tau_t side by side, U = [U_1 .. U_T] and
    V = [V_1 .. V_T] replaced by their polar factors, tau = U diag(w_1 S_1, .., w_T S_T) V'. One expert is kept whole.
    """

    name = "tsv_m"
    summary = "the largest singular triples of each task vector, made orthogonal to those of the others"
    reference = "Gargiulo et al. 2025, Task Singular Vectors, arXiv:2412.00081 (TSV-Merge)"
    params: Mapping[str, Param] = MappingProxyType(
        {
            "rank_share": Param(
                float,
                None,
                "share of the singular triples that each task vector keeps; default: 1/T",
                0,
                1,
                low_open=True,
            ),
            "matrices": ALL_MATRICES,
            "scale": SCALE,
        }
    )
    factors = True

    def combine_matrix(
        self,
        base: Tensor,
        experts: Sequence[Tensor | LowRank],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        rank_share: float | None,
        **_: Any,
    ) -> Tensor | None:
        rank = min(base.shape)
        kept = rank // num_kept(weights) if rank_share is None else math.floor(rank * rank_share + 1e-9)
        vectors = task_matrices(base, experts, weights, dtype)
        parts = [scaled(svd(tau, dtype, max(1, kept)), weight) for weight, tau in vectors]
        return recombine(parts, dtype) if parts else None


@final
class SVDLinear(Method):
    """Task arithmetic on the first singular triples of each task vector: affine in the weights.

    Per matrix, with r = min(rows, columns): theta_0 + scale sum_t w_t U_t S_t V_t' with the floor(rank_share r), at
    least one, largest triples of tau_t, which is the matrix of that rank next to it (Eckart and Young 1936). Other
    tensors are merged as by task_arithmetic.
    """

    name = "svd_linear"
    summary = "the largest singular triples of each task vector, then task arithmetic"
    reference = "Gargiulo et al. 2025, Task Singular Vectors, arXiv:2412.00081 (TSV-Compress), added up"
    params: Mapping[str, Param] = MappingProxyType(
        {
            "rank_share": Param(
                float,
                0.1,
                "share of the singular triples that each task vector keeps, at least one",
                0,
                1,
                low_open=True,
            ),
            "matrices": Param(
                str,
                "all",
                "which matrices are cut down: all of them, or the inner ones, those of attention and mlp; the other "
                "tensors are merged as by task_arithmetic",
                choices=("all", "inner"),
            ),
            "scale": SCALE,
        }
    )
    weight = TASK_WEIGHT
    factors = True
    chunked = False
    draws = True  # no numbers, but keeps decompositions where there will be many candidates
    kept_bits = 64  # two float32 matrices of the task vector's size at the most

    def is_linear(self, **params: Any) -> bool:
        return True

    def prepare(
        self, sources: SourceIterable, statistics: Any = None, *, seed: int | None = None, **fixed: Any
    ) -> Decompositions | None:
        return None if seed is None or "rank_share" not in fixed else Decompositions()

    def combine(
        self,
        base: Tensor,
        experts: Sequence[Tensor | LowRank],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        info: TensorInfo,
        state: State | None,
        rank_share: float,
        matrices: str,
        scale: float,
        **_: Any,
    ) -> Tensor:
        count = self._count(info, rank_share, matrices)
        if count is None or not any(weights):
            return TaskArithmetic().combine(base, experts, weights=weights, dtype=dtype, scale=scale)
        parts = [
            (scale * weight, self._first(base, expert, t, count, dtype, info, state))
            for t, (weight, expert) in enumerate(zip(weights, experts, strict=True))
            if weight != 0 and expert is not base
        ]
        merged = base.to(dtype, copy=True, memory_format=torch.contiguous_format)
        return add_low_rank(merged, parts)

    def directions(
        self,
        base: Tensor | None,
        experts: Sequence[Any],
        *,
        info: TensorInfo,
        state: State | None = None,
        seed: int = 0,
        **params: Any,
    ) -> Iterator[tuple[int, Tensor | LowRank]]:
        require_affine(self, params)
        count, scale = self._count(info, params["rank_share"], params["matrices"]), params["scale"]
        if count is None or base is None:
            yield from TaskArithmetic().directions(base, experts, info=info, scale=scale)
            return
        dtype = arithmetic_dtype(base, *(expert for expert in experts if isinstance(expert, Tensor)))
        for t, expert in enumerate(experts):
            if expert is not base:
                part = self._first(base, expert, t, count, dtype, info, state)
                yield t, LowRank(part.B, part.A, scale * part.scaling)

    def _count(self, info: TensorInfo, rank_share: float, matrices: str) -> int | None:
        """How many triples stay of a task vector; None for a tensor that is merged by task arithmetic."""
        if rank_share == 1 or not is_matrix(info, matrices):
            return None
        return max(1, math.floor(min(info.shape) * rank_share + 1e-9))

    @staticmethod
    def _first(
        base: Tensor,
        expert: Tensor | LowRank,
        t: int,
        count: int,
        dtype: torch.dtype,
        info: TensorInfo,
        state: Decompositions | None,
    ) -> LowRank:
        """U_t S_t V_t' in ``dtype``; of a LoRA expert of no higher rank its own factors."""
        if isinstance(expert, LowRank) and len(expert.A) <= count:
            return expert

        def find() -> SVD:
            return svd(expert if isinstance(expert, LowRank) else task_matrix(base, expert, dtype), dtype, count)

        U, S, V = find() if state is None else state.of(info.name, t, find)
        return LowRank((U * S).to(dtype), V.T.to(dtype), 1.0)


@final
class IsoC(MatrixMethod):
    """The sum of the task vectors with its singular values replaced by their mean.

    Per matrix: U S V' = sum w_t tau_t, tau = mean(S) U V'. The mean goes over the singular values that are not zero.
    """

    name = "iso_c"
    summary = "the sum of the task vectors, with all its singular values at their mean"
    reference = "Marczak et al. 2025, No Task Left Behind, arXiv:2502.04959, section 4 (Iso-C)"
    params: Mapping[str, Param] = MappingProxyType({"matrices": ALL_MATRICES, "scale": SCALE})
    factors = True

    def combine_matrix(
        self,
        base: Tensor,
        experts: Sequence[Tensor | LowRank],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        **_: Any,
    ) -> Tensor | None:
        total = total_matrix(base, experts, weights, dtype)
        return None if total is None else flattened(total, dtype)


def flattened(total: Tensor | LowRank, dtype: torch.dtype) -> Tensor | None:
    """mean(S) U V' of U S V' in ``dtype``; None for a matrix of zeros."""
    if isinstance(total, LowRank):
        U, S, V = svd(total, dtype)
        return (U * S.mean()).to(dtype) @ V.to(dtype).T if len(S) else None
    factor, S = polar(total, dtype)
    return factor.mul_(S.mean()) if len(S) else None


@final
class IsoCTS(MatrixMethod):
    """Iso-C with the least of the sum's directions given up for directions of the single tasks.

    Per matrix, with r = min(rows, columns) and s = round((1 - common) r / T): the top r - T s triples of sum w_t tau_t,
    and the top s triples of each w_t tau_t after the common left directions have been projected out of it. Left and
    right vectors are made orthogonal as in tsv_m, and all singular values replaced by their mean. ``common`` 1 is
    iso_c.
    """

    name = "iso_cts"
    summary = "iso_c with room for directions that only one task has"
    reference = "Marczak et al. 2025, No Task Left Behind, arXiv:2502.04959, section 4 (Iso-CTS)"
    params: Mapping[str, Param] = MappingProxyType(
        {
            "common": Param(float, 0.8, "share of the directions that are the sum's; the rest is the tasks' own", 0, 1),
            "matrices": ALL_MATRICES,
            "scale": SCALE,
        }
    )
    factors = True

    def combine_matrix(
        self,
        base: Tensor,
        experts: Sequence[Tensor | LowRank],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        common: float,
        **_: Any,
    ) -> Tensor | None:
        rank, count = min(base.shape), num_kept(weights)
        own = min(round((rank - math.floor(rank * common + 1e-9)) / count), rank // count)
        total = total_matrix(base, experts, weights, dtype)
        if total is None:
            return None
        if own == 0:
            return flattened(total, dtype)
        parts = [svd(total, dtype, rank - own * count)]
        del total  # a matrix less to hold
        vectors = task_matrices(base, experts, weights, dtype)
        parts += [self._own_part(weight, tau, parts[0].U, dtype, own) for weight, tau in vectors]
        values = torch.cat([part.S for part in parts])
        return recombine(parts, dtype, flat=float(values.mean())) if len(values) else None

    @staticmethod
    def _own_part(weight: float, tau: Tensor | LowRank, common: Tensor, dtype: torch.dtype, count: int) -> SVD:
        """The top triples of w tau without its part in the common left directions.

        Taking that part out leaves as much rounding again as a decomposition does. Where nothing else is left (a LoRA
        expert has few directions), that must not become a direction of its own.
        """
        size = 2 * norm(tau)
        return scaled(svd(without(tau, common), dtype, count, reference=size), weight)


def scaled(triples: SVD, weight: float) -> SVD:
    """Of w tau from those of tau: singular values stay positive, a sign goes to the right vectors."""
    return SVD(triples.U, abs(weight) * triples.S, triples.V if weight > 0 else -triples.V)


def without(tau: Tensor | LowRank, directions: Tensor) -> Tensor | LowRank:
    """tau - D D' tau for orthonormal columns D; a dense tau's memory is reused."""
    if isinstance(tau, LowRank):
        D, B = directions.to(torch.float64), tau.B.to(torch.float64)
        return LowRank(B - D @ (D.T @ B), tau.A, tau.scaling)
    return tau.addmm_(directions, directions.T @ tau, alpha=-1)
