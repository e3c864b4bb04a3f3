"""Filters and methods by module, by the command line: searched, shown, exported, merged again, moved, refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from .support import Server

SPLIT = {"with": "my_eval.py@score", "tasks": {"one": {}}, "split": {"search": 4, "select": 4, "test": 4}}
DENSITY = {"range": [0.1, 0.9], "initial": 0.3}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.slow
def test_a_method_for_each_part(server: Server, experiment: Callable[..., Path], dense_family: Path, tmp_path: Path):
    path = experiment(
        dense_family,
        space={
            "methods": {
                "attention": {"method": "ties", "params": {"density": DENSITY}},
                "*.mlp.down_proj.*": {"method": "dare_linear", "params": {"density": DENSITY}},
                "norm": "base",
                "rest": "task_arithmetic",
            },
            "weights": {"granularity": "layer_groups", "groups": 2, "range": [0, 2], "initial": 0.7},
        },
        search={"method": "tpe", "budget": 3, "initial": [{"control": "average"}]},
        evaluate=SPLIT,
    )
    shown = server.run("run", "--dry-run", path).out
    for line in (
        "space        task_arithmetic, ties and dare_linear, 6 dimensions",
        "attention.density", "*.mlp.down_proj.*.density",
        "  attention              16 tensors that experts change, by ties",
        "4 tensors that experts change, by dare_linear", "9 tensors that experts change, at the base",
        "9 tensors that experts change, by task_arithmetic",
    ):  # fmt: skip
        assert line in shown, shown
    server.run("run", path)
    recipe = yaml.safe_load(server.run("show", path, "best", "--format", "recipe").out)
    assert {group.get("method") for group in recipe["groups"]} == {"ties", "dare_linear", "task_arithmetic", None}
    assert "a method for each part" in server.run("show", path, "best", "--format", "mergekit", code=2).err

    server.run("export", path, "--out", tmp_path / "out")
    assert "identical" in server.run("evaluate", tmp_path / "out", path, "--split", "test", "--compare").out
    merged, base = weights(tmp_path / "out"), weights(dense_family / "base")
    assert all(torch.equal(merged[name], base[name]) == ("norm" in name) for name in base)
    assert "`dare_linear`" in (tmp_path / "out" / "README.md").read_text()
    server.run("merge", tmp_path / "out" / "recipe.yaml", "--out", tmp_path / "again")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()

    server.run("dump", path, "--out", tmp_path / "study.json")
    storage = f"sqlite:///{tmp_path / 'other.db'}"
    server.run("load", tmp_path / "study.json", "--storage", storage)
    assert server.run("leaderboard", "tiny", "--storage", storage).out == server.run("leaderboard", path).out
    server.run("resume", path, "--budget", "4")


def test_a_filtered_merge_of_a_mixture_of_experts(server: Server, moe_family: Path, tmp_path: Path):
    data = {
        "method": "ties", "base": str(moe_family / "base"), "weights": 0.8, "export_dtype": "bfloat16",
        "experts": {"a": str(moe_family / "expert0"), "b": str(moe_family / "expert1")},
        "filter": {"tensors": ["*.experts.[01].w1.*"], "rest": "base"},
    }  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(data))
    server.run("merge", recipe, "--out", tmp_path / "out")
    merged, base = weights(tmp_path / "out"), weights(moe_family / "base")
    changed = {name for name in base if not torch.equal(merged[name], base[name].to(merged[name].dtype))}
    assert changed == {name for name in base if ".experts.0.w1." in name or ".experts.1.w1." in name}

    recipe.write_text(yaml.safe_dump({**data, "filter": {"tensors": ["*gate_up_proj*"], "rest": "base"}}))
    refused = server.run("merge", recipe, "--out", tmp_path / "none", code=2).err
    for word in ("recipe.yaml: filter", "'*gate_up_proj*' matches no tensor", "such as model.layers."):
        assert word in " ".join(refused.split())
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (
            {"method": "ties", "filter": {"tensors": ["*slef_attn*"], "rest": "base"}},
            ["space.filter", "(*slef_attn*) holds 0"],
        ),
        ({"methods": {"*q_porj*": "ties", "rest": "ties"}}, ["space.methods.*q_porj*", "matches no tensor", "such as"]),
        ({"methods": {"norm": "ties", "rest": "base"}}, ["space.methods.norm", "no expert changes"]),
        ({"methods": {"mlp": "ties", "rest": "expert9"}}, ["space.methods.rest", "expert9"]),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_loads(
    server: Server, experiment: Callable[..., Path], lora_family: Path, space: dict, words: list[str]
):
    weights = {"granularity": "task", "range": [0, 2], "initial": 1}
    path = experiment(lora_family, space={**space, "weights": weights}, evaluate=SPLIT)
    run = server.run("run", "--dry-run", path, code=2)
    assert not run.model_modules
    for word in ("experiment.yaml", *words):
        assert word in " ".join(run.err.split())
