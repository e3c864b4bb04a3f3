"""RegMean: the weights whose outputs are closest to every expert's own, on the inputs that this expert sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from evomerge.errors import MethodError
from evomerge.methods.arithmetic import SCALE, task_vectors, weighted_sum
from evomerge.methods.base import SourceIterable, State, TensorInfo
from evomerge.methods.chunks import CHUNK
from evomerge.methods.matrices import ALL_MATRICES, MatrixMethod, num_kept
from evomerge.methods.statistics import Statistics
from evomerge.methods.weighted import NOT_NEGATIVE, missing_statistics
from evomerge.params import Param


class Regression(MatrixMethod):
    """W' = (sum_t w_t G_t)^-1 sum_t w_t G_t W_t', G_t = X_t' X_t / rows of the layer's inputs X_t, off-diagonals x rho.

    That is the least-squares fit to the outputs X_t W_t' of all experts. Solved for the distance from the weighted mean
    of the task vectors, in float64: what the inputs do not determine (a unit that never fires) stays the mean.
    Tensors without a Gram matrix (norms, biases, embeddings) are merged by that mean, sum w_t tau_t / sum w_t.
    """

    params: Mapping[str, Param] = MappingProxyType(
        {
            "rho": Param(
                float,
                0.9,
                "what multiplies the off-diagonal entries of the Gram matrices; the paper takes 0.9, and 0.1 for T5; 1 "
                "leaves them as they are, 0 weighs each input by itself",
                low=0.0,
                high=1.0,
            ),
            "matrices": ALL_MATRICES,
            "scale": SCALE,
        }
    )
    weight = NOT_NEGATIVE

    def prepare(self, sources: SourceIterable, statistics: Statistics | None = None, **fixed: Any) -> Statistics:
        if statistics is None:
            raise missing_statistics(self)
        return statistics

    def combine(self, base: Tensor, experts: Sequence[Any], *, weights: Sequence[float], **rest: Any) -> Tensor:
        """Raises MethodError without statistics, or if some experts lack a Gram matrix that others have."""
        if rest["state"] is None:
            raise missing_statistics(self)
        mean = math.fsum(weights) / max(1, num_kept(weights))
        shares = [weight / mean for weight in weights] if mean else weights  # the mean is then sum w tau / sum w
        return super().combine(base, experts, weights=shares, **rest)

    def combine_matrix(
        self,
        base: Tensor,
        experts: Sequence[Tensor],
        *,
        weights: Sequence[float],
        dtype: torch.dtype,
        info: TensorInfo,
        state: State | None,
        rho: float,
        **_: Any,
    ) -> Tensor | None:
        assert state is not None
        kept = [t for t, weight in enumerate(weights) if weight != 0]
        have = [t for t in kept if info.name in state[t]]
        if have and have != kept:
            raise MethodError(
                f"expert {next(t for t in kept if t not in have)} has no Gram matrix for {info.name}, but others have",
                remedy="Collect them for all experts in one go.",
            )
        if all(experts[t] is base for t in kept):
            return None
        shares = [weight / num_kept(weights) for weight in weights]
        solve = self._solver(base, [state[t][info.name] for t in have], [weights[t] for t in have], info, rho)
        result = torch.empty(base.shape, dtype=dtype, device=base.device)
        for rows in _row_blocks(info.shape, solve is not None):  # nothing else is as large as the tensor
            theta_0 = base[rows]
            parts = [theta_0 if expert is base else expert[rows] for expert in experts]
            vectors = {t: tau for t, _, tau in task_vectors(theta_0, parts, weights, dtype)}
            mean = weighted_sum((shares[t], tau.clone()) for t, tau in vectors.items())
            assert mean is not None
            if solve is not None:
                zero = torch.zeros_like(mean)  # of an expert that is the base
                right = torch.zeros(info.shape[1], len(mean), dtype=torch.float64, device=base.device)
                for t in kept:
                    G = self._gram(state[t][info.name], info, rho).to(base.device)
                    right.addmm_(G, (vectors.get(t, zero) - mean).T.double(), alpha=weights[t])
                mean += solve(right).T
            result[rows] = mean
        return result

    def _solver(
        self, base: Tensor, grams: Sequence[Tensor], weights: Sequence[float], info: TensorInfo, rho: float
    ) -> Callable[[Any], Tensor] | None:
        """B -> (sum_t w_t G_t)^-1 B; None without Gram matrices."""
        if not grams:
            return None
        total = base.new_zeros(info.shape[1], info.shape[1], dtype=torch.float64)
        for weight, gram in zip(weights, grams, strict=True):
            total.add_(self._gram(gram, info, rho).to(base.device), alpha=weight)
        return positive_solver(total, torch.finfo(grams[0].dtype).eps)

    def _gram(self, gram: Tensor, info: TensorInfo, rho: float) -> Tensor:
        """A copy in float64 with its off-diagonals scaled; MethodError if its shape is not (in, in)."""
        if tuple(gram.shape) != (info.shape[1],) * 2:
            raise MethodError(
                f"the Gram matrix of {info.name} is {tuple(gram.shape)}, but the layer has {info.shape[1]} inputs",
                remedy="Collect it again, from this base and these experts.",
            )
        diagonal = gram.diagonal().double()
        scaled = gram.double().mul(rho)
        scaled.diagonal().copy_(diagonal)
        return scaled


@final
class RegMean(Regression):
    """On the inputs that each layer has in each expert."""

    name = "regmean"
    summary = "weights of linear layers by least squares on the experts' inputs; the weighted mean elsewhere"
    reference = (
        "Jin et al. 2023, Dataless knowledge fusion by merging weights of language models, arXiv:2212.09849, "
        "equation 2 and section 4 (rho is its alpha)"
    )
    statistics = "gram"


@final
class RegMeanPP(Regression):
    """RegMean on the inputs that each layer has behind layers that are merged already.

    Its statistics were measured layer by layer while the model was being merged, at equal weights and one ``rho``: they
    are of that one merge, and not for a search.
    """

    name = "regmean_pp"
    summary = "as regmean, on the inputs that come out of the layers merged before"
    reference = "Nguyen et al. 2025, RegMean++, arXiv:2508.03121; order of the steps as in the authors' code"
    statistics = "gram_merged"

    def combine(self, base: Tensor, experts: Sequence[Any], *, weights: Sequence[float], **rest: Any) -> Tensor:
        """Raises MethodError without statistics, or for another ``rho`` than they were measured with."""
        for mapping in rest["state"] or ():
            if "rho" in mapping and not math.isclose(float(mapping["rho"]), rest["rho"]):
                raise MethodError(
                    f"method regmean_pp: rho is {rest['rho']:g}, but the statistics were measured with "
                    f"{float(mapping['rho']):g}",
                    remedy="Collect them with --rho, or give that rho.",
                )
        return super().combine(base, experts, weights=weights, **rest)


def _row_blocks(shape: tuple[int, ...], solved: bool) -> Iterator[slice]:
    """Blocks of rows: where something is ``solved``, so many that what is done once a block costs little beside it."""
    step = max(shape[1] if solved else 1, CHUNK // shape[1])
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def positive_solver(A: Tensor, eps: float) -> Callable[[Tensor], Tensor]:
    """B -> X with A X = B, for a symmetric, positive semidefinite A: (n, n) and B: (n, m) in its range; float64.

    By Cholesky where A is well enough conditioned for numbers of precision ``eps``, else the X of the least norm.

    Args:
        A: fresh memory, which is used up.
    """
    dead = A.diagonal() <= 0  # rows and columns of zeros: no equation at all, so that X is zero there
    A.diagonal()[dead] = 1.0
    L, failed = torch.linalg.cholesky_ex(A)
    pivots = L.diagonal().square()
    if not failed and pivots.min() > len(A) * eps * pivots.max():
        return lambda B: torch.cholesky_solve(B, L)
    values, vectors = torch.linalg.eigh(A)
    inverse = torch.where(values > len(A) * eps * values[-1], 1 / values, torch.zeros_like(values))
    return lambda B: vectors @ (inverse[:, None] * (vectors.T @ B))
