"""arcee_fusion against its definition on whole float64 arrays."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import assume, given
from scipy.special import log_softmax

from evomerge.methods import METHODS
from evomerge.methods.base import TensorInfo
from evomerge.methods.chunks import merge_chunks

from .families import Family, assert_close, families


def importance(base: np.ndarray, expert: np.ndarray) -> np.ndarray:
    rows = base.reshape(-1, base.shape[-1] if base.ndim else 1)
    p, q = (np.exp(log_softmax(array.reshape(rows.shape), axis=1)) + 1e-8 for array in (expert, base))
    divergence = (p * np.log(p / q)).sum(1, keepdims=True)
    return np.abs(expert - base).reshape(rows.shape) * np.maximum(divergence, 0)


@given(families(most=1))
def test_arcee_fusion(family: Family):
    base, expert = family.base, family.experts[0]
    found = importance(base, expert)
    ranked = np.sort(found, axis=None)
    first, median, third = (ranked[int(q * (ranked.size - 1))] for q in (0.25, 0.5, 0.75))
    limit = median + 1.5 * (third - first)
    # At the threshold itself a rounding error decides, unless all is zero.
    assume(np.all((np.abs(found - limit) > 1e-12 * ranked[-1]) | (found == limit)))
    taken = (found >= limit).reshape(base.shape)
    assert_close(family.merge("arcee_fusion"), base + family.weights[0] * np.where(taken, expert - base, 0))


def test_outliers_are_taken_and_the_rest_is_left():
    """One row that changes its distribution much, among rows that hardly do."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal((50, 40))
    expert = base + 1e-3 * rng.standard_normal(base.shape)
    expert[7] += 2 * rng.standard_normal(40)
    merged = Family(base, [expert], [1.0]).merge("arcee_fusion")
    assert np.mean(merged[7] == expert[7]) > 0.9
    assert np.mean(merged == base) > 0.5
    assert np.all(np.isclose(merged, expert, atol=1e-15) | (merged == base))


def test_quartiles_are_of_the_whole_tensor_when_it_is_merged_by_slices():
    method, shape = METHODS["arcee_fusion"], (700, 450)
    info = TensorInfo("w", shape=shape)
    base = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expert = base + 0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    state = method.prepare([(info, base, [expert])])
    pieces = [p for _, p in merge_chunks(method, base, [expert], weights=[1.0], info=info, state=state, params={})]
    assert len(pieces) > 1
    whole = method.merge(base, [expert], weights=[1.0], info=info)
    assert torch.equal(torch.cat(pieces), whole.reshape(-1))
    found = importance(base.numpy(), expert.numpy()).reshape(-1)
    ranked = np.sort(found)
    first, median, third = (ranked[int(q * (ranked.size - 1))] for q in (0.25, 0.5, 0.75))
    taken = (whole != base).reshape(-1).numpy()
    assert taken.sum() == (found >= median + 1.5 * (third - first)).sum()
