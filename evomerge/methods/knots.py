"""KnOTS: task vectors written in one basis that all of them share, and merged there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from evomerge.methods.arithmetic import SCALE
from evomerge.methods.base import LowRank, Method, TensorInfo
from evomerge.methods.dare import DARE_DENSITY, DareLinear, DareTies
from evomerge.methods.decompositions import left_basis
from evomerge.methods.election import MODE
from evomerge.methods.matrices import ALL_MATRICES, MatrixMethod, task_matrices
from evomerge.methods.ties import TIES_DENSITY, Ties
from evomerge.params import Param

INNER: Mapping[str, Method] = MappingProxyType({method.name: method for method in (Ties(), DareTies(), DareLinear())})


@final
class Knots(MatrixMethod):
    """The task vectors side by side have one decomposition; its right parts are merged by another method.

    Per matrix: U S [V_1' .. V_T'] = [tau_1 .. tau_T], tau = U M with M what ``inner`` makes of the S V_t' with the
    weights; with ``singular_values`` after, tau = U S M with M what it makes of the V_t'. U has a column for each
    singular value that is not zero. LoRA experts are decomposed by their factors, and nothing of the matrix's size is
    made but the result.
    """

    name = "knots"
    summary = "the task vectors in a basis that they share, merged there by ties or dare; made for LoRA experts"
    reference = "Stoica et al. 2025, Model merging with SVD to tie the KnOTS, arXiv:2410.19735"
    params: Mapping[str, Param] = MappingProxyType(
        {
            "inner": Param(str, "ties", "the method that merges the right parts", choices=tuple(INNER)),
            "density": Param(
                float,
                None,
                "share of the right parts' entries that the inner method keeps; default: the inner method's own, "
                f"{TIES_DENSITY.default} for ties and {DARE_DENSITY.default} for dare",
                0,
                1,
                low_open=True,
            ),
            "mode": replace(MODE, meaning=f"of the inner election: {MODE.meaning}"),
            "singular_values": Param(
                str,
                "before",
                "before: they multiply the right parts before these are merged (the authors' code); after: they "
                "multiply what has been merged of right parts of equally strong directions (the paper's words)",
                choices=("before", "after"),
            ),
            "matrices": ALL_MATRICES,
            "scale": SCALE,
        }
    )
    factors = True

    def combine_matrix(
        self,
        base: Tensor,
        experts: Sequence[Tensor | LowRank],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        info: TensorInfo,
        seed: int,
        **params: Any,
    ) -> Tensor | None:
        taus: dict[int, Any] = {}
        for t, (expert, weight) in enumerate(zip(experts, weights, strict=True)):
            for _, tau in task_matrices(base, [expert], [weight], dtype):
                taus[t] = tau
        merged = _merged(taus, weights=weights, dtype=dtype, info=info, seed=seed, **params)
        return None if merged is None else merged.B @ merged.A

    def merged_factors(
        self,
        experts: Sequence[Any],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        info: TensorInfo,
        seed: int,
        matrices: str,
        scale: float,
        **params: Any,
    ) -> LowRank | None:
        """None for a tensor that gets the mean: that is a weighted sum, as ``task_arithmetic`` would write it."""
        pairs = enumerate(zip(experts, weights, strict=True))
        taus: dict[int, Any] = {t: e for t, (e, weight) in pairs if isinstance(e, LowRank) and weight}
        if not self.takes(info, matrices):
            return None
        merged = _merged(taus, weights=weights, dtype=dtype, info=info, seed=seed, **params)
        return merged and replace(merged, scaling=scale)


def _merged(
    taus: dict[int, Tensor | LowRank],
    *,
    weights: Sequence[float],
    dtype: torch.dtype,
    info: TensorInfo,
    seed: int,
    inner: str,
    density: float | None,
    mode: str,
    singular_values: str,
    **_: Any,
) -> LowRank | None:
    """U (or U S) and M, in ``dtype``; None if there is no task vector, or nothing but zeros. Empties ``taus``."""
    left, S = left_basis(list(taus.values()), dtype)
    if not left.shape[1]:
        return None
    after = singular_values == "after"
    basis = left / S if after else left
    right = {t: in_basis(basis, taus.pop(t), dtype) for t in list(taus)}  # U' tau_t is S V_t'
    del basis
    method, rows = INNER[inner], (left.shape[1], info.shape[1])
    nothing = torch.zeros(rows, dtype=dtype, device=left.device)  # the base of the right parts
    options = {"density": method.params["density"].default if density is None else density, "mode": mode}
    merged = method.merge(
        nothing,
        [right.get(t, nothing) for t in range(len(weights))],
        weights=weights,
        info=replace(info, shape=rows),
        seed=seed,
        **{key: value for key, value in options.items() if key in method.params},
    )
    return LowRank((left * S if after else left).to(dtype), merged, 1.0)


def in_basis(left: Tensor, tau: Tensor | LowRank, dtype: torch.dtype) -> Tensor:
    """left' tau in ``dtype``."""
    if isinstance(tau, LowRank):
        return (tau.scaling * (left.T @ tau.B.to(left.dtype))).to(dtype) @ tau.A.to(dtype, copy=True)
    return left.T.to(dtype) @ tau
