"""Random masks as bits: which entries of a task vector stay. Drawn, and kept between the candidates of a search."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from evomerge.methods import fused
from evomerge.methods.random import BLOCK, stream, uniform

MOST_BYTES = 1 << 30  # of the masks that a worker keeps; what is beyond is drawn anew for every candidate
WORD = 32


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
    """The entries whose ``random.uniform`` number is below ``density`` (as float32)."""
    kernels = fused.kernels()
    if kernels is None or start % WORD:
        return Mask.of(uniform(seed, tensor_name, expert_index, start, count) < density)
    limit = np.uint32(math.ceil(float(np.float32(density)) * 2**24))
    words = np.empty(-(-count // WORD), dtype=np.uint32)
    done = 0
    while done < count:
        block, offset = divmod(start + done, BLOCK)
        size = min(BLOCK - offset, count - done)
        state = stream((seed, tensor_name, expert_index, block))
        if offset:
            drawn = np.empty(-(-(offset + size) // WORD), dtype=np.uint32)
            kernels.draw_bits(state, limit, offset + size, drawn)
            words[done // WORD :][: -(-size // WORD)] = drawn[offset // WORD :]
        else:
            kernels.draw_bits(state, limit, size, words[done // WORD :][: -(-size // WORD)])
        done += size
    return Mask(torch.from_numpy(words.view(np.int32)), count)


@dataclass
class Masks:
    """The masks of one seed and density: each is drawn once and kept, as long as they fit into MOST_BYTES.

    Keeping them changes no number; what is kept may be dropped at any time.
    """

    seed: int
    density: float
    _kept: dict[tuple[str, int, int, int], Mask] = field(default_factory=dict, repr=False)
    kept_bytes: int = 0

    def draw(self, tensor_name: str, expert_index: int, start: int, count: int) -> Mask:
        """As ``draw_mask``."""
        key = (tensor_name, expert_index, start, count)
        if key not in self._kept:
            mask = draw_mask(self.seed, tensor_name, expert_index, start, count, self.density)
            if self.kept_bytes + mask.words.nbytes > MOST_BYTES:
                return mask
            self._kept[key] = mask
            self.kept_bytes += mask.words.nbytes
        return self._kept[key]
