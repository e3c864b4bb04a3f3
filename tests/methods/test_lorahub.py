"""LoraHub against its paper's equation and against PEFT's linear combination of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomerge.checkpoints import Sources, open_checkpoint, open_expert
from evomerge.errors import CheckpointError, MethodError
from evomerge.methods import METHODS
from evomerge.methods.base import LowRank, TensorInfo
from evomerge.testing import tiny
from evomerge.testing.factors import make_adapters

from .families import assert_close

weight = st.floats(-1.5, 1.5)


@st.composite
def adapters(draw) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]], list[float], float]:
    """(base, [(B, A)], weights, the scaling that all share)."""
    m, n, rank, count = (draw(st.integers(1, high)) for high in (12, 12, 4, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    factors = [(rng.standard_normal((m, rank)), rng.standard_normal((rank, n))) for _ in range(count)]
    weights = draw(st.lists(weight, min_size=count, max_size=count))
    return rng.standard_normal((m, n)), factors, weights, draw(st.sampled_from([0.25, 1.0, 2.0]))


def merge(base: np.ndarray, experts: list[LowRank], weights: list[float], **params: Any) -> np.ndarray:
    info = TensorInfo("w", shape=base.shape)
    return METHODS["lorahub"].merge(torch.tensor(base), experts, weights=weights, info=info, **params).numpy()


def low_rank(factors: list[tuple[np.ndarray, np.ndarray]], scaling: float) -> list[LowRank]:
    return [LowRank(torch.tensor(B), torch.tensor(A), scaling) for B, A in factors]


@given(adapters(), st.floats(-1, 2))
def test_lorahub(family, scale: float):
    """LoraHub, section 3.2: (sum w_t B_t)(sum w_t A_t), here times the scaling that LoRA has in all its experts."""
    base, factors, weights, scaling = family
    B = sum(w * B for w, (B, _) in zip(weights, factors, strict=True))
    A = sum(w * A for w, (_, A) in zip(weights, factors, strict=True))
    expected = base + scale * scaling * B @ A
    assert_close(merge(base, low_rank(factors, scaling), weights, scale=scale), expected)


@given(adapters())
def test_one_expert_has_its_weight_squared_and_with_root_its_weight(family):
    base, factors, weights, scaling = family
    (B, A), w = factors[0], weights[0]
    experts = low_rank(factors, scaling)[:1]
    assert_close(merge(base, experts, [w]), base + w**2 * scaling * B @ A)
    assert_close(merge(base, experts, [w], root=True), base + w * scaling * B @ A)


@given(adapters())
def test_where_all_share_one_factor_it_is_task_arithmetic(family):
    """With equal A: (sum w B) (sum w) A; with weights that sum to 1 that is sum w B A."""
    base, factors, weights, scaling = family
    weights = [abs(w) + 0.1 for w in weights]
    weights = [w / sum(weights) for w in weights]
    factors = [(B, factors[0][1]) for B, _ in factors]
    expected = base + sum(w * scaling * B @ A for w, (B, A) in zip(weights, factors, strict=True))
    assert_close(merge(base, low_rank(factors, scaling), weights), expected)


def test_ranks_must_be_equal():
    base, experts = make_adapters((6, 8), 2)
    experts[1] = LowRank(experts[1].B[:, :2], experts[1].A[:2], 1.0)
    info = TensorInfo("layer.w", shape=(6, 8))
    with pytest.raises(MethodError, match=r"one rank, but those of layer\.w have the ranks 2, 3"):
        METHODS["lorahub"].merge(base, experts, weights=[1.0, 1.0], info=info)
    METHODS["lorahub"].merge(base, experts, weights=[1.0, 0.0], info=info)


@pytest.mark.parametrize("weights", [[0.5, 0.7], [0.5, -0.7], [-1.2, 0.3]], ids=str)
def test_root_is_what_peft_does(lora_family: Path, weights: list[float]):
    """The same adapters, combined by PEFT itself (add_weighted_adapter, combination_type linear)."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(lora_family / "base", dtype=torch.float32)
    peft = PeftModel.from_pretrained(model, str(lora_family / "expert0"), adapter_name="expert0")
    peft.load_adapter(str(lora_family / "expert1"), adapter_name="expert1")
    peft.add_weighted_adapter(["expert0", "expert1"], weights, "merged", combination_type="linear")
    base = open_checkpoint(lora_family / "base")
    sources = Sources(base, [open_expert(lora_family / f"expert{t}", base) for t in range(2)])
    found = 0
    for name, module in peft.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            info, theta_0, experts = sources.load(f"{name}.weight", factors=True)
            assert theta_0 is not None
            zero = torch.zeros(theta_0.shape, dtype=torch.float32)
            merged = METHODS["lorahub"].merge(zero, experts, weights=weights, info=info, root=True)
            torch.testing.assert_close(merged, module.get_delta_weight("merged"), rtol=1e-5, atol=1e-6)
            found += 1
    assert found == 16


def test_sources_without_factors_are_refused_by_name(lora_family: Path, dense_family: Path, tmp_path: Path):
    base = open_checkpoint(lora_family / "base")
    adapter = open_expert(lora_family / "expert0", base)
    with pytest.raises(CheckpointError, match="expert1 is a whole checkpoint"):
        Sources(base, [adapter, open_expert(dense_family / "expert1", base)]).require_factors("lorahub")
    Sources(base, [adapter, open_expert(dense_family / "expert1", base)]).require_factors("lorahub", [True, False])
    wider = tiny.save_lora_expert(lora_family / "base", tmp_path / "wider", seed=3, rank=6)
    with pytest.raises(
        CheckpointError, match=r"one rank, but on model\.layers\.0\.mlp\.down_proj\.weight theirs are 4, 6"
    ):
        Sources(base, [adapter, open_expert(wider, base)]).require_factors("lorahub")
    norm = tiny.save_lora_expert(lora_family / "base", tmp_path / "norm", seed=3, modules_to_save=["norm"])
    with pytest.raises(CheckpointError, match=r"replaces model\..* as a whole \(modules_to_save\)"):
        Sources(base, [adapter, open_expert(norm, base)]).require_factors("lorahub")
