"""Random masks: the documented bit planes, the same for slices, nested in the density, as random as they should be."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.methods import fused
from evomerge.methods.masks import draw_mask
from evomerge.methods.random import BLOCK

TINY = 2.0**-24
Key = tuple[int, str, int]


def documented_numbers(seed: int, name: str, expert: int, start: int, count: int) -> np.ndarray:
    """u_i in float64, put together from all 53 planes as masks.py and random.py state them; small slices only."""
    numbers = []
    for i_block in range(start // BLOCK, -(-(start + count) // BLOCK)):
        text = json.dumps([seed, name, expert, "planes"]).encode() + i_block.to_bytes(8, "little")
        digest = hashlib.blake2b(text, digest_size=24).digest()
        generator = np.random.SFC64()
        state = np.array([*np.frombuffer(digest, "<u8"), 1], np.uint64)
        generator.state = {"bit_generator": "SFC64", "state": {"state": state}, "has_uint32": 0, "uinteger": 0}
        generator.random_raw(12)
        first, last = max(0, start - i_block * BLOCK), min(BLOCK, start + count - i_block * BLOCK)
        place = np.arange(first, last)
        u = np.zeros(len(place))
        for digit in range(1, 54):
            plane = generator.random_raw(BLOCK // 64)
            u += (plane[place // 64] >> (place % 64).astype(np.uint64) & np.uint64(1)) * 2.0**-digit
        numbers.append(u)
    return np.concatenate([*numbers, np.empty(0)])


def documented_mask(seed: int, name: str, expert: int, count: int, density: float) -> np.ndarray:
    """(count,) bool: which of a tensor's entries stay."""
    return documented_numbers(seed, name, expert, 0, count) < density


def kept(key: Key, start: int, count: int, density: float) -> np.ndarray:
    return draw_mask(*key, start, count, density).values(torch.empty(count)).numpy() == 1


keys = st.tuples(st.integers(0, 2**63), st.text(), st.integers(0, 20))
places = st.one_of(st.integers(0, 200), st.integers(BLOCK - 200, BLOCK + 200), st.integers(0, 3 * BLOCK))
densities = st.one_of(st.sampled_from([1e-300, TINY, 0.25, 0.5, 0.75, 1 - TINY, 1 - 2.0**-53, 1.0]), st.floats(1e-6, 1))


@given(keys, places, st.integers(0, 700), densities, st.booleans())
def test_masks_are_the_documented_ones(key: Key, start: int, count: int, density: float, compiled: bool):
    with nullcontext() if compiled else fused.plain():
        mask = draw_mask(*key, start, count, density)
    assert mask.count == count and len(mask.words) == -(-count // 32)
    bits = np.unpackbits(mask.words.numpy().view(np.uint8), bitorder="little")
    assert np.array_equal(bits[:count], documented_numbers(*key, start, count) < density)
    assert not bits[count:].any()


@pytest.mark.skipif(fused.kernels() is None, reason="numba is not installed, or no fused multiply-add")
@given(keys, places, st.sampled_from([0, 1, 63, 64, 65, 4096, BLOCK, 2 * BLOCK + 5]), densities)
@settings(max_examples=60)
def test_compiled_and_plain_code_draw_the_same_bits(key: Key, start: int, count: int, density: float):
    with fused.plain():
        expected = draw_mask(*key, start, count, density)
    assert torch.equal(draw_mask(*key, start, count, density).words, expected.words)


@given(keys, st.lists(places, min_size=2, max_size=6).map(sorted), densities)
@settings(max_examples=40)
def test_slices_are_parts_of_the_whole(key: Key, cuts: list[int], density: float):
    whole = kept(key, 0, cuts[-1], density)
    for start, stop in reversed(list(pairwise(cuts))):
        assert np.array_equal(kept(key, start, stop - start, density), whole[start:stop])


@given(keys, places, st.integers(1, 2 * BLOCK), densities, densities)
@settings(max_examples=40)
def test_what_stays_at_one_density_stays_at_a_higher_one(key: Key, start: int, count: int, one: float, other: float):
    low, high = (kept(key, start, count, density) for density in sorted((one, other)))
    assert not (low & ~high).any()


def test_thread_count_does_not_matter():
    threads = torch.get_num_threads()
    one = kept((1, "w", 0), 0, 3 * BLOCK, 0.3)
    try:
        torch.set_num_threads(2)
        assert np.array_equal(kept((1, "w", 0), 0, 3 * BLOCK, 0.3), one)
    finally:
        torch.set_num_threads(threads)


def test_known_first_bits():
    """Pinned, since stored recipes rely on it: another NumPy must not give every DARE recipe another mask.

    Made with hashlib and SFC64 written out in Python's whole numbers, for seed 0, tensor w, expert 0: the first plane.
    """
    key, mask = json.dumps([0, "w", 0, "planes"]).encode() + bytes(8), 2**64 - 1
    digest = hashlib.blake2b(key, digest_size=24).digest()
    a, b, c, counter = (*(int.from_bytes(digest[k : k + 8], "little") for k in (0, 8, 16)), 1)
    words = []
    for _ in range(14):
        words.append((a + b + counter) & mask)
        counter += 1
        a, b, c = b ^ b >> 11, (c + (c << 3)) & mask, ((c << 24 | c >> 40) + words[-1]) & mask
    bits = [not words[12 + i // 64] >> i % 64 & 1 for i in range(128)]  # below 0.5 where the first digit is 0
    assert kept((0, "w", 0), 0, 128, 0.5).tolist() == bits
    assert np.packbits(bits, bitorder="little")[:8].tobytes().hex() == "295a6eb1e31356f1"


@pytest.mark.parametrize("density", [TINY, 0.01, 0.1, 0.3, 0.5, 0.75, 0.9, 1 - TINY, 1.0])
def test_the_kept_share_is_binomial(density: float):
    n = 64 * BLOCK
    mask = kept((3, "w", 0), 0, n, density)
    assert abs(mask.sum() - n * density) <= 5 * np.sqrt(n * density * (1 - density)) + 1
    by_block = mask.reshape(64, BLOCK).sum(axis=1)  # blocks vary as they should: neither alike nor too far apart
    if 0.001 < density < 0.999:
        spread = (by_block - BLOCK * density) ** 2 / (BLOCK * density * (1 - density))
        assert abs(spread.mean() - 1) < 5 * np.sqrt(2 / 64)
    by_bit = mask.reshape(-1, 64).sum(axis=0)  # no bit of a word is preferred
    assert (abs(by_bit - n / 64 * density) <= 5 * np.sqrt(n / 64 * density * (1 - density)) + 1).all()


def test_numbers_are_uniform_and_their_digits_unrelated():
    u = np.concatenate([documented_numbers(s, "w", 0, 0, BLOCK) for s in range(2)])
    digits = np.stack([np.floor(u * 2.0**k) % 2 for k in range(1, 25)])
    correlation = np.corrcoef(digits) - np.eye(len(digits))
    assert abs(correlation).max() < 6 / np.sqrt(len(u))
    assert abs(digits.mean(axis=1) - 0.5).max() < 5 * 0.5 / np.sqrt(len(u))


@pytest.mark.parametrize("density", [0.1, 0.5, 0.7])
def test_masks_of_different_keys_blocks_and_neighbours_are_unrelated(density: float):
    names = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1), (2**32, "a", 0)]
    drawn = np.stack([kept(key, 0, 2 * BLOCK, density) for key in names]).astype(float)
    blocks = drawn.reshape(2 * len(names), BLOCK)
    blocks = np.concatenate([blocks, *(np.roll(blocks[:1], shift, axis=1) for shift in (1, 32, 64, 512))])
    correlation = np.corrcoef(blocks) - np.eye(len(blocks))
    assert abs(correlation).max() < 6 / np.sqrt(BLOCK)
