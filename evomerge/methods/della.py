"""DELLA: as DARE, but the larger an entry is within its row, the likelier it stays."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from evomerge.errors import MethodError
from evomerge.methods import fused
from evomerge.methods.arithmetic import SCALE, TASK_WEIGHT
from evomerge.methods.base import LowRank, Method, SourceIterable, State, TensorInfo, arithmetic_dtype
from evomerge.methods.chunks import CHUNK
from evomerge.methods.election import MODE, NORMALIZE
from evomerge.methods.masks import MOST_BYTES, WORD, Kept, Mask
from evomerge.methods.random import BLOCK, stream, uniform
from evomerge.methods.thinning import Election, Thinned, add_vectors, experts_in, merge_thinned
from evomerge.params import Param

LONGEST = 65535  # entries of a row whose ranks, and one number more, are 16 bits
PIECE = 4 * CHUNK  # entries looked at at once, about: the streams of draws begin every BLOCK, rows elsewhere
SORTED = 1 << 15  # entries sorted at once: their copies fit into half a core's second cache

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


def rank_rows(base: Tensor, expert: Tensor, *, dtype: torch.dtype) -> Tensor:
    """(rows, n): where each entry of tau_t stands in its row by magnitude, from 0; uint16 if that can hold n, too."""
    rows, n = base.shape
    if n <= LONGEST and dtype == torch.float32 and fused.kernels() is not None and fused.on_cpu(base, expert):
        from evomerge.methods import rank_kernels

        theta_0, theta = map(fused.array, fused.alike([base, expert], dtype))
        ranks, step = np.empty(rows * n, np.uint16), max(1, SORTED // n) * n
        room = np.empty((2, min(step, rows * n)), np.uint32)
        for start in range(0, rows * n, step):
            piece = slice(start, min(start + step, rows * n))
            magnitudes, packed = room[:, : piece.stop - piece.start]
            rank_kernels.pack_rows(theta_0[piece], theta[piece], n, magnitudes, packed)
            packed.reshape(-1, n).sort(axis=1)
            rank_kernels.rank_rows(magnitudes, packed, n, ranks[piece])
        return torch.from_numpy(ranks).view(rows, n)
    order = ascending(torch.sub(expert, base.to(dtype)).abs_()).cpu()
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(n).expand(rows, n))
    return ranks.to(torch.uint16) if n <= LONGEST else ranks


def drop(ranks: Tensor, ladder: Tensor, key: tuple[int, str, int], start: int) -> Tensor:
    """The ranks of the entries that stay, and n where one is dropped.

    Args:
        ranks: (rows, n), on the CPU.
        ladder: (n,) float64, the probability to stay of the smallest to the largest entry; rounded to float32 here.
        key: (seed, tensor's name, t), which the draws go by.
        start: flat offset of the first entry.
    """
    if ranks.dtype == torch.uint16 and fused.kernels() is not None:
        from evomerge.methods import rank_kernels

        # Draws are whole numbers of 2**-24: below p where they are below p 2**24, rounded up.
        limits = np.ceil(ladder.float().numpy().astype(np.float64) * 2**24).astype(np.uint32)
        flat, kept = ranks.numpy().reshape(-1), np.empty(ranks.shape, np.uint16)
        done = 0
        while done < len(flat):
            block, skipped = divmod(start + done, BLOCK)
            piece = slice(done, done + BLOCK - skipped)
            rank_kernels.drop_rows(stream((*key, block)), skipped, flat[piece], limits, kept.reshape(-1)[piece])
            done = piece.stop
        return torch.from_numpy(kept)
    drawn = uniform(*key, start, ranks.numel()).view(ranks.shape)
    index = ranks.to(torch.int64)
    return index.masked_fill_(drawn >= ladder.float()[index], len(ladder)).to(ranks.dtype)


def _divisors(ladder: Tensor, dtype: torch.dtype) -> Tensor:
    """(n + 1,): p, and infinity for what was dropped: tau_t over that has the sign of 0 tau_t, and is NaN like it."""
    return torch.cat([ladder, torch.tensor([math.inf], dtype=torch.float64)]).to(dtype)


def rescaled(base: Tensor, expert: Tensor, ranks: Tensor, divisors: Tensor) -> Tensor:
    """(rows, n): what stays of tau_t, divided by its probability, in the type of ``divisors``."""
    tau = torch.sub(expert, base.to(divisors.dtype))
    return tau.div_(divisors[ranks.to(torch.int64)].to(base.device))


def merge_ranked(
    base: Tensor,
    parts: Sequence[tuple[float, Tensor, Tensor]],
    ladder: Tensor,
    *,
    dtype: torch.dtype,
    election: Election | None = None,
    scale: float = 1.0,
) -> Tensor:
    """theta_0 + scale x the sum of the w_t tau_t / p, or with an ``election`` what TIES makes of them.

    Args:
        base: (rows, n).
        parts: (w_t, theta_t, ranks) of each expert; ``ranks`` as ``drop`` returns them.
        ladder: (n,) float64, p by rank.
    """
    divisors = _divisors(ladder, dtype)
    ranks = [rank for _, _, rank in parts]
    narrow = dtype == torch.float32 and all(rank.dtype == torch.uint16 for rank in ranks)
    if fused.kernels() is None or not parts or scale == 0 or not narrow or not fused.on_cpu(base):
        vectors = ((weight, rescaled(base, expert, rank, divisors)) for weight, expert, rank in parts)
        return add_vectors(base, vectors, dtype=dtype, election=election, scale=scale)
    from evomerge.methods import rank_kernels

    theta_0, *experts = fused.alike([base, *(expert for _, expert, _ in parts)], dtype)
    merged = torch.empty(base.shape, dtype=dtype)
    out = fused.array(merged)
    rank_kernels.merge_ranked(
        fused.array(theta_0),
        fused.addresses(experts),
        fused.addresses(ranks),
        fused.array(divisors),
        fused.scalars([weight for weight, _, _ in parts], out),
        election is not None,
        election is not None and election.mode == "mean",
        election is not None and election.normalize,
        out.dtype.type(scale),
        out,
    )
    return merged


@dataclass(frozen=True)
class _Rows:
    """A tensor of the base and of the experts that count as rows, which are looked at a few at a time."""

    name: str
    base: Tensor
    experts: Mapping[int, Tensor]
    dtype: torch.dtype

    @classmethod
    def of(cls, name: str, base: Tensor, experts: Mapping[int, Tensor], dtype: torch.dtype) -> _Rows:
        n = base.shape[-1] if base.dim() else 1
        return cls(name, base.reshape(-1, n), {t: expert.reshape(-1, n) for t, expert in experts.items()}, dtype)

    def blocks(self) -> Iterator[slice]:
        step = max(1, PIECE // self.base.shape[1])
        return (slice(first, min(first + step, len(self.base))) for first in range(0, len(self.base), step))


@dataclass(frozen=True)
class _Chance:
    """Who stays: the draws of one seed, held against probabilities by rank."""

    seed: int
    density: float
    epsilon: float

    def ladder(self, n: int) -> Tensor:
        return probability_ladder(n, self.density, self.epsilon)


@dataclass
class _Ranks(Kept):
    """Ranks of entries in their rows, by tensor, expert and block of rows: 16 bits an entry. Rows too long for that are
    not kept.

    Attributes:
        chance: where no candidate changes it, what is kept says who was dropped, too; else that is drawn each time.
    """

    chance: _Chance | None

    def find(self, chance: _Chance, ladder: Tensor, rows: _Rows, t: int, block: slice) -> Tensor:
        """(rows, n), as ``drop`` returns them. ``chance`` must be that of ``self``, if it has one."""

        def ranked() -> Tensor:
            return rank_rows(rows.base[block], rows.experts[t][block], dtype=rows.dtype)

        def dropped(ranks: Tensor) -> Tensor:
            return drop(ranks, ladder, (chance.seed, rows.name, t), block.start * rows.base.shape[1])

        def size(ranks: Tensor) -> float:
            return ranks.nbytes if ranks.dtype == torch.uint16 else math.inf

        key = rows.name, t, block.start
        if self.chance is None:
            return dropped(self._find(key, ranked, size))
        return self._find(key, lambda: dropped(ranked()), size)


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
class _Restored(Kept):
    """What stays where the L1 norm is restored, by tensor and expert."""

    chance: _Chance

    def find(self, ladder: Tensor, rows: _Rows, t: int, ranks: _Ranks) -> _Stays:
        return self._find(
            (rows.name, t), lambda: self._stays(ladder, rows, t, ranks), lambda found: found.mask.words.nbytes
        )

    def _stays(self, ladder: Tensor, rows: _Rows, t: int, ranks: _Ranks) -> _Stays:
        keep = torch.empty(rows.base.shape, dtype=torch.bool)
        norm = kept = 0.0
        for block in rows.blocks():
            keep[block] = ranks.find(self.chance, ladder, rows, t, block).to(torch.int32) != len(ladder)
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
    kept_bits = 16  # a rank

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
    ) -> _Ranks | _Restored | None:
        """Room for what all candidates share, which is found when it is needed.

        Where they share the chances, too, that is what stays: as ranks, or for ``rescale`` l1 as bits. Else ranks.
        """
        if seed is None or fixed.get("density") == 1:
            return None
        chance = _Chance(seed, fixed["density"], fixed["epsilon"]) if {"density", "epsilon"} <= fixed.keys() else None
        if chance is not None and fixed.get("rescale") == "l1":
            return _Restored(chance, room=MOST_BYTES)
        return _Ranks(chance, room=MOST_BYTES)

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
        rows = _Rows.of(info.name, base, {t: experts[t] for t in chosen}, dtype)
        chance = _Chance(seed, params["density"], params["epsilon"])
        ladder = chance.ladder(rows.base.shape[1])
        ranks = _ranks(state, chance)
        merged = torch.empty(rows.base.shape, dtype=dtype, device=base.device)
        options: dict[str, Any] = {"dtype": dtype, "election": election, "scale": scale}
        if params["rescale"] == "probability":
            for block in rows.blocks():
                parts = [
                    (weight, rows.experts[t][block], ranks.find(chance, ladder, rows, t, block))
                    for t, weight in chosen.items()
                ]
                merged[block] = merge_ranked(rows.base[block], parts, ladder, **options)
            return merged.view(base.shape)
        restored = _restored(state, chance)
        stays = {t: restored.find(ladder, rows, t, ranks) for t in chosen}
        theta_0, flat = rows.base.reshape(-1), {t: expert.reshape(-1) for t, expert in rows.experts.items()}
        for first in range(0, base.numel(), CHUNK):
            piece = slice(first, min(first + CHUNK, base.numel()))
            parts = [stays[t].of(flat[t], weight, piece) for t, weight in chosen.items()]
            merged.view(-1)[piece] = merge_thinned(theta_0[piece], parts, **options)
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
        rows = _Rows.of(info.name, base, {t: expert}, dtype)
        chance = _Chance(seed, params["density"], params["epsilon"])
        ladder, ranks = chance.ladder(rows.base.shape[1]), _ranks(state, chance)
        vector = torch.empty(rows.base.shape, dtype=dtype, device=base.device)
        if params["rescale"] == "probability":
            divisors = _divisors(ladder, dtype)
            for block in rows.blocks():
                found = ranks.find(chance, ladder, rows, t, block)
                vector[block] = rescaled(rows.base[block], rows.experts[t][block], found, divisors)
            return vector.view(base.shape)
        stays = _restored(state, chance).find(ladder, rows, t, ranks)
        tau = torch.sub(rows.experts[t], rows.base.to(dtype), out=vector)
        return tau.mul_(stays.mask.values(tau)).mul_(stays.factor).view(base.shape)


def _ranks(state: State | None, chance: _Chance) -> _Ranks:
    """``state``, if it is about what is asked for; else what keeps nothing."""
    return state if isinstance(state, _Ranks) and state.chance in (None, chance) else _Ranks(chance, room=0)


def _restored(state: State | None, chance: _Chance) -> _Restored:
    return state if isinstance(state, _Restored) and state.chance == chance else _Restored(chance, room=0)


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
