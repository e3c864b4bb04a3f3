"""Whatever a space is made of, points and recipes lead to each other exactly; and what the shipped files promise."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from test_space import SHIPPED, model, template

from evomerge import methods
from evomerge.dimensions import Dimension
from evomerge.merging import open_sources
from evomerge.methods import lookup
from evomerge.methods.basic import TaskArithmetic
from evomerge.params import Param
from evomerge.recipe import Recipe
from evomerge.space import METHOD, Space
from evomerge.testing import tiny

LAYERS = 7


class Whole(TaskArithmetic):
    """No method that comes with evomerge has a parameter that is a whole number: this one has."""

    params: ClassVar = {**TaskArithmetic.params, "steps": Param(int, 3, "how many", low=1, high=1000)}


@pytest.fixture(scope="module", autouse=True)
def whole():
    with pytest.MonkeyPatch.context() as patch:
        for module in (methods, lookup):
            patch.setattr(module, "METHODS", {**methods.METHODS, "whole": Whole()})
        yield


numbers = st.floats(-2, 2)


@st.composite
def ranges(draw, low: float, high: float, *, integer: bool = False) -> dict[str, Any]:
    """A range with its start, by factors or not."""
    if integer:
        ends = sorted(draw(st.lists(st.integers(int(low), int(high)), min_size=2, max_size=2, unique=True)))
    else:
        first = draw(st.floats(low, high - 0.01))
        ends = [first, draw(st.floats(first + 0.01, high))]
    start = draw(st.integers(*ends) if integer else st.floats(*ends))
    return {"range": ends, "initial": start, "log": ends[0] > 0 and draw(st.booleans())}


@st.composite
def parameters(draw, method: str) -> dict[str, Any]:
    """Some parameters of a method: fixed, by a range, by choices."""
    found: dict[str, Any] = {}
    if method == "whole":
        found["steps"] = draw(st.one_of(st.integers(1, 9), ranges(1, 1000, integer=True)))
    if method in ("ties", "dare_ties"):
        found["density"] = draw(
            st.one_of(st.just(0.5), ranges(0.01, 1), st.just({"choices": [0.1, 0.25, 1], "initial": 0.25}))
        )
        found["mode"] = draw(st.sampled_from(["sum", {"choices": ["sum", "mean"]}]))
        found["normalize"] = draw(st.sampled_from([False, {"choices": [True, False], "initial": True}]))
    if draw(st.booleans()):
        found["scale"] = draw(st.one_of(st.sampled_from([0.5, -2]), ranges(-2, 2)))
    return found


@st.composite
def spaces(draw) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(a space as it is written, the experts)"""
    experts = ("add", "spam", "topic", "sort")[: draw(st.integers(1, 4))]
    granularity = draw(st.sampled_from(["global", "task", "layer_groups", "layer", "module", "layer_module", "tensor"]))
    weights: dict[str, Any] = {"granularity": granularity, **draw(ranges(-2, 2))}
    if granularity == "layer_groups" or (granularity == "layer_module" and draw(st.booleans())):
        weights["groups"] = draw(st.integers(1, LAYERS))
    if granularity != "global":
        free = list(experts)
        if len(free) > 1 and draw(st.booleans()):
            weights["fixed"] = {free.pop(): draw(numbers)}
        if len(free) > 1 and draw(st.booleans()):
            weights["tied"] = [draw(st.permutations(free))[:2]]
    methods = draw(
        st.lists(st.sampled_from(["task_arithmetic", "ties", "dare_ties", "whole"]), min_size=1, unique=True)
    )
    params = {method: draw(parameters(method)) for method in methods}
    if len(methods) == 1:
        return {"method": methods[0], "params": params[methods[0]], "weights": weights}, experts
    choice = {"choices": methods, "initial": draw(st.sampled_from(methods))}
    return {"method": choice, "params": params, "weights": weights}, experts


def build(data: dict[str, Any], experts: tuple[str, ...]) -> Space:
    return Space.from_dict(data, template=template(*experts), num_layers=LAYERS, tensors=model(LAYERS), where="x")


@given(spaces(), st.data())
def test_points_and_recipes_lead_to_each_other(drawn, data):
    """Bit for bit, by way of plain JSON as a store keeps both, from anywhere in the space and from its start."""
    space = build(*drawn)
    shares = data.draw(st.lists(st.floats(0, 1), min_size=len(space.dimensions), max_size=len(space.dimensions)))
    for point in (space.at(shares), space.initial(), space.at([0.0] * len(shares)), space.at([1.0] * len(shares))):
        recipe = space.decode(point)
        assert space.encode(recipe) == point
        stored = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
        kept = json.loads(json.dumps(point))
        assert space.encode(stored) == kept == point
        assert space.decode(space.encode(stored)).to_dict() == recipe.to_dict() == space.decode(kept).to_dict()
        assert space.decode(kept).hash == recipe.hash
        assert list(point) == [d.name for d in space.active(point.get(METHOD))]


@given(spaces(), st.data())
def test_any_legal_value_of_a_dimension_comes_back(drawn, data):
    """Not only those at shares of the way: whatever lies within the bounds, and the bounds."""
    space = build(*drawn)
    method = data.draw(st.sampled_from(space.methods))
    point: dict[str, Any] = {}
    for d in space.active(method):
        if d.name == METHOD:
            point[d.name] = method
        elif d.choices:
            point[d.name] = data.draw(st.sampled_from(d.choices))
        else:
            whole = st.integers(int(d.low), int(d.high))
            point[d.name] = data.draw(
                whole if d.integer else st.floats(d.low, d.high) | st.sampled_from([d.low, d.high])
            )
    assert space.encode(space.decode(point)) == point
    assert space.clip(point) == point


@given(spaces())
def test_a_space_is_the_same_from_yaml_and_json(drawn):
    data, experts = drawn
    space = build(data, experts)
    for again in (yaml.safe_load(yaml.safe_dump(data)), json.loads(json.dumps(data))):
        assert build(again, experts) == space
    assert json.loads(json.dumps(space.to_dict())) == space.to_dict()
    for dimension in space.dimensions:
        assert Dimension.from_dict(json.loads(json.dumps(dimension.to_dict()))) == dimension
        assert dimension.holds(dimension.initial)
    names = [dimension.name for dimension in space.dimensions]
    assert len(set(names)) == len(names)


# --- the files that come with evomerge

# file -> (its formula in words, the same as a function of layers, experts, and of the family: kinds, tensors)
FORMULAS: dict[str, tuple[str, Any]] = {
    "global.yaml": ("1, whatever the number of experts and layers", lambda L, E, kinds, tensors: 1),
    "task.yaml": ("the number of experts", lambda L, E, kinds, tensors: E),
    "layer_groups.yaml": ("6 x the number of experts", lambda L, E, kinds, tensors: 6 * E),
    "layer.yaml": ("layers x experts", lambda L, E, kinds, tensors: L * E),
    "module.yaml": ("kinds that the experts change x experts", lambda L, E, kinds, tensors: len(set(kinds)) * E),
    "layer_module.yaml": (
        "groups x kinds that the experts change there x experts",
        # three groups of layers; the embedding is in the first only, and norms are in all
        lambda L, E, kinds, tensors: E * sum(3 if kind != "embedding" else 1 for kind in set(kinds)),
    ),
    "tensor.yaml": ("tensors that the experts change x experts", lambda L, E, kinds, tensors: tensors * E),
    "ties_density.yaml": ("1 + the number of experts", lambda L, E, kinds, tensors: 1 + E),
    "method_by_module.yaml": ("2 + the number of experts", lambda L, E, kinds, tensors: 2 + E),
    "method_choice.yaml": ("1 + parameters that move + the number of experts", lambda L, E, kinds, tensors: 1 + 2 + E),
    "lorahub.yaml": ("the number of experts", lambda L, E, kinds, tensors: E),
}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Recipe, list[str], int]]:
    """(a recipe that names the sources, kinds of modules, number of tensors that experts change) of two families."""
    folder = tmp_path_factory.mktemp("eight")
    base = tiny.save_model(folder / "base", tiny.llama_config(num_hidden_layers=8), seed=0)
    for t in range(3):
        tiny.save_dense_expert(base, folder / f"dense{t}", seed=t)
        tiny.save_lora_expert(base, folder / f"lora{t}", seed=t)

    def recipe(kind: str) -> Recipe:
        data = {"method": "task_arithmetic", "base": str(base), "weights": 0.0}
        return Recipe.from_dict({**data, "experts": {f"e{t}": str(folder / f"{kind}{t}") for t in range(3)}})

    with safe_open(base / "model.safetensors", "pt") as file:
        names = list(file.keys())
    return {
        "dense": (recipe("dense"), ["embedding", "attention", "mlp", "norm"], len(names)),
        "lora": (recipe("lora"), ["attention", "mlp"], 4 * 8),  # q, v, up and down of each layer
    }


@pytest.mark.parametrize("kind", ["dense", "lora"])
@pytest.mark.parametrize("file", sorted(path.name for path in SHIPPED.glob("*.yaml")))
def test_shipped_files_say_their_number_of_dimensions(families, kind: str, file: str):
    recipe, kinds, tensors = families[kind]
    sources = open_sources(recipe)
    text = (SHIPPED / file).read_text()
    words, formula = FORMULAS[file]
    comment = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    assert f"Dimensions: {words}" in comment
    assert "When to use: " in comment
    space = Space.from_dict(
        yaml.safe_load(text), template=recipe, num_layers=sources.reference.num_layers, where=file,
        tensors=[sources.info(name) for name in sources.names if sources.touched(name)],
    )  # fmt: skip
    assert len(space.dimensions) == formula(8, 3, kinds, tensors)
    assert space.encode(space.decode(space.initial())) == space.initial()
