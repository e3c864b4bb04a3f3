"""Model Breadcrumbs: task vectors without their largest and their smallest entries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from evomerge.methods.arithmetic import SCALE, TASK_WEIGHT
from evomerge.methods.base import State, TensorInfo, arithmetic_dtype
from evomerge.methods.election import MODE, NORMALIZE
from evomerge.methods.thinning import Election, merge_thinned, thinned_directions
from evomerge.methods.trimming import TrimmedMethod, Trimming
from evomerge.params import Param

DENSITY = Param(float, 0.1, "share of each task vector's entries that is kept, tensor by tensor", 0, 1, low_open=True)
GAMMA = Param(
    float,
    0.01,
    "share of the entries, the largest in magnitude, that is dropped; fewer where density leaves less room",
    0,
    1,
)


class _Breadcrumbs(TrimmedMethod):
    """Both tails cut off, tensor by tensor: the part that the two methods share.

    Of a tensor's n entries the ``round(gamma * n)`` largest in magnitude are dropped (fewer where density + gamma
    exceeds 1), and of the others the ``round(density * n)`` largest are kept, at least one. Entries that equal the
    smallest or the largest of them in magnitude are kept as well.
    """

    reference = "Davari and Belilovsky 2024, Model Breadcrumbs, arXiv:2312.06795"

    def trimming(self, params: Mapping[str, Any]) -> Trimming | None:
        density, gamma = (params.get(key, self.params[key].default) for key in ("density", "gamma"))
        return None if density == 1 else Trimming(density, gamma)


@final
class Breadcrumbs(_Breadcrumbs):
    """Task arithmetic on task vectors without their largest and smallest entries."""

    name = "breadcrumbs"
    summary = "drop the largest and the smallest entries of the task vectors, then task arithmetic"
    params: Mapping[str, Param] = MappingProxyType({"density": DENSITY, "gamma": GAMMA, "scale": SCALE})
    weight = TASK_WEIGHT

    def is_linear(self, **params: Any) -> bool:
        return True

    def task_coefficients(self, weights: Sequence[float], **params: Any) -> list[float] | None:
        """Where nothing is dropped."""
        return [params["scale"] * weight for weight in weights] if params["density"] == 1 else None

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
        scaled = [scale * weight for weight in weights]
        parts = self.thinned(base, experts, scaled, info=info, state=state, params=params)
        return merge_thinned(base, parts, dtype=dtype)

    def directions(
        self,
        base: Tensor,
        experts: Sequence[Tensor],
        *,
        info: TensorInfo,
        state: State | None = None,
        seed: int = 0,
        scale: float,
        **params: Any,
    ) -> Iterator[tuple[int, Tensor]]:
        parts = self.thinned(base, experts, [1.0] * len(experts), info=info, state=state, params=params)
        return thinned_directions(base, experts, parts, arithmetic_dtype(base, *experts), scale)


@final
class BreadcrumbsTies(_Breadcrumbs):
    """TIES' sign election and merging, on task vectors without their largest and smallest entries."""

    name = "breadcrumbs_ties"
    summary = "drop the largest and the smallest entries of the task vectors, then elect signs as ties does"
    params: Mapping[str, Param] = MappingProxyType(
        {"density": DENSITY, "gamma": GAMMA, "mode": MODE, "normalize": NORMALIZE, "scale": SCALE}
    )

    def combine(
        self,
        base: Tensor,
        experts: Sequence[Tensor],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        info: TensorInfo,
        state: State | None,
        mode: str,
        normalize: bool,
        scale: float,
        seed: int,
        **params: Any,
    ) -> Tensor:
        parts = self.thinned(base, experts, weights, info=info, state=state, params=params)
        return merge_thinned(base, parts, dtype=dtype, election=Election(mode, normalize), scale=scale)
