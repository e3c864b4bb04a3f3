"""LiNeS: equation 1 on top of other methods."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import MethodError
from evomerge.methods import METHODS, merge_state_dicts
from evomerge.methods.base import TensorInfo

from .families import Family, assert_close, families


def lines(family: Family, layer: int | None, layers: int, kind: str = "mlp", seed: int = 0, **params) -> np.ndarray:
    merged = METHODS["lines"].merge(
        torch.tensor(family.base),
        [torch.tensor(expert) for expert in family.experts],
        weights=family.weights,
        info=TensorInfo(family.name, kind, layer, layers, family.base.shape),
        seed=seed,
        **params,
    )
    return merged.numpy()


@given(
    families(),
    st.integers(2, 12),
    st.integers(0, 11),
    st.floats(-1, 1),
    st.floats(-1, 2),
    st.sampled_from(["task_arithmetic", "ties", "dare_linear"]),
)
def test_lines(family: Family, layers: int, layer: int, a: float, b: float, inner: str):
    layer %= layers
    tau = family.merge(inner, seed=5) - family.base
    expected = family.base + (a + b * layer / (layers - 1)) * tau
    assert_close(lines(family, layer, layers, inner=inner, a=a, b=b, seed=5), expected)


@given(families())
def test_by_default_the_first_layer_moves_by_the_mean_and_the_last_in_full(family: Family):
    total = sum(w * tau for w, tau in zip(family.weights, family.taus, strict=True))
    kept = max(1, sum(w != 0 for w in family.weights))
    assert_close(lines(family, 0, 3), family.base + total / kept)
    assert_close(lines(family, 2, 3), family.base + total)


@given(families(), st.floats(0, 1), st.floats(0, 1))
def test_outside_the_layers(family: Family, a: float, b: float):
    tau = family.merge("task_arithmetic") - family.base
    shallow, deep = family.base + a * tau, family.base + (a + b) * tau
    assert_close(lines(family, None, 4, "embedding", a=a, b=b), shallow)
    assert_close(lines(family, None, 4, "head", a=a, b=b), shallow)  # the authors' code
    assert_close(lines(family, None, 4, "embedding", a=a, b=b, outside="ends"), shallow)
    assert_close(lines(family, None, 4, "norm", a=a, b=b, outside="ends"), deep)
    assert_close(lines(family, 0, 1, a=a, b=b), shallow)


@given(families(), st.floats(0.05, 1))
def test_a_constant_scale_is_the_inner_method_s(family: Family, density: float):
    for mode in ("mean", "sum"):
        expected = family.merge("ties", density=density, mode=mode, scale=0.4)
        merged = lines(family, 3, 7, inner="ties", density=density, mode=mode, a=0.4, b=0.0)
        assert_close(merged, expected)


def test_whole_models_know_their_depth():
    names = ["model.embed_tokens.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)), "lm_head.weight"]
    base = {name: torch.zeros(2, 2, dtype=torch.float64) for name in names}
    expert = {name: torch.ones(2, 2, dtype=torch.float64) for name in names}
    merged = merge_state_dicts("lines", base, [expert], a=0.2, b=0.6, outside="ends")
    assert_close(np.array([float(merged[name][0, 0]) for name in names]), np.array([0.2, 0.2, 0.5, 0.8, 0.8]))


def test_refusals():
    family = Family(np.zeros(2), [np.ones(2)], [1.0])
    with pytest.raises(MethodError, match="task_arithmetic has no parameter 'density'"):
        lines(family, 0, 2, density=0.5)
    with pytest.raises(MethodError, match="is not one of"):
        lines(family, 0, 2, inner="slerp")
    assert "lines" not in METHODS["lines"].params["inner"].choices
    assert not {name for name in METHODS["lines"].params["inner"].choices if METHODS[name].statistics}
