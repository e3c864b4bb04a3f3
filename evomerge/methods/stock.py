"""Model Stock: how far from the base the mean of the experts should lie follows from the angles between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from evomerge.methods.arithmetic import add_to_base, task_vectors, weighted_sum
from evomerge.methods.base import ANY_WEIGHT, Method, SourceIterable, State, TensorInfo
from evomerge.methods.inner_products import (
    VECTORS,
    InnerProducts,
    cosines_of,
    inner_products,
    prepare_products,
    spread,
)
from evomerge.params import Param

SINGULAR = 1e-6  # 1 + (k-1) cos below which task vectors cancel, and no place between mean and base can be told


@final
class ModelStock(Method):
    """theta_0 + r mean_t(w_t tau_t) with r = k c / (1 + (k-1) c), c the mean cosine between pairs of task vectors.

    k is the number of experts that have a weight; with one alone there is no angle, and r is 1. A task vector that is
    zero is at right angles to all. ``vectors`` rows takes the angles row by row instead of tensor by tensor.
    """

    name = "model_stock"
    summary = "mean of the experts, pulled to the base as far as the angles between their task vectors say"
    reference = "Jang et al. 2024, Model Stock, arXiv:2403.19522"
    params: Mapping[str, Param] = MappingProxyType({"vectors": replace(VECTORS, choices=("tensor", "rows"))})
    weight = ANY_WEIGHT
    num_experts: tuple[int, int | None] = (2, None)

    def chunked_with(self, state: State | None, **params: Any) -> bool:
        return isinstance(state, InnerProducts) and state.fits(params.get("vectors", VECTORS.default), "base")

    def prepare(self, sources: SourceIterable, statistics: Any = None, **fixed: Any) -> InnerProducts | None:
        """The inner products of the task vectors, by tensor, if ``vectors`` is fixed."""
        return prepare_products(self.name, sources, fixed["vectors"], "base") if "vectors" in fixed else None

    def combine(
        self,
        base: Tensor,
        experts: Sequence[Tensor],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        info: TensorInfo,
        state: State | None,
        vectors: str,
        **_: Any,
    ) -> Tensor:
        chosen = [t for t, weight in enumerate(weights) if weight != 0]
        if all(experts[t] is base for t in chosen):
            return base.to(dtype, copy=True)
        if isinstance(state, InnerProducts) and state.fits(vectors, "base"):
            products = state.for_tensor(self.name, info.name)
        else:
            products = inner_products(self.name, info, base, experts, vectors, "base")
        ratio = _ratio(products[:, chosen][:, :, chosen])
        mean = [weight / len(chosen) for weight in weights]
        tau = weighted_sum((weight, vector) for _, weight, vector in task_vectors(base, experts, mean, dtype))
        if len(ratio) == 1 or tau is None or tau.numel() == 0:
            return add_to_base(base, tau, dtype, scale=float(ratio[0]) if len(ratio) else 0.0)
        tau.mul_(spread(ratio.to(tau.device), info, tau.numel(), vectors, dtype).view(tau.shape))
        return add_to_base(base, tau, dtype)


def _ratio(products: Tensor) -> Tensor:
    """(vectors,): r, from (vectors, k, k) inner products of the task vectors."""
    k = products.shape[-1]
    if k == 1:
        return torch.ones_like(products[:, 0, 0])
    pairs = torch.triu_indices(k, k, 1, device=products.device)
    cosine = cosines_of(products)[1][:, pairs[0], pairs[1]].mean(1)
    divisor = 1 + (k - 1) * cosine
    return torch.where(divisor < SINGULAR, 0.0, k * cosine / divisor)
