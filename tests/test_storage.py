"""Sources stored in several types and in shards, from the files to the export and the resident model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from evomerge.exporting import export
from evomerge.merging import Merger, load_resident, open_sources
from evomerge.recipe import Group, Recipe, Source
from evomerge.testing import tiny

NORMS = "norm"


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def keep_wide(folder: Path) -> Path:
    """Norms in float32 beside matrices in a narrow type, as some checkpoints have them."""
    for file in folder.glob("*.safetensors"):
        tensors = {n: t.float() + 1e-4 if NORMS in n else t for n, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in bfloat16 and float32 in shards; experts in float16 in shards, in float32 whole, and a LoRA adapter."""
    folder = tmp_path_factory.mktemp("mixed")
    base = keep_wide(tiny.save_model(folder / "base", tiny.llama_config(), seed=0, max_shard_size="20KB"))
    for t, dtype in enumerate((torch.float16, torch.float32)):
        tiny.save_dense_expert(base, folder / f"expert{t}", seed=t + 1)
        model = AutoModelForCausalLM.from_pretrained(folder / f"expert{t}", dtype=dtype)
        (folder / f"expert{t}" / "model.safetensors").unlink()
        model.save_pretrained(folder / f"expert{t}", max_shard_size="30KB" if t == 0 else "1GB")
    tiny.save_lora_expert(base, folder / "expert2", seed=3)
    return folder


@pytest.mark.parametrize("export_dtype", ["float32", "bfloat16", "float16"])
def test_the_merge_is_the_formula_and_the_export_is_the_resident_model(family: Path, tmp_path: Path, export_dtype: str):
    """theta_0 + sum w (theta_t - theta_0) in float64, rounded to the export's type: within one unit of that type."""
    weights = (0.5, 0.3, 0.8)
    recipe = Recipe(
        base=Source("base", str(family / "base")),
        experts=tuple(Source(f"expert{t}", str(family / f"expert{t}")) for t in range(3)),
        method="task_arithmetic",
        groups=(Group(weights),),
        export_dtype=export_dtype,
    )
    base, first, second = (weights_in(family / name) for name in ("base", "expert0", "expert1"))
    assert len({t.dtype for t in base.values()}) == 2
    assert len(list((family / "expert0").glob("*.safetensors"))) > 1
    adapter = load_file(family / "expert2" / "adapter_model.safetensors")
    out = export(recipe, tmp_path / "out", shard_size=20_000)
    merged, dtype = weights_in(out), getattr(torch, export_dtype)
    assert merged.keys() == base.keys()
    for name, theta_0 in base.items():
        exact = theta_0.double()
        tau = weights[0] * (first[name].double() - exact) + weights[1] * (second[name].double() - exact)
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in adapter:
            tau += (
                weights[2] * 2.0 * adapter[f"{key}.lora_B.weight"].double() @ adapter[f"{key}.lora_A.weight"].double()
            )
        assert merged[name].dtype == dtype
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(merged[name].double(), exact + tau, rtol=unit, atol=4e-7)
    assert json.loads((out / "config.json").read_text())["dtype"] == export_dtype
    model = load_resident(family / "base", auto_class="AutoModelForCausalLM", compute_dtype="float32")
    Merger(open_sources(recipe)).into(model, recipe)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    for (name, ours), theirs in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
