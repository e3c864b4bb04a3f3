"""Search spaces: what a point decodes to, and which spaces are refused."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import SpecError
from evomerge.methods import METHODS
from evomerge.methods.base import TensorInfo
from evomerge.recipe import Group, Recipe, Source
from evomerge.space import Space, split_layers

SHIPPED = Path(__file__).parent.parent / "search_spaces"


def template(*names: str) -> Recipe:
    return Recipe(
        base=Source("base", "b", "00"),
        experts=tuple(Source(n, n, n) for n in names),
        method="linear",
        groups=(Group((0.0,) * len(names)),),
        seed=5,
        export_dtype="float16",
    )


def model(layers: int = 7) -> list[TensorInfo]:
    """What experts change in a small model: the embedding, a norm, attention and mlp of every layer, the final norm."""
    infos = [TensorInfo("embed", "embedding", None, layers)]
    for layer in range(layers):
        infos += [TensorInfo(f"{layer}.{kind}", kind, layer, layers) for kind in ("norm", "attention", "mlp")]
    return [*infos, TensorInfo("final_norm", "norm", None, layers)]


def space(
    method: Any = "task_arithmetic", *, experts=("add", "spam"), layers: int = 7, params=None, tensors=None, **weights
) -> Space:
    data = {"method": method, "weights": {"granularity": "task", "range": [0, 2], **weights}}
    if params is not None:
        data["params"] = params
    return Space.from_dict(
        data,
        template=template(*experts),
        num_layers=layers,
        tensors=model(layers) if tensors is None else tensors,
        where="file.yaml: space",
    )


# --- what a point means


def test_global_gives_all_experts_one_weight():
    recipe = space(granularity="global", initial=0.5).decode({"weight": 0.7})
    assert recipe.groups == (Group((0.7, 0.7)),)
    assert recipe.method == "task_arithmetic"
    assert (recipe.seed, recipe.export_dtype) == (5, "float16")  # the template's
    assert [s.name for s in recipe.experts] == ["add", "spam"]


def test_task_gives_each_expert_its_weight():
    found = space()
    assert [d.name for d in found.dimensions] == ["add", "spam"]
    assert found.decode({"spam": 0.25, "add": 1.5}).groups == (Group((1.5, 0.25)),)


def test_layer_groups_give_each_expert_a_weight_a_group():
    found = space(granularity="layer_groups", groups=3, layers=7)
    names = ["add[0-1]", "add[2-3]", "add[4-6]", "spam[0-1]", "spam[2-3]", "spam[4-6]"]
    assert [d.name for d in found.dimensions] == names
    recipe = found.decode({name: i / 10 for i, name in enumerate(names)})
    assert recipe.groups == (
        Group((0.0, 0.3), layers=(0, 2)),
        Group((0.1, 0.4), layers=(2, 4)),
        Group((0.2, 0.5), layers=(4, 7)),
    )
    layer_weights = [recipe.group_for(TensorInfo("x", "mlp", layer, 7)).weights[0] for layer in range(7)]
    assert layer_weights == [0.0, 0.0, 0.1, 0.1, 0.2, 0.2, 0.2]


def test_layers_have_weights_of_their_own():
    found = space(granularity="layer", layers=3)
    assert [d.name for d in found.dimensions[:3]] == ["add[0]", "add[1]", "add[2]"]
    assert found.to_dict() == space(granularity="layer_groups", groups=3, layers=3).to_dict()


def weight_of(recipe: Recipe, name: str, expert: int = 0, layers: int = 7) -> float:
    (info,) = [info for info in model(layers) if info.name == name]
    return recipe.group_for(info).weights[expert]


def test_modules_have_weights_of_their_own():
    found = space(granularity="module", layers=7)
    kinds = ["attention", "mlp", "norm", "embedding"]  # the model has no head
    assert [d.name for d in found.dimensions] == [f"{e}.{kind}" for e in ("add", "spam") for kind in kinds]
    recipe = found.decode({d.name: i / 8 for i, d in enumerate(found.dimensions)})
    for kind, weight in zip(kinds, (0.0, 0.125, 0.25, 0.375), strict=True):
        names = [info.name for info in model() if info.kind == kind]
        assert {weight_of(recipe, name) for name in names} == {weight}
        assert {weight_of(recipe, name, expert=1) for name in names} == {weight + 0.5}


def test_modules_of_layer_groups_have_weights_of_their_own():
    found = space(granularity="layer_module", groups=2, layers=4, experts=("add",))
    first = ["add[0-1].attention", "add[0-1].mlp", "add[0-1].norm", "add[0-1].embedding"]
    second = ["add[2-3].attention", "add[2-3].mlp", "add[2-3].norm"]  # the embedding comes before the layers
    assert [d.name for d in found.dimensions] == first + second
    recipe = found.decode({name: i / 10 for i, name in enumerate(first + second)})
    assert weight_of(recipe, "1.mlp", layers=4) == 0.1 and weight_of(recipe, "2.mlp", layers=4) == 0.5
    assert weight_of(recipe, "embed", layers=4) == 0.3 and weight_of(recipe, "final_norm", layers=4) == 0.6


def test_tensors_have_weights_of_their_own_and_the_rest_keeps_the_initial_one():
    tensors = [info for info in model() if info.kind == "mlp"]
    found = space(granularity="tensor", tensors=tensors, initial=0.5)
    assert [d.name for d in found.dimensions[:2]] == ["add:0.mlp", "add:1.mlp"]
    recipe = found.decode({d.name: i / 10 for i, d in enumerate(found.dimensions)})
    assert [weight_of(recipe, f"{layer}.mlp") for layer in range(7)] == [i / 10 for i in range(7)]
    assert weight_of(recipe, "3.attention") == weight_of(recipe, "embed") == 0.5


def test_fixed_weights_do_not_move():
    found = space(granularity="layer_groups", groups=2, fixed={"spam": 0.4, "add[0-2]": 1.1})
    assert [d.name for d in found.dimensions] == ["add[3-6]"]
    recipe = found.decode({"add[3-6]": 0.7})
    assert recipe.groups == (Group((1.1, 0.4), (0, 3)), Group((0.7, 0.4), (3, 7)))
    with pytest.raises(SpecError, match="not equal"):
        found.encode(replace(recipe, groups=(Group((1.1, 0.5), (0, 3)), Group((0.7, 0.4), (3, 7)))))


def test_tied_experts_share_their_weights():
    found = space(experts=("add", "spam", "topic"), tied=[["add", "topic"]])
    assert [d.name for d in found.dimensions] == ["add+topic", "spam"]
    assert found.decode({"add+topic": 0.3, "spam": 0.8}).groups == (Group((0.3, 0.8, 0.3)),)


# --- parameters and methods as dimensions


def test_parameters_move_where_a_range_or_choices_stand():
    params = {"density": {"range": [0.1, 1.0], "initial": 0.5, "log": True}, "mode": {"choices": ["sum", "mean"]}}
    found = space("ties", params=params, initial=1)
    assert [d.name for d in found.dimensions] == ["density", "mode", "add", "spam"]
    assert found.initial() == {"density": 0.5, "mode": METHODS["ties"].params["mode"].default, "add": 1.0, "spam": 1.0}
    recipe = found.decode({"density": 0.25, "mode": "sum", "add": 0.1, "spam": 0.2})
    assert (recipe.params["density"], recipe.params["mode"], recipe.params["scale"]) == (0.25, "sum", 1.0)
    assert set(found.fixed_params["ties"]) == set(METHODS["ties"].params) - {"density", "mode"}
    with pytest.raises(SpecError, match="mode"):
        found.decode({"density": 0.25, "mode": "mode", "add": 0.1, "spam": 0.2})


def test_an_expert_with_the_name_of_a_parameter_that_moves_is_refused():
    params = {"density": {"range": [0.1, 1.0]}}
    with pytest.raises(SpecError, match="'density'"):
        space("ties", experts=("density", "spam"), params=params, initial=1)
    with pytest.raises(SpecError, match="'method'"):
        space({"choices": ["ties", "dare_ties"]}, experts=("method", "spam"), initial=1)
    assert space("ties", experts=("density", "spam"), initial=1).dimensions  # a fixed parameter is none


CHOICE = {"choices": ["task_arithmetic", "ties", "dare_ties"], "initial": "ties"}
CHOICE_PARAMS = {
    "ties": {"density": {"range": [0.1, 1.0]}, "scope": "tensor"},
    "dare_ties": {"density": {"range": [0.2, 0.9], "initial": 0.4}},
}


def test_the_method_is_a_choice_with_parameters_of_its_own():
    found = space(CHOICE, params=CHOICE_PARAMS, initial=0.7)
    assert [d.name for d in found.dimensions] == ["method", "ties.density", "dare_ties.density", "add", "spam"]
    assert found.initial() == {"method": "ties", "ties.density": 0.2, "add": 0.7, "spam": 0.7}
    dare = {"method": "dare_ties", "dare_ties.density": 0.3, "add": 0.1, "spam": 0.2}
    recipe = found.decode(dare)
    assert (recipe.method, recipe.params["density"], recipe.groups) == ("dare_ties", 0.3, (Group((0.1, 0.2)),))
    assert found.encode(recipe) == dare
    plain = {"method": "task_arithmetic", "add": 0.1, "spam": 0.2}
    assert found.decode(plain).params == {"scale": 1.0} and found.encode(found.decode(plain)) == plain
    with pytest.raises(SpecError, match="where the method is task_arithmetic"):
        found.decode({**plain, "ties.density": 0.5})
    with pytest.raises(SpecError, match=r"ties\.density"):
        found.decode({**plain, "method": "ties"})


@given(st.lists(st.floats(0, 1), min_size=5, max_size=5))
def test_any_shares_are_a_point(shares: list[float]):
    found = space(CHOICE, params=CHOICE_PARAMS, initial=0.7)
    point = found.at(shares)
    assert found.encode(found.decode(point)) == point
    assert found.encode(Recipe.from_dict(found.decode(point).to_dict())) == point


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_groups_are_contiguous_cover_all_and_differ_by_at_most_one(sizes: tuple[int, int]):
    num_layers, groups = sizes
    spans = split_layers(num_layers, groups)
    assert [layer for a, b in spans for layer in range(a, b)] == list(range(num_layers))
    lengths = {b - a for a, b in spans}
    assert len(spans) == groups
    assert max(lengths) - min(lengths) <= 1


granularities = st.sampled_from(
    [{"granularity": g} for g in ("global", "task", "layer", "module", "layer_module", "tensor")]
    + [{"granularity": "task", "fixed": {"spam": 0.25}}, {"granularity": "layer", "tied": [["add", "spam"]]}]
) | st.tuples(st.sampled_from(["layer_groups", "layer_module"]), st.integers(1, 7)).map(
    lambda pair: {"granularity": pair[0], "groups": pair[1]}
)


@given(st.data(), granularities, st.floats(-3, 3), st.floats(0.01, 5))
def test_encode_undoes_decode(data, weights: dict, low: float, width: float):
    found = space(**weights, range=[low, low + width], initial=low)
    point = {d.name: data.draw(st.floats(d.low, d.high)) for d in found.dimensions}
    assert found.encode(found.decode(point)) == point
    assert found.encode(Recipe.from_dict(found.decode(point).to_dict())) == point  # as a store keeps it


def test_decode_refuses_rather_than_clips():
    found = space(range=[0.0, 1.0])
    inside = {"add": 0.5, "spam": 1.0}
    found.decode(inside)
    for bad, name in (
        ({**inside, "add": 1.0 + 1e-12}, "add"),
        ({**inside, "add": -1e-300}, "add"),
        ({**inside, "add": float("nan")}, "add"),
        ({**inside, "sapm": 0.5}, "spam"),
        ({"add": 0.5}, "spam"),
    ):
        with pytest.raises(SpecError, match=name):
            found.decode(bad)
    assert found.clip({"add": 1.5, "spam": -1.0}) == {"add": 1.0, "spam": 0.0}


def test_encode_refuses_recipes_from_elsewhere():
    found = space(granularity="global")
    other = space().decode({"add": 0.5, "spam": 0.7})
    with pytest.raises(SpecError, match="not equal"):
        found.encode(other)
    with pytest.raises(SpecError, match="experts"):
        found.encode(space(experts=("add", "ham")).decode({"add": 0.5, "ham": 0.5}))
    with pytest.raises(SpecError, match="method"):
        found.encode(space("ties").decode({"add": 0.5, "spam": 0.5}))
    with pytest.raises(SpecError, match="params"):
        space("ties").encode(space("ties", params={"density": 0.5}).decode({"add": 0.5, "spam": 0.5}))
    with pytest.raises(SpecError, match="layers"):
        space().encode(
            space(granularity="layer_groups", groups=2).decode(space(granularity="layer_groups", groups=2).initial())
        )
    with pytest.raises(SpecError, match=r"\[0, 2\]"):
        space().encode(space(range=[0, 3]).decode({"add": 2.5, "spam": 0.5}))


# --- where a search starts


def test_the_nearest_point_of_a_recipe_is_the_mean_of_what_it_says():
    """Layers 0 to 6 in two groups, [0, 3) and [3, 7); the recipe's groups end at layer 2. The embedding counts too."""
    found = space(granularity="layer_groups", groups=2)
    recipe = replace(found.decode(found.initial()), groups=(Group((0.2, 3.0), (0, 2)), Group((1.0, 0.5), (2, 7))))
    point = found.nearest(recipe, model())
    low = 1 + 2 * 3  # tensors of the space's first group that the recipe's first one holds: the embedding, two layers
    assert point["add[0-2]"] == pytest.approx((0.2 * low + 1.0 * 3) / (low + 3))
    assert point["spam[0-2]"] == 2.0  # beyond the bounds
    assert (point["add[3-6]"], point["spam[3-6]"]) == (1.0, 0.5)
    same = found.decode({"add[0-2]": 0.1, "add[3-6]": 0.2, "spam[0-2]": 0.3, "spam[3-6]": 0.4})
    assert found.nearest(same, model()) == found.encode(same)


def test_the_nearest_point_takes_experts_by_name_and_parameters_that_move():
    moving = space("ties", params={"density": {"range": [0.1, 0.5]}}, initial=1)
    other = space("ties", experts=("more", "spam", "add"), params={"density": 0.9}, initial=1)
    recipe = other.decode({"more": 1.1, "spam": 0.6, "add": 0.4})
    assert moving.nearest(recipe, model()) == {"density": 0.5, "add": 0.4, "spam": 0.6}
    with pytest.raises(SpecError, match="more"):
        other.nearest(moving.decode(moving.initial()), model())
    with pytest.raises(SpecError, match="task_arithmetic"):
        moving.nearest(space().decode(space().initial()), model())


def test_initial_is_one_number_or_one_an_expert_or_the_methods_own():
    assert space(initial=0.8).initial() == {"add": 0.8, "spam": 0.8}
    assert space(initial={"spam": 0.1, "add": 0.2}).initial() == {"add": 0.2, "spam": 0.1}
    assert space().initial() == dict.fromkeys(("add", "spam"), METHODS["task_arithmetic"].weight.default)
    grouped = space(granularity="layer_groups", groups=2, initial={"add": 0.2, "spam": 0.1}).initial()
    assert grouped == {"add[0-2]": 0.2, "add[3-6]": 0.2, "spam[0-2]": 0.1, "spam[3-6]": 0.1}


def test_recipes_hold_every_parameter_of_the_method():
    found = space("ties", params={"density": 0.5})
    recipe = found.decode(found.initial())
    assert set(recipe.params) == set(METHODS["ties"].params)
    assert recipe.params["density"] == 0.5
    assert found.fixed_params == {recipe.method: recipe.params}


def test_to_dict_is_canonical():
    """Equal spaces, written differently, are equal data; different ones are not."""
    default = METHODS["ties"].params["density"].default
    written = [space("ties", initial=1), space("ties", initial={"spam": 1.0, "add": 1.0}, range=[0.0, 2.0])]
    written.append(space("ties", params={"density": default}, initial=1))
    assert written[0].to_dict() == written[1].to_dict() == written[2].to_dict()
    others = [
        space("ties", initial=0.9),
        space("ties", initial=1, range=[0, 1]),
        space("ties", initial=1, params={"density": 0.7}),
    ]
    for a, b in itertools.combinations([written[0], *others], 2):
        assert a.to_dict() != b.to_dict()


# --- refused

REFUSED = {
    "an unknown method": ({"method": "tias"}, "space.method", ["tias", "'ties'"]),
    "an unknown granularity": ({"granularity": "layers"}, "space.weights.granularity", ["'layers'", "layer_groups"]),
    "a group of modules too many": ({"granularity": "layer_module", "groups": 8}, "space.weights.groups", ["8", "7"]),
    "modules of experts that change nothing": (
        {"granularity": "module", "tensors": []},
        "space",
        ["no expert changes"],
    ),
    "layers of a model without": ({"granularity": "layer", "layers": 0}, "space.weights.granularity", ["layers"]),
    "factors from 0 on": ({"log": True}, "space.weights", ["above 0"]),
    "an unknown expert is fixed": ({"fixed": {"spma": 1.0}}, "space.weights.fixed", ["'spma'", "'spam'"]),
    "everything is fixed": ({"fixed": {"add": 1.0, "spam": 0.5}}, "space", ["nothing moves"]),
    "an expert is tied twice": ({"tied": [["add", "spam"], ["add", "spam"]]}, "space.weights.tied", ["'add'"]),
    "an expert is tied and fixed": (
        {"tied": [["add", "spam"]], "fixed": {"add": 1.0}},
        "space.weights.tied",
        ["'add'", "fixed"],
    ),
    "tied experts start apart": (
        {"tied": [["add", "spam"]], "initial": {"add": 1.0, "spam": 0.5}},
        "space.weights.initial",
        ["tied"],
    ),
    "global and fixed": ({"granularity": "global", "fixed": {"add": 1.0}}, "space.weights", ["granularity: task"]),
    "a density beyond 1": (
        {"method": "ties", "params": {"density": {"range": [0.5, 1.5]}}},
        "space.params.density",
        ["1.5", "(0, 1]"],
    ),
    "a density and an epsilon that do not go together": (
        {"method": "della", "params": {"density": 0.9, "epsilon": 0.2}},
        "space.params",
        ["density + epsilon", "Lower epsilon"],
    ),
    "ranges whose ends do not go together": (
        {"method": "della", "params": {"density": {"range": [0.5, 1.0], "initial": 0.6}, "epsilon": 0.3}},
        "space.params",
        ["density + epsilon", "Lower epsilon"],
    ),
    "a range of words": (
        {"method": "ties", "params": {"mode": {"range": [0, 1]}}},
        "space.params.mode",
        ["choices: [mean, sum]"],
    ),
    "neither range nor choices": (
        {"method": "ties", "params": {"density": {"initial": 0.5}}},
        "space.params.density",
        ["range", "choices"],
    ),
    "a start outside the range": (
        {"method": "ties", "params": {"density": {"range": [0.5, 1.0]}}},
        "space.params.density.initial",
        ["0.2", "default"],
    ),
    "a method among the choices that does not exist": (
        {"method": {"choices": ["ties", "tise"]}},
        "space.method",
        ["'tise'", "'ties'"],
    ),
    "methods by a range": ({"method": {"range": [0, 1]}}, "space.method", ["choices"]),
    "parameters without their method": (
        {"method": {"choices": ["ties", "dare_ties"]}, "params": {"density": 0.5}},
        "space.params",
        ["'density'", "ties"],
    ),
    "an unknown parameter": ({"method": "ties", "params": {"densty": 0.5}}, "space.params.densty", ["'density'"]),
    "density 0": ({"method": "ties", "params": {"density": 0}}, "space.params.density", ["0", "(0, 1]"]),
    "density as text": ({"method": "ties", "params": {"density": "0.5"}}, "space.params.density", ["number", "'0.5'"]),
    "an unknown key": ({"ragne": [0, 1]}, "space.weights.ragne", ["'range'"]),
    "a range upside down": ({"range": [1.5, 0.5]}, "space.weights.range", ["1.5", "0.5", "Swap"]),
    "a range of nothing": ({"range": [1, 1]}, "space.weights.range", ["low < high", "1"]),
    "a range without an end": ({"range": [0, float("inf")]}, "space.weights.range", ["inf", "two numbers"]),
    "a range of one": ({"range": [1]}, "space.weights.range", ["two numbers"]),
    "no range": ({"range": None}, "space.weights.range", ["two numbers"]),
    "an initial outside": ({"initial": 2.5}, "space.weights.initial", ["2.5", "[0, 2]"]),
    "a default initial outside": ({"range": [0.5, 1]}, "space.weights.initial", ["0.3", "default"]),
    "an initial of nobody": ({"initial": {"add": 1, "sam": 1}}, "space.weights.initial", ["'sam'", "'spam'"]),
    "an initial left out": ({"initial": {"add": 1}}, "space.weights.initial", ["spam"]),
    "an initial for each of one": ({"granularity": "global", "initial": {"add": 1, "spam": 1}}, "initial", ["global"]),
    "groups without layers": ({"groups": 3}, "space.weights", ["groups", "task"]),
    "layers without groups": ({"granularity": "layer_groups"}, "space.weights", ["groups"]),
    "no groups at all": ({"granularity": "layer_groups", "groups": 0}, "space.weights.groups", ["0", "1"]),
    "more groups than layers": ({"granularity": "layer_groups", "groups": 8}, "space.weights.groups", ["8", "7"]),
    "weights that are illegal": ({"method": "slerp", "range": [-1, 1]}, "space.weights.range", ["-1", "slerp"]),
    "three for slerp": ({"method": "slerp", "experts": ("a", "b", "c")}, "space.method", ["exactly 2", "3"]),
    "one for slerp": ({"method": "slerp", "experts": ("a",)}, "space.method", ["exactly 2", "1"]),
    "nothing that moves: one weight of a mean": (
        {"method": "linear", "granularity": "global"},
        "space",
        ["same merge"],
    ),
    "nothing that moves: slerp at a fixed t": ({"method": "slerp", "params": {"t": 0.5}}, "space", ["same merge"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str):
    changes, key, words = REFUSED[case]
    with pytest.raises(SpecError) as caught:
        space(**changes)
    assert (caught.value.where or "").startswith("file.yaml: space")
    assert (caught.value.where or "").endswith(key)
    for word in words:
        assert word in str(caught.value)


def test_not_even_a_mapping():
    for data in (None, 3, [], "task"):
        with pytest.raises(SpecError, match="mapping"):
            Space.from_dict(data, template=template("a"), num_layers=2, where="x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "dimensions"),
    [
        ("global.yaml", 1),
        ("task.yaml", 3),
        ("layer_groups.yaml", 18),
        ("layer.yaml", 90),
        ("module.yaml", 6),
        ("layer_module.yaml", 18),
        ("tensor.yaml", 630),
        ("ties_density.yaml", 4),
        ("method_choice.yaml", 6),
        ("method_by_module.yaml", 5),
        ("lorahub.yaml", 3),
    ],
    ids=str,
)
def test_shipped(name: str, dimensions: int):
    """The shipped files say how many dimensions they have for 3 LoRA experts of a 30-layer model, and that is so."""
    text = (SHIPPED / name).read_text()
    tensors = [
        TensorInfo(f"{layer}.{kind}.{i}", kind, layer, 30)
        for layer in range(30)
        for kind, count in (("attention", 4), ("mlp", 3))
        for i in range(count)
    ]
    found = Space.from_dict(
        yaml.safe_load(text), template=template("a", "b", "c"), num_layers=30, tensors=tensors, where=name
    )
    assert len(found.dimensions) == dimensions
    assert re.search(
        rf"# Dimensions:.*\b{dimensions}( dimensions?\b|\)|,|;|$)", text.replace("\n# ", " "), re.MULTILINE
    )
    assert "# When to use:" in text
    found.decode(found.initial())


def test_every_shipped_space_is_tested():
    (shipped,) = [mark for mark in test_shipped.pytestmark if mark.name == "parametrize"]
    assert sorted(path.name for path in SHIPPED.iterdir()) == sorted(name for name, _ in shipped.args[1])
