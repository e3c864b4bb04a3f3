"""random_vectors: as long as the task vectors, and in directions of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from evomerge.methods import METHODS
from evomerge.methods.base import TensorInfo

from .families import Family, assert_close, families


@given(families(most=1), st.integers(0, 2**40), st.floats(-2, 2))
def test_each_vector_has_its_task_vector_s_norm(family: Family, seed: int, scale: float):
    shift = family.merge("random_vectors", seed=seed, scale=scale) - family.base
    expected = abs(scale * family.weights[0]) * np.linalg.norm(family.taus[0])
    assert_close(np.linalg.norm(shift), expected)


@given(families(fewest=2), st.integers(0, 2**40))
def test_the_experts_add_up(family: Family, seed: int):
    """sum w_t r_t, each r_t what it is alone."""
    alone = []
    for t in range(len(family.experts)):
        weights = [w if s == t else 0.0 for s, w in enumerate(family.weights)]
        alone.append(Family(family.base, family.experts, weights).merge("random_vectors", seed=seed) - family.base)
    merged = family.merge("random_vectors", seed=seed)
    assert_close(merged, family.base + sum(alone))


def test_vectors_are_normal_and_unrelated_to_the_task_vectors_and_each_other():
    rng = np.random.default_rng(0)
    n = 100_000
    base = np.zeros(n)
    taus = [rng.exponential(size=n) for _ in range(2)]  # nothing like normal noise
    shifts = [Family(base, taus, [float(t == s) for s in range(2)]).merge("random_vectors") for t in range(2)]
    for shift in shifts:
        assert stats.kstest(shift / shift.std(), "norm").pvalue > 1e-4
    correlation = np.corrcoef(np.stack([*taus, *shifts])) - np.eye(4)
    assert np.abs(correlation).max() < 6 / np.sqrt(n)
    again = Family(base, taus, [1.0, 0.0]).merge("random_vectors", seed=1)
    assert abs(np.corrcoef(again, shifts[0])[0, 1]) < 6 / np.sqrt(n)


@pytest.mark.parametrize("seed", range(5))
def test_no_move_where_the_expert_did_not_move(seed: int):
    base = torch.randn(20, generator=torch.Generator().manual_seed(seed))
    info = TensorInfo("w", shape=(20,))
    merged = METHODS["random_vectors"].merge(base, [base.clone()], weights=[1.0], info=info, seed=seed)
    assert torch.equal(merged, base)
