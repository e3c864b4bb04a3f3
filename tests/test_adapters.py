"""LoRA adapters as experts: the same weights as PEFT's own merge, and refusals by name."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from evomerge.adapters import Adapter
from evomerge.checkpoints import Sources, open_checkpoint, open_expert
from evomerge.errors import CheckpointError
from evomerge.testing import tiny


def edit_config(folder: Path, **changes) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny.llama_config(tie_word_embeddings=False)
    return tiny.save_model(tmp_path_factory.mktemp("untied") / "base", config, seed=0, dtype=torch.float32)


@pytest.fixture
def expert(lora_family: Path, tmp_path: Path) -> Path:
    return shutil.copytree(lora_family / "expert0", tmp_path / "expert")


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {r".*\.2\..*v_proj": 31}},
        {"target_modules": ["embed_tokens", "lm_head", "k_proj"]},
        {"modules_to_save": ["lm_head", "norm"]},
        {"modules_to_save": ["embed_tokens"]},
        {"init_lora_weights": "gaussian"},
    ],
    ids=lambda s: ",".join(s) or "plain",
)
def test_an_adapter_is_what_peft_makes_of_it(untied: Path, tmp_path: Path, settings: dict):
    """float32 base: base + tau equals merge_and_unload's weights to the rounding of one product and one sum."""
    folder = tiny.save_lora_expert(untied, tmp_path / "expert", seed=3, **settings)
    if modules := settings.get("modules_to_save"):  # train the copies, too
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        changed = {k: v * 1.5 if any(m in k for m in modules) else v for k, v in tensors.items()}
        assert any(not torch.equal(changed[k], tensors[k]) for k in tensors)
        save_file(changed, file, metadata={"format": "pt"})
    base = open_checkpoint(untied)
    adapter = open_expert(folder, base)
    assert isinstance(adapter, Adapter)
    expected = merged_by_peft(untied, folder)
    sources = Sources(base, [adapter])
    differing = set()
    for info, theta_0, (theta,) in sources:
        torch.testing.assert_close(theta, expected[info.name], rtol=1e-6, atol=1e-6)
        if not torch.equal(expected[info.name], theta_0):
            differing.add(info.name)
    assert differing == {name for name in sources.names if sources.touched(name)}


def test_tau_is_scaling_b_a_in_float32(lora_family: Path):
    """It is not rounded to the base's bfloat16: against float64, only float32's rounding remains."""
    base = open_checkpoint(lora_family / "base")
    adapter = open_expert(lora_family / "expert0", base)
    tensors = load_file(lora_family / "expert0" / "adapter_model.safetensors")
    for name in adapter.names:
        key = f"base_model.model.{name.removesuffix('.weight')}"
        tau = 2.0 * tensors[f"{key}.lora_B.weight"].double() @ tensors[f"{key}.lora_A.weight"].double()
        _, theta_0, (theta,) = Sources(base, [adapter]).load(name)
        assert theta.dtype == torch.float32
        torch.testing.assert_close(theta.double() - theta_0.double(), tau, rtol=0, atol=1e-6)
        low_rank = adapter.low_rank(name)
        assert low_rank.scaling == 2.0
        torch.testing.assert_close(2.0 * low_rank.B.double() @ low_rank.A.double(), tau)


def test_rslora_scaling(lora_family: Path, expert: Path):
    edit_config(expert, use_rslora=True)
    adapter = open_expert(expert, open_checkpoint(lora_family / "base"))
    assert adapter.low_rank(adapter.names[0]).scaling == pytest.approx(8 / math.sqrt(4))


def test_transposed_layers(tmp_path: Path):
    """GPT-2's Conv1D keeps (in, out): fan_in_fan_out."""
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=1, bos_token_id=1)
    base_folder = tiny.save_model(tmp_path / "base", config, seed=0, dtype=torch.float32)
    folder = tiny.save_lora_expert(
        base_folder, tmp_path / "expert", seed=1, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True
    )
    base = open_checkpoint(base_folder)
    expected = merged_by_peft(base_folder, folder)
    touched = 0
    for info, theta_0, (theta,) in Sources(base, [open_expert(folder, base)]):
        torch.testing.assert_close(theta, expected[info.name], rtol=1e-6, atol=1e-6)
        touched += theta is not theta_0
    assert touched == 6


def test_names_that_the_model_class_adds(untied: Path, tmp_path: Path):
    """A base saved from the inner model has no ``model.`` in front; the adapter's modules have."""
    from transformers import AutoModel

    inner = tmp_path / "inner"
    AutoModel.from_pretrained(untied).save_pretrained(inner)
    config = json.loads((inner / "config.json").read_text())
    (inner / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    folder = tiny.save_lora_expert(untied, tmp_path / "expert", seed=3)
    outer_base, inner_base = open_checkpoint(untied), open_checkpoint(inner)
    names = open_expert(folder, outer_base).names
    assert open_expert(folder, inner_base).names == [name.removeprefix("model.") for name in names]


def test_adapter_on_a_mixture_of_experts(moe_family: Path, tmp_path: Path):
    folder = tiny.save_lora_expert(moe_family / "base", tmp_path / "lora", seed=1, target_modules=["q_proj", "v_proj"])
    base = open_checkpoint(moe_family / "base")
    expected = merged_by_peft(moe_family / "base", folder)
    adapter = open_expert(folder, base)
    assert len(adapter.names) == 4
    for name in adapter.names:
        _, _, (theta,) = Sources(base, [adapter]).load(name)
        torch.testing.assert_close(theta, expected[name], rtol=1e-6, atol=1e-6)


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("peft_type", "IA3"),
        ("init_lora_weights", "pissa_niter_4"),
    ],
)
def test_more_than_low_rank(lora_family: Path, expert: Path, key: str, value: object):
    edit_config(expert, **{key: value})
    with pytest.raises(CheckpointError, match=rf"adapter_config.json: .*{'IA3' if key == 'peft_type' else key}"):
        open_expert(expert, open_checkpoint(lora_family / "base"))


def test_adapter_of_a_wider_base(lora_family: Path, tmp_path: Path):
    other = tiny.save_model(tmp_path / "other", tiny.llama_config(hidden_size=48), seed=5)
    folder = tiny.save_lora_expert(other, tmp_path / "stranger", seed=1)
    with pytest.raises(CheckpointError, match=r"stranger.*down_proj.*\(48, 48\).*\(32, 48\)(.|\n)*another base"):
        open_expert(folder, open_checkpoint(lora_family / "base"))


def test_adapter_of_a_deeper_base(lora_family: Path, tmp_path: Path):
    other = tiny.save_model(tmp_path / "other", tiny.llama_config(num_hidden_layers=6), seed=5)
    folder = tiny.save_lora_expert(other, tmp_path / "stranger", seed=1)
    with pytest.raises(CheckpointError, match=r"stranger.*layers\.4\.(.|\n)*another base"):
        open_expert(folder, open_checkpoint(lora_family / "base"))


def test_rank_that_is_not_what_the_config_says(lora_family: Path, expert: Path):
    edit_config(expert, r=8)
    with pytest.raises(CheckpointError, match=r"q_proj|down_proj.* the rank 8"):
        open_expert(expert, open_checkpoint(lora_family / "base"))


def test_half_of_a_pair(lora_family: Path, expert: Path):
    file = expert / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[next(key for key in tensors if "lora_B" in key)]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="has no lora_B"):
        open_expert(expert, open_checkpoint(lora_family / "base"))


def test_pickled_adapter(lora_family: Path, expert: Path):
    (expert / "adapter_model.safetensors").rename(expert / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin.*pickle"):
        open_expert(expert, open_checkpoint(lora_family / "base"))


@pytest.mark.parametrize("settings", [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["embed_tokens"]}])
def test_adapter_that_unties(lora_family: Path, tmp_path: Path, settings: dict):
    """PEFT changes the input embedding only; a tied checkpoint has no second tensor for the head."""
    folder = tiny.save_lora_expert(lora_family / "base", tmp_path / "expert", seed=1, **settings)
    file = folder / "adapter_model.safetensors"
    save_file({k: v + 1 for k, v in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match=r"embed_tokens.*ties"):
        open_expert(folder, open_checkpoint(lora_family / "base"))


def test_truncated_adapter(lora_family: Path, expert: Path):
    file = expert / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is truncated"):
        open_expert(expert, open_checkpoint(lora_family / "base"))
