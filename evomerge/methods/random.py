"""Random draws keyed by (seed, tensor, expert, block): the same numbers on any device, thread count or chunking.

The streams are NumPy's SFC64 raw words, whose sequence NumPy keeps for good, started from a 128-bit hash of the key. So
a recipe's masks stay the same when torch or NumPy is upgraded, and no two blocks share a stream.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from evomerge.methods import fused

BLOCK = 65536  # entries drawn from one stream; part of what a recipe's seed means, so it never changes


def uniform(seed: int, tensor_name: str, expert_index: int, start: int, count: int) -> Tensor:
    """``count`` uniform numbers in [0, 1) for the entries ``start`` .. ``start + count`` (row-major) of a tensor.

    Args:
        seed: the recipe's seed.
        tensor_name: the tensor's checkpoint name.
        expert_index: which expert, from 0.
        start: flat offset of the first entry.
        count: how many.

    Returns:
        (count,) float32 on the CPU, multiples of 2**-24.
    """
    return _by_blocks(_uniform_block, (seed, tensor_name, expert_index), start, count)


def normal(seed: int, tensor_name: str, expert_index: int, start: int, count: int) -> Tensor:
    """As ``uniform``, from the standard normal distribution (Box-Muller, so at most 5.8 in magnitude)."""
    return _by_blocks(_normal_block, (seed, tensor_name, expert_index), start, count)


def _by_blocks(draw: Callable[[tuple, int], Tensor], key: tuple, start: int, count: int) -> Tensor:
    """Entries ``start`` .. ``start + count`` of the blocks laid end to end."""
    out = torch.empty(count, dtype=torch.float32)
    done = 0
    while done < count:
        block, offset = divmod(start + done, BLOCK)
        size = min(BLOCK - offset, count - done)
        out[done : done + size] = draw((*key, block), offset + size)[offset:]
        done += size
    return out


def _uniform_block(key: tuple, size: int) -> Tensor:
    """The first ``size`` numbers of a block: a prefix of the stream, so that small tensors stay cheap."""
    kernels = fused.kernels()
    if kernels is not None:
        out = np.empty(size, dtype=np.float32)
        kernels.draw_uniform(stream(key), out)
        return torch.from_numpy(out)
    words = _generator(key).random_raw((size + 1) // 2)
    halves = words.astype("<u8", copy=False).view("<u4")[:size] >> np.uint32(8)
    return torch.from_numpy(np.multiply(halves, np.float32(2.0**-24), dtype=np.float32))


def _generator(key: tuple) -> np.random.SFC64:
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).digest()
    return np.random.SFC64(int.from_bytes(digest, "little"))


def stream(key: tuple) -> np.ndarray:
    """Where the stream of a block starts: the four words of SFC64's state, for the compiled loops."""
    return _generator(key).state["state"]["state"].copy()


def _normal_block(key: tuple, size: int) -> Tensor:
    u = _uniform_block((*key, "normal"), BLOCK)  # Box-Muller pairs the two halves of a block: always the whole of it
    radius = torch.sqrt(-2 * torch.log1p(-u[: BLOCK // 2]))
    angle = u[BLOCK // 2 :] * (2 * math.pi)
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])[:size]
