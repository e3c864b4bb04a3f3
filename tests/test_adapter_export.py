"""Merges written as LoRA adapters: the task vector of the merge, as PEFT itself reads it; and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from evomerge.adapter_export import export_adapter
from evomerge.checkpoints import open_checkpoint, open_expert
from evomerge.errors import CheckpointError, MethodError
from evomerge.exporting import MANIFEST, export, is_complete_export
from evomerge.merging import verify_sources
from evomerge.recipe import Group, Recipe, Source
from evomerge.testing import tiny


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny.llama_config(tie_word_embeddings=False)
    return tiny.save_model(tmp_path_factory.mktemp("untied") / "base", config, seed=0, dtype=torch.float32)


def recipe_of(base: Path, experts: list[Path], *groups: Group, **more: Any) -> Recipe:
    sources = tuple(Source(path.name, str(path)) for path in experts)
    settings = {"method": "task_arithmetic", "groups": groups, "export_dtype": "float32", **more}
    return Recipe(base=Source("base", str(base)), experts=sources, **settings)


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    peft_model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).double()
    return peft_model.merge_and_unload().state_dict()


def assert_is_the_merge(adapter: Path, recipe: Recipe, tmp_path: Path) -> None:
    """base + adapter, put together by PEFT in float64, against the dense merge in float64. What is left is float32's
    rounding of the stored factors: 2^-24 of numbers below 1, a few times."""
    assert recipe.base is not None
    dense = load_file(export(replace(recipe, export_dtype="float64"), tmp_path / "dense") / "model.safetensors")
    theirs = merged_by_peft(Path(recipe.base.path), adapter)
    base = load_file(Path(recipe.base.path) / "model.safetensors")
    for name, tensor in dense.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=5e-7)
    assert any((dense[name] - base[name].double()).abs().max() > 0.01 for name in dense)


CASES: dict[str, list[dict[str, Any]]] = {
    "of one rank": [{}, {}, {}],
    "of several ranks": [{"rank": 2}, {"rank": 5, "lora_alpha": 7}],
    "rank patterns, rslora": [
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r".*\.2\..*v_proj": 31}},
        {"use_rslora": True, "rank_pattern": {"layers.1.mlp.up_proj": 6}},
    ],
    "on other modules": [{"target_modules": ["q_proj"]}, {"target_modules": ["o_proj", "q_proj"]}],
    "on some layers": [{"layers_to_transform": [0, 2]}, {"target_modules": ["q_proj"], "layers_to_transform": [1]}],
    "on embeddings": [{"target_modules": ["embed_tokens", "lm_head"]}, {"target_modules": ["embed_tokens", "k_proj"]}],
}


@pytest.mark.parametrize("case", CASES)
def test_peft_makes_the_merge_of_it(untied: Path, tmp_path: Path, case: str):
    """Weights by groups of layers, of either sign, some of them zero."""
    folders = [
        tiny.save_lora_expert(untied, tmp_path / f"expert{t}", seed=t, **settings)
        for t, settings in enumerate(CASES[case])
    ]
    first = [0.6, -0.3, 1.7][: len(folders)]
    groups = (Group(tuple(first), (0, 2)), Group((0.0, *first[1:]), (2, 3)), Group((0.0,) * len(folders), (3, 4)))
    recipe = recipe_of(untied, folders, *groups, params={"scale": 0.9})
    out = export_adapter(recipe, tmp_path / "out")
    assert_is_the_merge(out, recipe, tmp_path)
    assert is_complete_export(out, hashes=True)
    # what no weight moves has no factors: nothing of the last layer, nothing of the first expert alone in layer 2
    moved = {name for name in open_expert(out, open_checkpoint(untied)).names if ".layers." in name}
    assert all(int(name.split(".layers.")[1].split(".")[0]) < 3 for name in moved)
    if case == "on some layers":
        assert {name.split("layers.")[1] for name in moved if "q_proj" in name} == {
            "0.self_attn.q_proj.weight", "1.self_attn.q_proj.weight",
        }  # fmt: skip


def test_transposed_layers(tmp_path: Path):
    """GPT-2's Conv1D keeps (in, out)."""
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=1, bos_token_id=1)
    base = tiny.save_model(tmp_path / "base", config, seed=0, dtype=torch.float32)
    settings: dict[str, Any] = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    folders = [
        tiny.save_lora_expert(base, tmp_path / f"expert{t}", seed=t, rank=2 + t, size=0.2, **settings) for t in range(2)
    ]
    recipe = recipe_of(base, folders, Group((0.5, 0.8)))
    assert_is_the_merge(export_adapter(recipe, tmp_path / "out"), recipe, tmp_path)


@pytest.mark.parametrize(
    ("method", "params", "weights"),
    [
        ("linear", {}, (0.5, 1.5)),
        ("linear", {"normalize": False}, (0.25, 0.75)),
        ("dare_linear", {"density": 1.0, "scale": 2.0}, (0.5, 0.25)),
    ],
)
def test_other_methods_that_are_weighted_sums(
    untied: Path, tmp_path: Path, method: str, params: dict, weights: tuple[float, ...]
):
    folders = [tiny.save_lora_expert(untied, tmp_path / f"expert{t}", seed=t) for t in range(2)]
    recipe = recipe_of(untied, folders, Group(weights), method=method, params=params)
    assert_is_the_merge(export_adapter(recipe, tmp_path / "out"), recipe, tmp_path)


@pytest.mark.parametrize(
    ("method", "params", "rank"),
    [
        ("lorahub", {"scale": 0.9}, 4),
        ("lorahub", {"root": True}, 4),
        ("knots", {"density": 0.5, "mode": "sum", "scale": 0.8}, 8),
        ("knots", {"inner": "dare_ties"}, 8),
    ],
)
def test_methods_that_make_factors_of_factors(untied: Path, tmp_path: Path, method: str, params: dict, rank: int):
    """lorahub keeps the experts' rank, knots has at most the sum of them. A weight of zero in one group."""
    experts = [tiny.save_lora_expert(untied, tmp_path / f"expert{t}", seed=t) for t in range(2)]
    groups = (Group((0.6, -0.7), (0, 2)), Group((0.0, 1.2), (2, 4)))
    recipe = recipe_of(untied, experts, *groups, method=method, params=params, seed=5)
    out = export_adapter(recipe, tmp_path / "out")
    assert_is_the_merge(out, recipe, tmp_path)
    found = open_expert(out, open_checkpoint(untied))
    ranks = {int(name.split(".")[2]): low.A.shape[0] for name in found.names if (low := found.low_rank(name))}
    assert ranks == {0: rank, 1: rank, 2: 4, 3: 4}


def test_what_knots_gives_the_mean_is_refused(untied: Path, tmp_path: Path):
    folder = tiny.save_lora_expert(untied, tmp_path / "expert", seed=1, target_modules=["embed_tokens", "q_proj"])
    recipe = recipe_of(untied, [folder], Group((0.5,)), method="knots", params={"matrices": "inner"})
    refused(recipe, tmp_path, "embed_tokens", "--as adapter", error=MethodError)


def test_one_adapter_at_weight_one_is_itself(lora_family: Path, tmp_path: Path):
    """Its alpha / r of 2 moves into B, which is exact: the same B A to the bit, on a bfloat16 base as well."""
    recipe = recipe_of(lora_family / "base", [lora_family / "expert0"], Group((1.0,)))
    base = open_checkpoint(lora_family / "base")
    before, after = (open_expert(f, base) for f in (lora_family / "expert0", export_adapter(recipe, tmp_path / "out")))
    assert before.names == after.names
    for name in before.names:
        old, new = before.low_rank(name), after.low_rank(name)
        assert new.scaling == 1.0
        assert torch.equal(new.A, old.A)
        assert torch.equal(new.B, old.B * old.scaling)


def test_what_is_in_the_folder(lora_family: Path, tmp_path: Path):
    recipe = verify_sources(
        recipe_of(lora_family / "base", [lora_family / f"expert{t}" for t in range(2)], Group((0.4, 0.7)))
    )
    recipe = replace(recipe, export_dtype="bfloat16")
    scores = {"test": {"objective": 0.5, "tasks": {"add": {"score": 0.5, "items": 10}}}}
    out = export_adapter(recipe, tmp_path / "out", card={"study": "skills", "scores": scores})
    assert {file.name for file in out.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", MANIFEST, "recipe.yaml",
    }  # fmt: skip
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(lora_family / "base")
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (8, 8, {})
    assert sorted(config["target_modules"]) == ["down_proj", "q_proj", "up_proj", "v_proj"]
    text = (out / "README.md").read_text()
    for words in (
        "LoRA adapter",
        recipe.base.sha256,
        "within rounding only",
        "library_name: peft",
        "merged checkpoints",
    ):
        assert words in text
    again = export_adapter(
        Recipe.load(out / "recipe.yaml"), tmp_path / "again", card={"study": "skills", "scores": scores}
    )
    for file in out.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name


def test_zero_weights_may_be_of_anything(dense_family: Path, tmp_path: Path):
    lora = tiny.save_lora_expert(dense_family / "base", tmp_path / "lora", seed=1)
    recipe = recipe_of(dense_family / "base", [lora, dense_family / "expert0"], Group((0.5, 0.0)))
    assert_is_the_merge(export_adapter(recipe, tmp_path / "out"), recipe, tmp_path)


# --- refusals ------------------------------------------------------------------------------------------------------


def refused(recipe: Recipe, tmp_path: Path, *words: str, error: type = CheckpointError) -> None:
    before = set(tmp_path.iterdir())
    with pytest.raises(error) as caught:
        export_adapter(recipe, tmp_path / "out")
    for word in words:
        assert word in str(caught.value)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("method", "params", "weights"),
    [
        ("ties", {}, (1.0, 1.0)),
        ("dare_linear", {}, (1.0, 1.0)),
        ("random_vectors", {}, (1.0, 1.0)),
        ("linear", {"normalize": False}, (0.5, 0.7)),
        ("linear", {}, (1.0, -1.0)),
    ],
)
def test_methods_that_are_no_weighted_sum(
    lora_family: Path, tmp_path: Path, method: str, params: dict, weights: tuple[float, ...]
):
    experts = [lora_family / f"expert{t}" for t in range(2)]
    recipe = recipe_of(lora_family / "base", experts, Group(weights), method=method, params=params)
    refused(recipe, tmp_path, f"method {method}", "--as adapter", error=MethodError)


def test_dense_experts(dense_family: Path, tmp_path: Path):
    recipe = recipe_of(dense_family / "base", [dense_family / "expert0"], Group((0.1,)))
    refused(recipe, tmp_path, "expert expert0", "whole checkpoint", "--as adapter")


def test_modules_that_were_replaced(untied: Path, tmp_path: Path):
    folder = tiny.save_lora_expert(untied, tmp_path / "expert", seed=3, modules_to_save=["norm"])
    recipe = recipe_of(untied, [folder], Group((0.5,)))
    export_adapter(recipe, tmp_path / "unchanged")  # a copy of the base's is no change
    shutil.rmtree(tmp_path / "unchanged")
    file = folder / "adapter_model.safetensors"
    save_file({k: v + 1 if "norm" in k else v for k, v in load_file(file).items()}, file)
    refused(recipe, tmp_path, "expert expert", "input_layernorm.weight", "modules_to_save")


def test_nothing_to_write(lora_family: Path, tmp_path: Path):
    refused(recipe_of(lora_family / "base", [lora_family / "expert0"], Group((0.0,))), tmp_path, "all weights are zero")


def test_a_base_that_is_a_stage(lora_family: Path, tmp_path: Path):
    stage = recipe_of(lora_family / "base", [lora_family / "expert0"], Group((1.0,)))
    recipe = replace(
        recipe_of(lora_family / "base", [lora_family / "expert1"], Group((1.0,))), base=Source("base", recipe=stage)
    )
    refused(recipe, tmp_path, "stage", "Export the stage")


def test_numbers_beyond_float32(lora_family: Path, tmp_path: Path):
    refused(recipe_of(lora_family / "base", [lora_family / "expert0"], Group((1e39,))), tmp_path, "not finite")
