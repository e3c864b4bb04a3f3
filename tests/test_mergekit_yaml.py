"""mergekit's configurations in and out: what they mean, tensor by tensor, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.checkpoints import open_checkpoint
from evomerge.errors import EvomergeError, SpecError
from evomerge.mergekit_methods import COUNTERPARTS
from evomerge.mergekit_writing import to_mergekit
from evomerge.methods import METHODS
from evomerge.recipe import Group, Recipe, Source
from evomerge.tokenizer_choice import TokenizerChoice

LAYERS = 4


@pytest.fixture
def read(dense_family: Path, tmp_path: Path):
    """The recipe of a configuration in a file; base, a and b stand for the family's folders."""

    def load(text: str, *, family: Path = dense_family) -> Recipe:
        for name, folder in (("BASE", "base"), ("EXPERT_A", "expert0"), ("EXPERT_B", "expert1")):
            text = text.replace(name, str(family / folder))
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return Recipe.load(path)

    return load


@pytest.fixture
def tensors(dense_family: Path):
    return open_checkpoint(dense_family / "base")


def numbers(recipe: Recipe, tensors, name: str) -> tuple[tuple[float, ...], dict[str, Any]]:
    info = tensors.info(name)
    return recipe.group_for(info).weights, recipe.params_for(info)


TIES = """
merge_method: ties
base_model: BASE
models:
  - model: BASE
  - model: EXPERT_A
    parameters: {weight: 0.5, density: 0.7}
  - model: EXPERT_B
    parameters: {weight: 0.3, density: 0.7}
parameters: {normalize: true, int8_mask: true, lambda: 0.9}
dtype: float16
"""


def test_ties(read):
    """mergekit's sum of what agrees, divided by the weights that agree, times lambda."""
    recipe = read(TIES)
    assert (recipe.method, recipe.groups, recipe.export_dtype) == ("ties", (Group((0.5, 0.3)),), "float16")
    assert recipe.params == {"density": 0.7, "mode": "sum", "normalize": True, "scale": 0.9, "scope": "tensor"}
    assert [source.name for source in recipe.experts] == ["expert0", "expert1"]


def test_defaults_are_mergekits(read):
    """The stored dtype; density 1; ties normalises, dare_ties and task_arithmetic do not; DARE matches L1 norms."""
    models = "models: [{model: EXPERT_A, parameters: {weight: 1}}, {model: EXPERT_B, parameters: {weight: 3}}]"
    for method, expected in (
        ("ties", {"density": 1.0, "normalize": True, "mode": "sum"}),
        ("dare_ties", {"density": 1.0, "normalize": False, "mode": "sum", "rescale": "l1"}),
        ("dare_linear", {"density": 1.0, "rescale": "l1"}),
        ("task_arithmetic", {"scale": 1.0}),
        ("linear", {"normalize": True}),
    ):
        base = (
            "" if method == "linear" else "base_model: BASE\n"
        )  # mergekit's linear takes a base for one of the models
        recipe = read(f"merge_method: {method}\n{base}{models}")
        assert recipe.groups == (Group((1.0, 3.0)),) and recipe.export_dtype == "bfloat16"
        assert expected.items() <= recipe.params.items()


def test_task_arithmetic_that_normalises_divides_the_weights(read):
    models = "models: [{model: EXPERT_A, parameters: {weight: 1}}, {model: EXPERT_B, parameters: {weight: 3}}]"
    recipe = read(f"merge_method: task_arithmetic\nbase_model: BASE\nparameters: {{normalize: true}}\n{models}")
    assert recipe.groups == (Group((0.25, 0.75)),)


SLERP = """
merge_method: slerp
base_model: BASE
slices:
  - sources:
      - {model: BASE, layer_range: [0, 4]}
      - {model: EXPERT_A, layer_range: [0, 4]}
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
dtype: bfloat16
"""


def test_slerp_with_gradients_and_filters(read, tensors):
    """Five values over four layers: layer 1 lies at 4/3, a third of the way from the second value to the third."""
    recipe = read(SLERP)
    assert recipe.experts[0].path == recipe.base.path
    attention = [0.0, 0.5 + (0.3 - 0.5) / 3, 0.3 + (0.7 - 0.3) * 2 / 3, 1.0]
    mlp = [1.0, 0.5 + (0.7 - 0.5) / 3, 0.7 + (0.3 - 0.7) * 2 / 3, 0.0]
    for layer in range(LAYERS):
        for part, expected in (("self_attn.q_proj", attention[layer]), ("mlp.up_proj", mlp[layer])):
            _, params = numbers(recipe, tensors, f"model.layers.{layer}.{part}.weight")
            assert params["t"] == pytest.approx(expected, abs=1e-12)
        assert numbers(recipe, tensors, f"model.layers.{layer}.input_layernorm.weight")[1]["t"] == 0.5
    assert numbers(recipe, tensors, "model.embed_tokens.weight")[1]["t"] == 0.5


def test_a_gradients_first_value_is_for_all_outside_the_layers(read, tensors):
    recipe = read(
        "merge_method: linear\nmodels: [{model: EXPERT_A, parameters: {weight: [0, 1]}}, {model: EXPERT_B, parameters: "
        "{weight: [1, 0.25]}}]"
    )
    assert recipe.base is None
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
        assert numbers(recipe, tensors, name)[0] == (0.0, 1.0)
    assert numbers(recipe, tensors, "model.layers.2.mlp.up_proj.weight")[0] == pytest.approx((2 / 3, 0.5))


SLICES = """
merge_method: task_arithmetic
base_model: BASE
slices:
  - sources:
      - {model: BASE, layer_range: [0, 1]}
      - {model: EXPERT_A, layer_range: [0, 1], parameters: {weight: 0.5}}
      - {model: EXPERT_B, layer_range: [0, 1], parameters: {weight: 0.25}}
  - sources:
      - {model: BASE, layer_range: [1, 4]}
      - {model: EXPERT_A, layer_range: [1, 4], parameters: {weight: [0, 1]}}
      - {model: EXPERT_B, layer_range: [1, 4], parameters: {weight: 0.75}}
    parameters: {lambda: 2}
"""


def test_plain_slices(read, tensors):
    """A gradient runs over its own slice; embeddings read the first slice, the final norm the last."""
    recipe = read(SLICES)
    expected = [(0.5, 0.25), (0.0, 0.75), (0.5, 0.75), (1.0, 0.75)]
    for layer, weights in enumerate(expected):
        found, params = numbers(recipe, tensors, f"model.layers.{layer}.mlp.up_proj.weight")
        assert found == pytest.approx(weights) and params["scale"] == (2.0 if layer else 1.0)
    assert numbers(recipe, tensors, "model.embed_tokens.weight") == ((0.5, 0.25), {"scale": 1.0})
    assert numbers(recipe, tensors, "model.norm.weight") == ((0.0, 0.75), {"scale": 2.0})


def test_groups_of_layers_where_that_says_it(read):
    text = SLICES.replace("[0, 1]}}", "1}}").replace("parameters: {weight: 1}", "parameters: {weight: 1.0}")
    recipe = read(text)
    assert [group.layers for group in recipe.groups] == [(0, 1), (1, 4)]


def test_adapters(read, lora_family: Path):
    recipe = read(
        "merge_method: task_arithmetic\nbase_model: BASE\nmodels: [{model: BASE+EXPERT_A, parameters: {weight: 0.5}}]",
        family=lora_family,
    )
    assert recipe.experts == (Source("expert0", str(lora_family / "expert0")),)


TWO = "models: [{model: EXPERT_A}, {model: EXPERT_B}]"
ONE = "models: [{model: EXPERT_A}]"
WEIGHTED = "models: [{model: EXPERT_A, parameters: {weight: 1}}, {model: EXPERT_B, parameters: {weight: 3}}]"
BASE = "base_model: BASE"
DROPPED = {"density": 0.6, "rescale": "l1", "scale": 0.5}
# mergekit's method, its configuration, and evomerge's (weights, parameters): defaults first, then all that can be set.
MEANINGS: list[tuple[str, str, str, tuple[float, ...], dict[str, Any]]] = [
    ("nuslerp", WEIGHTED, "", (1.0, 3.0), {"vectors": "tensor", "origin": "zero"}),
    ("nuslerp", f"{WEIGHTED}\n{BASE}", "nuslerp_flatten: false", (1.0, 3.0), {"vectors": "rows", "origin": "base"}),
    ("nuslerp", WEIGHTED.replace("3", "-1"), "nuslerp_flatten: false, nuslerp_row_wise: true", (1.0, 1.0),
     {"vectors": "columns", "origin": "zero"}),
    ("multislerp", WEIGHTED, "", (1.0, 3.0), {"normalize": True, "origin": "zero"}),
    ("multislerp", f"{WEIGHTED}\n{BASE}", "normalize_weights: false, eps: 1.0e-8", (1.0, 3.0),
     {"normalize": False, "origin": "base"}),
    ("karcher", TWO, "", (1.0, 1.0), {"steps": 10, "tol": 1e-5}),
    ("karcher", f"{TWO}\n{BASE}", "max_iter: 3, tol: 0.01", (1.0, 1.0, 1.0), {"steps": 3, "tol": 0.01}),
    ("passthrough", ONE, "", (1.0,), {}),
    ("passthrough", ONE, "scale: 0.5", (0.5,), {}),
    ("model_stock", f"{TWO}\n{BASE}", "", (1.0, 1.0), {"vectors": "tensor"}),
    ("model_stock", f"{TWO}\n{BASE}", "filter_wise: true", (1.0, 1.0), {"vectors": "rows"}),
    ("nearswap", f"{ONE}\n{BASE}", "t: 0.02", (1.0,), {"t": 0.02}),
    ("arcee_fusion", f"{ONE}\n{BASE}", "", (1.0,), {}),
    ("sce", f"{TWO}\n{BASE}", "", (1.0, 1.0), {"select_topk": 1.0, "floor": 1e-6, "scale": 1.0}),
    ("sce", f"{TWO}\n{BASE}", "select_topk: 0.1, int8_mask: true", (1.0, 1.0),
     {"select_topk": 0.1, "floor": 1e-6, "scale": 1.0}),
    ("ram", f"{TWO}\n{BASE}", "", (1.0, 1.0), {"epsilon": 1e-5, "scale": 1.0}),
    ("breadcrumbs", f"{WEIGHTED}\n{BASE}", "", (1.0, 3.0), {"density": 1.0, "gamma": 0.01, "scale": 1.0}),
    ("breadcrumbs", f"{WEIGHTED}\n{BASE}", "density: 0.9, gamma: 0.02, lambda: 0.5, normalize: true", (0.25, 0.75),
     {"density": 0.9, "gamma": 0.02, "scale": 0.5}),
    ("breadcrumbs_ties", f"{WEIGHTED}\n{BASE}", "density: 0.9, normalize: true", (1.0, 3.0),
     {"density": 0.9, "gamma": 0.01, "mode": "sum", "normalize": True, "scale": 1.0}),
    ("della", f"{WEIGHTED}\n{BASE}", "density: 0.6, lambda: 0.5", (1.0, 3.0),
     {**DROPPED, "epsilon": 0.15, "mode": "sum", "normalize": True}),
    ("della_linear", f"{WEIGHTED}\n{BASE}", "density: 0.6, lambda: 0.5, epsilon: 0.1", (1.0, 3.0),
     {**DROPPED, "epsilon": 0.1}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "models", "parameters", "weights", "params"), MEANINGS)
def test_what_mergekits_methods_mean(
    read, method: str, models: str, parameters: str, weights: tuple[float, ...], params: dict[str, Any]
):
    recipe = read(f"merge_method: {method}\n{models}\nparameters: {{{parameters}}}")
    assert (recipe.method, recipe.groups, recipe.to_dict()["params"]) == (method, (Group(weights),), params)
    assert (recipe.base is None) == (BASE not in models)


def test_every_method_of_mergekits_that_evomerge_has_is_tested_here():
    above = {"linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties"}
    tested = {method for method, *_ in MEANINGS} | above
    assert tested == set(COUNTERPARTS)
    assert tested <= set(METHODS)


def test_passthrough_of_layers_that_stay_in_their_places(read, tensors):
    """Slices of several models, each layer where it was: a linear merge with one model a layer."""
    recipe = read("""
merge_method: passthrough
slices:
  - sources: [{model: EXPERT_A, layer_range: [0, 1]}]
  - sources: [{model: EXPERT_B, layer_range: [1, 4], parameters: {scale: [{filter: down, value: 0.5}, {value: 1}]}}]
""")
    assert (recipe.method, recipe.params["normalize"], recipe.base) == ("linear", False, None)
    for name, expected in (
        ("model.embed_tokens.weight", (1.0, 0.0)),
        ("model.layers.0.mlp.down_proj.weight", (1.0, 0.0)),
        ("model.layers.1.mlp.up_proj.weight", (0.0, 1.0)),
        ("model.layers.1.mlp.down_proj.weight", (0.0, 0.5)),
        ("model.norm.weight", (0.0, 1.0)),
    ):
        assert numbers(recipe, tensors, name)[0] == expected, name


MODELS = "models: [{model: EXPERT_A, parameters: {weight: 1}}, {model: EXPERT_B, parameters: {weight: 1}}]\n"
REFUSED = {
    "passthrough of two": (f"merge_method: passthrough\n{TWO}", ["passthrough takes one model"]),
    "passthrough beside a base": (f"merge_method: passthrough\n{ONE}\n{BASE}", ["passthrough takes one model"]),
    "nearswap without t": (f"merge_method: nearswap\n{ONE}\n{BASE}", ["parameters.t", "nearswap needs t"]),
    "a t that mergekit reads as another": (
        f"merge_method: nearswap\n{ONE}\n{BASE}\nparameters: {{t: 1.0e-7}}", ["parameters.t", "1e-6"]
    ),
    "nearswap of two": (f"merge_method: nearswap\n{TWO}\n{BASE}\nparameters: {{t: 1}}", ["nearswap", "exactly 1"]),
    "model_stock of one": (f"merge_method: model_stock\n{ONE}\n{BASE}", ["model_stock", "at least 2"]),
    "sce without a base": (f"merge_method: sce\n{TWO}", ["base_model", "sce"]),
    "a weight where there is none": (f"merge_method: sce\n{WEIGHTED}\n{BASE}", ["parameters.weight", "sce"]),
    "a word for a number": (
        f"merge_method: ram\n{TWO}\n{BASE}\nparameters: {{epsilon: small}}", ["parameters.epsilon", "'small'"]
    ),
    "a number for true": (
        f"merge_method: model_stock\n{TWO}\n{BASE}\nparameters: {{filter_wise: 3}}", ["filter_wise", "3"]
    ),
    "breadcrumbs that are rescaled": (
        f"merge_method: breadcrumbs\n{WEIGHTED}\n{BASE}\nparameters: {{rescale: true, density: 0.5}}", ["rescale"]
    ),
    "DELLA without rescaling": (
        f"merge_method: della\n{WEIGHTED}\n{BASE}\nparameters: {{rescale: false, density: 0.5}}", ["rescale"]
    ),
    "a part of a step": (
        f"merge_method: karcher\n{TWO}\nparameters: {{max_iter: 2.5}}", ["karcher", "steps", "whole number", "2.5"]
    ),
    "DELLA beyond probability 1": (
        f"merge_method: della\n{WEIGHTED}\n{BASE}\nparameters: {{density: 0.95}}", ["epsilon", "0.15"]
    ),
    "two epsilons": (
        f"merge_method: della\n{BASE}\nparameters: {{density: 0.5}}\n"
        + WEIGHTED.replace("weight: 1}", "weight: 1, epsilon: 0.1}"),
        ["one epsilon", "0.1", "0.15"],
    ),
    "an eps that changes the merge": (
        f"merge_method: multislerp\n{WEIGHTED}\nparameters: {{eps: 0.1}}", ["parameters.eps", "0.1"]
    ),
    "a method that is not there": ("merge_method: ramplus_tl\n" + MODELS, ["merge_method", "ramplus_tl"]),
    "modules": ("merge_method: linear\nmodules: {text: {}}\n" + MODELS, ["modules"]),
    "two tokenizers": (
        "merge_method: linear\ntokenizer_source: union\ntokenizer: {source: base}\n" + MODELS, ["tokenizer_source"]
    ),
    "a tokenizer of a model that is not merged": (
        "merge_method: linear\ntokenizer: {source: BASE}\n" + MODELS, ["tokenizer.source", "none of the models"]
    ),
    "an unknown key of a tokenizer": (
        "merge_method: linear\ntokenizer: {pad_to: 3}\n" + MODELS, ["pad_to", "pad_to_multiple_of"]
    ),
    "a token forced to nothing": (
        "merge_method: linear\ntokenizer: {tokens: {x: {force: true}}}\n" + MODELS, ["tokens.x", "force"]
    ),
    "a row of a model that is not merged": (
        "merge_method: linear\ntokenizer: {tokens: {x: {source: {kind: model_token, model: BASE, token: y}}}}\n"
        + MODELS,
        ["tokens.x.source.model", "none of the models"],
    ),
    "a chat template": ("merge_method: linear\nchat_template: chatml\n" + MODELS, ["chat_template"]),
    "no base": ("merge_method: ties\n" + MODELS, ["base_model"]),
    "an unknown key": ("merge_method: linear\nbase: x\n" + MODELS, ["'base'", "base_model"]),
    "a parameter of another method": (
        "merge_method: ties\nbase_model: BASE\nparameters: {gamma: 0.1}\n" + MODELS, ["gamma", "ties"]
    ),
    "two densities": (TIES.replace("0.3, density: 0.7", "0.3, density: 0.5"), ["density", "0.5", "0.7"]),
    "no weight": (TIES.replace("weight: 0.3, ", ""), ["weight", "expert1"]),
    "DARE without rescaling": (
        "merge_method: dare_linear\nbase_model: BASE\nparameters: {rescale: false, density: 0.5}\n" + MODELS,
        ["rescale"],
    ),
    "layers that change places": (
        SLICES.replace("[0, 1]", "[2, 3]").replace("[1, 4]", "[0, 2]"), ["slices[0]", "out of order"]
    ),
    "layers left out": (SLICES.replace("[1, 4]", "[1, 3]"), ["slices", "3", "4"]),
    "sources from different layers": (SLICES.replace("[0, 1], ", "[1, 2], ", 1), ["slices[0]", "layer_range"]),
    "a residual": (SLICES.replace("lambda: 2}", "lambda: 2}\n    residual_weight: 0.5"), ["residual_weight"]),
    "an adapter of another base": (
        "merge_method: linear\nbase_model: BASE\nmodels: [{model: EXPERT_A+EXPERT_B, parameters: {weight: 1}}]",
        ["adapter", "base_model"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_evomerge_cannot_say_is_refused_by_name(read, case: str):
    text, words = REFUSED[case]
    with pytest.raises(EvomergeError) as raised:
        read(text)
    for word in (*words, "config.yaml"):
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("merge_method: [x]\nmodels: 3", ["merge_method", "models"]),
        ("merge_method: linear\nmodels: [some/where]", ["models[0]", "mapping"]),
        ("merge_method: linear\nslices: [{sources: [{model: x, layer_range: 5}]}]", ["layer_range", "list"]),
        (
            "merge_method: linear\nslices: [{sources: [{model: x, layer_range: [5]}]}]",
            ["layer_range", "at least 2", "[5]"],
        ),
        ("merge_method: linear\nslices: [{sources: [{model: x, layer_range: [0, 1, 2]}]}]", ["at most 2", "[0, 1, 2]"]),
        ("merge_method: linear\nslices: []", ["exactly one of models and slices"]),
        ("merge_method: linear\nslices: [{sources: []}]", ["sources", "must not be empty"]),
        ("merge_method: linear\nmodels: [{parameters: {weight: 1}}]", ["'model' is missing"]),
        ("merge_method: linear\nmodels: [{model: x, parameters: {weight: [{filter: 3, value: 1}]}}]", ["weight"]),
        ("merge_method: linear\nmodels: [{model: x, parameters: {weight: null}}]", ["weight"]),
        ("merge_method: linear", ["models", "slices"]),
    ],
    ids=str,
)
def test_wrong_shapes_are_named(read, text: str, words: list[str]):
    with pytest.raises(SpecError) as raised:
        read(text)
    for word in (*words, "config.yaml"):
        assert word in str(raised.value)


# --- out, and back in


def recipe_of(family: Path, method: str = "task_arithmetic", groups=None, **params) -> Recipe:
    return Recipe(
        Source("base", str(family / "base")),
        tuple(Source(f"expert{t}", str(family / f"expert{t}")) for t in range(2)),
        method,
        groups or (Group((0.25, -0.5)),),
        params,
        export_dtype="float16",
    )


LAYERED = (Group((0.1, 0.2), (0, 1)), Group((0.3, 0.4), (1, 3)), Group((0.5, 0.6), (3, 4)))
MLP = tuple(f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(LAYERS))
BACK = {
    "one group": {},
    "layers": {"groups": LAYERED},
    "tensors": {"groups": (Group((0.1, 0.2), tensors=MLP), Group((0.3, 0.4)))},
    "tensors with a scale of their own": (
        {"groups": (Group((0.1, 0.2), tensors=MLP, params={"scale": 2.0}), Group((0.1, 0.4)))}),
    "ties": {"method": "ties", "density": 0.4, "mode": "sum", "scale": 0.5},
    "ties that normalises": {"method": "ties", "density": 0.4, "normalize": True, "mode": "sum"},
    "ties with a density a layer": (
        {"method": "ties", "mode": "sum", "groups": tuple(
            Group((0.1, 0.2), span, {"density": d}) for span, d in (((0, 2), 0.3), ((2, 4), 0.6)))}),
    "dare": {"method": "dare_linear", "density": 0.5, "rescale": "l1"},
    "dare_ties": {"method": "dare_ties", "density": 0.5, "rescale": "l1", "mode": "sum"},
    "linear": {"method": "linear", "normalize": False},
    "nuslerp": {"method": "nuslerp", "groups": (Group((0.5, 1.5)),), "vectors": "columns"},
    "nuslerp around the base": {"method": "nuslerp", "groups": (Group((0.5, 1.5)),), "origin": "base"},
    "multislerp in layers": {"method": "multislerp", "groups": LAYERED, "origin": "base", "normalize": False},
    "karcher": {"method": "karcher", "groups": (Group((1.0, 1.0)),), "steps": 3},
    "model_stock": {"method": "model_stock", "groups": (Group((1.0, 1.0)),), "vectors": "rows"},
    "sce": {"method": "sce", "groups": (Group((1.0, 1.0)),), "select_topk": 0.1, "floor": 1e-6},
    "sce by layers": {"method": "sce", "floor": 1e-6, "groups": tuple(
        Group((1.0, 1.0), span, {"select_topk": k}) for span, k in (((0, 2), 0.3), ((2, 4), 1.0)))},
    "ram": {"method": "ram", "groups": (Group((1.0, 1.0)),), "epsilon": 0.01},
    "breadcrumbs": {"method": "breadcrumbs", "density": 0.5, "gamma": 0.1},
    "breadcrumbs_ties": {"method": "breadcrumbs_ties", "density": 0.5, "mode": "sum"},
    "della": {"method": "della", "density": 0.5, "epsilon": 0.2, "rescale": "l1", "mode": "sum"},
    "della_linear": {"method": "della_linear", "density": 0.5, "rescale": "l1"},
}  # fmt: skip


@pytest.mark.parametrize("case", BACK)
def test_out_and_back_in_is_the_same_merge(dense_family: Path, tensors, tmp_path: Path, case: str):
    recipe = recipe_of(dense_family, **BACK[case])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_mergekit(recipe)))
    again = Recipe.load(tmp_path / "config.yaml")
    assert (again.method, again.export_dtype, again.experts) == (recipe.method, recipe.export_dtype, recipe.experts)
    defaults = recipe.to_dict()["params"]
    for name in tensors.names:
        weights, params = numbers(recipe, tensors, name)
        assert numbers(again, tensors, name) == (weights, {**defaults, **params}), name


def test_slerp_out_and_back_in(dense_family: Path, tensors, tmp_path: Path):
    recipe = Recipe(
        Source("base", str(dense_family / "base")),
        (Source("base", str(dense_family / "base")), Source("expert0", str(dense_family / "expert0"))),
        "slerp",
        (Group((3.0, 1.0), (0, 2)), Group((1.0, 3.0), (2, 4))),
    )
    for params, expected in ({}, 0.75), ({"t": 0.5}, 0.5):  # of one group only: the other one's is by its weights
        groups = (recipe.groups[0], replace(recipe.groups[1], params=params))
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_mergekit(replace(recipe, groups=groups))))
        again = Recipe.load(tmp_path / "config.yaml")
        assert numbers(again, tensors, "model.layers.1.mlp.up_proj.weight")[1]["t"] == 0.25
        assert numbers(again, tensors, "model.layers.2.mlp.up_proj.weight")[1]["t"] == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "random_vectors"}, "random_vectors"),
        ({"method": "ties", "mode": "mean"}, "mode: mean"),
        ({"method": "ties", "mode": "sum", "scope": "model"}, "scope: model"),
        ({"method": "dare_linear", "rescale": "density"}, "rescale: density"),
        ({"groups": (Group((0.1, 0.2), kinds=("mlp",)), Group((0.3, 0.4)))}, "kind of module"),
        ({"method": "karcher", "groups": (Group((1.0, 2.0)),)}, r"weights \[1.0, 2.0\]"),
        ({"method": "sce", "floor": 1e-6}, r"weights other than 1 \(\[0.25, -0.5\]\)"),
        ({"method": "sce", "groups": (Group((1.0, 1.0)),)}, "floor other than 1e-6"),
        ({"method": "sce", "groups": (Group((1.0, 1.0)),), "floor": 1e-6, "scale": 2.0}, "scale: 2.0"),
        ({"method": "della", "density": 0.9, "epsilon": 0.1, "rescale": "l1", "normalize": True}, "epsilon"),
        ({"method": "della_linear", "density": 0.5}, "rescale: probability"),
        ({"method": "tsv_m"}, "tsv_m"),
        (
            {
                "method": "multislerp",
                "groups": tuple(
                    Group((1.0, 1.0), span, {"origin": o}) for span, o in (((0, 2), "zero"), ((2, 4), "base"))
                ),
            },
            "origin",
        ),
    ],
    ids=str,
)
def test_what_mergekit_cannot_say_is_refused_by_name(dense_family: Path, change: dict, words: str):
    with pytest.raises(SpecError, match=words):
        to_mergekit(recipe_of(dense_family, **change))


def test_one_expert_out_and_back_in(dense_family: Path, tmp_path: Path):
    for method, params in (("nearswap", {"t": 0.5}), ("arcee_fusion", {}), ("passthrough", {})):
        recipe = recipe_of(dense_family, method, (Group((1.0,)),), **params)
        recipe = replace(recipe, experts=recipe.experts[:1])
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_mergekit(recipe)))
        again = Recipe.load(tmp_path / "config.yaml")
        assert (again.method, again.groups, again.experts) == (method, recipe.groups, recipe.experts)
        assert {**again.params} == params
    for method, params, words in (
        ("nearswap", {"t": 1e-7}, "t below 1e-6"),
        ("multislerp", {"normalize": False}, "one"),
    ):
        recipe = recipe_of(dense_family, method, (Group((1.0,)),), **params)
        with pytest.raises(SpecError, match=words):
            to_mergekit(replace(recipe, experts=recipe.experts[:1]))


TOKENS = """
merge_method: task_arithmetic
base_model: BASE
models:
  - {model: EXPERT_A, parameters: {weight: 0.5}}
  - {model: EXPERT_B, parameters: {weight: 0.25}}
tokenizer:
  source: union
  tokens:
    <|x|>: {source: EXPERT_A, force: true}
    <|y|>: {source: {model: {path: BASE}}}
    <|z|>: {source: {kind: model_token, model: EXPERT_B, token_id: 7}}
    <|0|>: {source: {kind: zero}}
  pad_to_multiple_of: 8
"""


def test_tokenizers_there_and_back(read):
    recipe = read(TOKENS)
    assert recipe.tokenizer is not None
    assert recipe.tokenizer.short() == {
        "source": "union",
        "tokens": {
            "<|x|>": {"source": "expert0", "force": True},
            "<|y|>": {"source": "base"},
            "<|z|>": {"source": {"kind": "model_token", "model": "expert1", "token_id": 7}},
            "<|0|>": {"source": {"kind": "zero"}},
        },
        "pad_to_multiple_of": 8,
    }
    assert read(yaml.safe_dump(to_mergekit(recipe))).to_dict() == recipe.to_dict()


@pytest.mark.parametrize(
    ("written", "source"),
    [
        ("tokenizer: {}", "union"),
        ("tokenizer_source: union", "union"),
        ("tokenizer_source: base", "base"),
        ("tokenizer_source: EXPERT_B", "expert1"),
        ("tokenizer: {source: BASE}", "base"),
        ("", None),
    ],
)
def test_whose_tokens(read, written: str, source: str | None):
    recipe = read(f"merge_method: task_arithmetic\nbase_model: BASE\n{written}\n{MODELS}")
    assert (recipe.tokenizer and recipe.tokenizer.short()) == (source and {"source": source})
    assert read(yaml.safe_dump(to_mergekit(recipe))).to_dict() == recipe.to_dict()


def test_tokens_that_mergekit_needs_a_source_for(read):
    recipe = read(TOKENS)
    choice = TokenizerChoice.model_validate({"tokens": {"<|y|>": {}}})
    with pytest.raises(SpecError, match=r"mergekit cannot say a token without a source \(<\|y\|>\)"):
        to_mergekit(replace(recipe, tokenizer=choice))
