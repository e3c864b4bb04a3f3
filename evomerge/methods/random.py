"""Random draws keyed by (seed, tensor, expert, block): the same numbers on any device, thread count or chunking.

Numbers are drawn here; the bits of masks are drawn by ``masks.py`` from the streams that ``plane_seeds`` starts.

The streams are NumPy's SFC64 raw words, whose sequence NumPy keeps for good, started from a hash of the key. So
a recipe's masks stay the same when torch or NumPy is upgraded, and no two blocks share a stream.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from evomerge.methods import fused

BLOCK = 65536  # entries drawn from one stream; part of what a recipe's seed means, so it never changes
WARM_UP = 12  # words that are left out after a stream is started, until all bits of its seed are mixed


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


def plane_seeds(key: tuple, blocks: Iterable[int]) -> np.ndarray:
    """(blocks, 3) uint64: what the streams of bit planes of some blocks are started from, by ``seeded``.

    A hash of key and block fills SFC64's state but for the counter, which is 1, and WARM_UP words are left out: so its
    author starts it. NumPy's own seeding would cost as much as all of a block's bits. The key says what the streams
    are for, so that they are none of those above.
    """
    root = hashlib.blake2b(json.dumps((*key, "planes")).encode(), digest_size=24)
    digests = []
    for block in blocks:
        digest = root.copy()
        digest.update(block.to_bytes(8, "little"))
        digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64).reshape(-1, 3)


def seeded(words: np.ndarray) -> np.random.SFC64:
    """NumPy's generator, started from three words and warmed up."""
    generator = np.random.SFC64(0)
    state = np.array([*words, 1], dtype=np.uint64)
    generator.state = {"bit_generator": "SFC64", "state": {"state": state}, "has_uint32": 0, "uinteger": 0}
    generator.random_raw(WARM_UP)
    return generator


def _normal_block(key: tuple, size: int) -> Tensor:
    u = _uniform_block((*key, "normal"), BLOCK)  # Box-Muller pairs the two halves of a block: always the whole of it
    radius = torch.sqrt(-2 * torch.log1p(-u[: BLOCK // 2]))
    angle = u[BLOCK // 2 :] * (2 * math.pi)
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])[:size]
