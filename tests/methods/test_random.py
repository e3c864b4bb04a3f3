"""Keyed random draws: documented streams, the same for slices, and as random as they should be."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from evomerge.methods.random import BLOCK, normal, uniform


def documented_uniform(seed: int, name: str, expert: int, start: int, count: int) -> np.ndarray:
    """The keying as random.py states it, through NumPy's own float32 generator instead of raw words."""
    blocks = []
    for block in range(-(-(start + count) // BLOCK)):
        key = hashlib.blake2b(json.dumps([seed, name, expert, block]).encode(), digest_size=16).digest()
        bits = np.random.SFC64(int.from_bytes(key, "little"))
        size = min(BLOCK, start + count - block * BLOCK)
        blocks.append(np.random.Generator(bits).random(size, dtype=np.float32))
    return np.concatenate([*blocks, np.empty(0, np.float32)])[start : start + count]


@given(st.integers(0, 2**63), st.text(), st.integers(0, 20), st.integers(0, 2 * BLOCK), st.integers(0, 3000))
def test_uniform_is_the_documented_stream(seed, name, expert, start, count):
    drawn = uniform(seed, name, expert, start, count)
    assert drawn.dtype == torch.float32 and drawn.device.type == "cpu"
    assert np.array_equal(drawn.numpy(), documented_uniform(seed, name, expert, start, count))


def test_known_first_numbers():
    """Pinned, since stored recipes rely on it: another NumPy must not give every DARE recipe another mask.

    Made with hashlib and NumPy alone: Generator(SFC64(key)).random(3, dtype=float32).
    """
    expected = np.array([0.279431, 0.633493, 0.085356])
    np.testing.assert_allclose(uniform(0, "w", 0, 0, 3).numpy(), expected, atol=1e-6)


@given(st.lists(st.integers(0, 3 * BLOCK), min_size=2, max_size=6).map(sorted))
def test_slices_are_parts_of_the_whole(cuts):
    for draw in (uniform, normal):
        whole = draw(7, "w", 1, 0, 3 * BLOCK)
        for start, stop in pairwise(cuts):
            assert torch.equal(draw(7, "w", 1, start, stop - start), whole[start:stop])


def test_thread_count_does_not_matter():
    threads = torch.get_num_threads()
    one = uniform(1, "w", 0, 0, 3 * BLOCK), normal(1, "w", 0, 0, 3 * BLOCK)
    try:
        torch.set_num_threads(2)
        two = uniform(1, "w", 0, 0, 3 * BLOCK), normal(1, "w", 0, 0, 3 * BLOCK)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(one, two, strict=True))


def test_distributions():
    u = uniform(3, "w", 0, 0, 4 * BLOCK)
    assert float(u.min()) >= 0 and float(u.max()) < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-4
    assert stats.kstest(normal(3, "w", 0, 0, 4 * BLOCK).numpy(), "norm").pvalue > 1e-4


def test_streams_of_different_keys_are_unrelated():
    keys = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1), (2**32, "a", 0)]
    for draw in (uniform, normal):
        drawn = np.stack([draw(*key, 0, 2 * BLOCK).numpy() for key in keys])
        blocks = drawn.reshape(2 * len(keys), BLOCK)  # the two blocks of a stream are unrelated too
        correlation = np.corrcoef(blocks) - np.eye(len(blocks))
        assert np.abs(correlation).max() < 6 / np.sqrt(BLOCK)
