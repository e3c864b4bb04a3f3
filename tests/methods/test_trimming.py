"""Thresholds of small tensors are sorted out, those of large ones counted: the same numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.methods import trimming
from evomerge.methods.selection import order_statistics


@given(
    n=st.integers(1, 200),
    density=st.floats(0.001, 0.999),
    gamma=st.sampled_from([0.0, 0.01, 0.3]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    special=st.sampled_from([None, float("nan"), float("inf")]),
)
@settings(max_examples=60)
def test_sorting_finds_what_counting_finds(n, density, gamma, dtype, special):
    generator = torch.Generator().manual_seed(n)
    base = torch.randn(n, generator=generator).to(dtype)
    experts = [base, (base + 0.1 * torch.randn(n, generator=generator)).to(dtype), base.clone()]
    if special is not None:
        experts[1][0] = special
    cut = trimming.Trimming(density, gamma)
    counted = order_statistics(lambda: trimming.magnitudes(base, experts), 3, cut.ranks)
    found = trimming._of_tensor(base, experts, cut)
    assert torch.equal(torch.tensor(found).nan_to_num(-1), torch.tensor(counted).nan_to_num(-1))


@pytest.mark.parametrize("n", [trimming.SMALL, trimming.SMALL + 1])
def test_on_both_sides_of_the_limit(n: int):
    base = torch.zeros(n)
    expert = torch.arange(1.0, n + 1)[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    assert trimming._of_tensor(base, [expert], trimming.Trimming(0.25)) == [[n - round(0.25 * n) + 1.0]]
