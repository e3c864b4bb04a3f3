"""The compiled loop of inner products with task vectors, against plain torch in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from evomerge.methods import fused

kernels = pytest.importorskip("evomerge.methods.gradient_kernels", reason="numba is not installed")
WIDE = {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}


def products(
    gradients: list[list[Tensor | None]], bases: list[Tensor], experts: list[list[Tensor | None]]
) -> np.ndarray:
    """(B, K, T), added to 0.5."""
    found = np.full((len(gradients), len(bases), len(experts[0])), 0.5)
    slope = next(gradient for row in gradients for gradient in row if gradient is not None)
    kernels.task_products(
        np.stack([fused.addresses(row) for row in gradients]),
        fused.addresses(bases),
        np.stack([fused.addresses(row) for row in experts]),
        np.array([base.numel() for base in bases]),
        fused.array(slope),
        fused.array(bases[0]),
        found,
    )
    return found


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("slope", WIDE, ids=str)
def test_products_with_task_vectors(dtype: torch.dtype, slope: torch.dtype):
    draws = torch.Generator().manual_seed(3)
    sizes = (1, 511, 512, 513, 5000)

    def drawn(size: int, kind: torch.dtype) -> Tensor:
        return torch.randn(size, generator=draws, dtype=torch.float64).to(kind)

    bases = [drawn(size, dtype) for size in sizes]
    experts: list[list[Tensor | None]] = [[drawn(size, dtype) for _ in range(3)] for size in sizes]
    gradients: list[list[Tensor | None]] = [[drawn(size, slope) for size in sizes] for _ in range(2)]
    experts[2][1], gradients[1][3] = None, None  # nothing is added
    found = products(gradients, bases, experts)
    for b, k, t in np.ndindex(found.shape):
        gradient, expert = gradients[b][k], experts[k][t]
        if gradient is None or expert is None:
            assert found[b, k, t] == 0.5
            continue
        terms = gradient.double() * (expert.to(WIDE[dtype]) - bases[k].to(WIDE[dtype])).double()
        assert abs(found[b, k, t] - 0.5 - float(terms.sum())) <= 1e-14 * float(terms.abs().sum()) + 1e-15


def test_a_product_does_not_depend_on_what_else_there_is():
    draws = torch.Generator().manual_seed(4)
    sizes = (700, 5000)
    bases = [torch.randn(size, generator=draws) for size in sizes]
    experts: list[list[Tensor | None]] = [[torch.randn(size, generator=draws) for _ in range(3)] for size in sizes]
    gradients: list[list[Tensor | None]] = [[torch.randn(size, generator=draws) for size in sizes] for _ in range(5)]
    found = products(gradients, bases, experts)
    for b, k, t in np.ndindex(found.shape):
        alone = products([[gradients[b][k]]], [bases[k]], [[experts[k][t]]])
        assert alone[0, 0, 0] == found[b, k, t]


def test_without_experts_nothing_is_added():
    assert products([[torch.ones(3)]], [torch.ones(3)], [[]]).shape == (1, 1, 0)


def test_numbers_that_are_not_finite_show():
    gradient = torch.tensor([float("nan"), 1.0])
    assert np.isnan(products([[gradient]], [torch.zeros(2)], [[torch.tensor([1.0, 2.0])]])).all()
    infinite = torch.tensor([float("inf"), 1.0])
    assert np.isinf(products([[infinite]], [torch.zeros(2)], [[torch.tensor([1.0, 2.0])]])).all()
