"""LoraHub: the factors of LoRA experts summed apart, so that the merge is a LoRA of the same rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from evomerge.errors import MethodError
from evomerge.methods.arithmetic import SCALE, add_low_rank
from evomerge.methods.base import ANY_EXPERTS, LowRank, Method, TensorInfo
from evomerge.params import Param


@final
class LoraHub(Method):
    """theta_0 + scale (sum_t w_t B_t) (sum_t w_t A_t), of LoRA experts of one rank.

    The root of an expert's own scaling goes to either factor. Beside the experts' own products there are those of one's
    B with another's A; one expert of weight w has w^2 tau.
    """

    name = "lorahub"
    summary = "the factors of LoRA experts summed apart: the merge is a LoRA of their rank; weights to be searched"
    reference = "Huang et al. 2024, LoraHub, arXiv:2307.13269, section 3.2 (COMPOSE)"
    params: Mapping[str, Param] = MappingProxyType(
        {
            "root": Param(
                bool,
                False,
                "multiply either factor by the root of the weight's size, and one of them by its sign (as PEFT's "
                "combination_type linear does), so that one expert of weight w has w tau",
            ),
            "scale": SCALE,
        }
    )
    weight = Param(float, 0.3, "what multiplies both factors of this expert; any sign, 0 leaves the expert out")
    factors = True
    needs_factors = True

    def combine(
        self,
        base: Tensor,
        experts: Sequence[Tensor | LowRank],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        info: TensorInfo,
        root: bool,
        scale: float,
        **_: Any,
    ) -> Tensor:
        call = {"weights": weights, "dtype": dtype, "info": info, "root": root, "scale": scale}
        merged = self.merged_factors(experts, **call)
        # The last bits of a product depend on the strides of what it is added to.
        total = base.to(dtype, copy=True, memory_format=torch.contiguous_format)
        return add_low_rank(total, [] if merged is None else [(1.0, merged)])

    def merged_factors(
        self,
        experts: Sequence[Tensor | LowRank],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        info: TensorInfo,
        root: bool,
        scale: float,
        **_: Any,
    ) -> LowRank | None:
        """None if nothing is added. MethodError for experts of different ranks."""
        chosen = [(w, e) for w, e in zip(weights, experts, strict=True) if isinstance(e, LowRank) and w != 0]
        ranks = sorted({expert.A.shape[0] for _, expert in chosen})
        if len(ranks) > 1:
            raise MethodError(
                f"method lorahub adds up the experts' factors, which must have one rank, but those of {info.name} have "
                f"the ranks {', '.join(map(str, ranks))}",
                remedy=ANY_EXPERTS,
            )
        if not chosen or scale == 0:
            return None
        first = chosen[0][1]
        B, A = (torch.zeros(factor.shape, dtype=dtype, device=factor.device) for factor in (first.B, first.A))
        for weight, expert in chosen:
            share = math.sqrt(abs(expert.scaling)) * (math.sqrt(abs(weight)) if root else weight)
            sign = math.copysign(1, expert.scaling * weight) if root else math.copysign(1, expert.scaling)
            B.add_(expert.B.to(dtype), alpha=share)
            A.add_(expert.A.to(dtype), alpha=sign * share)
        return LowRank(B, A, scale)
