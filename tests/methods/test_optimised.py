"""WUDI against autograd on the paper's loss and torch's Adam."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from evomerge.methods import METHODS
from evomerge.methods.base import LowRank, TensorInfo
from evomerge.methods.optimised import interference

from .families import Family
from .matrix_families import kept, matrix_families


def loss(X: torch.Tensor, vectors: list[tuple[float, torch.Tensor]]) -> torch.Tensor:
    """Whoever Started the Interference: sum_t ||(X - w_t tau_t) tau_t'||^2 / ||tau_t||^2."""
    return sum(((X - w * tau) @ tau.T).square().sum() / tau.square().sum() for w, tau in vectors)  # type: ignore[return-value]


def reference(family: Family, steps: int, lr: float) -> np.ndarray:
    vectors = [(w, torch.tensor(tau)) for w, tau in kept(family)]
    X = torch.nn.Parameter(sum((w * tau for w, tau in vectors), torch.zeros(family.base.shape, dtype=torch.float64)))
    vectors = [(w, tau) for w, tau in vectors if tau.any()]
    optimiser = torch.optim.Adam([X], lr=lr)
    for _ in range(steps if vectors else 0):
        optimiser.zero_grad()
        loss(X, vectors).backward()
        optimiser.step()
    return X.detach().numpy()


@given(matrix_families(), st.integers(0, 30), st.sampled_from([1e-5, 1e-3, 0.1]), st.floats(-1, 2))
def test_wudi(family: Family, steps: int, lr: float, scale: float):
    assume(kept(family))
    merged = family.merge("wudi", steps=steps, lr=lr, scale=scale, matrices="all")
    np.testing.assert_allclose(merged, family.base + scale * reference(family, steps, lr), rtol=1e-8, atol=1e-8)


@given(matrix_families(full_rank=True), st.integers(0, 2**32))
def test_gradient_is_autograds(family: Family, seed: int):
    vectors = [(w, torch.tensor(tau)) for w, tau in kept(family)]
    assume(vectors)
    start = sum(w * tau for w, tau in vectors)
    assert isinstance(start, torch.Tensor)
    base, experts = torch.tensor(family.base), [torch.tensor(expert) for expert in family.experts]
    C, A = interference(base, experts, family.weights, start)
    if len(A) < A.shape[1]:
        A = A.T @ A
    D = torch.from_numpy(np.random.default_rng(seed).standard_normal(start.shape))
    X = (start + D).requires_grad_()
    (expected,) = torch.autograd.grad(loss(X, vectors), X)
    torch.testing.assert_close(2 * (D @ A + C), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weight", [1.0, 0.7, -0.3])
@pytest.mark.parametrize("shape", [(5, 40), (40, 5)], ids=str)
def test_one_expert_is_kept(dtype: torch.dtype, weight: float, shape: tuple[int, int]):
    """A gradient of rounding errors would move every entry by lr a step."""
    generator = torch.Generator().manual_seed(0)
    base, expert = torch.randn(2, *shape, generator=generator, dtype=dtype)
    factors = LowRank(torch.randn(shape[0], 2, generator=generator), torch.randn(2, shape[1], generator=generator), 0.5)
    info = TensorInfo("w", "mlp", shape=shape)
    for experts in ([expert], [expert, expert], [expert, base.clone()], [factors]):
        weights = [weight, 0.0][: len(experts)]
        plain = METHODS["task_arithmetic"].merge(base, experts, weights=weights, info=info)
        merged = METHODS["wudi"].merge(base, experts, weights=weights, info=info, lr=0.1)
        torch.testing.assert_close(merged, plain, rtol=1e-6, atol=1e-6)


def test_the_loss_falls():
    generator = torch.Generator().manual_seed(0)
    base = torch.zeros(30, 20, dtype=torch.float64)
    experts = list(torch.randn(3, 30, 20, generator=generator, dtype=torch.float64) * 0.01)
    options = {"weights": [1, 1, 1], "info": TensorInfo("w", "mlp", shape=(30, 20))}
    vectors = [(1.0, tau) for tau in experts]
    losses = [float(loss(METHODS["wudi"].merge(base, experts, steps=n, **options), vectors)) for n in (0, 30, 300)]
    assert losses[0] > losses[1] > losses[2]
    assert losses[0] == pytest.approx(float(loss(torch.stack(experts).sum(0), vectors)))


def test_embeddings_get_the_mean_by_default():
    base, experts = torch.zeros(6, 4), [torch.ones(6, 4), torch.full((6, 4), 3.0)]
    for kind, expected in (("embedding", 2.0), ("head", 2.0), ("attention", 4.0)):
        info = TensorInfo("w", kind, shape=(6, 4))
        merged = METHODS["wudi"].merge(base, experts, weights=[1, 1], info=info, steps=0)
        assert merged.unique().tolist() == [expected]
