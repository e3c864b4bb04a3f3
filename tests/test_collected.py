"""Folders of statistics: written here by hand, read by recipes, experiments and merges; what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from statistics_folder import write_statistics

from evomerge.collected import open_collected, read_manifest, verify_collected
from evomerge.errors import CheckpointError, MethodError, SpecError
from evomerge.merging import Merger, open_sources, verify_sources
from evomerge.methods import merge_state_dicts
from evomerge.planning import build_plan
from evomerge.progress import Progress
from evomerge.recipe import Collected, Recipe
from evomerge.spec import load_spec
from evomerge.testing import tiny

EXPERTS = ("expert0", "expert1")


@pytest.fixture
def family(dense_family: Path, tmp_path: Path) -> Path:
    shutil.copytree(dense_family, tmp_path / "family")
    write_statistics(tmp_path / "family", EXPERTS, tmp_path / "family" / "stats", "fisher", "loss")
    return tmp_path / "family"


def recipe_file(family: Path, **changes) -> Path:
    data = {
        "method": "fisher",
        "base": "base",
        "experts": {"expert0": "expert0", "expert1": "expert1"},
        "weights": {"expert0": 1.0, "expert1": 0.5},
        "statistics": "stats",
        "export_dtype": "float32",
        **changes,
    }
    path = family / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in data.items() if v is not None}, sort_keys=False))
    return path


def test_a_merge_by_recipe_is_the_merge_in_memory(family: Path, tmp_path: Path):
    recipe = verify_sources(Recipe.load(recipe_file(family)))
    out = tmp_path / "out"
    out.mkdir()
    Merger(open_sources(recipe)).stream(recipe, out)
    models = [load_file(family / name / "model.safetensors") for name in ("base", "expert0", "expert1")]
    statistics = [load_file(family / "stats" / f"expert{t}.fisher.safetensors") for t in range(2)]
    expected = merge_state_dicts(
        "fisher", models[0], models[1:], weights=[1.0, 0.5], statistics=statistics, dtype=torch.float32
    )
    merged = load_file(out / "model.safetensors")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_the_recipe_is_of_what_the_statistics_say_not_where_they_lie(family: Path, tmp_path: Path):
    recipe = verify_sources(Recipe.load(recipe_file(family)))
    assert recipe.statistics is not None and set(recipe.statistics.sha256) == {"fisher"}
    shutil.copytree(family / "stats", tmp_path / "moved")
    moved = verify_sources(Recipe.load(recipe_file(family, statistics=str(tmp_path / "moved"))))
    assert moved.hash == recipe.hash
    write_statistics(family, EXPERTS, tmp_path / "moved", "fisher", seed=1)
    other = verify_sources(Recipe.load(recipe_file(family, statistics=str(tmp_path / "moved"))))
    assert other.hash != recipe.hash
    again = Recipe.from_dict(yaml.safe_load(recipe.to_yaml()))
    assert again.hash == recipe.hash and again.statistics == recipe.statistics
    with pytest.raises(CheckpointError, match="the recipe was made with"):
        verify_sources(replace(recipe, statistics=replace(recipe.statistics, path=str(tmp_path / "moved"))))


def test_experts_are_found_by_content_in_any_order_and_name(family: Path):
    swapped = verify_sources(
        Recipe.load(recipe_file(family, experts={"b": "expert1", "a": "expert0"}, weights={"a": 1, "b": 1}))
    )
    assert swapped.statistics is not None
    first, second = open_collected(swapped.statistics, "fisher", swapped)
    assert first.path.name == "expert1.fisher.safetensors" and second.path.name == "expert0.fisher.safetensors"
    assert torch.equal(first["model.norm.weight"], load_file(first.path)["model.norm.weight"])


def refused(family: Path, *words: str, error: type[Exception] = CheckpointError) -> None:
    with pytest.raises(error) as raised:
        verify_sources(Recipe.load(recipe_file(family)))
    for word in words:
        assert word in str(raised.value)


def test_statistics_of_other_sources_are_refused(family: Path):
    tiny.save_dense_expert(family / "base", family / "other", seed=9)
    shutil.rmtree(family / "expert1")
    (family / "other").rename(family / "expert1")
    refused(family, "expert1", "evomerge collect EXPERIMENT --what fisher")


def test_statistics_on_another_base_are_refused(family: Path):
    manifest = json.loads((family / "stats" / "manifest.json").read_text())
    manifest["kinds"]["fisher"]["base"] = "0" * 64
    (family / "stats" / "manifest.json").write_text(json.dumps(manifest))
    refused(family, "another base")


def test_what_is_no_folder_of_statistics_is_refused(family: Path):
    stats = family / "stats"
    with pytest.raises(CheckpointError, match="no statistics of the kind gram, but fisher, loss"):
        recipe = verify_sources(Recipe.load(recipe_file(family)))
        verify_collected(Collected(str(stats)), ["gram"], recipe)
    (stats / "expert1.fisher.safetensors").unlink()
    refused(family, "is gone")
    (stats / "manifest.json").write_text('{"evomerge_statistics": 1, "kinds": {"fisher": {"base": 3}}}')
    refused(family, "damaged")
    (stats / "manifest.json").write_text("{")
    refused(family, "does not describe statistics")
    (stats / "manifest.json").unlink()
    refused(family, "there is no manifest.json", "evomerge collect")


def test_a_changed_file_is_refused(family: Path):
    path = family / "stats" / "expert1.fisher.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(family, "expert1.fisher.safetensors is not what manifest.json beside it says")


def test_a_manifest_cannot_name_files_elsewhere(family: Path):
    manifest = json.loads((family / "stats" / "manifest.json").read_text())
    manifest["kinds"]["fisher"]["files"][0]["file"] = "../expert0/model.safetensors"
    (family / "stats" / "manifest.json").write_text(json.dumps(manifest))
    refused(family, "no file of this folder")
    assert read_manifest(family / "stats") == manifest


def test_a_recipe_without_statistics_is_refused_when_it_is_read(family: Path):
    with pytest.raises(SpecError, match="method fisher needs them") as raised:
        Recipe.load(recipe_file(family, statistics=None))
    assert "evomerge collect EXPERIMENT --what fisher" in str(raised.value)
    with pytest.raises(SpecError, match="method ties uses none"):
        Recipe.load(recipe_file(family, method="ties"))
    with pytest.raises(SpecError, match="must be the path of a folder"):
        Recipe.load(recipe_file(family, statistics=3))
    with pytest.raises(MethodError, match="needs statistics"):
        merge_state_dicts("fisher", {"w": torch.ones(2)}, [{"w": torch.ones(2)}])
    with pytest.raises(MethodError, match="one mapping of statistics an expert"):
        merge_state_dicts("fisher", {"w": torch.ones(2)}, [{"w": torch.ones(2)}], statistics=[])


# --- experiments


TPE = {"method": "tpe", "budget": 4}
SPACE = {
    "method": {"choices": ["fisher", "lm_cocktail", "task_arithmetic"]},
    "weights": {"granularity": "task", "range": [0.1, 2.0], "initial": 1.0},
}


def test_candidates_have_the_statistics_of_their_method(family: Path):
    path = tiny.write_experiment(family, space=SPACE, search=TPE, statistics="stats")
    plan = build_plan(load_spec(path), Progress(quiet=True))
    for method, kinds in (("fisher", {"fisher"}), ("lm_cocktail", {"loss"}), ("task_arithmetic", set())):
        point = {**plan.space.initial(), "method": method}
        point = {d.name: point.get(d.name, d.initial) for d in plan.space.active(method)}
        recipe = plan.space.decode(point)
        assert set(recipe.statistics.sha256 if recipe.statistics else ()) == kinds
        assert Recipe.from_dict(recipe.to_dict()).hash == recipe.hash
    assert {key for key in plan.fingerprint if key.startswith("statistics")} == {
        "statistics of fisher",
        "statistics of lm_cocktail",
    }


def test_an_experiment_without_statistics_is_told_what_to_type(family: Path):
    path = tiny.write_experiment(family, space=SPACE, search=TPE)
    with pytest.raises(SpecError) as raised:
        build_plan(load_spec(path), Progress(quiet=True))
    assert f"{path}: statistics" in str(raised.value)
    assert f"evomerge collect {path} --what fisher" in str(raised.value)
    path = tiny.write_experiment(family, space=SPACE, search=TPE, statistics="nowhere")
    with pytest.raises(SpecError, match="nowhere holds none"):
        build_plan(load_spec(path), Progress(quiet=True))
