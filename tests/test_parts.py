"""Filters, and a method for each part of the model: what recipes say, and that the merge is that of each part."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_merging import assert_equal, recipe_of, resident, snapshot, weights_in

from evomerge.adapter_export import adapter_modules
from evomerge.errors import MethodError, SpecError, UserError
from evomerge.exporting import export
from evomerge.mergekit_writing import to_mergekit
from evomerge.merging import Merger, open_sources
from evomerge.methods import METHODS, merge_state_dicts
from evomerge.methods.base import TensorInfo
from evomerge.modelcard import model_card
from evomerge.parts import KINDS, is_pattern, matcher
from evomerge.recipe import Group, Recipe, Source

SHORT: dict[str, Any] = {
    "method": "ties",
    "base": "base",
    "experts": {"add": "add", "topic": "topic"},
    "weights": {"add": 0.5, "topic": 0.7},
}
BY_METHODS: dict[str, Any] = {key: SHORT[key] for key in ("base", "experts", "weights")}


def short(**changes: Any) -> Recipe:
    return Recipe.from_dict({k: v for k, v in {**SHORT, **changes}.items() if v is not None}, where="my.yaml")


def parts(**methods: Any) -> Recipe:
    return Recipe.from_dict({**BY_METHODS, "methods": methods}, where="my.yaml")


def refused(data: dict[str, Any], *words: str) -> None:
    with pytest.raises(UserError) as raised:
        Recipe.from_dict(data, where="my.yaml")
    for word in ("my.yaml", *words):
        assert word in str(raised.value)


# --- what the short forms mean


def test_a_filter_is_two_groups():
    recipe = short(filter={"tensors": ["*self_attn*"], "kinds": ["attention"], "rest": "average"})
    merged, rest = recipe.groups
    assert merged == Group((0.5, 0.7), kinds=("attention",), tensors=("*self_attn*",))
    assert rest == Group((0.5, 0.5), method="linear", params={"normalize": True})
    assert recipe.methods == ("ties", "linear")
    base, expert = (short(filter={"kinds": ["mlp"], "rest": rest}).groups[1] for rest in ("base", "topic"))
    assert (base.method, base.weights) == ("task_arithmetic", (0.0, 0.0))
    assert (expert.method, expert.weights, expert.params) == ("linear", (0.0, 1.0), {"normalize": True})


def test_methods_are_a_group_a_part_and_the_rest_is_the_last():
    recipe = Recipe.from_dict(
        {
            **BY_METHODS,
            "methods": {
                "rest": {"method": "ties", "params": {"density": 0.3}, "weights": 1},
                "attention": "dare_ties",
                "*.norm.*": "base",
                "mlp": {"method": "ties", "params": {"density": 0.9}},
            },
        }
    )
    assert recipe.methods == ("dare_ties", "task_arithmetic", "ties")
    assert [group.part for group in recipe.groups] == [
        (None, ("attention",), None),
        (None, None, ("*.norm.*",)),
        (None, ("mlp",), None),
        (None, None, None),
    ]
    assert [group.weights for group in recipe.groups] == [(0.5, 0.7), (0.0, 0.0), (0.5, 0.7), (1.0, 1.0)]
    assert [recipe.params_of(group).get("density") for group in recipe.groups] == [0.5, None, 0.9, 0.3]
    assert set(recipe.groups[0].params) == set(METHODS["dare_ties"].params)  # the defaults are part of the recipe


def test_round_trips_through_yaml(tmp_path: Path):
    for recipe in (
        short(filter={"tensors": ["*a*", "model.norm.weight"], "rest": "add"}),
        parts(attention={"method": "ties", "params": {"density": 0.3}}, mlp="dare_linear", rest="base"),
    ):
        (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
        again = Recipe.load(tmp_path / "recipe.yaml")
        assert again.groups == recipe.groups
        assert again.to_dict() == recipe.to_dict()
        assert again.hash == recipe.hash


# --- the hash


def test_equal_merges_have_equal_hashes_whichever_method_stands_at_the_top():
    filtered = short(params={"density": 0.3}, filter={"kinds": ["attention"], "rest": "base"})
    table = {"method": "ties", "params": {"density": 0.3}}
    assert parts(attention=table, rest="base").hash == filtered.hash
    assert parts(attention=table, rest={"method": "task_arithmetic", "weights": 0}).hash == filtered.hash
    groups = [{"kinds": ["attention"], "weights": [0.5, 0.7]}, {"method": "task_arithmetic", "weights": 0}]
    assert short(params={"density": 0.3}, weights=None, groups=groups).hash == filtered.hash
    for other in (
        parts(attention=table, rest="average"),
        parts(mlp=table, rest="base"),
        parts(attention="ties", rest="base"),
        parts(attention={**table, "weights": 1}, rest="base"),
    ):
        assert other.hash != filtered.hash


def test_a_group_that_repeats_the_recipes_method_changes_no_hash():
    plain = [{"kinds": ["mlp"], "weights": 1, "params": {"density": 0.5}}, {"weights": 1}]
    own = [{**plain[0], "method": "ties"}, {"weights": 1}]
    assert short(weights=None, groups=plain).hash == short(weights=None, groups=own).hash
    both = [{**plain[0], "method": "ties"}, {"weights": 1, "method": "ties"}]
    assert short(weights=None, groups=both).hash == short(weights=None, groups=plain).hash


def test_recipes_without_parts_keep_their_hash():
    """Stored studies have them: SHA-256 of this very text."""
    recipe = Recipe(
        Source("b", "somewhere", "aa"), (Source("x", "else", "bb"),), "task_arithmetic",
        (Group((0.5,), (0, 2)), Group((1.0,), (2, 4), {"scale": 2.0})), {"scale": 1.0}, 3, "float32",
    )  # fmt: skip
    text = (
        '{"base":{"name":"b","sha256":"aa"},"evomerge_recipe":1,"experts":[{"name":"x","sha256":"bb"}],'
        '"export_dtype":"float32","groups":[{"layers":[0,2],"weights":{"x":0.5}},{"layers":[2,4],"params":{"scale":2.0},'
        '"weights":{"x":1.0}}],"method":"task_arithmetic","params":{"scale":1.0},"seed":3}'
    )
    assert recipe.hash == hashlib.sha256(text.encode()).hexdigest()


# --- which tensors

names = st.lists(st.sampled_from("abc."), min_size=1, max_size=5).map("".join)
words = st.lists(st.sampled_from(["a", "b", "c", ".", "*", "?", "[ab]"]), min_size=1, max_size=4).map("".join)


@given(st.lists(words, min_size=1, max_size=3), names)
def test_patterns_are_those_of_the_shell(patterns: list[str], name: str):
    expected = any(fnmatch.fnmatchcase(name, word) if is_pattern(word) else name == word for word in patterns)
    assert matcher(patterns)(name) == expected


conditions = st.fixed_dictionaries(
    {},
    optional={
        "kinds": st.lists(st.sampled_from(KINDS), min_size=1, max_size=3, unique=True).map(tuple),
        "tensors": st.lists(words, min_size=1, max_size=3).map(tuple),
    },
)


@given(st.lists(conditions, max_size=5), st.lists(st.tuples(names, st.sampled_from(KINDS)), max_size=8))
def test_every_tensor_belongs_to_the_first_group_that_holds_it(groups: list[dict[str, Any]], tensors: list):
    listed = tuple(Group((float(n),), **part) for n, part in enumerate([*groups, {}]))
    recipe = Recipe(None, (Source("x", "x"),), "linear", listed)
    for name, kind in tensors:
        expected = next(
            n
            for n, part in enumerate([*groups, {}])
            if ("kinds" not in part or kind in part["kinds"])
            and (
                "tensors" not in part
                or any(fnmatch.fnmatchcase(name, w) if is_pattern(w) else name == w for w in part["tensors"])
            )
        )
        assert recipe.group_for(TensorInfo(name, kind)).weights == (float(expected),)


# --- the merge is that of each part

PARTS = {
    "attention": ("ties", {"density": 0.4}),
    "*mlp.up*": ("dare_ties", {}),
    "norm": ("slerp", {}),
    "rest": ("linear", {}),
}


def separately(folder: Path, held: dict[str, tuple[str, dict[str, Any]]], **options: Any) -> dict[str, torch.Tensor]:
    """Each part cut out of the files, and merged as if it were a model of its own."""
    base, *experts = (weights_in(folder / name) for name in ("base", "expert0", "expert1"))
    sources = open_sources(recipe_of(folder))
    infos = {name: sources.info(name) for name in base}
    merged, taken = {}, set()
    for label, (method, params) in held.items():
        mine = [
            n
            for n in base
            if n not in taken and (label == "rest" or infos[n].kind == label or fnmatch.fnmatchcase(n, label))
        ]
        taken |= {*mine}
        assert mine, label
        cut = [{n: tensors[n] for n in mine} for tensors in (base, *experts)]
        merged |= merge_state_dicts(method, cut[0], cut[1:], dtype=torch.float32, **params, **options)
    return merged


def by_parts(folder: Path, methods: dict[str, Any], **changes: Any) -> Recipe:
    data = {
        "base": str(folder / "base"), "experts": {n: str(folder / n) for n in ("expert0", "expert1")},
        "export_dtype": "float32", "methods": methods, "weights": [0.4, 0.7], **changes,
    }  # fmt: skip
    return Recipe.from_dict(data)


def streamed(recipe: Recipe, out: Path) -> dict[str, torch.Tensor]:
    return weights_in(export(recipe, out))


def test_merging_by_module_is_merging_each_part_by_its_method(dense_family: Path, tmp_path: Path):
    """Bit for bit, to disk and in place, and whatever was merged before."""
    methods = {label: {"method": method, "params": params} for label, (method, params) in PARTS.items()}
    recipe = by_parts(dense_family, methods, seed=3)
    expected = separately(dense_family, PARTS, weights=[0.4, 0.7], seed=3)
    assert_equal(streamed(recipe, tmp_path / "out"), expected)
    model, merger = resident(dense_family), Merger(open_sources(recipe))
    merger.into(model, recipe_of(dense_family, "ties", params={"density": 0.4}))
    for _ in range(2):
        merger.into(model, recipe)
        held = snapshot(model)
        assert all(torch.equal(held[name], tensor) for name, tensor in expected.items())


methods_of_parts = st.sampled_from(["ties", "dare_linear", "task_arithmetic", "linear", "magmax", "slerp", "average"])


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(["attention", "mlp", "*q_proj*", "*layers.1.*", "norm", "model.embed_tokens.weight"]),
        methods_of_parts, max_size=4,
    ),
    methods_of_parts,
    st.integers(0, 100),
)  # fmt: skip
def test_any_parts_by_any_methods(dense_family: Path, chosen: dict[str, str], rest: str, seed: int):
    held = {**chosen, "rest": rest}
    sources = open_sources(recipe_of(dense_family))
    infos = [sources.info(name) for name in sources.names]
    recipe = by_parts(dense_family, held, seed=seed)
    used = {id(recipe.group_for(info)) for info in infos}
    model = resident(dense_family)
    Merger(open_sources(recipe)).into(model, recipe)
    merged = snapshot(model)
    spelt = {
        label: ("linear", {"weights": [0.5, 0.5]}) if method == "average" else (method, {"weights": [0.4, 0.7]})
        for (label, method), group in zip(held.items(), recipe.groups, strict=True)
        if id(group) in used
    }
    expected = separately(dense_family, spelt, seed=seed)
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    assert len(expected) == len(infos)


def test_scope_model_is_about_the_tensors_of_the_method_alone(dense_family: Path, tmp_path: Path):
    params = {"density": 0.2, "scope": "model"}
    recipe = by_parts(dense_family, {"mlp": {"method": "ties", "params": params}, "rest": "task_arithmetic"})
    expected = separately(dense_family, {"mlp": ("ties", params), "rest": ("task_arithmetic", {})}, weights=[0.4, 0.7])
    assert_equal(streamed(recipe, tmp_path / "out"), expected)
    whole = by_parts(dense_family, {"rest": {"method": "ties", "params": params}})
    other = streamed(whole, tmp_path / "whole")
    assert any(not torch.equal(other[name], expected[name]) for name in expected if ".mlp." in name)


@pytest.mark.parametrize("family", ["dense_family", "lora_family"])
def test_the_rest_keeps_the_bytes_of_base_and_experts(family: str, request: pytest.FixtureRequest, tmp_path: Path):
    folder = request.getfixturevalue(family)
    base = weights_in(folder / "base")
    stored = str(base["model.norm.weight"].dtype).removeprefix("torch.")
    kept = streamed(by_parts(folder, {"mlp": "ties", "rest": "base"}, export_dtype=stored), tmp_path / "base")
    for name, tensor in base.items():
        assert torch.equal(kept[name].view(torch.int16), tensor.view(torch.int16)) == (".mlp." not in name or
            (family == "lora_family" and "gate" in name)), name  # fmt: skip
    if family == "dense_family":
        expert = weights_in(folder / "expert1")
        out = streamed(by_parts(folder, {"mlp": "ties", "rest": "expert1"}, export_dtype=stored), tmp_path / "expert")
        assert all(torch.equal(out[name], expert[name]) for name in base if ".mlp." not in name)
        average = streamed(by_parts(folder, {"mlp": "ties", "rest": "average"}), tmp_path / "average")
        for name in (n for n in base if ".mlp." not in n):
            mean = (weights_in(folder / "expert0")[name].double() + expert[name].double()) / 2
            torch.testing.assert_close(average[name].double(), mean, rtol=1e-6, atol=1e-6)


def test_a_part_at_the_base_is_written_once(dense_family: Path):
    """What a filter leaves at the base costs a search nothing: it is there already."""
    recipe = by_parts(dense_family, {"mlp": "ties", "rest": "base"})
    model, merger = resident(dense_family), Merger(open_sources(recipe))
    merger.into(model, recipe)
    place = dict(model.named_parameters())["model.norm.weight"]
    written, mlp = place._version, dict(model.named_parameters())["model.layers.0.mlp.up_proj.weight"]
    before = mlp._version
    merger.into(model, recipe)
    assert place._version == written
    assert mlp._version > before
    merger.into(model, recipe_of(dense_family))
    merger.into(model, recipe)
    assert torch.equal(place, weights_in(dense_family / "base")["model.norm.weight"].float())


def test_parts_of_a_mixture_of_experts_go_by_checkpoint_names(moe_family: Path, tmp_path: Path):
    held = {
        "*.experts.0.*": ("ties", {"density": 0.5}),
        "attention": ("dare_linear", {}),
        "rest": ("task_arithmetic", {}),
    }
    methods = {label: {"method": method, "params": params} for label, (method, params) in held.items()}
    recipe = by_parts(moe_family, methods)
    expected = separately(moe_family, held, weights=[0.4, 0.7])
    assert_equal(streamed(recipe, tmp_path / "out"), expected)
    direct, loaded = resident(moe_family), resident(moe_family)
    Merger(open_sources(recipe)).into(direct, recipe)
    other = type(loaded).from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert_equal(snapshot(direct), snapshot(other))
    with pytest.raises(SpecError, match=r"gate_up_proj.*matches no tensor"):
        open_sources(by_parts(moe_family, {"*experts.gate_up_proj*": "ties", "rest": "base"}))


# --- what else reads a recipe's method


def test_an_adapter_is_exported_by_groups(lora_family: Path):
    recipe = by_parts(lora_family, {"mlp": "task_arithmetic", "rest": "expert1"})
    found = {m.name: [c for _, c in m.parts] for m in adapter_modules(recipe, open_sources(recipe))}
    assert {tuple(c) for name, c in found.items() if ".mlp." in name} == {(0.4, 0.7)}
    assert {tuple(c) for name, c in found.items() if ".mlp." not in name} == {(1.0,)}
    recipe = by_parts(lora_family, {"mlp": "ties", "rest": "base"})
    with pytest.raises(MethodError, match="ties"):
        adapter_modules(recipe, open_sources(recipe))


def test_mergekit_gets_patterns_as_names_and_no_methods_by_part(dense_family: Path):
    with pytest.raises(SpecError, match="a method for each part of the model"):
        to_mergekit(by_parts(dense_family, {"mlp": "ties", "rest": "base"}))
    groups = (Group((0.1, 0.2), tensors=("*.0.mlp.up*",)), Group((0.5, 0.5)))
    data = to_mergekit(recipe_of(dense_family, groups=groups))
    assert data["models"][-1]["parameters"]["weight"] == [
        {"filter": "model.layers.0.mlp.up_proj.weight", "value": 0.2}, {"value": 0.5},
    ]  # fmt: skip


def test_the_card_says_which_part_has_which_method(dense_family: Path):
    recipe = by_parts(dense_family, {"mlp": {"method": "ties", "params": {"density": 0.3}}, "rest": "average"})
    text = model_card(recipe, {"architectures": ["X"]}, {})
    head = yaml.safe_load(text.split("---")[1])
    assert head["tags"][-2:] == ["ties", "linear"]
    assert "by `ties` and `linear`" in text
    assert "| mlp | ties | 0.4 | 0.7 | density 0.3" in text
    assert "| the rest | linear | 0.5 | 0.5 |" in text
    assert "Parameters of linear: normalize True." in text


# --- what is refused, with the file, the key and the remedy

REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "an unknown kind": ({"filter": {"kinds": ["attn"], "rest": "base"}}, ["filter.kinds", "'attn'", "attention"]),
    "a rest that nobody is": ({"filter": {"kinds": ["mlp"], "rest": "ad"}}, ["filter.rest", "'ad'", "add, topic"]),
    "no rest": ({"filter": {"kinds": ["mlp"]}}, ["filter.rest", "missing", "average"]),
    "a filter of everything": ({"filter": {"rest": "base"}}, ["filter", "everything"]),
    "a filter that is none": ({"filter": "mlp"}, ["filter", "'mlp'"]),
    "an unknown key of the filter": ({"filter": {"kind": ["mlp"], "rest": "base"}}, ["filter", "'kind'", "kinds"]),
    "groups beside a filter": (
        {"groups": [{"weights": 1}], "filter": {"kinds": ["mlp"], "rest": "base"}}, ["filter and groups exclude"],
    ),
    "methods beside a method": ({"methods": {"rest": "ties"}}, ["method", "stands beside methods"]),
    "the base without a base": (
        {"method": "linear", "base": None, "filter": {"kinds": ["mlp"], "rest": "base"}},
        ["filter.rest.method", "base"],
    ),
}  # fmt: skip

REFUSED_METHODS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "an unknown part": ({"attn": "ties", "rest": "base"}, ["methods", "'attn'", "attention", "'*attn*'"]),
    "no rest": ({"attention": "ties"}, ["methods", "rest is missing", "average"]),
    "an unknown method": ({"mlp": "tais", "rest": "base"}, ["methods.mlp.method", "'tais'", "ties"]),
    "an unknown method of the rest": ({"mlp": "ties", "rest": "bsae"}, ["methods.rest.method", "'bsae'"]),
    "a parameter of another method": (
        {"mlp": {"method": "linear", "params": {"density": 0.5}}, "rest": "base"},
        ["methods.mlp.params", "'density'"],
    ),
    "an illegal parameter": (
        {"mlp": "ties", "rest": {"method": "ties", "params": {"density": 2}}}, ["methods.rest.params", "density"],
    ),
    "an unknown key": ({"mlp": {"method": "ties", "density": 0.5}, "rest": "base"}, ["methods.mlp", "'density'"]),
    "a part without a method": ({"mlp": {"params": {}}, "rest": "base"}, ["methods.mlp", "no method"]),
    "a number of experts": ({"mlp": "nearswap", "rest": "base"}, ["methods.mlp.method", "nearswap takes"]),
    "a list": ({"mlp": ["ties"], "rest": "base"}, ["methods.mlp", "['ties']"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str):
    changes, expected = REFUSED[case]
    data = {k: v for k, v in {**SHORT, **changes}.items() if v is not None}
    if "groups" in data:
        del data["weights"]
    refused(data, *expected)


@pytest.mark.parametrize("case", REFUSED_METHODS)
def test_refused_methods(case: str):
    methods, expected = REFUSED_METHODS[case]
    refused({**BY_METHODS, "methods": methods}, *expected)


def test_a_word_that_may_mean_two_things_is_refused():
    data = {**BY_METHODS, "experts": {"ties": "add", "topic": "topic"}, "weights": 1}
    refused({**data, "methods": {"mlp": "ties", "rest": "base"}}, "methods.mlp", "'ties' is an expert", "Rename")
    refused({**data, "experts": {"base": "x", "topic": "y"}, "method": "ties",
             "filter": {"kinds": ["mlp"], "rest": "base"}}, "filter.rest", "'base' is an expert")  # fmt: skip


def test_tensors_that_are_not_there_are_refused_when_the_sources_are_opened(dense_family: Path, tmp_path: Path):
    data = by_parts(dense_family, {"mlp": "ties", "rest": "base"}).to_dict()
    for part, expected in (
        ({"tensors": ["*slef_attn*"]}, "'*slef_attn*' matches no tensor"),
        ({"tensors": ["model.norm.wieght"]}, "there is no tensor 'model.norm.wieght'"),
        ({"kinds": ["mlp"]}, "no group of the recipe holds the tensor model.embed_tokens.weight"),
    ):
        groups = [{**part, "weights": 1}, {"weights": 1}]
        path = tmp_path / "my.yaml"
        path.write_text(json.dumps({**data, "groups": groups[: 1 if "kinds" in part else 2]}))
        with pytest.raises(SpecError) as raised:
            open_sources(Recipe.load(path))
        for word in (expected, f"{path}: groups[0]", "model." if "tensors" in part else "last group"):
            assert word in str(raised.value)
    stage = replace(recipe_of(dense_family), groups=(Group((1.0, 1.0), tensors=("nothing*",)), Group((1.0, 1.0))))
    with pytest.raises(SpecError, match=r"nothing\*"):
        open_sources(replace(recipe_of(dense_family), experts=(Source("a", recipe=stage), Source("b", recipe=stage))))
