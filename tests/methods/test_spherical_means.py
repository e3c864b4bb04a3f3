"""nuslerp, multislerp and karcher against formulas on whole float64 arrays, and against the sphere's geometry."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from evomerge.errors import MethodError
from evomerge.methods import METHODS
from evomerge.methods.base import TensorInfo
from evomerge.methods.chunks import merge_chunks

from .families import Family, assert_close, families

CUTS = ("tensor", "rows", "columns")
ORIGINS = ("zero", "base")


def arc(a: np.ndarray, b: np.ndarray, s: float) -> np.ndarray:
    """The arc from vector a to vector b at s; a line where it is none; a zero vector is at right angles."""
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    cosine = float(np.clip(a @ b / norms, -1, 1)) if norms > 0 else 0.0
    if 1 - cosine**2 <= 1e-12:
        return (1 - s) * a + s * b
    angle = np.arccos(cosine)
    return (np.sin((1 - s) * angle) * a + np.sin(s * angle) * b) / np.sin(angle)


def cut(array: np.ndarray, vectors: str) -> np.ndarray:
    """(count, length): the vectors that a tensor is made of."""
    if vectors == "tensor" or array.ndim == 0:
        return array.reshape(1, -1)
    if vectors == "rows":
        return array.reshape(-1, array.shape[-1])
    return array.reshape(array.shape[0], -1).T


def uncut(found: np.ndarray, shape: tuple[int, ...], vectors: str) -> np.ndarray:
    return (found.T if vectors == "columns" and len(shape) > 0 else found).reshape(shape)


@given(families(fewest=2, most=2, low=0.0), st.sampled_from(CUTS), st.sampled_from(ORIGINS))
def test_nuslerp(family: Family, vectors: str, origin: str):
    assume(sum(family.weights) > 1e-3)
    s = family.weights[1] / sum(family.weights)
    start = family.base if origin == "base" else np.zeros_like(family.base)
    pairs = zip(*(cut(expert - start, vectors) for expert in family.experts), strict=True)
    expected = start + uncut(np.stack([arc(a, b, s) for a, b in pairs]), family.base.shape, vectors)
    for a, b in zip(*(cut(expert - start, vectors) for expert in family.experts), strict=True):
        # Nearly opposite vectors: the arc's length is all rounding.
        assume(np.linalg.norm(a) * np.linalg.norm(b) * 0.999 + a @ b >= 0 or np.array_equal(a, -b))
    assert_close(family.merge("nuslerp", vectors=vectors, origin=origin), expected)


@given(families(fewest=2, most=2, low=0.0))
def test_nuslerp_of_whole_experts_is_slerp(family: Family):
    a, b = (expert.reshape(-1) for expert in family.experts)
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    assume(sum(family.weights) > 1e-3 and norms > 0 and abs(a @ b) / norms < 0.9995)
    assert_close(family.merge("nuslerp"), family.merge("slerp"))


@given(families(fewest=2, most=2), st.floats(-1, 2))
def test_nuslerp_takes_weights_of_any_sign(family: Family, s: float):
    """Beyond the ends of the arc, on the same circle."""
    rng = np.random.default_rng(0)
    a, b = (v / np.linalg.norm(v) for v in rng.standard_normal((2, 8)))
    merged = Family(a, [a, b], [1 - s, s]).merge("nuslerp")
    assert np.linalg.norm(merged) == pytest.approx(1, abs=1e-10)
    assert_close(merged, arc(a, b, s))


@given(families(fewest=2), st.booleans(), st.sampled_from(ORIGINS))
def test_multislerp(family: Family, normalize: bool, origin: str):
    """mergekit's steps one by one, its projection to the tangent space and back included."""
    total, size = sum(family.weights), sum(map(abs, family.weights))
    assume(abs(total) > 0.1 * size > 0)
    start = family.base if origin == "base" else np.zeros_like(family.base)
    w = np.array(family.weights) / (total if normalize else 1)
    x = np.stack([(expert - start).reshape(-1) for expert in family.experts])
    norms = np.linalg.norm(x, axis=1)
    units = np.divide(x, norms[:, None], out=np.zeros_like(x), where=norms[:, None] > 0)
    mean = w @ units
    assume(np.linalg.norm(mean) > 1e-2 * np.abs(w).sum())
    mean = mean / np.linalg.norm(mean)
    tangent = w @ (units - (units @ mean)[:, None] * mean)
    step = np.linalg.norm(tangent)
    assert step < 1e-12 * (1 + np.abs(w).sum()), "the projections cancel"
    merged = mean * np.cos(step) + tangent * np.sinc(step / np.pi)
    expected = start + (w @ norms * merged).reshape(start.shape)
    assert_close(family.merge("multislerp", normalize=normalize, origin=origin), expected)


def karcher_reference(x: np.ndarray, w: np.ndarray, steps: int, tol: float) -> np.ndarray:
    """Weighted Karcher mean by log and exp maps on full vectors, at the mean length."""
    norms = np.linalg.norm(x, axis=1)
    there = norms > 0
    units, share = x[there] / norms[there, None], w[there] / w[there].sum()
    mean = share @ units
    mean = units[0] if np.linalg.norm(mean) <= 1e-6 else mean / np.linalg.norm(mean)
    for _ in range(steps):
        logs = np.zeros_like(units)
        for t, unit in enumerate(units):
            cosine = np.clip(unit @ mean, -1, 1)
            across = unit - cosine * mean
            if np.sin(np.arccos(cosine)) > tol:
                logs[t] = np.arccos(cosine) * across / np.linalg.norm(across)
        step = share @ logs
        size = np.linalg.norm(step)
        if size <= tol:
            break
        mean = np.cos(size) * mean + np.sin(size) / size * step
        mean = mean / np.linalg.norm(mean)
    return (w / w.sum()) @ norms * mean


@given(families(fewest=2, low=0.0), st.integers(0, 12), st.sampled_from([1e-5, 1e-3]))
def test_karcher(family: Family, steps: int, tol: float):
    w = np.array(family.weights)
    keep = w > 1e-3
    assume(keep.sum() >= 2)
    family.weights = [weight if kept else 0.0 for weight, kept in zip(w, keep, strict=True)]
    x = np.stack([expert.reshape(-1) for expert in family.experts])[keep]
    norms = np.linalg.norm(x, axis=1)
    assume((norms > 0).any())
    units = x[norms > 0] / norms[norms > 0, None]
    assume(np.abs(units @ units.T - np.eye(len(units))).max(initial=0) < 0.999)  # else angles are all rounding
    assume(np.linalg.norm(w[keep][norms > 0] @ units) > 1e-2)
    # A pull that one side counts and the other, by rounding, does not, is at most tol.
    expected = karcher_reference(x, w[keep], steps, tol).reshape(family.base.shape)
    np.testing.assert_allclose(family.merge("karcher", steps=steps, tol=tol), expected, rtol=1e-9, atol=1e-9)


@given(st.integers(0, 2**32), st.integers(2, 5), st.integers(5, 30))
def test_karcher_is_the_least_sum_of_squared_angles(seed: int, count: int, size: int):
    rng = np.random.default_rng(seed)
    centre = rng.standard_normal(size)
    x = centre + 0.3 * rng.standard_normal((count, size))
    w = rng.uniform(0.2, 1, count)
    found = Family(centre, list(x), list(w)).merge("karcher", steps=200, tol=0.0)
    units = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert np.linalg.norm(found) == pytest.approx(w @ np.linalg.norm(x, axis=1) / w.sum(), rel=1e-10)

    def cost(v: np.ndarray) -> float:
        return float(w @ np.arccos(np.clip(units @ (v / np.linalg.norm(v)), -1, 1)) ** 2)

    for _ in range(5):
        assert cost(found) <= cost(found + 1e-3 * np.linalg.norm(found) * rng.standard_normal(size)) + 1e-12


@given(st.integers(0, 2**32), st.integers(2, 20))
def test_karcher_and_multislerp_of_two_equal_weights_are_half_way(seed: int, size: int):
    rng = np.random.default_rng(seed)
    a, b = (v / np.linalg.norm(v) for v in rng.standard_normal((2, size)))
    assume(abs(a @ b) < 0.99)
    middle = (a + b) / np.linalg.norm(a + b)
    for method in ("karcher", "multislerp", "nuslerp"):
        assert_close(Family(a, [a, b], [1.0, 1.0]).merge(method), middle)


@pytest.mark.parametrize("method", ["nuslerp", "multislerp", "karcher"])
@given(family=families(fewest=2, most=2))
def test_one_weight_alone_is_that_expert_to_the_bit(method: str, family: Family):
    for t in range(2):
        family.weights = [0.3 if s == t else 0.0 for s in range(2)]
        assert np.array_equal(family.merge(method), family.experts[t])


@pytest.mark.parametrize("method", ["nuslerp", "multislerp", "karcher"])
def test_one_object_several_times_is_that_object_to_the_bit(method: str):
    base = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    info = TensorInfo("w", shape=(1000,))
    assert torch.equal(METHODS[method].merge(base, [base] * 2, weights=[0.1, 0.7], info=info), base)


def test_zero_and_opposite_directions():
    a = np.array([1.0, 2.0])
    zero = np.zeros(2)

    def merge(method: str, *experts: np.ndarray, **params) -> np.ndarray:
        return Family(zero, list(experts), [1.0] * len(experts)).merge(method, **params)

    assert_close(merge("nuslerp", a, zero), a * np.sqrt(0.5))  # at right angles
    assert_close(merge("nuslerp", a, -a), zero)  # a line
    assert_close(merge("multislerp", a, -a), zero)
    assert_close(merge("karcher", a, -a), a)  # no mean is better than an expert's own direction
    assert_close(merge("karcher", a, zero), a / 2)  # half the length, all of the direction
    assert_close(merge("multislerp", a, zero), a / 2)
    for method in ("nuslerp", "multislerp", "karcher"):
        assert_close(merge(method, zero, zero), zero)
    with pytest.raises(MethodError, match=r"directions of .* cancel"):
        merge("multislerp", a, -a, zero)


def test_refusals_name_the_weights_or_the_base():
    info, experts = TensorInfo("w", shape=(2,)), [torch.ones(2), torch.zeros(2)]
    for method, weights in (("nuslerp", [0, 0]), ("nuslerp", [1, -1]), ("multislerp", [1, -1]), ("karcher", [0, 0])):
        with pytest.raises(MethodError, match=r"weights|sum to zero"):
            METHODS[method].merge(None, experts, weights=weights, info=info)
    with pytest.raises(MethodError, match="legal range"):
        METHODS["karcher"].merge(None, experts, weights=[1, -1], info=info)
    for method in ("nuslerp", "multislerp"):
        with pytest.raises(MethodError, match="base"):
            METHODS[method].merge(None, experts, weights=[1, 1], info=info, origin="base")
        with pytest.raises(MethodError, match="base"):
            METHODS[method].prepare([(info, None, experts)], origin="base", vectors="tensor")


def test_prepared_for_another_cut_prepares_anew():
    """A search that moves ``vectors`` or ``origin`` cannot keep inner products; one that fixes them can."""
    method, info = METHODS["nuslerp"], TensorInfo("w", shape=(30, 20))
    base, a, b = torch.randn(3, 30, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert method.prepare([(info, base, [a, b])], vectors="rows") is None
    state = method.prepare([(info, base, [a, b])], vectors="rows", origin="zero")
    options: dict[str, Any] = {"weights": [1.0, 2.0], "info": info}
    for params in ({"vectors": "rows", "origin": "zero"}, {"vectors": "tensor", "origin": "base"}):
        pieces = [piece for _, piece in merge_chunks(method, base, [a, b], state=state, params=params, **options)]
        whole = method.merge(base, [a, b], **options, **params)
        torch.testing.assert_close(torch.cat(pieces), whole.reshape(-1), rtol=1e-14, atol=1e-14)
    assert method.chunked_with(state, vectors="rows", origin="zero")
    assert not method.chunked_with(state, vectors="tensor", origin="zero")
