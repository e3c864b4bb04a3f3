"""The compiled loop of inner products with task vectors, against plain torch in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from evomerge.methods import fused

kernels = pytest.importorskip("evomerge.methods.gradient_kernels", reason="numba is not installed")
WIDE = {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}


def products(gradients: list[Tensor], bases: list[Tensor], experts: list[list[Tensor | None]]) -> np.ndarray:
    """(K, T), added to 0.5."""
    found = np.full((len(bases), len(experts[0])), 0.5)
    kernels.task_products(
        fused.addresses(gradients),
        fused.addresses(bases),
        np.stack([fused.addresses(row) for row in experts]),
        np.array([base.numel() for base in bases]),
        fused.array(gradients[0]),
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
    gradients = [drawn(size, slope) for size in sizes]
    experts[2][1] = None  # nothing is added
    found = products(gradients, bases, experts)
    for k, t in np.ndindex(found.shape):
        expert = experts[k][t]
        if expert is None:
            assert found[k, t] == 0.5
            continue
        terms = gradients[k].double() * (expert.to(WIDE[dtype]) - bases[k].to(WIDE[dtype])).double()
        assert abs(found[k, t] - 0.5 - float(terms.sum())) <= 1e-14 * float(terms.abs().sum()) + 1e-15


def test_a_product_does_not_depend_on_what_else_there_is():
    draws = torch.Generator().manual_seed(4)
    sizes = (700, 5000)
    bases, gradients = ([torch.randn(size, generator=draws) for size in sizes] for _ in range(2))
    experts: list[list[Tensor | None]] = [[torch.randn(size, generator=draws) for _ in range(3)] for size in sizes]
    found = products(gradients, bases, experts)
    for k, t in np.ndindex(found.shape):
        assert products([gradients[k]], [bases[k]], [[experts[k][t]]])[0, 0] == found[k, t]


def test_without_experts_nothing_is_added():
    assert products([torch.ones(3)], [torch.ones(3)], [[]]).shape == (1, 0)


def test_numbers_that_are_not_finite_show():
    gradient = torch.tensor([float("nan"), 1.0])
    assert np.isnan(products([gradient], [torch.zeros(2)], [[torch.tensor([1.0, 2.0])]])).all()
    infinite = torch.tensor([float("inf"), 1.0])
    assert np.isinf(products([infinite], [torch.zeros(2)], [[torch.tensor([1.0, 2.0])]])).all()


def test_entries_that_nothing_depends_on_are_not_read():
    """Such as rows of an embedding that no item has: here 600 of 4,000 entries have a gradient."""
    gradient = torch.zeros(4000)
    gradient[1000:1600] = 2.0
    expert = torch.full((4000,), float("nan"))
    expert[512:2048] = 3.0  # whole blocks
    assert products([gradient], [torch.zeros(4000)], [[expert]])[0, 0] == 0.5 + 600 * 2.0 * 3.0
