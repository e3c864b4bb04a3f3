"""Task vectors found by an optimisation that needs no data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from evomerge.methods.arithmetic import SCALE
from evomerge.methods.base import LowRank
from evomerge.methods.decompositions import norm, row_factor
from evomerge.methods.matrices import INNER_MATRICES, MatrixMethod, task_matrices, total_matrix
from evomerge.params import Param

ROWS = 768  # at most about so many are optimised at a time, or BLOCK entries: a product with fewer is slower
BLOCK = 2**18
FEWEST = 64
PIECE = 2**15  # entries that Adam goes through at a time: small enough for a processor's cache
BETAS, EPSILON = (0.9, 0.999), 1e-8  # Adam's, as in torch and in the authors' code


@final
class WUDI(MatrixMethod):
    """The task vector that disturbs each expert's own as little as possible, measured on that expert's rows.

    Per matrix: min_X sum_t ||(X - w_t tau_t) tau_t'||^2 / ||tau_t||^2 by ``steps`` steps of Adam from
    X = sum w_t tau_t. The rows of tau_t stand for the inputs of the layer, which they are combinations of. One expert
    is kept, up to rounding.
    """

    name = "wudi"
    summary = "the task vector that interferes least with each expert's own, found by Adam; no data"
    reference = "Cheng et al. 2025, Whoever Started the Interference Should End It, arXiv:2503.08099"
    params: Mapping[str, Param] = MappingProxyType(
        {
            "steps": Param(int, 300, "steps of Adam", 0),
            "lr": Param(
                float,
                1e-5,
                "Adam's learning rate: about how far an entry moves in a step, whatever the size of the task vectors",
                0,
                low_open=True,
            ),
            "matrices": INNER_MATRICES,
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
        steps: int,
        lr: float,
        **_: Any,
    ) -> Tensor | None:
        """Works on D = X - sum w_t tau_t, so that nothing comes from a difference of large numbers."""
        start = total_matrix(base, experts, weights, dtype)
        if isinstance(start, LowRank):
            start = multiplied(1.0, start, dtype)
        if start is None or steps == 0:
            return start
        pull, gram = interference(base, experts, weights, start)
        count = math.ceil(len(start) / rows_at_a_time(*start.shape))
        for rows, its_pull in zip(start.chunk(count), pull.chunk(count), strict=True):  # a row is a problem of its own
            rows.add_(adam(gradient_at(its_pull, gram), torch.zeros_like(rows), steps=steps, lr=lr))
        return start


def rows_at_a_time(num_rows: int, columns: int) -> int:
    """How many rows of a matrix are optimised together: Adam's five copies of them are to need less memory than it."""
    return min(max(ROWS, BLOCK // columns), max(FEWEST, num_rows // 6))


def gradient_at(pull: Tensor, gram: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """WUDI's gradient 2 (D A + C) as a function of D and of the memory that it is written to; see ``interference``."""
    if len(gram) == gram.shape[1]:
        return lambda D, out: torch.addmm(pull, D, gram, beta=2, alpha=2, out=out)
    return lambda D, out: torch.addmm(pull, D @ gram.T, gram, beta=2, alpha=2, out=out)


def interference(
    base: Tensor, experts: Sequence[Any], weights: Sequence[float], start: Tensor
) -> tuple[Tensor, Tensor]:
    """(C, A) of WUDI's gradient 2 (D A + C) at X = start + D, in start's dtype.

    A = sum_t tau_t' tau_t / ||tau_t||^2 and C = sum_t (start - w_t tau_t) tau_t' tau_t / ||tau_t||^2. A is (in, in); or
    (rows, in) with A its Gram matrix, where that is less work: fewer rows than half the columns.
    """
    out_features, in_features = start.shape
    ranks = [min(out_features, len(e.A)) if isinstance(e, LowRank) else out_features for e in experts]
    few = 2 * sum(rank for rank, weight in zip(ranks, weights, strict=True) if weight != 0) < in_features
    pull, gram = torch.zeros_like(start), start.new_zeros(0 if few else in_features, in_features)
    rows: list[Tensor] = []

    def add(weight: float, tau: Tensor | LowRank) -> None:  # a function, so that it forgets its matrices
        away = multiplied(weight, tau, start.dtype).neg_().add_(start)
        unit = unit_rows(tau, start.dtype)
        if unit is None:
            return
        if few or 2 * len(unit) < in_features:
            pull.addmm_(away @ unit.T, unit)
        if few:
            rows.append(unit)
            return
        own = unit.T @ unit
        gram.add_(own)
        if 2 * len(unit) >= in_features:
            pull.addmm_(away, own)

    for weight, tau in task_matrices(base, experts, weights, start.dtype):
        add(weight, tau)
    return pull, torch.cat([gram, *rows])


def unit_rows(tau: Tensor | LowRank, dtype: torch.dtype) -> Tensor | None:
    """S with S'S = tau' tau / ||tau||^2: tau / ||tau|| in the memory of tau, or (rank, in) for low-rank factors.

    None if tau is zero.
    """
    rows = row_factor(tau) if isinstance(tau, LowRank) else tau
    size = norm(rows)
    return rows.div_(size).to(dtype) if size > 0 else None


def multiplied(weight: float, tau: Tensor | LowRank, dtype: torch.dtype) -> Tensor:
    """w tau, dense; the same operations as in ``total_matrix``, so that the sum of a single one is it to the bit."""
    if isinstance(tau, Tensor):
        return tau.mul(weight)
    return (tau.B.to(torch.float64) * (weight * tau.scaling)).to(dtype) @ tau.A.to(dtype)


def adam(gradient_at: Callable[[Tensor, Tensor], Tensor], point: Tensor, *, steps: int, lr: float) -> Tensor:
    """``point`` (contiguous) after so many steps of Adam (Kingma and Ba 2015, algorithm 1), in place.

    The second moment's bias correction stands in the learning rate and in epsilon, which saves a pass over the entries
    (section 2 of the paper; the same steps). torch.optim.Adam takes them too, but loads torch's compiler for it.

    Args:
        gradient_at: the gradient at a point, written into its second argument.
    """
    gradient, mean, square = (torch.zeros_like(point) for _ in range(3))
    scratch = point.new_empty(min(PIECE, point.numel()))
    pieces = list(zip(*(tensor.view(-1).split(PIECE) for tensor in (point, gradient, mean, square)), strict=True))
    first, second = BETAS
    for step in range(1, steps + 1):
        gradient_at(point, gradient)
        correction = math.sqrt(1 - second**step)
        epsilon, rate = EPSILON * correction, lr * correction / (1 - first**step)
        for x, g, m, v in pieces:
            root = scratch[: len(x)]
            m.lerp_(g, 1 - first)
            v.mul_(second).addcmul_(g, g, value=1 - second)
            torch.sqrt(v, out=root).add_(epsilon)
            x.addcdiv_(m, root, value=-rate)
    return point
