"""DARE: entries of the task vectors dropped at random, the rest rescaled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from evomerge.methods.arithmetic import SCALE, TASK_WEIGHT
from evomerge.methods.base import Method, SourceIterable, State, TensorInfo, arithmetic_dtype
from evomerge.methods.election import MODE, NORMALIZE
from evomerge.methods.masks import Masks
from evomerge.methods.thinning import Election, Thinned, experts_in, merge_thinned, thinned_directions
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

    widens = True
    draws = True
    kept_bits = 1  # a mask
    reference = "Yu et al. 2024, Language models are super Mario (DARE), arXiv:2311.03099, section 3.2, equation 1"

    def chunked_with(self, state: State | None, **params: Any) -> bool:
        """False for rescale l1: the L1 norm of what a seed keeps needs the whole tensor."""
        density, rescale = (params.get(key, self.params[key].default) for key in ("density", "rescale"))
        return rescale == "density" or density == 1

    def prepare(
        self, sources: SourceIterable, statistics: Any = None, *, seed: int | None = None, **fixed: Any
    ) -> Masks | None:
        """Room for the masks, if ``density`` is fixed and all candidates share ``seed``: they are drawn when needed."""
        density = fixed.get("density", 1)
        return None if seed is None or density == 1 else Masks(seed, density)

    def _thinned(
        self,
        base: Tensor,
        experts: Sequence[Tensor],
        weights: Sequence[float],
        *,
        dtype: torch.dtype,
        info: TensorInfo,
        state: State | None,
        seed: int,
        density: float,
        rescale: str,
    ) -> list[Thinned]:
        """The experts that count, each entry kept with probability ``density``, the kept ones rescaled."""
        chosen = list(experts_in(base, experts, weights))
        if density == 1:
            return [Thinned(experts[t], weight) for t, weight in chosen]
        masks = state if isinstance(state, Masks) else Masks(seed, density)
        if (masks.seed, masks.density) != (seed, density):
            masks = Masks(seed, density)
        parts: list[Thinned] = []
        for t, weight in chosen:
            mask, factor = masks.draw(info.name, t, info.start, base.numel()), 1 / density
            if rescale == "l1":
                tau = torch.sub(experts[t], base.to(dtype))
                norm = float(tau.abs().sum(dtype=torch.float64))
                kept = float(tau.mul_(mask.values(tau)).abs().sum(dtype=torch.float64))
                factor = norm / kept if kept else 1.0
            parts.append(Thinned(experts[t], weight, mask, factor=factor))
        return parts


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
        state: State | None,
        seed: int,
        density: float,
        rescale: str,
        scale: float,
        **_: Any,
    ) -> Tensor:
        scaled = [scale * weight for weight in weights]
        parts = self._thinned(
            base, experts, scaled, dtype=dtype, info=info, state=state, seed=seed, density=density, rescale=rescale
        )
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
        dtype = arithmetic_dtype(base, *experts)
        ones = [1.0] * len(experts)
        parts = self._thinned(base, experts, ones, dtype=dtype, info=info, state=state, seed=seed, **params)
        return thinned_directions(base, experts, parts, dtype, scale)


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
        state: State | None,
        seed: int,
        density: float,
        mode: str,
        normalize: bool,
        rescale: str,
        scale: float,
        **_: Any,
    ) -> Tensor:
        parts = self._thinned(
            base, experts, weights, dtype=dtype, info=info, state=state, seed=seed, density=density, rescale=rescale
        )
        return merge_thinned(base, parts, dtype=dtype, election=Election(mode, normalize), scale=scale)
