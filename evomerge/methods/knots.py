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
    weights. U has a column for each singular value that is not zero. LoRA experts are decomposed by their factors, and
    nothing of the matrix's size is made but the result.
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
        inner: str,
        density: float | None,
        mode: str,
        **_: Any,
    ) -> Tensor | None:
        parts = shared_parts(base, experts, weights, dtype)
        if parts is None:
            return None
        left, right = parts
        method, rows = INNER[inner], (left.shape[1], base.shape[1])
        nothing = torch.zeros(rows, dtype=dtype, device=base.device)  # the base of the right parts
        options = {"density": density if density is not None else method.params["density"].default, "mode": mode}
        merged = method.merge(
            nothing,
            [right.get(t, nothing) for t in range(len(experts))],
            weights=weights,
            info=replace(info, shape=rows),
            seed=seed,
            **{key: value for key, value in options.items() if key in method.params},
        )
        return left.to(dtype) @ merged


def shared_parts(
    base: Tensor, experts: Sequence[Tensor | LowRank], weights: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, dict[int, Tensor]] | None:
    """(U: (m, k) in float64, {t: S V_t': (k, n) in ``dtype``}) with tau_t = U S V_t'; None if there is no task vector.

    Of the experts t that have a task vector and a weight. S V_t' is taken as U' tau_t, which it equals.
    """
    taus: dict[int, Any] = {}
    for t, (expert, weight) in enumerate(zip(experts, weights, strict=True)):
        for _, tau in task_matrices(base, [expert], [weight], dtype):
            taus[t] = tau
    left = left_basis(list(taus.values()), dtype)
    return (left, {t: in_basis(left, tau, dtype) for t, tau in taus.items()}) if left.shape[1] else None


def in_basis(left: Tensor, tau: Tensor | LowRank, dtype: torch.dtype) -> Tensor:
    """left' tau in ``dtype``."""
    if isinstance(tau, LowRank):
        return (tau.scaling * (left.T @ tau.B.to(left.dtype))).to(dtype) @ tau.A.to(dtype, copy=True)
    return left.T.to(dtype) @ tau
