"""Recipes: read, written, hashed; what is wrong with one is said with file and key."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import MethodError, SpecError
from evomerge.methods.base import TensorInfo
from evomerge.recipe import Group, Recipe, Source

SHORT = {
    "method": "ties",
    "base": "models/base",
    "experts": {"add": "adapters/add", "topic": "adapters/topic"},
    "weights": {"add": 0.5, "topic": 0.7},
}


def full(**changes) -> Recipe:
    recipe = Recipe(
        base=Source("base", "/models/base", "aa" * 32),
        experts=(Source("add", "/adapters/add", "bb" * 32), Source("topic", "/adapters/topic", "cc" * 32)),
        method="ties",
        groups=(Group((0.5, 1 / 3), (0, 2)), Group((1e-5, -2.0), (2, 4), {"density": 0.9})),
        params={"density": 0.1},
        seed=7,
        export_dtype="float32",
    )
    return replace(recipe, **changes)


def refused(data: object, *words: str, error: type[Exception] = SpecError) -> None:
    with pytest.raises(error) as raised:
        Recipe.from_dict(data, where="my.yaml")
    for word in ("my.yaml", *words):
        assert word in str(raised.value)


def test_yaml_round_trip(tmp_path: Path):
    recipe = full()
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    again = Recipe.load(tmp_path / "recipe.yaml")
    assert again.to_dict() == recipe.to_dict()
    assert again.groups == recipe.groups
    assert again.hash == recipe.hash
    assert again.to_yaml() == recipe.to_yaml()


def test_json_is_read_too(tmp_path: Path):
    (tmp_path / "recipe.json").write_text(json.dumps(full().to_dict()))
    assert Recipe.load(tmp_path / "recipe.json").hash == full().hash


finite = st.floats(allow_nan=False, allow_infinity=False)


def test_a_small_weight_is_a_number_however_it_is_written(tmp_path: Path):
    """YAML 1.1 takes 1e-05, as Python and JSON write it, for text."""
    text = yaml.safe_dump({**SHORT, "weights": "HERE"}).replace("HERE", "[1e-05, 2E-5]")
    (tmp_path / "recipe.yaml").write_text(text)
    assert Recipe.load(tmp_path / "recipe.yaml").groups[0].weights == (0.00001, 0.00002)


@given(weights=st.lists(st.tuples(finite, finite), min_size=1, max_size=4), seed=st.integers(0, 2**63 - 1))
def test_every_number_survives(weights: list[tuple[float, float]], seed: int):
    """Bit for bit, through YAML."""
    groups = tuple(Group(pair, (i, i + 1)) for i, pair in enumerate(weights))
    recipe = full(groups=groups, seed=seed)
    again = Recipe.from_dict(yaml.safe_load(recipe.to_yaml()))
    assert again.groups == groups
    assert again.seed == seed
    assert again.hash == recipe.hash


def test_the_short_form():
    recipe = Recipe.from_dict(SHORT)
    assert recipe.base == Source("base", "models/base")
    assert recipe.experts == (Source("add", "adapters/add"), Source("topic", "adapters/topic"))
    assert recipe.groups == (Group((0.5, 0.7)),)
    assert recipe.export_dtype == "bfloat16"
    assert recipe.params["density"] == 0.2  # the method's default is part of the recipe


@pytest.mark.parametrize("weights", [[0.5, 0.5], 0.5, {"topic": 0.5, "add": 0.5}])
def test_ways_to_give_weights(weights: object):
    assert Recipe.from_dict({**SHORT, "weights": weights}).groups[0].weights == (0.5, 0.5)


def test_paths_are_relative_to_the_file(tmp_path: Path):
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(
            {
                **SHORT,
                "experts": {"add": "/somewhere/add", "topic": "a/b"},
            }
        )
    )
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    assert recipe.base.path == str(tmp_path / "models" / "base")
    assert [source.path for source in recipe.experts] == ["/somewhere/add", "a/b"]  # not there: perhaps an id


# --- the hash ------------------------------------------------------------------------------------------------------


def test_places_do_not_count():
    recipe = full()
    moved = full(
        base=replace(recipe.base, path="D:/x"), experts=tuple(replace(s, path=f"/y/{s.name}") for s in recipe.experts)
    )
    assert moved.hash == recipe.hash


def test_without_content_hashes_places_count():
    recipe = full(base=Source("base", "/models/base"))
    assert replace(recipe, base=Source("base", "/models/other")).hash != recipe.hash


def test_everything_else_counts():
    recipe = full()
    others = [
        full(base=replace(recipe.base, sha256="dd" * 32)),
        full(experts=recipe.experts[::-1]),
        full(method="dare_ties"),
        full(groups=(recipe.groups[0], replace(recipe.groups[1], weights=(1e-5, -2.0000000000000004)))),
        full(groups=(recipe.groups[0], replace(recipe.groups[1], params={}))),
        full(params={"density": 0.2}),
        full(seed=8),
        full(export_dtype="bfloat16"),
    ]
    assert len({recipe.hash, *(other.hash for other in others)}) == len(others) + 1


def test_spelling_does_not_count():
    """A default written out, a whole number for a float: the same merge, the same hash."""
    assert full(params={"density": 1, "scale": 1}).hash == full(params={"density": 1.0}).hash
    assert full(groups=(Group((1, 2)),)).hash == full(groups=(Group((1.0, 2.0)),)).hash


def test_the_hash_is_the_same_in_another_process():
    script = (
        "import sys, yaml; from evomerge.recipe import Recipe; print(Recipe.from_dict(yaml.safe_load(sys.stdin)).hash)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=full().to_yaml(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == full().hash


def test_importing_recipes_needs_no_torch():
    script = "import sys; import evomerge.recipe; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "False\n"
    )


# --- groups --------------------------------------------------------------------------------------------------------


def test_which_group_a_tensor_belongs_to():
    recipe = full()
    first, second = recipe.groups
    assert recipe.group_for(TensorInfo("model.embed_tokens.weight", "embedding", None, 4)) is first
    assert recipe.group_for(TensorInfo("model.layers.1.mlp.up_proj.weight", "mlp", 1, 4)) is first
    assert recipe.group_for(TensorInfo("model.layers.2.mlp.up_proj.weight", "mlp", 2, 4)) is second
    assert recipe.group_for(TensorInfo("model.norm.weight", "norm", None, 4)) is second
    assert recipe.group_for(TensorInfo("lm_head.weight", "head", None, 4)) is second


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"wieghts": {}}, ["'wieghts'", "Did you mean 'weights'"]),
        ({"method": "tie"}, ["method", "'tie'", "Did you mean 'ties'"]),
        ({"method": None}, ["method"]),
        ({"experts": {}}, ["experts"]),
        ({"experts": "a"}, ["experts"]),
        ({"experts": {"add": 3}}, ["experts.add", "3"]),
        ({"experts": [{"name": "a", "path": "x"}, {"name": "a", "path": "y"}]}, ["'a'"]),
        ({"base": None}, ["base"]),
        ({"base": {"path": "x", "sha": "y"}}, ["base", "'sha'", "sha256"]),
        ({"base": {"path": "x", "sha256": 0}}, ["base", "sha256 must be text", "0"]),
        ({"weights": {"add": 0.5}}, ["weights", "topic"]),
        ({"weights": {"add": 0.5, "topic": 1, "spam": 2}}, ["weights", "'spam'"]),
        ({"weights": {"add": 0.5, "topic": float("nan")}}, ["weights.topic", "nan"]),
        ({"weights": {"add": 0.5, "topic": "1e-3"}}, ["weights.topic", "1e-3", "quotation marks"]),
        ({"weights": {"add": 0.5, "topic": True}}, ["weights.topic", "True"]),
        ({"weights": [1, 2, 3]}, ["weights", "add, topic"]),
        ({"groups": [{"weights": [1, 2]}]}, ["weights", "groups"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"seed": 1.5}, ["seed", "1.5"]),
        ({"export_dtype": "bf16"}, ["export_dtype", "bfloat16"]),
        ({"evomerge_recipe": 2}, ["evomerge_recipe", "2"]),
        ({"params": [1]}, ["params"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused(changes: dict, words: list[str]):
    refused({**SHORT, **changes}, *words)


def test_parameters_are_the_methods_affair():
    refused({**SHORT, "params": {"dense": 0.5}}, "params", "'dense'", "density", error=MethodError)
    refused({**SHORT, "params": {"density": 0}}, "params", "density=0", "(0, 1]", error=MethodError)


def test_wrong_number_of_experts():
    three = {name: name for name in "abc"}
    refused({"method": "slerp", "base": "b", "experts": three, "weights": 1}, "slerp", "3")


@pytest.mark.parametrize(
    ("layers", "word"),
    [
        ([[0, 2], [3, 4]], "groups[1].layers"),
        ([[1, 4]], "groups[0].layers"),
        ([[0, 2], [2, 2]], "groups[1].layers"),
        ([[0, 2], None], "groups[1].layers"),
        ([[0, 2, 4]], "groups[0].layers"),
    ],
)
def test_groups_that_do_not_cover_the_layers(layers: list, word: str):
    data = {key: value for key, value in SHORT.items() if key != "weights"}
    refused({**data, "groups": [{"weights": 1, **({"layers": rng} if rng else {})} for rng in layers]}, word)


def test_not_a_table():
    refused([1, 2])
    refused("ties")


@pytest.mark.parametrize(
    "text",
    ["a: !!python/object/apply:os.system ['echo hi']", "a: [1", "\x00", "!!python/name:os.system", "seed: 1\nseed: 2"],
)
def test_only_plain_yaml_is_read(tmp_path: Path, text: str):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(SpecError, match=r"recipe\.yaml"):
        Recipe.load(tmp_path / "recipe.yaml")


def test_no_such_file(tmp_path: Path):
    with pytest.raises(SpecError, match=r"nowhere\.yaml"):
        Recipe.load(tmp_path / "nowhere.yaml")
