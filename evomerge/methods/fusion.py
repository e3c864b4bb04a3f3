"""Arcee Fusion: the changes of one expert that stand out, by size and by what they do to a row's distribution."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from evomerge.errors import MethodError
from evomerge.methods.arithmetic import add_to_base, task_vectors, weighted_sum
from evomerge.methods.base import Method, SourceIterable, State, TensorInfo, arithmetic_dtype
from evomerge.methods.chunks import CHUNK
from evomerge.methods.inner_products import row_blocks, spread
from evomerge.methods.selection import order_statistics

EPSILON = 1e-8  # added to every probability


@dataclass(frozen=True)
class Importance:
    """Of one tensor: the divergence of each row (rows,), and the importance from which a change is taken."""

    rows: Tensor
    threshold: float


@final
class ArceeFusion(Method):
    """theta_0 + w m tau with m = 1 where the importance |tau| KL is at least median + 1.5 (Q3 - Q1) of the tensor's.

    KL is that of the softmax of the expert's row from the softmax of the base's (rows along the last dimension; 1e-8 is
    added to every probability). Quartiles are exact: the entry at place floor(q (n - 1)) of all n in rising order.
    """

    name = "arcee_fusion"
    summary = "one expert's changes that stand out in size and in what they do to their row"
    reference = "mergekit 0.1.5 (Goddard et al. 2024, arXiv:2403.13257), method arcee_fusion (Arcee AI 2024)"
    num_experts: tuple[int, int | None] = (1, 1)

    def is_linear(self, **params: Any) -> bool:
        return True

    def chunked_with(self, state: State | None, **params: Any) -> bool:
        return state is not None

    def prepare(self, sources: SourceIterable, statistics: Any = None, **fixed: Any) -> Mapping[str, Importance]:
        """By tensor name, a number a row and the threshold."""
        return {info.name: _importance(info, base, expert) for info, base, (expert,) in sources}

    def combine(
        self,
        base: Tensor,
        experts: Sequence[Tensor],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        info: TensorInfo,
        state: State | None,
        **_: Any,
    ) -> Tensor:
        if state is not None and info.name not in state:
            raise MethodError(f"method arcee_fusion was prepared without the tensor {info.name}")
        found = _importance(info, base, experts[0]) if state is None else state[info.name]

        def taken() -> Iterator[tuple[float, Tensor]]:
            for _, weight, tau in task_vectors(base, experts, weights, dtype):
                if tau.numel():
                    tau.mul_(_weigh(tau.abs(), found.rows, info).ge_(found.threshold))
                yield weight, tau

        return add_to_base(base, weighted_sum(taken()), dtype)


def _weigh(magnitudes: Tensor, rows: Tensor, info: TensorInfo) -> Tensor:
    """|tau| of a slice times the divergence of each entry's row, in place."""
    factors = spread(rows.to(magnitudes.device), info, magnitudes.numel(), "rows", magnitudes.dtype)
    return magnitudes.mul_(factors.view(magnitudes.shape))


def _importance(info: TensorInfo, base: Tensor | None, expert: Tensor) -> Importance:
    """One pass for the rows, two for the quartiles."""
    assert base is not None
    dtype = arithmetic_dtype(base, expert)
    found = [torch.zeros(0, dtype=torch.float64, device=base.device)]
    for _, (theta_0, theta) in row_blocks(info.shape, [base, expert]):
        p, q = (torch.softmax(rows, dim=1).add_(EPSILON) for rows in (theta, theta_0))
        found.append((p * (p / q).log_()).sum(1).clamp_(min=0))  # not below 0: p and q have one sum
    rows = torch.cat(found)
    flat_base, flat = base.reshape(-1), expert.reshape(-1)

    def stream() -> Iterator[tuple[int, Tensor]]:
        for start in range(0, flat.numel(), CHUNK):
            tau = torch.sub(flat[start : start + CHUNK], flat_base[start : start + CHUNK].to(dtype))
            yield 0, _weigh(tau.abs_(), rows, TensorInfo(info.name, shape=info.shape, start=start))

    ranks = lambda n: [n - quarter * (n - 1) // 4 for quarter in (1, 2, 3)]  # noqa: E731
    ((first, median, third),) = order_statistics(stream, 1, ranks)
    return Importance(rows, median + 1.5 * (third - first))
