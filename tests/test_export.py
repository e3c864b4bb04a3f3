"""Exports: whole or not there, loadable by anyone, and honest about what they hold."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from evomerge.errors import CheckpointError
from evomerge.exporting import MANIFEST, export, is_complete_export
from evomerge.merging import verify_sources
from evomerge.modelcard import model_card
from evomerge.recipe import Group, Recipe, Source


@pytest.fixture
def recipe(lora_family: Path) -> Recipe:
    return Recipe(
        base=Source("base", str(lora_family / "base")),
        experts=tuple(Source(f"skill{t}", str(lora_family / f"expert{t}")) for t in range(2)),
        method="task_arithmetic",
        groups=(Group((0.4, 0.7)),),
    )


def test_plain_transformers_loads_it(recipe: Recipe, lora_family: Path, tmp_path: Path):
    out = export(replace(recipe, export_dtype="float16"), tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.float16
    assert model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id == 1
    first, second = (transformers.AutoTokenizer.from_pretrained(f) for f in (out, lora_family / "base"))
    assert first("Hello (1+2)?")["input_ids"] == second("Hello (1+2)?")["input_ids"]
    base = json.loads((lora_family / "base" / "config.json").read_text())
    assert json.loads((out / "config.json").read_text()) == {**base, "dtype": "float16"}


def test_what_is_in_the_folder(recipe: Recipe, tmp_path: Path):
    out = export(recipe, tmp_path / "deep" / "out")
    assert {file.name for file in out.iterdir()} == {
        "README.md", "config.json", "evomerge_manifest.json", "generation_config.json", "model.safetensors",
        "recipe.yaml", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert list(out.parent.iterdir()) == [out]
    assert Recipe.load(out / "recipe.yaml").hash == recipe.hash


def test_chat_templates_come_along(recipe: Recipe, lora_family: Path, tmp_path: Path):
    """The default one and those with a name: transformers finds the same ones in the export."""
    base = shutil.copytree(lora_family / "base", tmp_path / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": "a {{ messages }}", "tools": "b {{ messages }}"}
    tokenizer.save_pretrained(base)
    out = export(replace(recipe, base=Source("base", str(base))), tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    assert is_complete_export(out, hashes=True)
    (out / "additional_chat_templates" / "tools.jinja").unlink()
    assert not is_complete_export(out)


def test_the_recipe_in_the_folder_repeats_it(recipe: Recipe, tmp_path: Path):
    first = export(verify_sources(recipe), tmp_path / "first", shard_size=20_000)
    second = export(Recipe.load(first / "recipe.yaml"), tmp_path / "second", shard_size=20_000)
    for file in first.iterdir():
        assert (second / file.name).read_bytes() == file.read_bytes(), file.name


def test_shards_hold_what_one_file_holds(recipe: Recipe, tmp_path: Path):
    """And no shard holds more than was asked for, unless in a single tensor."""
    whole = load_file(export(recipe, tmp_path / "whole") / "model.safetensors")
    out = export(recipe, tmp_path / "sharded", shard_size=6000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in whole.values())
    seen = {}
    for file in files:
        with safe_open(file, "pt") as handle:
            assert handle.metadata() == {"format": "pt"}
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(t.numel() * t.itemsize for t in tensors.values()) <= 6000
        seen |= dict.fromkeys(tensors, file.name)
        assert all(torch.equal(tensor, whole[name]) for name, tensor in tensors.items())
    assert seen == index["weight_map"]
    assert seen.keys() == whole.keys()


def test_older_and_nested_type_fields(recipe: Recipe, lora_family: Path, tmp_path: Path):
    """torch_dtype of older configs, and those of a config's parts, say the truth as well; names of code are dropped."""
    base = shutil.copytree(lora_family / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    del config["dtype"]
    config |= {"torch_dtype": "float32", "part": {"dtype": "float32", "size": 3}, "auto_map": {"AutoModel": "x--y.Z"}}
    (base / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(
        json.dumps({**tokenizer, "auto_map": {"AutoTokenizer": ["x--y.Z", None]}})
    )
    out = export(replace(recipe, base=Source("base", str(base))), tmp_path / "out")
    written = json.loads((out / "config.json").read_text())
    assert (written["dtype"], written["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert written["part"] == {"dtype": "bfloat16", "size": 3}
    assert "auto_map" not in written
    assert json.loads((out / "tokenizer_config.json").read_text()) == tokenizer


# --- whole or not there --------------------------------------------------------------------------------------------


def test_a_complete_export(recipe: Recipe, tmp_path: Path):
    out = export(recipe, tmp_path / "out")
    assert is_complete_export(out)
    assert is_complete_export(out, hashes=True)
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["files"].keys() == {file.name for file in out.iterdir()} - {MANIFEST}
    assert manifest["recipe"] == recipe.hash


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", MANIFEST])
def test_an_export_that_lacks_something(recipe: Recipe, tmp_path: Path, file: str):
    out = export(recipe, tmp_path / "out")
    content = (out / file).read_bytes()
    (out / file).write_bytes(content[:-1] if file != MANIFEST else content[:50])
    assert not is_complete_export(out)
    (out / file).unlink()
    assert not is_complete_export(out)


def test_an_export_with_a_flipped_bit(recipe: Recipe, tmp_path: Path):
    out = export(recipe, tmp_path / "out")
    content = bytearray((out / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (out / "model.safetensors").write_bytes(content)
    assert is_complete_export(out)
    assert not is_complete_export(out, hashes=True)


@pytest.mark.parametrize("content", ["", "[]", '{"files": {}}', '{"files": [1]}', '{"files": {"config.json": 3}}'])
def test_nonsense_manifest(tmp_path: Path, content: str):
    (tmp_path / MANIFEST).write_text(content)
    assert not is_complete_export(tmp_path)
    assert not is_complete_export(tmp_path / "nowhere")


def test_an_empty_folder_may_be_used(recipe: Recipe, tmp_path: Path):
    (tmp_path / "out").mkdir()
    assert is_complete_export(export(recipe, tmp_path / "out"))


def test_a_folder_that_is_not_empty(recipe: Recipe, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"out is not empty"):
        export(recipe, tmp_path / "out")
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "thesis.txt"]


def test_a_file_of_that_name(recipe: Recipe, tmp_path: Path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file"):
        export(recipe, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_source_that_is_not_there(recipe: Recipe, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"expert skill: .*nowhere"):
        export(replace(recipe, experts=(Source("skill", "nowhere"),), groups=(Group((1.0,)),)), tmp_path / "a" / "out")
    assert list(tmp_path.iterdir()) == []


def test_numbers_beyond_the_export_dtype(dense_family: Path, tmp_path: Path):
    """float16 ends at 65504: an infinite weight is refused by name, and nothing is left behind."""
    family = shutil.copytree(dense_family, tmp_path / "family")
    file, name = family / "expert0" / "model.safetensors", "model.layers.2.mlp.up_proj.weight"
    tensors = {k: v.clone() for k, v in load_file(file).items()}
    tensors[name][5, 6] = 1e6
    save_file(tensors, file, metadata={"format": "pt"})
    recipe = Recipe(
        base=Source("base", str(family / "base")),
        experts=(Source("a", str(family / "expert0")),),
        method="task_arithmetic",
        groups=(Group((1.0,)),),
        export_dtype="float16",
    )
    with pytest.raises(CheckpointError, match=rf"{name} is not finite in float16"):
        export(recipe, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["family"]
    assert is_complete_export(export(replace(recipe, export_dtype="bfloat16"), tmp_path / "out"))


def test_a_disk_that_is_known_to_be_too_small(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="GB left"):
        export(recipe, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


RUN = """
import json, os, resource, signal, sys
from pathlib import Path
from evomerge.errors import CheckpointError
from evomerge.exporting import export
from evomerge.recipe import Recipe
recipe, out = Recipe.from_dict(json.loads(sys.argv[1])), Path(sys.argv[2])
{fault}
"""
NO_ROOM = """
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # a real write that fails half-way
try:
    export(recipe, out)
except CheckpointError as error:
    print(error)
"""
KILLED = """
export(recipe, out, progress=lambda done, total: done < total / 2 or os.kill(os.getpid(), signal.SIGKILL))
"""


def run(fault: str, recipe: Recipe, out: Path) -> subprocess.CompletedProcess[str]:
    script = RUN.format(fault=fault)
    return subprocess.run(
        [sys.executable, "-c", script, json.dumps(recipe.to_dict()), str(out)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_write_that_fails(recipe: Recipe, tmp_path: Path):
    done = run(NO_ROOM, recipe, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "could not be written" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_killed_half_way(recipe: Recipe, tmp_path: Path):
    """What is left has another name, is no complete export, and does not stand in the way of the next try."""
    assert run(KILLED, recipe, tmp_path / "out").returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".partial")
    assert not is_complete_export(left)
    assert is_complete_export(export(recipe, tmp_path / "out"))


# --- the model card ------------------------------------------------------------------------------------------------


def test_the_model_card(recipe: Recipe):
    recipe = replace(verify_sources(recipe), groups=(Group((0.25, 1.5), (0, 2)), Group((-0.125, 0.0), (2, 4))))
    card = {
        "study": "smollm2 | skills <b>",
        "subject": "trial:17",
        "scores": {"test": {"objective": 0.75, "tasks": {"add2": {"score": 0.5, "items": 150}}}},
        "metrics": {"add2": "exact_match"},
        "compute_dtype": "float32",
        "libraries": {"torch": "2.13.0"},
    }
    text = model_card(recipe, {"architectures": ["LlamaForCausalLM"]}, card)
    head = yaml.safe_load(text.split("---")[1])
    assert head["library_name"] == "transformers"
    assert "merge" in head["tags"]
    rows = [
        "| layers 0 to 1 | 0.25 | 1.5 |",
        "| layers 2 to 3 | -0.125 | 0 |",
        "| test | add2 | exact_match | 0.5000 | 150 |",
    ]
    facts = ["task_arithmetic", "trial:17", "LlamaForCausalLM", "0.7500", "torch 2.13.0", recipe.base.sha256[:16]]
    for words in (*rows, *facts, recipe.hash):
        assert words in text
    assert "<b>" not in text
    assert "smollm2 \\| skills" in text


def test_a_card_without_a_study(recipe: Recipe):
    text = model_card(recipe, {}, {})
    assert "Scores" not in text
    assert "skill0" in text
