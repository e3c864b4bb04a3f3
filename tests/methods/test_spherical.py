"""slerp against its formula and its geometry."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from evomerge.errors import MethodError
from evomerge.methods import METHODS
from evomerge.methods.base import TensorInfo

from .families import Family, assert_close, families

shares = st.floats(0, 1)


def reference(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    """Shoemake 1985: sin((1-t) O)/sin(O) a + sin(t O)/sin(O) b; a straight line beyond |cos O| = 0.9995."""
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    cosine = np.vdot(a, b) / norms if norms > 0 else 1.0
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


@given(families(fewest=2, most=2, low=0.0), shares)
def test_slerp(family: Family, t: float):
    assert_close(family.merge("slerp", t=t), reference(family.experts[0], family.experts[1], t))


@given(families(fewest=2, most=2, low=0.0))
def test_t_comes_from_the_weights(family: Family):
    assume(sum(family.weights) > 1e-3)
    t = family.weights[1] / sum(family.weights)
    assert_close(family.merge("slerp"), reference(family.experts[0], family.experts[1], t))


@given(st.integers(0, 2**32), shares, st.integers(2, 50))
def test_the_arc_between_unit_vectors(seed: int, t: float, size: int):
    """Stays on the sphere, at angle t O from the first and (1 - t) O from the second."""
    rng = np.random.default_rng(seed)
    a, b = (v / np.linalg.norm(v) for v in rng.standard_normal((2, size)))
    assume(abs(a @ b) < 0.99)
    merged = Family(a, [a, b], [1.0, 1.0]).merge("slerp", t=t)
    assert np.linalg.norm(merged) == pytest.approx(1, abs=1e-10)
    # Through the chord, which is accurate for small angles, unlike the arc cosine.
    angle = np.arccos(a @ b)
    assert np.linalg.norm(merged - a) == pytest.approx(2 * np.sin(t * angle / 2), abs=1e-10)
    assert np.linalg.norm(merged - b) == pytest.approx(2 * np.sin((1 - t) * angle / 2), abs=1e-10)


@given(families(fewest=2, most=2, low=0.0))
def test_ends_are_the_experts_to_the_bit(family: Family):
    for t in (0, 1):
        assert np.array_equal(family.merge("slerp", t=float(t)), family.experts[t])


@given(families(fewest=2, most=2, low=0.0), shares)
def test_turned_around(family: Family, t: float):
    merged = family.merge("slerp", t=t)
    family.experts.reverse()
    assert_close(family.merge("slerp", t=1 - t), merged)


@pytest.mark.parametrize("cosine", [0.9996, 0.9994, -0.9994, -0.9996])
def test_straight_line_beyond_the_limit(cosine: float):
    a = np.array([1.0, 0.0])
    b = np.array([cosine, np.sqrt(1 - cosine**2)])
    line = (a + b) / 2
    arc = line / np.linalg.norm(line)
    merged = Family(a, [a, b], [1.0, 1.0]).merge("slerp", t=0.5)
    assert_close(merged, line if abs(cosine) > 0.9995 else arc)


def test_zero_and_opposite_tensors_give_the_line():
    a = np.array([1.0, 2.0])
    for b in (np.zeros(2), -a):
        assert_close(Family(a, [a, b], [1.0, 1.0]).merge("slerp", t=0.25), 0.75 * a + 0.25 * b)
    assert np.array_equal(Family(a, [np.zeros(2), np.zeros(2)], [1.0, 1.0]).merge("slerp"), np.zeros(2))


def test_large_and_small_numbers_do_not_lose_the_angle():
    for dtype, size in ((torch.float16, 6e4), (torch.bfloat16, 1e30), (torch.float32, 1e-30)):
        a, b = torch.tensor([size, 0.0]).to(dtype), torch.tensor([0.0, size]).to(dtype)
        merged = METHODS["slerp"].merge(None, [a, b], weights=[1, 1], info=TensorInfo("w", shape=(2,)))
        torch.testing.assert_close(merged, (a.float() + b.float()) * 0.5**0.5)


def test_refuses_weights_without_a_direction():
    a, info = torch.ones(2), TensorInfo("w", shape=(2,))
    with pytest.raises(MethodError, match="both are zero"):
        METHODS["slerp"].merge(None, [a, a + 1], weights=[0, 0], info=info)
    with pytest.raises(MethodError, match="legal range"):
        METHODS["slerp"].merge(None, [a, a + 1], weights=[-1, 2], info=info)
    assert torch.equal(METHODS["slerp"].merge(None, [a, a + 1], weights=[0, 0], info=info, t=0.0), a)
