"""DARE: entries of the task vectors dropped at random, the rest rescaled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from evomerge.methods.arithmetic import SCALE, TASK_WEIGHT, add_to_base, task_vectors, weighted_sum
from evomerge.methods.base import Method, State, TensorInfo
from evomerge.methods.election import MODE, NORMALIZE, elect_and_merge
from evomerge.methods.random import uniform
from evomerge.params import Param

RESCALE = Param(
    str,
    "density",
    "density: divide what is kept by density (keeps the expectation); l1: restore the L1 norm of the task vector, "
    "tensor by tensor",
    choices=("density", "l1"),
)


class _Dare(Method):
    """Drop and rescale: the part that DARE's two methods share."""

    reference = "Yu et al. 2024, Language models are super Mario (DARE), arXiv:2311.03099, section 3.2, equation 1"

    def chunked_with(self, state: State | None, **params: Any) -> bool:
        """False for rescale l1: the L1 norm of what a seed keeps needs the whole tensor."""
        density, rescale = (params.get(key, self.params[key].default) for key in ("density", "rescale"))
        return rescale == "density" or density == 1

    def _dropped(
        self,
        vectors: Iterable[tuple[int, float, Tensor]],
        *,
        info: TensorInfo,
        seed: int,
        density: float,
        rescale: str,
    ) -> Iterator[tuple[float, Tensor]]:
        """(w_t, tau_t with each entry kept with probability ``density``, the kept ones rescaled)."""
        for t, weight, tau in vectors:
            if density == 1:
                yield weight, tau
                continue
            norm = float(tau.abs().sum(dtype=torch.float64)) if rescale == "l1" else 0.0
            drawn = uniform(seed, info.name, t, info.start, tau.numel())
            keep = torch.lt(drawn, density, out=drawn)  # 1 and 0 in float32: much faster than a boolean mask
            tau.mul_(keep.view(tau.shape).to(tau))
            if rescale == "density":
                yield weight, tau.div_(density)
            else:
                kept = float(tau.abs().sum(dtype=torch.float64))
                yield weight, tau.mul_(norm / kept if kept else 1.0)


DARE_DENSITY = Param(float, 0.5, "probability with which an entry of a task vector is kept", 0, 1, low_open=True)


@final
class DareLinear(_Dare):
    """Task arithmetic on task vectors whose entries were dropped at random and rescaled."""

    name = "dare_linear"
    summary = "drop entries of the task vectors at random, rescale the rest, then task arithmetic"
    params: Mapping[str, Param] = MappingProxyType({"density": DARE_DENSITY, "rescale": RESCALE, "scale": SCALE})
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
        seed: int,
        density: float,
        rescale: str,
        scale: float,
        **_: Any,
    ) -> Tensor:
        vectors = task_vectors(base, experts, [scale * weight for weight in weights], dtype)
        dropped = self._dropped(vectors, info=info, seed=seed, density=density, rescale=rescale)
        return add_to_base(base, weighted_sum(dropped), dtype)


@final
class DareTies(_Dare):
    """TIES' sign election and merging, with DARE's random drop in the place of the trimming.

    (DARE's authors also run TIES whole, with its trimming, on task vectors that DARE has thinned out.)
    """

    name = "dare_ties"
    summary = "drop entries of the task vectors at random, rescale the rest, then elect signs as ties does"
    params: Mapping[str, Param] = MappingProxyType(
        {"density": DARE_DENSITY, "mode": MODE, "normalize": NORMALIZE, "rescale": RESCALE, "scale": SCALE}
    )

    def combine(
        self,
        base: Tensor,
        experts: Sequence[Tensor],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        info: TensorInfo,
        seed: int,
        density: float,
        mode: str,
        normalize: bool,
        rescale: str,
        scale: float,
        **_: Any,
    ) -> Tensor:
        vectors = task_vectors(base, experts, weights, dtype)
        dropped = self._dropped(vectors, info=info, seed=seed, density=density, rescale=rescale)
        merged = elect_and_merge(dropped, mode=mode, normalize=normalize)
        return add_to_base(base, merged, dtype, scale=scale)
