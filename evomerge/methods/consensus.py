"""Consensus Merging: only the entries stay that several experts need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from evomerge.methods.arithmetic import SCALE, TASK_WEIGHT, add_to_base, task_vectors, weighted_sum
from evomerge.methods.base import State, TensorInfo
from evomerge.methods.election import MODE, NORMALIZE, elect_and_merge
from evomerge.methods.thinning import thinned_vectors
from evomerge.methods.ties import TIES_DENSITY
from evomerge.methods.trimming import SCOPE, TrimmedMethod, Trimming
from evomerge.params import Param


def tall_mask(tau: Tensor, merged: Tensor, strictness: float) -> Tensor:
    """1 where an expert needs an entry, else 0: abs(tau_t) > l abs(tau_MT - tau_t), l being the ``strictness``."""
    return torch.gt(tau.abs(), torch.sub(merged, tau).abs_().mul_(strictness)).to(tau)


@final
class Consensus(TrimmedMethod):
    """Task arithmetic or TIES, without the entries that fewer than k experts need.

    An expert needs an entry where its TALL mask holds it: mask_t = abs(tau_t) > l abs(tau_MT - tau_t). tau_MT is what
    the inner method makes of the task vectors with weights of 1, so that the masks are the same for all weights;
    experts of weight 0 have no mask and no part in it. What an expert does not move it does not need.
    """

    name = "consensus"
    summary = "keep only the entries that at least k experts need (TALL masks), then task arithmetic or ties"
    reference = "Wang et al. 2024, Localizing task information (TALL masks), arXiv:2405.07813, Consensus Merging"
    params: Mapping[str, Param] = MappingProxyType(
        {
            "density": Param(float, TIES_DENSITY.default, f"of ties: {TIES_DENSITY.meaning}", 0, 1, low_open=True),
            "inner": Param(str, "task_arithmetic", "what merges the task vectors", choices=("task_arithmetic", "ties")),
            "k": Param(int, 2, "how many experts must need an entry; 0 keeps all, more than there are keeps none", 0),
            "l": Param(float, 0.4, "how much of an entry of the merge an expert must account for to need it", 0),
            "mode": Param(str, MODE.default, f"of ties: {MODE.meaning}", choices=MODE.choices),
            "normalize": Param(bool, NORMALIZE.default, f"of ties: {NORMALIZE.meaning}"),
            "scale": SCALE,
            "scope": Param(str, SCOPE.default, f"of ties: {SCOPE.meaning}", choices=SCOPE.choices),
        }
    )
    weight = TASK_WEIGHT

    def is_linear(self, **params: Any) -> bool:
        return params["inner"] == "task_arithmetic" and params["k"] == 0

    def task_coefficients(self, weights: Sequence[float], **params: Any) -> list[float] | None:
        """Where nothing is masked."""
        return [params["scale"] * weight for weight in weights] if self.is_linear(**params) else None

    def trimming(self, params: Mapping[str, Any]) -> Trimming | None:
        inner, density, scope = (params.get(key, self.params[key].default) for key in ("inner", "density", "scope"))
        return None if inner == "task_arithmetic" or density == 1 else Trimming(density, scope=scope)

    def combine(
        self,
        base: Tensor,
        experts: Sequence[Tensor],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        info: TensorInfo,
        state: State | None,
        scale: float,
        seed: int,
        **params: Any,
    ) -> Tensor:
        arithmetic = params["inner"] == "task_arithmetic"
        if arithmetic:  # in the order of task_arithmetic, so that with k = 0 it is the same to the bit
            weights, scale = [scale * weight for weight in weights], 1.0

        def merge(weights: Sequence[float]) -> Tensor | None:
            parts = self.thinned(base, experts, weights, info=info, state=state, params=params)
            vectors = thinned_vectors(base, parts, dtype)
            if arithmetic:
                return weighted_sum(vectors)
            return elect_and_merge(vectors, mode=params["mode"], normalize=params["normalize"])

        tau = merge(weights)
        if tau is not None and params["k"] > 0:
            present = [float(weight != 0) for weight in weights]
            together = merge(present)
            assert together is not None
            needing = torch.zeros_like(together)
            for _, _, vector in task_vectors(base, experts, present, dtype):
                needing.add_(tall_mask(vector, together, params["l"]))
            tau.mul_(needing.ge_(params["k"]))
        return add_to_base(base, tau, dtype, scale=scale)
