"""model_stock against its formula and its geometry."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from .families import Family, assert_close, families


def ratio(taus: np.ndarray) -> float:
    """k cos / (1 + (k-1) cos), cos the mean over pairs; 0 where task vectors cancel, 1 for one alone."""
    k = len(taus)
    if k == 1:
        return 1.0
    cosines = []
    for s in range(k):
        for t in range(s + 1, k):
            norms = np.linalg.norm(taus[s]) * np.linalg.norm(taus[t])
            cosines.append(taus[s] @ taus[t] / norms if norms > 0 else 0.0)
    cosine = float(np.mean(cosines))
    return 0.0 if 1 + (k - 1) * cosine < 1e-6 else k * cosine / (1 + (k - 1) * cosine)


@given(families(fewest=2), st.sampled_from(["tensor", "rows"]))
def test_model_stock(family: Family, vectors: str):
    """Equation 2 and its form for N experts: w_H = r mean + (1 - r) theta_0."""
    chosen = [t for t, w in enumerate(family.weights) if w != 0]
    assume(chosen)
    shape = family.base.shape
    columns = shape[-1] if shape and vectors == "rows" else family.base.size
    taus = np.stack([family.taus[t].reshape(-1, columns) for t in chosen])
    weights = np.array([family.weights[t] for t in chosen])
    expected = family.base.reshape(-1, columns).copy()
    for row in range(taus.shape[1]):
        r = ratio(taus[:, row])
        assume(abs(r) < 1e3)  # task vectors that all but cancel: all rounding
        expected[row] += r * (weights @ taus[:, row]) / len(chosen)
    assert_close(family.merge("model_stock", vectors=vectors), expected.reshape(shape))


@given(st.integers(0, 2**32), st.integers(2, 5), st.floats(0.1, 3), st.floats(0.1, 3))
def test_the_point_nearest_to_the_centre(seed: int, k: int, near: float, far: float):
    """Section 4's geometry: seen from the centre all fine-tuned weights are equally far and at right angles to each
    other and to the base; the merge is where the plane through them all is nearest to the centre."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.standard_normal((10, k + 1)))[0].T
    centre, lengths = rng.standard_normal(10), np.array([far, *[near] * k])
    base, *experts = points = centre + lengths[:, None] * axes
    share = 1 / lengths**2  # of the barycentre that is the foot of the perpendicular from the centre
    assert_close(Family(base, experts, [1.0] * k).merge("model_stock"), share @ np.array(points) / share.sum())


@given(families(fewest=2))
def test_equal_experts_are_kept_and_orthogonal_ones_give_the_base(family: Family):
    family.experts, family.weights = [family.experts[0].copy() for _ in family.experts], [1.0] * len(family.experts)
    assert_close(family.merge("model_stock"), family.experts[0])
    base = np.zeros(4)
    assert_close(Family(base, list(np.eye(4)[:3]), [1.0] * 3).merge("model_stock"), base)
    assert_close(Family(base, [np.eye(4)[0], -np.eye(4)[0]], [1.0] * 2).merge("model_stock"), base)
