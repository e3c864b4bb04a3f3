"""The compiled loops of DELLA against the plain torch code: the same bits, whatever the numbers, types and layouts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.methods import METHODS, fused
from evomerge.methods.base import TensorInfo
from evomerge.methods.della import LONGEST, drop, merge_ranked, probability_ladder, rank_rows
from evomerge.methods.random import BLOCK, uniform
from evomerge.methods.thinning import Election

from .test_fused import WEIGHTS, same_bits, tensors

pytestmark = pytest.mark.skipif(fused.kernels() is None, reason="numba is not installed, or no fused multiply-add")

elections = st.sampled_from([None, *(Election(m, n) for m in ("mean", "sum") for n in (False, True))])
chances = st.sampled_from([(0.5, 0.1), (0.5, 0.49), (0.9, 0.1), (0.05, 0.04), (0.3, 0.0)])


def same_ranks(ranks: Tensor, base: Tensor, expert: Tensor) -> bool:
    """Equal to NumPy's stable sort of the magnitudes' bits, which has a place for NaN, too."""
    bits = torch.sub(expert.float(), base.float()).abs().numpy().view(np.uint32)
    order = np.argsort(bits, axis=1, kind="stable")
    return np.array_equal(np.argsort(order, axis=1), ranks.numpy())


@given(st.data(), st.booleans())
@settings(max_examples=100)
def test_ranks(data: st.DataObject, round_off: bool):
    base, expert = data.draw(tensors(2))
    if round_off:  # many equal magnitudes
        base, expert = (base * 4).round(), (expert * 4).round()
    dtype = torch.float64 if torch.float64 in (base.dtype, expert.dtype) else torch.float32
    ranks = rank_rows(base, expert, dtype=dtype)
    with fused.plain():
        assert torch.equal(ranks.int(), rank_rows(base, expert, dtype=dtype).int())
    if dtype == torch.float32:
        assert same_ranks(ranks, base, expert)


@pytest.mark.parametrize("n", [1, 2, 255, 5000, LONGEST, LONGEST + 1])
def test_ranks_in_rows_of_any_length(n: int):
    """Numbers that 16 bits tell apart and such that they do not: far below the largest one, or close together."""
    generator = torch.Generator().manual_seed(n)
    normal = torch.randn(3, n, generator=generator)
    outlier = normal.clone()
    outlier[:, n // 2] = 1e30
    steps = 1 + 2.0**-20 * torch.randint(0, 9, (3, n), generator=generator)
    for expert in (normal, normal * 1e-42, torch.zeros(3, n), outlier, 1 + 2.0**-18 * normal, steps):
        assert same_ranks(rank_rows(torch.zeros(3, n), expert, dtype=torch.float32), torch.zeros(3, n), expert)


@given(
    st.integers(1, 90),
    st.integers(1, 60),
    chances,
    st.sampled_from([0, 1, 31, 4096, BLOCK - 1, BLOCK, 3 * BLOCK - 700]),
    st.integers(0, 2**40),
)
@settings(max_examples=100)
def test_drop(rows: int, n: int, chance: tuple[float, float], start: int, seed: int):
    """What stays is what is drawn below its probability, in float32."""
    ranks = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed)).argsort(dim=1).to(torch.uint16)
    ladder = probability_ladder(n, *chance)
    kept = drop(ranks, ladder, (seed, "w", 1), start)
    drawn = uniform(seed, "w", 1, start, rows * n).view(rows, n)
    expected = torch.where(drawn < ladder.float()[ranks.int()], ranks.int(), n)
    assert torch.equal(kept.int(), expected)
    with fused.plain():
        assert torch.equal(drop(ranks, ladder, (seed, "w", 1), start).int(), expected)


@given(st.data(), elections, chances, WEIGHTS)
@settings(max_examples=100)
def test_merge_ranked(data: st.DataObject, election: Election | None, chance: tuple[float, float], scale: float):
    base, *experts = data.draw(tensors(data.draw(st.integers(2, 5))))
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in (base, *experts)) else torch.float32
    ladder = probability_ladder(base.shape[1], *chance)
    parts = []
    for t, expert in enumerate(experts):
        ranks = drop(rank_rows(base, expert, dtype=dtype), ladder, (3, "w", t), 0)
        parts.append((data.draw(WEIGHTS), expert, ranks))
    options: dict[str, Any] = {"dtype": dtype, "election": election, "scale": scale}
    merged = merge_ranked(base, parts, ladder, **options)
    with fused.plain():
        expected = merge_ranked(base, parts, ladder, **options)
    assert same_bits(merged, expected)


@pytest.mark.parametrize("rescale", ["probability", "l1"])
@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_whole_merges(method: str, rescale: str):
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        base = torch.randn(400, 1531, generator=generator).to(dtype)  # more than one block of rows
        experts = [(base + 0.01 * torch.randn(base.shape, generator=generator)).to(dtype) for _ in range(3)]
        info = TensorInfo("w", shape=tuple(base.shape))
        options: dict[str, Any] = {"weights": [0.5, -0.7, 1.0], "info": info, "seed": 3, "rescale": rescale}
        with fused.plain():
            expected = METHODS[method].merge(base, experts, **options)
        assert same_bits(METHODS[method].merge(base, experts, **options), expected)
