"""What a merge has to beat: vectors that are as long as the task vectors, and mean nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from evomerge.errors import MethodError
from evomerge.methods.arithmetic import (
    SCALE,
    TASK_WEIGHT,
    MethodDefaults,
    add_to_base,
    check_call,
    is_slice,
    task_vectors,
    weighted_sum,
)
from evomerge.methods.base import State, TensorInfo, arithmetic_dtype
from evomerge.methods.random import normal
from evomerge.params import Param


@final
class RandomVectors(MethodDefaults):
    """theta_0 + scale sum_t w_t r_t, r_t standard normal noise scaled to the norm of tau_t, tensor by tensor."""

    name = "random_vectors"
    summary = "control: task arithmetic with random vectors of the task vectors' norms"
    reference = "a control of evomerge's own: what is gained by moving as far as the experts did, anywhere"
    params: Mapping[str, Param] = MappingProxyType({"scale": SCALE})
    weight = TASK_WEIGHT
    chunked = False  # the noise's own norm needs the whole tensor

    def is_linear(self, **params: Any) -> bool:
        return True

    def merge(
        self,
        base: Tensor | None,
        experts: Sequence[Tensor],
        *,
        weights: Sequence[float],
        info: TensorInfo,
        state: State | None = None,
        seed: int = 0,
        **params: Any,
    ) -> Tensor:
        """Raises MethodError for a slice."""
        scale = check_call(self, base, experts, weights, params)["scale"]
        assert base is not None
        if is_slice(info, base):
            raise MethodError(f"method random_vectors got a slice of {info.name}, but norms need the whole tensor")
        dtype = arithmetic_dtype(base, *experts)

        def noise() -> Iterator[tuple[float, Tensor]]:
            for t, weight, tau in task_vectors(base, experts, [scale * weight for weight in weights], dtype):
                norm = float(torch.linalg.vector_norm(tau, dtype=torch.float64))
                if norm > 0:
                    drawn = normal(seed, info.name, t, 0, tau.numel()).view(tau.shape).to(tau)
                    yield weight * norm / float(torch.linalg.vector_norm(drawn, dtype=torch.float64)), drawn

        return add_to_base(base, weighted_sum(noise()), dtype)
