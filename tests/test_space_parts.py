"""Spaces with a filter or a method for each part of the model: dimensions, points and recipes, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_space import model, template

from evomerge.dimensions import Dimension
from evomerge.errors import SpecError
from evomerge.methods import METHODS
from evomerge.recipe import Group, Recipe
from evomerge.searchers.soup import ingredients
from evomerge.space import Space

LAYERS = 7
DENSITY = {"range": [0.1, 0.9], "initial": 0.3}
MOVING = {"method": "ties", "params": {"density": DENSITY}}


def build(data: dict[str, Any], *, experts=("add", "spam"), tensors: Any = None, **weights: Any) -> Space:
    chosen = {"granularity": "task", "range": [0, 2], "initial": 0.5, **weights}
    return Space.from_dict(
        {"weights": chosen, **data}, template=template(*experts), num_layers=LAYERS, where="file.yaml: space",
        tensors=model(LAYERS) if tensors is None else tensors,
    )  # fmt: skip


def names(space: Space) -> list[str]:
    return [dimension.name for dimension in space.dimensions]


# --- what a point means


def test_a_filter_leaves_the_rest_where_it_is_told_to():
    space = build({"method": "ties", "params": {"density": DENSITY}, "filter": {"kinds": ["mlp"], "rest": "average"}})
    assert names(space) == ["density", "add", "spam"]
    recipe = space.decode({"density": 0.2, "add": 1.0, "spam": 1.5})
    assert (recipe.method, recipe.params["density"]) == ("ties", 0.2)
    assert recipe.groups == (
        Group((1.0, 1.5), kinds=("mlp",)),
        Group((0.5, 0.5), method="linear", params={"normalize": True}),
    )
    assert space.fixed_params["linear"] == {"normalize": True}
    assert "density" not in space.fixed_params["ties"]


def test_each_method_has_parameters_of_its_own():
    rest = {"method": "dare_ties", "params": {"density": {**DENSITY, "log": True}}}
    space = build({"methods": {"rest": rest, "attention": MOVING, "*.mlp": MOVING, "norm": "spam"}})
    assert names(space) == ["rest.density", "attention.density", "*.mlp.density", "add", "spam"]
    point = {"attention.density": 0.2, "*.mlp.density": 0.7, "rest.density": 0.5, "add": 0.1, "spam": 0.4}
    recipe = space.decode(point)
    assert recipe.methods == ("ties", "linear", "dare_ties")
    assert [recipe.params_of(group).get("density") for group in recipe.groups] == [0.2, 0.7, None, 0.5]
    assert [group.weights for group in recipe.groups] == [(0.1, 0.4), (0.1, 0.4), (0.0, 1.0), (0.1, 0.4)]
    assert [group.where for group in recipe.groups] == [
        f"file.yaml: space.methods.{label}" for label in ("attention", "*.mlp", "norm", "rest")
    ]
    assert space.encode(recipe) == point
    assert space.methods == ("dare_ties",)
    assert space.all_methods == ("dare_ties", "ties", "linear")


def test_a_choice_of_methods_may_have_a_filter():
    data = {"method": {"choices": ["task_arithmetic", "ties"]}, "params": {"ties": {"density": DENSITY}}}
    space = build({**data, "filter": {"kinds": ["attention", "mlp"], "rest": "base"}})
    point = {"method": "ties", "ties.density": 0.2, "add": 0.1, "spam": 0.4}
    recipe = space.decode(point)
    assert recipe.methods == ("ties", "task_arithmetic")
    assert space.encode(recipe) == point
    assert recipe.groups[1].weights == (0.0, 0.0)


def test_granularities_are_cut_by_the_parts():
    """Layers 2 and 3 of the attention, by two spans of layers; a dimension that reaches no tensor is not there."""
    filtered = {"tensors": ["[23].*"], "kinds": ["attention"], "rest": "base"}
    space = build({"method": "ties", "filter": filtered}, granularity="layer", experts=("add",))
    assert names(space) == ["add[2]", "add[3]"]
    recipe = space.decode({"add[2]": 0.25, "add[3]": 0.75})
    found = {info.name: recipe.group_for(info) for info in model(LAYERS)}
    assert {name: g.weights[0] for name, g in found.items() if g.method is None} == {
        "2.attention": 0.25, "3.attention": 0.75,
    }  # fmt: skip
    assert all(g.weights == (0.0,) for g in found.values() if g.method == "task_arithmetic")
    data = {"methods": {"mlp": "ties", "norm": "base", "rest": "task_arithmetic"}}
    assert names(build(data, granularity="module", experts=("add",))) == ["add.attention", "add.mlp", "add.embedding"]
    tensor = build({"method": "ties", "filter": filtered}, granularity="tensor", experts=("add",))
    assert names(tensor) == ["add:2.attention", "add:3.attention"]


# --- there and back

parameters = st.sampled_from(
    [{}, {"density": 0.4}, {"density": DENSITY}, {"density": DENSITY, "scale": {"range": [0, 2]}}]
)
values = st.one_of(
    st.sampled_from(["ties", "task_arithmetic", "average", "base", "add"]),
    st.tuples(st.sampled_from(["ties", "dare_ties"]), parameters).map(lambda t: {"method": t[0], "params": t[1]}),
)
labels = st.sampled_from(["attention", "mlp", "norm", "embedding", "head", "*.mlp", "[0-3].*", "embed*", "no.such"])


@st.composite
def spaces(draw) -> Space | None:
    granularity = draw(st.sampled_from(["global", "task", "layer_groups", "layer", "module", "layer_module", "tensor"]))
    weights = {"granularity": granularity, **({"groups": 3} if granularity == "layer_groups" else {})}
    if draw(st.booleans()):
        rest = draw(st.sampled_from(["average", "base", "spam"]))
        held = draw(st.sampled_from([{"kinds": ["mlp", "norm"]}, {"tensors": ["[0-4].*"], "kinds": ["mlp"]}]))
        data = {"method": "ties", "params": draw(parameters), "filter": {**held, "rest": rest}}
    else:
        data = {"methods": {**draw(st.dictionaries(labels, values, max_size=3)), "rest": draw(values)}}
    try:
        return build(data, **weights)
    except SpecError as error:  # nothing moves, or a part is empty: tested below
        assert "move" in str(error) or "no expert changes" in str(error)
        return None


@given(spaces(), st.data())
def test_points_and_recipes_lead_to_each_other(space: Space | None, data):
    if space is None:
        return
    shares = data.draw(st.lists(st.floats(0, 1), min_size=len(space.dimensions), max_size=len(space.dimensions)))
    for point in (space.at(shares), space.initial()):
        recipe = space.decode(point)
        assert space.encode(recipe) == point
        stored = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
        assert space.encode(stored) == json.loads(json.dumps(point)) == point
        assert stored.hash == recipe.hash
        assert stored.to_dict() == recipe.to_dict()
        assert space.nearest(recipe, model(LAYERS)) == pytest.approx(point)
        for info in model(LAYERS):
            recipe.group_for(info)
    assert json.loads(json.dumps(space.to_dict())) == space.to_dict()
    for dimension in space.dimensions:
        assert Dimension.from_dict(json.loads(json.dumps(dimension.to_dict()))) == dimension
    assert len(set(names(space))) == len(space.dimensions)


@given(spaces(), st.data())
def test_every_dimension_changes_how_a_tensor_is_merged(space: Space | None, data):
    """A dimension that moves nothing would only make the search harder."""
    if space is None:
        return
    point = space.initial()
    for d in space.dimensions:
        other = {**point, d.name: d.at(0.987)}
        if other == point:
            continue
        merges = []
        for recipe in (space.decode(point), space.decode(other)):
            groups = [recipe.group_for(info) for info in model(LAYERS)]
            merges.append([(recipe.method_of(g), recipe.params_of(g), g.weights) for g in groups])
        assert merges[0] != merges[1], d.name


def test_spaces_without_parts_are_written_as_before():
    """A study's record holds this text: it must not change."""
    plain = build({"method": "ties"}).to_dict()
    assert set(plain) == {"params", "regions", "dimensions"}
    assert set(plain["regions"][0]) == {"layers", "kinds", "tensors", "weights"}


def test_encode_refuses_other_parts():
    space = build({"methods": {"mlp": MOVING, "rest": "base"}})
    recipe = space.decode(space.initial())
    for other in (
        build({"methods": {"mlp": "dare_ties", "rest": "base"}}),
        build({"methods": {"attention": MOVING, "rest": "base"}}),
        build({"methods": {"mlp": MOVING, "rest": "average"}}),
        build({"methods": {"mlp": {"method": "ties", "params": {"density": 0.31}}, "rest": "base"}}),
        build({"method": "ties"}),
    ):
        with pytest.raises(SpecError, match="not in the search space"):
            other.encode(recipe)


def test_the_nearest_point_takes_parameters_part_by_part():
    space = build({"methods": {"mlp": MOVING, "attention": MOVING, "rest": "task_arithmetic"}})
    groups = (
        Group((0.2, 0.2), kinds=("mlp",), method="ties", params={"density": 0.5}),
        Group((0.2, 0.2), method="task_arithmetic"),
    )
    recipe = Recipe(None, template("add", "spam").experts, "linear", groups)
    assert space.nearest(recipe, model()) == {"mlp.density": 0.5, "attention.density": 0.3, "add": 0.2, "spam": 0.2}
    with pytest.raises(SpecError, match="dare_ties"):
        space.nearest(Recipe(None, recipe.experts, "dare_ties", (Group((1.0, 1.0)),)), model())


def test_soup_mixes_the_parts_that_weights_decide():
    data = {"methods": {"norm": "average", "rest": "task_arithmetic"}}
    assert ingredients(build(data, range=[0, 1])) == [(frozenset({"add"}), 1), (frozenset({"spam"}), 1)]
    with pytest.raises(SpecError, match="slerp takes 2"):
        ingredients(build({"methods": {"mlp": "slerp", "rest": "task_arithmetic"}}, range=[0, 1]))


# --- what is refused

REFUSED: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "method and methods": ({"method": "ties", "methods": {"rest": "ties"}}, "space", ["exactly one"]),
    "neither": ({}, "space", ["exactly one of method and methods"]),
    "params beside methods": ({"methods": {"rest": "ties"}, "params": {"density": 0.5}}, "space", ["params", "part"]),
    "a filter beside methods": (
        {"methods": {"rest": "ties"}, "filter": {"kinds": ["mlp"], "rest": "base"}},
        "space", ["filter", "methods.rest"],
    ),
    "an unknown part": ({"methods": {"mpl": "ties", "rest": "base"}}, "space.methods", ["'mpl'", "'mlp'", "'*mpl*'"]),
    "no rest": ({"methods": {"mlp": "ties"}}, "space.methods", ["rest is missing"]),
    "a method that is none": ({"methods": {"mlp": "tise", "rest": "base"}}, "space.methods.mlp", ["'tise'", "ties"]),
    "an unknown key of a part": (
        {"methods": {"mlp": {"method": "ties", "density": 0.5}, "rest": "base"}}, "space.methods.mlp", ["density"],
    ),
    "a parameter of another method": (
        {"methods": {"mlp": {"method": "ties", "params": {"t": 0.5}}, "rest": "base"}},
        "space.methods.mlp.params.t", ["ties has no parameter 't'"],
    ),
    "a range outside the legal values": (
        {"methods": {"mlp": "ties", "rest": {"method": "ties", "params": {"density": {"range": [0.5, 2]}}}}},
        "space.methods.rest.params.density", ["rest.density", "2"],
    ),
    "too few experts for a part": (
        {"methods": {"mlp": "nearswap", "rest": "base"}}, "space.methods.mlp", ["nearswap needs exactly 1"],
    ),
    "an unknown kind": (
        {"method": "ties", "filter": {"kinds": ["mpl"], "rest": "base"}}, "space.filter.kinds", ["'mpl'", "mlp"],
    ),
    "a rest that nobody is": (
        {"method": "ties", "filter": {"kinds": ["mlp"], "rest": "ham"}}, "space.filter.rest", ["'ham'", "add, spam"],
    ),
    "a filter without rest": ({"method": "ties", "filter": {"kinds": ["mlp"]}}, "space.filter.rest", ["missing"]),
    "a filter of everything": ({"method": "ties", "filter": {"rest": "base"}}, "space.filter", ["everything"]),
    "a filter of nothing that moves": (
        {"method": "ties", "filter": {"kinds": ["head"], "rest": "base"}}, "space.filter", ["no expert changes"],
    ),
    "a parameter of a part without tensors": (
        {"methods": {"head": MOVING, "rest": "ties"}}, "space.methods.head", ["head.density would move nothing"],
    ),
    "nothing that moves": ({"methods": {"mlp": "add", "rest": "base"}}, "space", ["nothing moves"]),
    "only proportions that do not": (
        {"methods": {"mlp": "linear", "rest": "average"}, "weights": {"granularity": "global", "range": [0.1, 1]}},
        "space", ["same merge", "linear does not depend"],
    ),
    "methods that start elsewhere": (
        {"methods": {"mlp": "ties", "rest": "task_arithmetic"}, "weights": {"granularity": "task", "range": [0, 2]}},
        "space.weights.initial", ["ties 1", "task_arithmetic 0.3", "initial: 0.7"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str):
    data, where, words = REFUSED[case]
    with pytest.raises(SpecError) as raised:
        build(data)
    assert str(raised.value.where).startswith(f"file.yaml: {where}")
    for word in words:
        assert word in str(raised.value)


def test_a_word_that_may_mean_two_things_is_refused():
    with pytest.raises(SpecError, match="'average' is an expert"):
        build({"method": "ties", "filter": {"kinds": ["mlp"], "rest": "average"}}, experts=("add", "average"))


def test_parameters_may_not_share_a_name_with_weights():
    with pytest.raises(SpecError, match="two dimensions"):
        build({"methods": {"mlp": MOVING, "rest": "base"}}, experts=("mlp.density", "spam"))


def test_methods_are_known_by_name():
    assert {"linear", "task_arithmetic"} <= set(METHODS)  # what the words stand for
