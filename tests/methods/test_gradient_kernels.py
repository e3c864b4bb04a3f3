"""The compiled loop of inner products with task vectors, against plain torch in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evomerge.methods import fused

kernels = pytest.importorskip("evomerge.methods.gradient_kernels", reason="numba is not installed")
WIDE = {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}


@pytest.mark.parametrize("count", [1, 511, 512, 513, 5000])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("slope", [torch.float32, torch.float64], ids=str)
def test_products_with_task_vectors(count: int, dtype: torch.dtype, slope: torch.dtype):
    draws = torch.Generator().manual_seed(count)
    base, *experts = (torch.randn(count, generator=draws).to(dtype) for _ in range(4))
    gradient = torch.randn(count, generator=draws, dtype=torch.float64).to(slope)
    found = np.full(3, 0.5)  # what is there is added to
    kernels.task_products(fused.array(gradient), fused.array(base), fused.addresses(experts), found)
    terms = [gradient.double() * (expert.to(WIDE[dtype]) - base.to(WIDE[dtype])).double() for expert in experts]
    sums = np.array([float(term.sum()) for term in terms])
    sizes = np.array([float(term.abs().sum()) for term in terms])
    assert (np.abs(found - 0.5 - sums) <= 1e-14 * sizes + 1e-15).all()


def test_without_experts_nothing_is_added():
    found = np.zeros(0)
    kernels.task_products(np.ones(3, np.float32), np.ones(3, np.float32), np.zeros(0, np.int64), found)
    assert found.shape == (0,)


def test_numbers_that_are_not_finite_show():
    found = np.zeros(1)
    expert = torch.tensor([1.0, 2.0])
    gradient = torch.tensor([float("nan"), 1.0])
    kernels.task_products(fused.array(gradient), fused.array(torch.zeros(2)), fused.addresses([expert]), found)
    assert np.isnan(found).all()
