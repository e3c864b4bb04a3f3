"""Rules that look at one entry of the task vectors at a time, and need to know nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from evomerge.methods.arithmetic import SCALE, add_to_base, task_vectors, weighted_sum
from evomerge.methods.base import Method
from evomerge.params import Param


@final
class NearSwap(Method):
    """theta_0 + w clamp(tau, -t, t): takes the expert where it is within ``t`` of the base, and goes ``t`` towards it
    elsewhere."""

    name = "nearswap"
    summary = "one expert's changes, each cut off at a size"
    reference = "alchemonaut 2024, QuartetAnemoi-70B-t0.0001 (model card: (1 - s) a + s b, s = min(1, t / |b - a|))"
    params: Mapping[str, Param] = MappingProxyType(
        {"t": Param(float, 1e-4, "the most that a parameter of the base may change", 0)}
    )
    num_experts: tuple[int, int | None] = (1, 1)

    def is_linear(self, **params: Any) -> bool:
        return True

    def combine(
        self,
        base: Tensor,
        experts: Sequence[Tensor],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        t: float,
        **_: Any,
    ) -> Tensor:
        vectors = task_vectors(base, experts, weights, dtype)
        return add_to_base(base, weighted_sum((weight, tau.clamp_(-t, t)) for _, weight, tau in vectors), dtype)


@final
class MagMax(Method):
    """theta_0 + scale m, each entry of m the w_t tau_t that is largest in magnitude there (the last of equals)."""

    name = "magmax"
    summary = "for every parameter, the change of the expert that changed it most"
    reference = "Marczak et al. 2024, MagMax, arXiv:2407.06322, maximum magnitude selection"
    params: Mapping[str, Param] = MappingProxyType({"scale": SCALE})

    def combine(
        self,
        base: Tensor,
        experts: Sequence[Tensor],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        scale: float,
        **_: Any,
    ) -> Tensor:
        largest: Tensor | None = None
        for _t, weight, tau in task_vectors(base, experts, weights, dtype):
            tau.mul_(weight)
            largest = tau if largest is None else torch.where(tau.abs() >= largest.abs(), tau, largest)
        return add_to_base(base, largest, dtype, scale=scale)


@final
class Ram(Method):
    """theta_0 + scale sum_t w_t m_t tau_t / max(1, sum_t m_t), m_t = 1 where |tau_t| > ``epsilon``: a change that one
    expert alone made is kept whole, one that several made is averaged over those that made it."""

    name = "ram"
    summary = "average each parameter's change over the experts that changed it at all"
    reference = "Yuan et al. 2026, Behavior Knowledge Merge in Reinforced Agentic Models (RAM), arXiv:2601.13572"
    params: Mapping[str, Param] = MappingProxyType(
        {"epsilon": Param(float, 1e-5, "magnitude up to which a parameter counts as unchanged", 0), "scale": SCALE}
    )

    def combine(
        self,
        base: Tensor,
        experts: Sequence[Tensor],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        epsilon: float,
        scale: float,
        **_: Any,
    ) -> Tensor:
        total: Tensor | None = None
        count: Tensor | None = None
        for _t, weight, tau in task_vectors(base, experts, weights, dtype):
            changed = tau.abs().gt_(epsilon)
            tau.mul_(changed)
            total = tau.mul_(weight) if total is None else total.add_(tau, alpha=weight)
            count = changed if count is None else count.add_(changed)
        if total is not None and count is not None:
            total.div_(count.clamp_(min=1))
        return add_to_base(base, total, dtype, scale=scale)
