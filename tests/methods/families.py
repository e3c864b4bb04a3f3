"""Random inputs for the methods' tests: float64 tensors, some of them on a coarse grid so that ties and zeros occur."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from hypothesis import strategies as st

from evomerge.methods import METHODS
from evomerge.methods.base import TensorInfo

T = TypeVar("T")

# Those whose zero weights do not give the base: they are not of the form base + sum w f(tau).
NOT_AROUND_THE_BASE = {"linear", "slerp", "nuslerp", "multislerp", "karcher", "passthrough", "fisher", "lm_cocktail"}

# Those that take whole checkpoints, as state dicts hold them; the others work on the factors of adapters.
OF_DENSE_EXPERTS = [name for name, method in METHODS.items() if not method.needs_factors]


def fitting(method: str, experts: Sequence[T]) -> list[T]:
    """As many of the experts (or of their weights) as the method takes."""
    return list(experts[: METHODS[method].num_experts[1]])


@dataclass
class Family:
    """A base, T experts and their weights, as float64 arrays for references and as tensors for methods."""

    base: np.ndarray
    experts: list[np.ndarray]
    weights: list[float]
    name: str = "model.layers.0.mlp.up_proj.weight"

    def merge(self, method: str, *, seed: int = 0, **params) -> np.ndarray:
        merged = METHODS[method].merge(
            torch.tensor(self.base),
            [torch.tensor(expert) for expert in self.experts],
            weights=self.weights,
            info=self.info,
            seed=seed,
            **params,
        )
        assert merged.dtype == torch.float64
        return merged.numpy()

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.name, shape=self.base.shape)

    @property
    def taus(self) -> list[np.ndarray]:
        return [expert - self.base for expert in self.experts]


@st.composite
def families(draw, *, fewest: int = 1, most: int = 5, low: float = -2.0) -> Family:
    """Grid families have dyadic entries and weights: their sums are exact, so a sign is never a matter of rounding."""
    shape = tuple(draw(st.lists(st.integers(1, 12), min_size=0, max_size=3)))
    count = draw(st.integers(fewest, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    base = rng.standard_normal(shape)
    experts = [base + rng.standard_normal(shape) * rng.choice([0.01, 1.0]) for _ in range(count)]
    weight = st.floats(low, 2.0, allow_nan=False, allow_subnormal=False)
    if draw(st.booleans()):
        base, *experts = (np.round(array * 2) / 2 for array in (base, *experts))
        weight = st.sampled_from([w for w in (1.0, 0.5, -1.0, 2.0, 0.0) if w >= low])
    weights = draw(st.lists(weight, min_size=count, max_size=count))
    return Family(np.asarray(base), [np.asarray(expert) for expert in experts], weights)


def assert_close(actual: np.ndarray | np.floating, expected: np.ndarray | np.floating) -> None:
    """Equal to 1e-10: the arithmetic is float64 on both sides."""
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)
