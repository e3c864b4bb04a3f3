"""TIES: task vectors trimmed to their largest entries, then an election of signs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from evomerge.methods.arithmetic import SCALE, TASK_WEIGHT, add_to_base, weighted_sum
from evomerge.methods.base import State, TensorInfo, arithmetic_dtype
from evomerge.methods.election import MODE, NORMALIZE
from evomerge.methods.thinning import Election, Thinned, merge_thinned, thinned_vectors
from evomerge.methods.trimming import SCOPE, TrimmedMethod, Trimming
from evomerge.params import Param

TIES_DENSITY = Param(float, 0.2, "share of each task vector's entries that is kept", 0, 1, low_open=True)


@final
class Ties(TrimmedMethod):
    """Trim each task vector to its largest entries, elect a sign for every entry, merge the entries that agree.

    Kept are ``round(density * n)`` entries of an expert's task vector, at least one, and all that equal the smallest
    of them in magnitude. ``scope`` says what n is: the tensor, or (the paper) the whole model, where tensors in which
    the expert is the base count with their zeros. The weights multiply the trimmed task vectors before the election.
    """

    name = "ties"
    summary = "keep each task vector's largest entries, elect signs, merge the entries that agree"
    reference = "Yadav et al. 2023, TIES-Merging, arXiv:2306.01708, section 4 and algorithm 1"
    affine_remedy = "Use ties_linear, which elects the signs before the weights multiply."
    params: Mapping[str, Param] = MappingProxyType(
        {"density": TIES_DENSITY, "mode": MODE, "normalize": NORMALIZE, "scale": SCALE, "scope": SCOPE}
    )

    def trimming(self, params: Mapping[str, Any]) -> Trimming | None:
        density, scope = (params.get(key, self.params[key].default) for key in ("density", "scope"))
        return None if density == 1 else Trimming(density, scope=scope)

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
        """Without ``state`` the thresholds come from the tensor itself. MethodError for scope model, which needs it."""
        parts = self.thinned(base, experts, weights, info=info, state=state, params=params)
        return merge_thinned(base, parts, dtype=dtype, election=Election(mode, normalize), scale=scale)


@final
class TiesLinear(TrimmedMethod):
    """Task arithmetic on what TIES leaves of the task vectors where all weights are equal: affine in the weights.

    Task vectors are trimmed as by ``ties``. The sign of an entry is that of the sum of the trimmed ones (zero counts as
    +), whatever the weights are, and what disagrees with it becomes zero. An expert of weight zero has its vote, too.
    """

    name = "ties_linear"
    summary = "trim and elect signs as ties does with equal weights, then task arithmetic"
    reference = "Yang et al. 2024, AdaMerging, arXiv:2310.02575, AdaMerging++ (its task vectors after TIES-Merging)"
    params: Mapping[str, Param] = MappingProxyType({"density": TIES_DENSITY, "scale": SCALE, "scope": SCOPE})
    weight = TASK_WEIGHT

    def is_linear(self, **params: Any) -> bool:
        return True

    def counts_all(self, **params: Any) -> bool:
        return True

    def trimming(self, params: Mapping[str, Any]) -> Trimming | None:
        density, scope = (params.get(key, self.params[key].default) for key in ("density", "scope"))
        return None if density == 1 else Trimming(density, scope=scope)

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
        if scale == 0 or not any(weights):
            return base.to(dtype, copy=True)
        parts = self._voting(base, experts, info, state, params)
        agreeing = _agreeing(base, parts, dtype, [weights[t] != 0 for t in parts])
        tau = weighted_sum((weights[t], vector) for t, vector in agreeing)
        return add_to_base(base, tau, dtype, scale=scale)

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
        parts = self._voting(base, experts, info, state, params)
        for t, vector in _agreeing(base, parts, arithmetic_dtype(base, *experts), [True] * len(parts)):
            yield t, vector if scale == 1 else vector.mul_(scale)

    def _voting(
        self, base: Tensor, experts: Sequence[Tensor], info: TensorInfo, state: State | None, params: Mapping[str, Any]
    ) -> dict[int, Thinned]:
        """What stays of the task vectors, by the number of the expert."""
        present = [t for t, expert in enumerate(experts) if expert is not base]
        parts = self.thinned(base, experts, [1.0] * len(experts), info=info, state=state, params=params)
        return dict(zip(present, parts, strict=True))


def _agreeing(
    base: Tensor, parts: Mapping[int, Thinned], dtype: torch.dtype, wanted: Sequence[bool]
) -> Iterator[tuple[int, Tensor]]:
    """(t, the entries of trimmed tau_t that have the sign of the sum of all) of the experts that are ``wanted``.

    The task vectors are made twice, so that one of them and the sum are all that is in memory.
    """
    total = weighted_sum(thinned_vectors(base, list(parts.values()), dtype))
    if total is None:
        return
    plus = total >= 0
    chosen = {t: part for (t, part), want in zip(parts.items(), wanted, strict=True) if want}
    for t, (_, vector) in zip(chosen, thinned_vectors(base, list(chosen.values()), dtype), strict=True):
        yield t, torch.where(plus, vector.clamp(min=0), vector.clamp(max=0))
