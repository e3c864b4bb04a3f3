"""The compiled loops of DELLA against the plain torch code: the same bits, whatever the numbers, types and layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.methods import METHODS, fused
from evomerge.methods.base import TensorInfo
from evomerge.methods.della import thin
from evomerge.methods.random import uniform
from evomerge.methods.thinning import Election, merge_vectors

from .test_fused import WEIGHTS, same_bits, tensors

pytestmark = pytest.mark.skipif(fused.kernels() is None, reason="numba is not installed, or no fused multiply-add")

elections = st.sampled_from([None, *(Election(m, n) for m in ("mean", "sum") for n in (False, True))])


@given(st.data(), st.sampled_from([(0.5, 0.1), (0.5, 0.49), (0.9, 0.1), (0.05, 0.04), (0.3, 0.0)]))
@settings(max_examples=100)
def test_thin(data: st.DataObject, chance: tuple[float, float]):
    base, expert = data.draw(tensors(2))
    if data.draw(st.booleans()):  # many equal magnitudes
        base, expert = (base * 4).round(), (expert * 4).round()
    dtype = torch.float64 if torch.float64 in (base.dtype, expert.dtype) else torch.float32
    drawn = uniform(3, "w", 0, 0, base.numel()).view(base.shape)
    with fused.plain():
        expected = thin(base, expert, drawn, *chance, dtype=dtype)
    assert same_bits(thin(base, expert, drawn, *chance, dtype=dtype), expected)


@pytest.mark.parametrize("n", [1, 2, 48, 49, 255, 256, 257, 5000])
def test_thin_rows_of_any_length(n: int):
    generator = torch.Generator().manual_seed(n)
    for size in (1.0, 1e-42, 0.0):  # ordinary, denormal and no task vectors
        base = torch.zeros(7, n)
        expert = size * torch.randn(7, n, generator=generator)
        drawn = uniform(3, "w", 0, 0, base.numel()).view(base.shape)
        with fused.plain():
            expected = thin(base, expert, drawn, 0.5, 0.3, dtype=torch.float32)
        assert same_bits(thin(base, expert, drawn, 0.5, 0.3, dtype=torch.float32), expected)


@given(st.data(), elections, WEIGHTS)
@settings(max_examples=100)
def test_merge_vectors(data: st.DataObject, election: Election | None, scale: float):
    base, *vectors = data.draw(tensors(data.draw(st.integers(1, 5))))
    dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
    weighted = [(data.draw(WEIGHTS), vector.to(dtype).contiguous()) for vector in vectors]
    options: dict[str, Any] = {"dtype": dtype, "election": election, "scale": scale}
    merged = merge_vectors(base, [(w, v.clone()) for w, v in weighted], **options)
    with fused.plain():
        expected = merge_vectors(base, [(w, v.clone()) for w, v in weighted], **options)
    assert same_bits(merged, expected)


@pytest.mark.parametrize("rescale", ["probability", "l1"])
@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_whole_merges(method: str, rescale: str):
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        base = torch.randn(130, 1531, generator=generator).to(dtype)  # more than one block of rows
        experts = [(base + 0.01 * torch.randn(base.shape, generator=generator)).to(dtype) for _ in range(3)]
        info = TensorInfo("w", shape=tuple(base.shape))
        options: dict[str, Any] = {"weights": [0.5, -0.7, 1.0], "info": info, "seed": 3, "rescale": rescale}
        with fused.plain():
            expected = METHODS[method].merge(base, experts, **options)
        assert same_bits(METHODS[method].merge(base, experts, **options), expected)
