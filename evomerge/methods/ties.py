"""TIES: task vectors trimmed to their largest entries, then an election of signs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from evomerge.methods.arithmetic import SCALE
from evomerge.methods.base import State, TensorInfo
from evomerge.methods.election import MODE, NORMALIZE
from evomerge.methods.thinning import Election, merge_thinned
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
