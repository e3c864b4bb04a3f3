"""What methods on whole matrices share: which tensors they take, and the mean of the task vectors for the others."""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomerge.methods import merge_state_dicts
from evomerge.methods.arithmetic import SCALE, task_vectors, weighted_sum
from evomerge.methods.base import LowRank, TensorInfo
from evomerge.methods.chunks import CHUNK
from evomerge.methods.matrices import ALL_MATRICES, MatrixMethod, add_mean
from evomerge.testing.methods import MethodContract

from .families import Family, assert_close, families


class Doubled(MatrixMethod):
    """Twice the weighted sum of the task vectors, so that a matrix is told from what gets the mean."""

    name = "doubled"
    summary = reference = "for the tests"
    params = MappingProxyType({"matrices": ALL_MATRICES, "scale": SCALE})

    def combine_matrix(self, base, experts, *, weights, dtype, **_):
        vectors = task_vectors(base, experts, weights, dtype)
        return weighted_sum((2 * weight, vector) for _, weight, vector in vectors)


class TestDoubled(MethodContract):
    method = Doubled()
    settings: ClassVar = ({"matrices": "inner", "scale": 0.5}, {"scale": 0.0})


def merge(family: Family, **params) -> np.ndarray:
    experts = [torch.tensor(expert) for expert in family.experts]
    options = {"weights": family.weights, "info": family.info, **params}
    return Doubled().merge(torch.tensor(family.base), experts, **options).numpy()


@given(families(), st.floats(-1, 2), st.sampled_from(["all", "inner"]), st.sampled_from(["mlp", "embedding"]))
def test_mean_or_matrix(family: Family, scale: float, matrices: str, kind: str):
    info = TensorInfo("w", kind, shape=family.base.shape)
    weighted = sum(weight * tau for weight, tau in zip(family.weights, family.taus, strict=True))
    if family.base.ndim == 2 and (matrices == "all" or kind == "mlp"):
        expected = 2 * weighted
    else:
        expected = weighted / max(1, np.count_nonzero(family.weights))
    merged = merge(family, info=info, scale=scale, matrices=matrices)
    assert_close(merged, family.base + scale * np.asarray(expected))


@given(families())
def test_mean_of_equal_experts_is_the_expert(family: Family):
    same = [family.experts[0]] * len(family.experts)
    merged = merge(Family(family.base, same, [1.0] * len(same)), info=TensorInfo("w", "other", shape=family.base.shape),
                   matrices="inner")  # fmt: skip
    assert_close(merged, family.experts[0])


@pytest.mark.parametrize("shape", [(CHUNK + 10,), (3, CHUNK), (40, 50)], ids=str)
def test_mean_beside_low_rank_experts(shape: tuple[int, ...]):
    generator = torch.Generator().manual_seed(0)
    base, dense = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    experts: list = [dense, base]
    taus, weights = [dense - base, torch.zeros_like(base)], [0.5, 2.0, -1.0, 0.0]
    if len(shape) == 2:
        for rank in (2, 3):
            B = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)
            A = torch.randn(rank, shape[1], generator=generator, dtype=torch.float64)
            experts.append(LowRank(B, A, 0.25))
            taus.append(0.25 * B @ A)
    weights = weights[: len(experts)]
    mean = sum(w * tau for w, tau in zip(weights, taus, strict=True)) / (len(experts) - weights.count(0.0))
    torch.testing.assert_close(
        add_mean(base, experts, weights, torch.float64, scale=0.7), base + 0.7 * mean, rtol=1e-12, atol=1e-12
    )


def test_kinds_come_from_the_names():
    """``inner`` works on plain state dicts: a projection is a matrix, an embedding and a head get the mean."""
    inner = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight")
    outer = ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.input_layernorm.weight")
    base = {name: torch.zeros(4, 3) if "norm" not in name else torch.zeros(3) for name in (*inner, *outer)}
    experts = [{name: torch.full_like(tensor, t) for name, tensor in base.items()} for t in (1.0, 3.0)]
    merged = merge_state_dicts(Doubled(), base, experts, matrices="inner")
    assert {name: float(merged[name].mean()) for name in inner} == dict.fromkeys(inner, 8.0)
    assert {name: float(merged[name].mean()) for name in outer} == dict.fromkeys(outer, 2.0)
