"""DELLA: as DARE, but the larger an entry is within its row, the likelier it stays."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from evomerge.errors import MethodError
from evomerge.methods.arithmetic import SCALE, TASK_WEIGHT, add_to_base, task_vectors, weighted_sum
from evomerge.methods.base import Method, State, TensorInfo
from evomerge.methods.chunks import CHUNK
from evomerge.methods.election import MODE, NORMALIZE, elect_and_merge
from evomerge.methods.random import uniform
from evomerge.params import Param

DENSITY = Param(
    float, 0.5, "mean probability with which an entry of a task vector is kept; 1 drops nothing", 0, 1, low_open=True
)
EPSILON = Param(
    float,
    0.1,
    "half the range of the probabilities: the smallest entry of a row stays with density - epsilon, the largest with "
    "density + epsilon; both must lie in (0, 1]",
    0,
    0.5,
)
RESCALE = Param(
    str,
    "probability",
    "probability: divide each entry that is kept by its own probability (keeps the expectation); l1: restore the L1 "
    "norm of the task vector, tensor by tensor",
    choices=("probability", "l1"),
)


def probability_ladder(n: int, density: float, epsilon: float) -> Tensor:
    """(n,) float64: the probability to stay of the smallest to the largest entry of a row, in equal steps."""
    if n == 1:
        return torch.full((1,), density, dtype=torch.float64)
    steps = torch.arange(n, dtype=torch.float64).mul_(2 * epsilon / (n - 1))
    return steps.add_(density - epsilon).clamp_(max=1)


def ascending(magnitudes: Tensor) -> Tensor:
    """(rows, n) -> (rows, n) int64: where the smallest to the largest entry of each row are; of equals the first."""
    if magnitudes.dtype != torch.float32 or magnitudes.device.type != "cpu":
        return magnitudes.argsort(dim=1, stable=True)
    # Bit patterns order like the magnitudes. With the place below them one sort of whole numbers does, which NumPy has
    # in vector instructions: three times as fast as an argsort.
    keys = magnitudes.view(torch.int32).to(torch.int64).bitwise_left_shift_(32)
    keys.add_(torch.arange(magnitudes.shape[1]))
    keys.numpy().sort(axis=1)
    return keys.bitwise_and_(0xFFFFFFFF)


def keep_probabilities(tau: Tensor, density: float, epsilon: float) -> Tensor:
    """(rows, n) -> the probability of each entry to stay, by the rank of its magnitude in its row."""
    if epsilon == 0:
        return torch.full_like(tau, density)
    ladder = probability_ladder(tau.shape[1], density, epsilon).to(tau)
    return torch.empty_like(tau).scatter_(1, ascending(tau.abs()), ladder.expand(tau.shape))


@dataclass(frozen=True)
class _Rows:
    """A tensor as rows, of the base (``matrix``) and the experts, of which a block of a few is looked at at a time."""

    matrix: Tensor
    experts: Sequence[Tensor]
    weights: Sequence[float]
    dtype: torch.dtype

    @classmethod
    def of(cls, base: Tensor, experts: Sequence[Tensor], weights: Sequence[float], dtype: torch.dtype) -> _Rows:
        n = base.shape[-1] if base.dim() else 1
        matrix = base.reshape(-1, n)
        rows = [matrix if expert is base else expert.reshape(-1, n) for expert in experts]
        return cls(matrix, rows, weights, dtype)

    def blocks(self) -> Iterator[slice]:
        step = max(1, CHUNK // self.matrix.shape[1])
        return (slice(first, first + step) for first in range(0, len(self.matrix), step))

    def task_vectors(self, block: slice) -> Iterator[tuple[int, float, Tensor]]:
        """(t, w_t, tau_t) of some rows, as ``arithmetic.task_vectors``."""
        base = self.matrix[block]
        experts = [base if expert is self.matrix else expert[block] for expert in self.experts]
        return task_vectors(base, experts, self.weights, self.dtype)


@dataclass(frozen=True)
class _Chance:
    """Who stays: the draws of one recipe for one tensor, held against probabilities by rank."""

    density: float
    epsilon: float
    seed: int
    name: str

    def keep(self, t: int, block: slice, tau: Tensor) -> tuple[Tensor, Tensor]:
        """(1 for what stays of tau_t and 0 for what does not, the probabilities to stay) of some rows."""
        probabilities = keep_probabilities(tau, self.density, self.epsilon)
        drawn = uniform(self.seed, self.name, t, block.start * tau.shape[1], tau.numel()).view(tau.shape).to(tau.device)
        # In float32 whatever the arithmetic is in, as the draws are; and no boolean mask, which is slow.
        return torch.lt(drawn, probabilities.to(drawn), out=drawn).to(tau), probabilities


@dataclass(frozen=True)
class _Stays:
    """What stays of one task vector, a bit an entry, and the factor that restores its L1 norm."""

    bits: list[np.ndarray]  # one a block
    factor: float

    def apply(self, tau: Tensor, block: int) -> Tensor:
        keep = torch.from_numpy(np.unpackbits(self.bits[block], count=tau.numel())).view(tau.shape)
        return tau.mul_(keep.to(tau)).mul_(self.factor)


def _restoring_l1(rows: _Rows, chance: _Chance) -> dict[int, _Stays]:
    """What stays of each task vector: found before anything is merged, since the norm takes the whole tensor."""
    bits: dict[int, list[np.ndarray]] = {}
    norms: dict[int, list[float]] = {}
    for block in rows.blocks():
        for t, _, tau in rows.task_vectors(block):
            keep, _ = chance.keep(t, block, tau)
            bits.setdefault(t, []).append(np.packbits(keep.cpu().numpy() != 0))
            norm = norms.setdefault(t, [0.0, 0.0])
            norm[0] += float(tau.abs_().sum(dtype=torch.float64))
            norm[1] += float(tau.mul_(keep).sum(dtype=torch.float64))
    return {t: _Stays(found, norms[t][0] / norms[t][1] if norms[t][1] else 1.0) for t, found in bits.items()}


class _Della(Method):
    """Drop by rank and rescale: the part that DELLA's two methods share.

    A row is what runs along the last dimension; a vector is one row. Ranks go by magnitude, equal magnitudes by their
    place in the row. Draws are DARE's, so that epsilon 0 drops what DARE drops.
    """

    reference = "Deep et al. 2024, DELLA-Merging, arXiv:2406.11617, section 3 (MagPrune)"

    def check_together(self, params: Mapping[str, Any]) -> None:
        density, epsilon = params["density"], params["epsilon"]
        if density < 1 and not (density - epsilon > 0 and density + epsilon <= 1 + 1e-9):
            raise MethodError(
                f"method {self.name}: density - epsilon must be above 0 and density + epsilon at most 1, but density "
                f"is {density} and epsilon {epsilon}",
                remedy="Lower epsilon, or move density away from 0 or 1.",
            )

    def chunked_with(self, state: State | None, **params: Any) -> bool:
        """False, since ranks need whole rows, unless nothing is dropped."""
        return params.get("density", self.params["density"].default) == 1

    @abstractmethod
    def _join(
        self, base: Tensor, vectors: Iterable[tuple[float, Tensor]], dtype: torch.dtype, params: Mapping[str, Any]
    ) -> Tensor:
        """theta_0 and (w_t, what was made of tau_t) as the merged tensor."""

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
        **params: Any,
    ) -> Tensor:
        """A few whole rows at a time: besides the result nothing is as large as the tensor.

        With ``rescale`` l1 a first round finds what stays, and keeps a bit an entry and expert.
        """
        if params["density"] == 1 or base.numel() == 0:
            vectors = ((weight, tau) for _, weight, tau in task_vectors(base, experts, weights, dtype))
            return self._join(base, vectors, dtype, params)
        rows = _Rows.of(base, experts, weights, dtype)
        chance = _Chance(params["density"], params["epsilon"], seed, info.name)
        stays = _restoring_l1(rows, chance) if params["rescale"] == "l1" else None

        def dropped(i: int, block: slice) -> Iterator[tuple[float, Tensor]]:
            for t, weight, tau in rows.task_vectors(block):
                if stays is not None:
                    yield weight, stays[t].apply(tau, i)
                else:
                    keep, probabilities = chance.keep(t, block, tau)
                    yield weight, tau.mul_(keep).div_(probabilities)

        merged = torch.empty(rows.matrix.shape, dtype=dtype, device=base.device)
        for i, block in enumerate(rows.blocks()):
            merged[block] = self._join(rows.matrix[block], dropped(i, block), dtype, params)
        return merged.view(base.shape)


@final
class DellaLinear(_Della):
    """Task arithmetic on task vectors that were thinned out by rank and rescaled."""

    name = "della_linear"
    summary = "drop entries of the task vectors at random, small ones sooner, rescale the rest, then task arithmetic"
    params: Mapping[str, Param] = MappingProxyType(
        {"density": DENSITY, "epsilon": EPSILON, "rescale": RESCALE, "scale": SCALE}
    )
    weight = TASK_WEIGHT

    def is_linear(self, **params: Any) -> bool:
        return True

    def task_coefficients(self, weights: Sequence[float], **params: Any) -> list[float] | None:
        """Where nothing is dropped."""
        return [params["scale"] * weight for weight in weights] if params["density"] == 1 else None

    def _join(
        self, base: Tensor, vectors: Iterable[tuple[float, Tensor]], dtype: torch.dtype, params: Mapping[str, Any]
    ) -> Tensor:
        scale = params["scale"]
        return add_to_base(base, weighted_sum((scale * weight, tau) for weight, tau in vectors), dtype)


@final
class Della(_Della):
    """TIES' sign election and merging, on task vectors that were thinned out by rank and rescaled."""

    name = "della"
    summary = "drop entries of the task vectors at random, small ones sooner, rescale the rest, then elect signs"
    params: Mapping[str, Param] = MappingProxyType(
        {
            "density": DENSITY,
            "epsilon": EPSILON,
            "mode": MODE,
            "normalize": NORMALIZE,
            "rescale": RESCALE,
            "scale": SCALE,
        }
    )

    def _join(
        self, base: Tensor, vectors: Iterable[tuple[float, Tensor]], dtype: torch.dtype, params: Mapping[str, Any]
    ) -> Tensor:
        merged = elect_and_merge(vectors, mode=params["mode"], normalize=params["normalize"])
        return add_to_base(base, merged, dtype, scale=params["scale"])
