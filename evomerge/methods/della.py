"""DELLA: as DARE, but the larger an entry is within its row, the likelier it stays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from evomerge.errors import MethodError
from evomerge.methods import fused
from evomerge.methods.arithmetic import SCALE, TASK_WEIGHT
from evomerge.methods.base import LowRank, Method, SourceIterable, State, TensorInfo, arithmetic_dtype
from evomerge.methods.chunks import CHUNK
from evomerge.methods.election import MODE, NORMALIZE
from evomerge.methods.masks import MOST_BYTES, WORD, Mask
from evomerge.methods.random import uniform
from evomerge.methods.thinning import Election, Thinned, experts_in, merge_thinned, merge_vectors
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


def thin(base: Tensor, expert: Tensor, drawn: Tensor, density: float, epsilon: float, *, dtype: torch.dtype) -> Tensor:
    """tau_t with each entry zero, or divided by its probability to stay where the draw is below that.

    Args:
        base, expert: (rows, n).
        drawn: (rows, n), float32 on the CPU; compared in float32, whatever ``dtype`` the arithmetic is in.
    """
    if epsilon > 0 and dtype == torch.float32 and fused.kernels() is not None and fused.on_cpu(base):
        from evomerge.methods import rank_kernels

        theta_0, theta = fused.alike([base, expert], dtype)
        ladder = probability_ladder(base.shape[1], density, epsilon).to(dtype)
        tau = torch.empty(base.shape, dtype=dtype)
        rank_kernels.thin_rows(*map(fused.array, (theta_0, theta, ladder, drawn, tau)))
        return tau
    tau = torch.sub(expert, base.to(dtype))
    probabilities = keep_probabilities(tau, density, epsilon)
    keep = torch.lt(drawn.to(tau.device), probabilities.to(drawn.dtype))
    return tau.mul_(keep.to(tau)).div_(probabilities)


@dataclass(frozen=True)
class _Rows:
    """A tensor of the base and of the experts that count as rows, which are looked at a few at a time."""

    base: Tensor
    experts: Mapping[int, Tensor]
    dtype: torch.dtype

    @classmethod
    def of(cls, base: Tensor, experts: Mapping[int, Tensor], dtype: torch.dtype) -> _Rows:
        n = base.shape[-1] if base.dim() else 1
        return cls(base.reshape(-1, n), {t: expert.reshape(-1, n) for t, expert in experts.items()}, dtype)

    def blocks(self) -> Iterator[slice]:
        step = max(1, CHUNK // self.base.shape[1])
        return (slice(first, min(first + step, len(self.base))) for first in range(0, len(self.base), step))


@dataclass(frozen=True)
class _Chance:
    """Who stays: the draws of one seed, held against probabilities by rank."""

    seed: int
    density: float
    epsilon: float

    def thin(self, name: str, t: int, rows: _Rows, block: slice) -> Tensor:
        base = rows.base[block]
        drawn = uniform(self.seed, name, t, block.start * base.shape[1], base.numel()).view(base.shape)
        return thin(base, rows.experts[t][block], drawn, self.density, self.epsilon, dtype=rows.dtype)


@dataclass(frozen=True)
class _Stays:
    """What stays of one task vector, and the factor that restores its L1 norm."""

    mask: Mask
    factor: float

    def of(self, expert: Tensor, weight: float, piece: slice) -> Thinned:
        """For the flat ``piece`` of ``expert``, which starts at a whole word."""
        words = self.mask.words[piece.start // WORD : -(-piece.stop // WORD)]
        return Thinned(expert[piece], weight, Mask(words, piece.stop - piece.start), factor=self.factor)


@dataclass
class _Restored:
    """What stays where the L1 norm is restored: found once a tensor and expert and kept, as far as there is room.

    Keeping it changes no number; what is kept may be dropped at any time.
    """

    chance: _Chance
    _kept: dict[tuple[str, int], _Stays] = field(default_factory=dict, repr=False)
    kept_bytes: int = 0

    def stays(self, name: str, t: int, rows: _Rows) -> _Stays:
        found = self._kept.get((name, t))
        if found is None:
            found = self._find(name, t, rows)
            size = found.mask.words.nbytes
            if self.kept_bytes + size <= MOST_BYTES:
                self._kept[name, t] = found
                self.kept_bytes += size
        return found

    def _find(self, name: str, t: int, rows: _Rows) -> _Stays:
        keep = torch.empty(rows.base.shape, dtype=torch.bool)
        norm = kept = 0.0
        for block in rows.blocks():
            keep[block] = self.chance.thin(name, t, rows, block) != 0  # where tau is zero it does not matter
            tau = torch.sub(rows.experts[t][block], rows.base[block].to(rows.dtype)).abs_()
            norm += float(tau.sum(dtype=torch.float64))
            kept += float(tau.mul_(keep[block].to(tau)).sum(dtype=torch.float64))
        return _Stays(Mask.of(keep), norm / kept if kept else 1.0)


class _Della(Method):
    """Drop by rank and rescale: the part that DELLA's two methods share.

    A row is what runs along the last dimension; a vector is one row. Ranks go by magnitude, equal magnitudes by their
    place in the row. Each entry has a draw in float32 of its own (``random.uniform``): with epsilon 0 each is
    dropped with DARE's chance, but not the same ones as by DARE, whose masks are drawn as bits.
    """

    reference = "Deep et al. 2024, DELLA-Merging, arXiv:2406.11617, MagPrune"
    draws = True

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

    def prepare(
        self, sources: SourceIterable, statistics: Any = None, *, seed: int | None = None, **fixed: Any
    ) -> _Restored | None:
        """Room for what stays, for ``rescale`` l1 with nothing that varies; with probability the ranks are needed."""
        if seed is None or fixed.get("rescale") != "l1" or not {"density", "epsilon"} <= fixed.keys():
            return None
        return _Restored(_Chance(seed, fixed["density"], fixed["epsilon"]))

    def _merge(
        self,
        base: Tensor,
        experts: Sequence[Tensor],
        weights: Sequence[float],
        *,
        dtype: torch.dtype,
        info: TensorInfo,
        state: State | None,
        seed: int,
        params: Mapping[str, Any],
        election: Election | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """A few rows, or with ``rescale`` l1 a slice, at a time: nothing but the result is as large as the tensor."""
        chosen = dict(experts_in(base, experts, weights))
        if params["density"] == 1 or base.numel() == 0:
            parts = [Thinned(experts[t], weight) for t, weight in chosen.items()]
            return merge_thinned(base, parts, dtype=dtype, election=election, scale=scale)
        rows = _Rows.of(base, {t: experts[t] for t in chosen}, dtype)
        chance = _Chance(seed, params["density"], params["epsilon"])
        merged = torch.empty(rows.base.shape, dtype=dtype, device=base.device)
        if params["rescale"] == "probability":
            for block in rows.blocks():
                vectors = [(weight, chance.thin(info.name, t, rows, block)) for t, weight in chosen.items()]
                merged[block] = merge_vectors(rows.base[block], vectors, dtype=dtype, election=election, scale=scale)
            return merged.view(base.shape)
        restored = _restored(state, chance)
        stays = {t: restored.stays(info.name, t, rows) for t in chosen}
        theta_0, flat = rows.base.reshape(-1), {t: expert.reshape(-1) for t, expert in rows.experts.items()}
        for first in range(0, base.numel(), CHUNK):
            piece = slice(first, min(first + CHUNK, base.numel()))
            parts = [stays[t].of(flat[t], weight, piece) for t, weight in chosen.items()]
            merged.view(-1)[piece] = merge_thinned(theta_0[piece], parts, dtype=dtype, election=election, scale=scale)
        return merged.view(base.shape)

    def _thinned(
        self,
        base: Tensor,
        expert: Tensor,
        t: int,
        *,
        dtype: torch.dtype,
        info: TensorInfo,
        state: State | None,
        seed: int,
        params: Mapping[str, Any],
    ) -> Tensor:
        """What stays of one task vector, rescaled, in fresh memory. The tensor must be whole, and not empty."""
        rows = _Rows.of(base, {t: expert}, dtype)
        chance = _Chance(seed, params["density"], params["epsilon"])
        vector = torch.empty(rows.base.shape, dtype=dtype, device=base.device)
        if params["rescale"] == "probability":
            for block in rows.blocks():
                vector[block] = chance.thin(info.name, t, rows, block)
            return vector.view(base.shape)
        stays = _restored(state, chance).stays(info.name, t, rows)
        tau = torch.sub(rows.experts[t], rows.base.to(dtype), out=vector)
        return tau.mul_(stays.mask.values(tau)).mul_(stays.factor).view(base.shape)


def _restored(state: State | None, chance: _Chance) -> _Restored:
    """``state``, if it is about what is asked for."""
    return state if isinstance(state, _Restored) and state.chance == chance else _Restored(chance)


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
        scale: float,
        **params: Any,
    ) -> Tensor:
        scaled = [scale * weight for weight in weights]
        return self._merge(base, experts, scaled, dtype=dtype, info=info, state=state, seed=seed, params=params)

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
    ) -> Iterator[tuple[int, Tensor | LowRank]]:
        call = {"info": info, "state": state, "seed": seed, "params": params}
        if params["density"] == 1 or base.numel() == 0:
            yield from super().directions(base, experts, info=info, scale=scale, **params)
            return
        dtype = arithmetic_dtype(base, *experts)
        for t, expert in enumerate(experts):
            if expert is not base:
                vector = self._thinned(base, expert, t, dtype=dtype, **call)
                yield t, vector if scale == 1 else vector.mul_(scale)


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
        mode: str,
        normalize: bool,
        scale: float,
        **params: Any,
    ) -> Tensor:
        call = {"dtype": dtype, "info": info, "state": state, "seed": seed, "params": params, "scale": scale}
        return self._merge(base, experts, weights, election=Election(mode, normalize), **call)
