"""DARE against a reference written from its paper."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomerge.methods import METHODS
from evomerge.methods.base import TensorInfo

from .families import Family, assert_close, families
from .references import densities, elect_and_merge, modes
from .test_masks import documented_mask


def drop(tau: np.ndarray, key: tuple[int, str, int], *, density: float, rescale: str) -> np.ndarray:
    """DARE, section 3.2: delta = m * tau / (1 - p), m Bernoulli(1 - p), here 1 - p = density; the documented mask."""
    mask = documented_mask(*key, tau.size, density).reshape(tau.shape)
    kept = tau * mask
    if density == 1:
        return tau
    if rescale == "l1":
        return kept * (np.abs(tau).sum() / np.abs(kept).sum() if kept.any() else 1)
    return kept / density


dare = {"seed": st.integers(0, 2**40), "density": densities, "rescale": st.sampled_from(["density", "l1"])}


@given(family=families(), scale=st.floats(-1, 2), **dare)
def test_dare_linear(family: Family, seed: int, density: float, rescale: str, scale: float):
    dropped = [drop(tau, (seed, family.name, t), density=density, rescale=rescale) for t, tau in enumerate(family.taus)]
    expected = family.base + scale * sum(w * tau for w, tau in zip(family.weights, dropped, strict=True))
    merged = family.merge("dare_linear", seed=seed, density=density, rescale=rescale, scale=scale)
    assert_close(merged, expected)


@given(family=families(low=0.0), mode=modes, normalize=st.booleans(), **dare)
def test_dare_ties(family: Family, seed: int, *, density: float, rescale: str, mode: str, normalize: bool):
    """DARE's drop, then TIES-Merging's election and disjoint merge."""
    # Continuous numbers: on a grid, rescaled sums could cancel or not by a matter of rounding.
    rng = np.random.default_rng(seed)
    family.experts = [family.base + rng.standard_normal(family.base.shape) for _ in family.experts]
    dropped = [drop(tau, (seed, family.name, t), density=density, rescale=rescale) for t, tau in enumerate(family.taus)]
    expected = family.base + elect_and_merge(dropped, family.weights, mode, normalize)
    merged = family.merge("dare_ties", seed=seed, density=density, rescale=rescale, mode=mode, normalize=normalize)
    assert_close(merged, expected)


@given(families(), st.integers(0, 2**40))
def test_dare_at_density_1_is_what_follows_it(family: Family, seed: int):
    for rescale in ("density", "l1"):
        merged = family.merge("dare_linear", seed=seed, density=1.0, rescale=rescale)
        assert np.array_equal(merged, family.merge("task_arithmetic"))
        merged = family.merge("dare_ties", seed=seed, density=1.0, rescale=rescale)
        assert np.array_equal(merged, family.merge("ties", density=1.0))


def test_dare_keeps_the_stated_share_and_the_expectation():
    """Independent of how masks are keyed: the kept share is binomial, and the mean over seeds is task arithmetic."""
    rng = np.random.default_rng(0)
    n, seeds = 20_000, range(40)
    family = Family(rng.standard_normal(n), [], [0.6, 0.9])
    family.experts = [family.base + 0.1 * rng.standard_normal(n) for _ in range(2)]
    for density in (0.1, 0.5, 0.9):
        only_first = Family(family.base, family.experts, [0.6, 0.0])
        mean = np.zeros(n)
        for seed in seeds:
            shift = only_first.merge("dare_linear", seed=seed, density=density) - family.base
            kept = int((np.abs(shift) > 1e-14).sum())
            assert abs(kept - n * density) < 6 * np.sqrt(n * density * (1 - density))
            mean += family.merge("dare_linear", seed=seed, density=density) / len(seeds)
        spread = sum((w * t) ** 2 for w, t in zip(family.weights, family.taus, strict=True)) * (1 / density - 1)
        deviation = (mean - family.merge("task_arithmetic")) / np.sqrt(spread / len(seeds))
        assert abs(deviation.mean()) < 6 / np.sqrt(n)
        assert abs(deviation.std() - 1) < 0.05


def test_dare_masks_differ_between_experts_tensors_and_seeds():
    base, expert = torch.zeros(1000), torch.ones(1000)

    def kept(seed: int = 0, name: str = "w", before: int = 0) -> torch.Tensor:
        experts = [base] * before + [expert]
        merged = METHODS["dare_linear"].merge(
            base, experts, weights=[1.0] * len(experts), info=TensorInfo(name, shape=(1000,)), seed=seed
        )
        return merged != 0

    masks = [kept(), kept(seed=1), kept(name="v"), kept(before=1)]
    for i, mask in enumerate(masks):
        for other in masks[:i]:
            assert 350 < int((mask == other).sum()) < 650


def test_l1_rescaling_restores_the_norm_of_each_task_vector():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(500, generator=generator, dtype=torch.float64)
    expert = base + torch.randn(500, generator=generator, dtype=torch.float64)
    info = TensorInfo("w", shape=(500,))
    for method in ("dare_linear", "dare_ties"):
        merged = METHODS[method].merge(base, [expert], weights=[1.0], info=info, density=0.2, rescale="l1")
        torch.testing.assert_close((merged - base).abs().sum(), (expert - base).abs().sum())
