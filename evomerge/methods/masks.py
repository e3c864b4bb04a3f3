"""Random masks as bits: which entries of a task vector stay. Drawn, and kept between the candidates of a search."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from evomerge.methods import fused
from evomerge.methods.random import BLOCK, WARM_UP, plane_seeds, seeded

T = TypeVar("T")

MOST_BYTES = 1 << 30  # of what a method keeps in a worker; what is beyond is found anew for every candidate
WORD = 32
PLANES = 53  # binary digits of the number that is compared with a density: a float64 in [0.5, 1) has no more
PLANE_WORD = 64
PLANE_SIZE = BLOCK // PLANE_WORD  # words of one plane of a block


@dataclass(frozen=True)
class Mask:
    """One bit an entry, the first in the lowest bit of the first word; ``words``: int32, on the CPU."""

    words: Tensor
    count: int

    def values(self, like: Tensor) -> Tensor:
        """1 and 0 in the type, in the shape and on the device of ``like``."""
        if like.device.type == "cpu":
            bits = np.unpackbits(self.words.numpy().view(np.uint8), count=self.count, bitorder="little")
            return torch.from_numpy(bits).view(like.shape).to(like.dtype)
        shifts = torch.arange(WORD, dtype=torch.int32, device=like.device)
        bits = (self.words.to(like.device)[:, None] >> shifts & 1).view(-1)[: self.count]
        return bits.view(like.shape).to(like.dtype)

    @classmethod
    def of(cls, keep: Tensor) -> Mask:
        """The mask of what is not zero in ``keep``, read flat."""
        packed = np.packbits(keep.reshape(-1).numpy() != 0, bitorder="little")
        packed = np.concatenate([packed, np.zeros(-len(packed) % 4, np.uint8)])
        return cls(torch.from_numpy(packed.view(np.int32)), keep.numel())


def draw_mask(seed: int, tensor_name: str, expert_index: int, start: int, count: int, density: float) -> Mask:
    """Which of the entries ``start`` .. ``start + count`` (row-major) of a tensor stay: each with chance ``density``.

    Entry i has one uniform number u_i in [0, 1), a multiple of 2**-53, and stays where u_i < ``density``: a function
    of its place, whatever is drawn with it, and what stays at one density stays at every higher one. The numbers are
    drawn in bit planes: the stream of a block of BLOCK entries gives the first binary digit of all their numbers, 64 to
    a word, the first in the lowest bit; then the second digit of all; and so on. To compare with a density takes no
    more planes than the density has digits (one for 0.5), nor than it takes to tell all numbers apart from it: about 17
    of 53 for a block, where a float an entry takes 32 bits. All digits of a block are words of one stream, none used
    twice, and blocks, experts, tensors and seeds have streams of their own, so that nothing is correlated that SFC64
    does not correlate. A plane is drawn whole where a small tensor needs a part of it: microseconds.

    Args:
        seed, tensor_name, expert_index: what the streams are keyed by, as in ``random.uniform``.
        density: in (0, 1].
    """
    first, last = start // PLANE_WORD, -(-(start + count) // PLANE_WORD)
    words = np.empty(last - first, dtype=np.uint64)
    blocks = range(first // PLANE_SIZE, -(-last // PLANE_SIZE))
    seeds = plane_seeds((seed, tensor_name, expert_index), blocks)
    _draw_words(seeds, math.ceil(density * 2**PLANES), first % PLANE_SIZE, words)
    bits = words.astype("<u8", copy=False).view(np.uint8)
    if start % PLANE_WORD:
        skipped = start % PLANE_WORD
        bits = np.packbits(np.unpackbits(bits, bitorder="little")[skipped : skipped + count], bitorder="little")
        bits = np.concatenate([bits, np.zeros(-len(bits) % 4, np.uint8)])
    elif count % PLANE_WORD:
        words[-1] &= np.uint64((1 << count % PLANE_WORD) - 1)
    return Mask(torch.from_numpy(bits.view(np.int32)[: -(-count // WORD)]), count)


def _draw_words(seeds: np.ndarray, limit: int, offset: int, out: np.ndarray) -> None:
    """Bit k of word j of ``out``: is the number of entry 64 (offset + j) + k, times 2**53, below ``limit``?

    Args:
        seeds: (blocks, 3) uint64, of the streams, the first of that block in which entry 0 lies.
        out: uint64; it ends in the last of the blocks.
    """
    kernels = fused.kernels()
    if limit == 2**PLANES:
        out.fill(2**64 - 1)
    elif kernels is not None:
        kernels.draw_below(seeds, WARM_UP, np.uint64(limit), PLANES, PLANE_SIZE, offset, out)
    else:
        for block, seed in enumerate(seeds):
            inside = slice(max(0, offset - block * PLANE_SIZE), PLANE_SIZE)
            place = block * PLANE_SIZE + inside.start - offset
            part = out[place : place + PLANE_SIZE - inside.start]
            _draw_block(seeded(seed), limit, inside, part)


def _draw_block(generator: np.random.SFC64, limit: int, inside: slice, out: np.ndarray) -> None:
    out.fill(0)
    equal = np.full_like(out, 2**64 - 1)  # where all digits so far are those of the limit
    for plane in range(PLANES - 1, -1, -1):
        if limit % (1 << plane + 1) == 0 or not equal.any():
            return  # no digit of the limit is left, so that what equals it is not below it; or all is decided
        digits = generator.random_raw(PLANE_SIZE)[inside][: len(out)]
        if limit >> plane & 1:
            out |= equal & ~digits
            equal &= digits
        else:
            equal &= ~digits


@dataclass
class Kept:
    """What is found once and kept, as far as there is room. Keeping it changes no number; any of it may be dropped.

    Attributes:
        room: bytes.
    """

    room: int = field(default_factory=lambda: MOST_BYTES, kw_only=True)
    kept_bytes: int = field(default=0, kw_only=True)
    _kept: dict[Any, Any] = field(default_factory=dict, kw_only=True, repr=False)

    def _find(self, key: Any, find: Callable[[], T], size: Callable[[T], float]) -> T:
        """What ``find`` gives, from before if it was kept. Of ``size`` infinity it never is."""
        if key in self._kept:
            return self._kept[key]
        found = find()
        if self.kept_bytes + size(found) <= self.room:
            self._kept[key] = found
            self.kept_bytes += int(size(found))
        return found


@dataclass
class Masks(Kept):
    """The masks of one seed and density."""

    seed: int
    density: float

    def draw(self, tensor_name: str, expert_index: int, start: int, count: int) -> Mask:
        """As ``draw_mask``."""
        key = (tensor_name, expert_index, start, count)
        return self._find(key, lambda: draw_mask(self.seed, *key, self.density), lambda mask: mask.words.nbytes)
