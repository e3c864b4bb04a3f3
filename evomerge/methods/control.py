"""What a merge has to beat: vectors that are as long as the task vectors, and mean nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from evomerge.methods.arithmetic import SCALE, TASK_WEIGHT
from evomerge.methods.base import Method, TensorInfo
from evomerge.methods.random import BLOCK, normal
from evomerge.params import Param


@final
class RandomVectors(Method):
    """theta_0 + scale sum_t w_t r_t, r_t standard normal noise scaled to the norm of tau_t, tensor by tensor."""

    name = "random_vectors"
    summary = "control: task arithmetic with random vectors of the task vectors' norms"
    reference = "a control of evomerge's own: what is gained by moving as far as the experts did, anywhere"
    params: Mapping[str, Param] = MappingProxyType({"scale": SCALE})
    weight = TASK_WEIGHT
    chunked = False  # the noise's own norm needs the whole tensor

    def is_linear(self, **params: Any) -> bool:
        return True

    def combine(
        self,
        base: Tensor,
        experts: Sequence[Tensor],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        info: TensorInfo,
        seed: int,
        scale: float,
        **_: Any,
    ) -> Tensor:
        theta_0 = base.reshape(-1)
        noise = theta_0.new_empty(theta_0.shape, dtype=dtype)  # of one expert at a time
        total = theta_0.to(dtype, copy=True)
        for t, (expert, weight) in enumerate(zip(experts, weights, strict=True)):
            if expert is base or weight == 0:
                continue
            theta, tau_squares, noise_squares = expert.reshape(-1), 0.0, 0.0
            for start in range(0, theta.numel(), BLOCK):  # the norms block by block: nothing else is tensor-sized
                part = slice(start, start + BLOCK)
                tau_squares += _squares(theta[part].to(dtype) - theta_0[part].to(dtype))
                noise[part] = normal(seed, info.name, t, start, noise[part].numel())
                noise_squares += _squares(noise[part])
            if tau_squares > 0:
                total.add_(noise, alpha=scale * weight * math.sqrt(tau_squares / noise_squares))
        return total.view(base.shape)


def _squares(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64)) ** 2
