"""Weighted sums: of the experts themselves, or of their task vectors around the base."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from evomerge.errors import MethodError
from evomerge.methods.arithmetic import SCALE, TASK_WEIGHT, add_low_rank, sum_experts, sum_task_vectors
from evomerge.methods.base import LowRank, Method
from evomerge.params import Param


@final
class Linear(Method):
    """sum_t w_t theta_t, divided by sum_t w_t if ``normalize``. One weight at 1 gives that expert's very numbers."""

    name = "linear"
    summary = "weighted mean of the experts (uniform weights: the average, a model soup)"
    reference = "Wortsman et al. 2022, Model soups, arXiv:2203.05482, section 2 (uniform soup)"
    params: Mapping[str, Param] = MappingProxyType({"normalize": Param(bool, True, "divide by the sum of the weights")})
    weight = Param(float, 1.0, "what multiplies this expert; any sign, 0 leaves the expert out")
    needs_base = False
    widens = True
    fills = True
    keeps_base = False  # weights that do not sum to 1 scale the base too, if not normalised
    affine_remedy = "Set normalize: false, or use task_arithmetic."

    def is_linear(self, **params: Any) -> bool:
        return not params.get("normalize", self.params["normalize"].default)

    def task_coefficients(self, weights: Sequence[float], **params: Any) -> list[float] | None:
        """The weights, where they sum to 1 (if ``normalize``: after the division)."""
        total = math.fsum(weights)
        if params["normalize"]:
            return None if _sums_to_zero(weights) else [weight / total for weight in weights]
        return list(weights) if total == 1 else None

    def combine(
        self,
        base: Tensor | None,
        experts: Sequence[Tensor],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        normalize: bool,
        out: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Raises MethodError if ``normalize`` is asked for and the weights sum to zero."""
        divisor = 1.0
        if normalize:
            divisor = math.fsum(weights)
            if _sums_to_zero(weights):
                raise MethodError(
                    f"method linear with normalize divides by the sum of the weights, but {list(weights)} sum to zero",
                    remedy="Keep the weights positive, or set normalize: false.",
                )
        # Experts that are one object (all untouched by their adapters) count once: their mean is then exactly it.
        shares: dict[int, list[float]] = {}
        for expert, weight in zip(experts, weights, strict=True):
            shares.setdefault(id(expert), []).append(weight)
        coefficients = {key: math.fsum(share) / divisor for key, share in shares.items()}
        distinct = {id(expert): expert for expert in experts}
        counted = [key for key in distinct if coefficients[key] != 0]
        if not counted:
            return experts[0].to(dtype, copy=True).zero_()
        return sum_experts([distinct[key] for key in counted], [coefficients[key] for key in counted], dtype, out)


@final
class Passthrough(Method):
    """w theta_1: one checkpoint as it is, or multiplied by a number. What a recipe's groups say of it is by region."""

    name = "passthrough"
    summary = "one expert as it is, times its weight"
    reference = "mergekit 0.1.5 (Goddard et al. 2024, arXiv:2403.13257), method passthrough; its scale is the weight"
    weight = Param(float, 1.0, "what multiplies the expert")
    needs_base = False
    keeps_base = False  # the weight multiplies what is the base, too
    num_experts: tuple[int, int | None] = (1, 1)

    def is_linear(self, **params: Any) -> bool:
        return True

    def combine(self, base: Any, experts: Sequence[Tensor], *, weights: Any, dtype: torch.dtype, **_: Any) -> Tensor:
        whole = experts[0].to(dtype, copy=True)
        return whole if weights[0] == 1 else whole.mul_(weights[0])


def _sums_to_zero(weights: Sequence[float]) -> bool:
    return abs(math.fsum(weights)) <= 1e-12 * math.fsum(map(abs, weights))


@final
class TaskArithmetic(Method):
    """theta_0 + scale sum_t w_t tau_t. The paper's lambda is the weight; a negative one forgets a task."""

    name = "task_arithmetic"
    summary = "the base plus a weighted sum of task vectors"
    reference = "Ilharco et al. 2023, Editing models with task arithmetic, arXiv:2212.04089, section 2"
    params: Mapping[str, Param] = MappingProxyType({"scale": SCALE})
    weight = TASK_WEIGHT
    factors = True
    widens = True
    fills = True
    sums_task_vectors = True

    def is_linear(self, **params: Any) -> bool:
        return True

    def task_coefficients(self, weights: Sequence[float], **params: Any) -> list[float] | None:
        return [params["scale"] * weight for weight in weights]

    def combine(
        self,
        base: Tensor,
        experts: Sequence[Tensor | LowRank],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        scale: float,
        out: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """A LowRank expert is its task vector itself: its B A is added without being made."""
        scaled = [(scale * weight, expert) for weight, expert in zip(weights, experts, strict=True)]
        dense = [(weight, expert) for weight, expert in scaled if isinstance(expert, Tensor)]
        merged = sum_task_vectors(base, [expert for _, expert in dense], [weight for weight, _ in dense], dtype, out)
        return add_low_rank(merged, [(weight, expert) for weight, expert in scaled if isinstance(expert, LowRank)])
