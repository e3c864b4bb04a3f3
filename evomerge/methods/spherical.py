"""Merging along the arc between experts instead of the chord."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from evomerge.errors import MethodError
from evomerge.methods.arithmetic import sum_experts
from evomerge.methods.base import Method, SourceIterable, State, TensorInfo
from evomerge.methods.chunks import CHUNK
from evomerge.params import Param

PARALLEL = 0.9995  # beyond this |cosine| the arc is a line to within rounding, or (opposite vectors) not defined


@final
class Slerp(Method):
    """sin((1-t)O)/sin(O) theta_1 + sin(t O)/sin(O) theta_2, O the angle between the two flattened tensors.

    A straight line where the angle is (nearly) 0 or 180 degrees or one of the tensors is zero. The base plays no part.
    """

    name = "slerp"
    summary = "two experts along the arc between them"
    reference = "Shoemake 1985, Animating rotation with quaternion curves, SIGGRAPH 19(3), section 3.3; " \
        "on flattened weight tensors as merge tools do, line beyond |cos| 0.9995"  # fmt: skip
    params: Mapping[str, Param] = MappingProxyType(
        {"t": Param(float, None, "place on the arc, 0 the first expert, 1 the second; default: w2 / (w1 + w2)", 0, 1)}
    )
    weight = Param(float, 1.0, "only the two weights' proportion counts, and only where t is not given", low=0)
    needs_base = False
    widens = True
    num_experts: tuple[int, int | None] = (2, 2)

    def chunked_with(self, state: State | None, **params: Any) -> bool:
        return state is not None

    def prepare(self, sources: SourceIterable, statistics: Any = None, **fixed: Any) -> dict[str, float]:
        """The cosine between the two experts' flattened tensors, by tensor name."""
        return {info.name: _cosine(*experts) for info, _, experts in sources}

    def combine(
        self,
        base: Tensor | None,
        experts: Sequence[Tensor],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        info: TensorInfo,
        state: Mapping[str, float] | None,
        t: float | None,
        **_: Any,
    ) -> Tensor:
        """Raises MethodError for two zero weights without ``t``."""
        if t is None:
            if sum(weights) == 0:
                raise MethodError(
                    "method slerp takes t from the weights as w2 / (w1 + w2), but both are zero",
                    remedy="Give t, or a positive weight.",
                )
            t = weights[1] / sum(weights)
        a, b = experts
        if a is b:
            return a.to(dtype, copy=True)
        if state is not None:
            if info.name not in state:
                raise MethodError(f"method slerp was prepared without the tensor {info.name}")
            cosine = state[info.name]
        else:
            cosine = _cosine(a, b)
        if abs(cosine) > PARALLEL:
            first, second = 1 - t, t
        else:
            angle = math.acos(cosine)
            first, second = (math.sin(share * angle) / math.sin(angle) for share in (1 - t, t))
        return sum_experts([a, b], [first, second], dtype)


def _cosine(a: Tensor, b: Tensor) -> float:
    """cos of the angle between two flattened tensors, summed in float64; 1 (no arc) if one of them is zero."""
    if a is b:
        return 1.0
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    sums = torch.zeros(3, dtype=torch.float64, device=a.device)
    for start in range(0, flat_a.numel(), CHUNK):
        x, y = (flat[start : start + CHUNK].to(torch.float64) for flat in (flat_a, flat_b))
        sums += torch.stack([torch.dot(x, y), torch.dot(x, x), torch.dot(y, y)])
    dot, square_a, square_b = sums.tolist()
    norms = math.sqrt(square_a) * math.sqrt(square_b)
    return max(-1.0, min(1.0, dot / norms)) if norms > 0 else 1.0
