"""mergekit configurations and recipes lead to each other: what its own examples show, whatever Hypothesis draws."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.checkpoints import Checkpoint, open_checkpoint
from evomerge.errors import CheckpointError, MethodError, SpecError
from evomerge.exporting import export
from evomerge.mergekit_writing import to_mergekit, to_mergekit_yaml
from evomerge.merging import Merger, open_sources
from evomerge.progress import Progress
from evomerge.recipe import Group, Recipe, Source
from evomerge.stages import built

LAYERS = 4
MLP = [f"model.layers.{layer}.mlp.{part}_proj.weight" for layer in range(LAYERS) for part in ("gate", "up", "down")]


def parse(text: str, family: Path, folder: Path | None = None) -> Recipe:
    """The recipe of a configuration; BASE, A and B stand for the family's folders."""
    for name, model in (("BASE", "base"), ("MODEL_A", "expert0"), ("MODEL_B", "expert1")):
        text = text.replace(name, str(family / model))
    with tempfile.TemporaryDirectory() as own:
        path = Path(folder or own) / "config.yaml"
        path.write_text(text)
        return Recipe.load(path)


def is_adapter(path: str) -> bool:
    return (Path(path) / "adapter_config.json").exists()


def merged(recipe: Recipe) -> bytes:
    """All bytes of a merge's weights."""
    with tempfile.TemporaryDirectory() as folder, built(recipe, Path(folder), Progress(quiet=True)) as ready:
        Merger(open_sources(ready)).stream(recipe, Path(folder), durable=False)
        return (Path(folder) / "model.safetensors").read_bytes()


def made(recipe: Recipe) -> bytes | str:
    """The bytes, or why there is no such merge (weights that sum to zero, numbers too large for the type)."""
    try:
        return merged(recipe)
    except (CheckpointError, MethodError) as error:
        return error.problem


# --- what mergekit's README and examples show, written anew for a tiny family

EXAMPLES = {
    "linear": """
models:
  - {model: BASE, parameters: {weight: 1.0}}
  - {model: MODEL_A, parameters: {weight: 0.3}}
  - {model: MODEL_B, parameters: {weight: 0.5}}
merge_method: linear
dtype: float16
""",
    "slerp with a gradient": """
slices:
  - sources:
      - {model: BASE, layer_range: [0, 4]}
      - {model: MODEL_A, layer_range: [0, 4]}
merge_method: slerp
base_model: BASE
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
dtype: bfloat16
""",
    "ties with gradients and a filter": """
models:
  - model: MODEL_A
    parameters: {weight: [0, 0.3, 0.7, 1]}
  - model: MODEL_B
    parameters: {weight: [{filter: mlp, value: 0.5}, {value: 0.25}]}
merge_method: ties
base_model: BASE
parameters:
  density: [1, 0.7, 0.1]
  normalize: true
  int8_mask: true
dtype: float16
""",
    "dare_ties": """
models:
  - model: BASE
  - {model: MODEL_A, parameters: {density: 0.53, weight: 0.4}}
  - {model: MODEL_B, parameters: {density: 0.53, weight: 0.3}}
merge_method: dare_ties
base_model: BASE
parameters: {int8_mask: true}
dtype: bfloat16
""",
    "dare_linear with lambda": """
models:
  - {model: MODEL_A, parameters: {weight: 0.4}}
  - {model: MODEL_B, parameters: {weight: 0.3}}
merge_method: dare_linear
base_model: BASE
parameters: {density: [0.8, 0.4], lambda: 1.2, normalize: true}
dtype: float32
""",
    "task_arithmetic in slices": """
slices:
  - sources:
      - {model: BASE, layer_range: [0, 2]}
      - {model: MODEL_A, layer_range: [0, 2], parameters: {weight: [0.2, 0.6]}}
      - {model: MODEL_B, layer_range: [0, 2], parameters: {weight: 0.9}}
  - sources:
      - {model: BASE, layer_range: [2, 4]}
      - {model: MODEL_A, layer_range: [2, 4], parameters: {weight: -0.5}}
      - {model: MODEL_B, layer_range: [2, 4], parameters: {weight: 0.1}}
    parameters: {lambda: 0.5}
merge_method: task_arithmetic
base_model: BASE
out_dtype: float32
dtype: bfloat16
""",
    "sce as its authors have it": """
models:
  - model: BASE
  - model: MODEL_A
  - model: MODEL_B
merge_method: sce
base_model: BASE
parameters: {select_topk: 0.1}
dtype: bfloat16
""",
    "model_stock": """
models: [{model: MODEL_A}, {model: MODEL_B}]
merge_method: model_stock
base_model: BASE
dtype: bfloat16
""",
    "nuslerp of task vectors": """
models:
  - {model: MODEL_A, parameters: {weight: 0.5}}
  - {model: MODEL_B, parameters: {weight: [0.5, 1]}}
merge_method: nuslerp
base_model: BASE
parameters: {nuslerp_flatten: false}
dtype: bfloat16
""",
    "karcher": """
models: [{model: MODEL_A}, {model: MODEL_B}]
merge_method: karcher
parameters: {max_iter: 20, tol: [1.0e-9, 0.1]}
dtype: bfloat16
""",
    "layers of two models": """
slices:
  - sources: [{model: MODEL_A, layer_range: [0, 3], parameters: {scale: [{filter: o_proj, value: 0.5}, {value: 1}]}}]
  - sources: [{model: MODEL_B, layer_range: [3, 4]}]
merge_method: passthrough
dtype: bfloat16
""",
    "della": """
models:
  - {model: MODEL_A, parameters: {weight: 0.4}}
  - {model: MODEL_B, parameters: {weight: 0.3}}
merge_method: della
base_model: BASE
parameters: {density: [0.5, 0.7], epsilon: 0.1, lambda: 1.1}
dtype: float32
""",
    "models written out": """
models:
  - {model: {model: {path: MODEL_A}}, parameters: {weight: 0.4}}
  - {model: {model: MODEL_B, lora: null}, parameters: {weight: 0.3}}
merge_method: task_arithmetic
base_model: {model: {path: BASE, revision: null}, lora: null, override_architecture: null}
dtype: float32
""",
    "a merge of merges": """
name: first
merge_method: slerp
base_model: BASE
models: [{model: MODEL_A}]
parameters: {t: 0.4}
dtype: float16
---
name: second
merge_method: ties
base_model: first
models:
  - {model: MODEL_A, parameters: {weight: 0.5}}
  - {model: MODEL_B, parameters: {weight: 0.5}}
parameters: {density: 0.5}
dtype: float32
---
merge_method: linear
models:
  - {model: second, parameters: {weight: 0.7}}
  - {model: first, parameters: {weight: [0.1, 0.5]}}
dtype: bfloat16
""",
}


@pytest.mark.parametrize("case", EXAMPLES)
def test_in_and_out_and_in_again(dense_family: Path, case: str):
    """An equal recipe, and the same bytes."""
    first = parse(EXAMPLES[case], dense_family)
    again = parse(to_mergekit_yaml(first), dense_family)
    assert again == first
    assert again.hash == first.hash
    assert merged(again) == merged(first)


def test_a_merge_of_merges_is_its_stages(dense_family: Path, tmp_path: Path):
    """Named merges are stages, each rounded to its own type: as if they had been exported and named by folders."""
    recipe = parse(EXAMPLES["a merge of merges"], dense_family)
    documents = EXAMPLES["a merge of merges"].split("---")
    for name, text in zip(("first", "second"), documents, strict=False):
        body = "\n".join(line for line in text.splitlines() if not line.startswith("name:"))
        export(parse(body, dense_family, tmp_path), tmp_path / name)
    assert merged(recipe) == merged(parse(documents[2], dense_family, tmp_path))
    assert [s.name for s in recipe.experts] == ["second", "first"]
    second = recipe.experts[0].recipe
    assert second is not None and second.base is not None
    assert second.base.recipe == recipe.experts[1].recipe != None  # noqa: E711


def test_a_stage_of_ours_that_uses_another_and_an_adapter(lora_family: Path, dense_family: Path):
    """The adapter of a base that is a merge itself; a name that a folder has already."""
    base, adapter = str(lora_family / "base"), str(lora_family / "expert0")
    mean = {"method": "linear", "weights": 0.5, "experts": {"a": base, "b": str(dense_family / "expert1")}}
    inner = {"method": "task_arithmetic", "base": base, "experts": {"b": adapter}, "weights": 0.5}
    recipe = Recipe.from_dict(
        {
            "method": "task_arithmetic", "weights": 0.25, "base": {"recipe": mean},
            "experts": {"l": adapter, "in ner": {"recipe": {**inner, "base": {"recipe": mean}}}},
        }
    )  # fmt: skip
    text = to_mergekit_yaml(recipe, is_adapter=is_adapter)
    assert [d.get("name") for d in yaml.safe_load_all(text)] == ["base", "in-ner", None]
    assert f"base+{adapter}" in text
    again = parse(text, lora_family)
    assert merged(again) == merged(recipe)
    assert to_mergekit_yaml(again, is_adapter=is_adapter) == text


REFUSED = {
    "a frankenmerge": (
        """
slices:
  - sources: [{model: BASE, layer_range: [0, 3]}]
  - sources: [{model: MODEL_A, layer_range: [1, 4]}]
merge_method: passthrough
dtype: float16
""",
        ["slices[1]", "1 to 4", "out of order"],
    ),
    "a frankenmerge by linear": (
        """
slices:
  - sources: [{model: MODEL_A, layer_range: [0, 3], parameters: {weight: 1}}]
  - sources: [{model: MODEL_A, layer_range: [1, 4], parameters: {weight: 1}}]
merge_method: linear
""",
        ["slices[1]", "1 to 4", "out of order"],
    ),
    "a density for each model": (
        """
models:
  - {model: MODEL_A, parameters: {density: 0.5, weight: 1}}
  - {model: MODEL_B, parameters: {density: 0.33, weight: 1}}
merge_method: ties
base_model: BASE
""",
        ["density", "0.33", "0.5"],
    ),
    "linear's base without a weight": (
        "merge_method: linear\nbase_model: BASE\nmodels: [{model: MODEL_A, parameters: {weight: 1}}]",
        ["weight", "base"],
    ),
    "a parameter that linear has not": (
        "merge_method: linear\nmodels: [{model: MODEL_A, parameters: {weight: 1, density: 1}}]", ["density", "linear"]
    ),
    "another architecture": (
        "merge_method: linear\n"
        "models: [{model: {model: MODEL_A, override_architecture: X}, parameters: {weight: 1}}]",
        ["models[0].model.override_architecture"],
    ),
    "an unknown key of a model": (
        "merge_method: linear\nmodels: [{model: {model: MODEL_A, branch: x}, parameters: {weight: 1}}]",
        ["models[0].model", "'branch'"],
    ),
    "an unknown key of a path": (
        "merge_method: linear\nmodels: [{model: {model: {path: MODEL_A, sha: x}}, parameters: {weight: 1}}]",
        ["models[0].model", "'sha'"],
    ),
    "an unknown key of a slice": (
        "merge_method: linear\nslices: [{layers: 3, sources: [{model: BASE, layer_range: [0, 4]}]}]", ["'layers'"]
    ),
    "an unknown key of a source": (
        "merge_method: linear\nslices: [{sources: [{model: BASE, layer_range: [0, 4], wieght: 1}]}]", ["'wieght'"]
    ),
    "an unknown key of a condition": (
        "merge_method: linear\nmodels: [{model: BASE, parameters: {weight: [{filtr: x, value: 1}]}}]", ["weight"]
    ),
    "a second name": ("name: a\nmerge_method: linear\n---\nname: a\nmerge_method: linear", ["two merges", "'a'"]),
    "a circle": (
        "name: a\nmerge_method: linear\nmodels: [{model: b}]\n---\n"
        "name: b\nmerge_method: linear\nmodels: [{model: a}]\n---\nmerge_method: linear\nmodels: [{model: b}]",
        ["itself", "b -> a -> b"],
    ),
    "a merge that nobody needs": (
        "name: a\nmerge_method: linear\nmodels: [{model: BASE, parameters: {weight: 1}}]\n---\n"
        "merge_method: linear\nmodels: [{model: MODEL_A, parameters: {weight: 1}}]",
        ["does not need", "a"],
    ),
    "several recipes": ("method: linear\n---\nmethod: linear", ["document 1 of 2"]),
    "a stage that is wrong": (
        "name: a\nmerge_method: tise\nmodels: [{model: BASE}]\n---\n"
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]",
        ["config.yaml: a.merge_method", "'tise'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(dense_family: Path, case: str):
    text, words = REFUSED[case]
    with pytest.raises(SpecError) as raised:
        parse(text, dense_family)
    for word in (*words, "config.yaml"):
        assert word in str(raised.value)


# --- whatever Hypothesis draws

number = st.floats(-2, 2) | st.sampled_from([0.0, 1.0, 0.5])
gradient = st.lists(st.floats(-2, 2), min_size=1, max_size=5)
share = st.floats(0.05, 1)
FILTERS = ["mlp", "self_attn", "layernorm", "embed", "layers.1.", "model.norm", "q_proj", "*"]


def setting(one: st.SearchStrategy, several: st.SearchStrategy) -> st.SearchStrategy:
    """A value, a gradient, or conditions of these that end with one for the rest."""
    either = one | several
    condition = st.fixed_dictionaries({"filter": st.sampled_from(FILTERS), "value": either})
    rest = either.map(lambda value: {"value": value})
    return either | st.tuples(st.lists(condition, max_size=2), rest).map(lambda pair: [*pair[0], pair[1]])


weights = setting(number, gradient)
densities = setting(share, st.lists(share, min_size=1, max_size=4))
drops = setting(st.floats(0.3, 0.7), st.lists(st.floats(0.3, 0.7), min_size=1, max_size=4))
shared_by = {
    "linear": {"normalize": st.booleans()},
    "task_arithmetic": {"normalize": st.booleans(), "lambda": weights},
    "ties": {"normalize": st.booleans(), "lambda": number, "density": densities},
    "dare_linear": {"lambda": number, "density": densities, "rescale": st.just(True)},
    "dare_ties": {"normalize": st.booleans(), "density": densities},
    "slerp": {"t": setting(st.floats(0, 1), st.lists(st.floats(0, 1), min_size=1, max_size=4))},
    "nuslerp": {"nuslerp_flatten": st.booleans(), "nuslerp_row_wise": st.booleans()},
    "multislerp": {"normalize_weights": st.booleans()},
    "karcher": {"max_iter": st.integers(0, 10), "tol": setting(st.floats(0, 1), st.lists(st.floats(0, 1), min_size=1))},
    "model_stock": {"filter_wise": st.booleans()},
    "sce": {"select_topk": setting(st.floats(0, 1), st.lists(st.floats(0, 1), min_size=1, max_size=4))},
    "ram": {"epsilon": setting(st.floats(0, 1), st.lists(st.floats(0, 1), min_size=1, max_size=4))},
    "breadcrumbs": {"normalize": st.booleans(), "density": densities, "gamma": st.floats(0, 1), "lambda": number},
    "breadcrumbs_ties": {"normalize": st.booleans(), "density": densities, "gamma": densities},
    "della": {"normalize": st.booleans(), "density": drops, "epsilon": st.floats(0, 0.2), "lambda": number},
    "della_linear": {"density": drops, "epsilon": st.floats(0.01, 0.2)},
}
UNWEIGHTED = {"slerp", "karcher", "model_stock", "sce", "ram"}


@st.composite
def configurations(draw) -> dict[str, Any]:
    """mergekit configurations of whole models, or of slices that are all layers in order."""
    method = draw(st.sampled_from(sorted(shared_by)))
    needed = {"t"} if method == "slerp" else {"density", "epsilon"} if "della" in method else set()
    baseless = method in ("linear", "karcher") or (method in ("nuslerp", "multislerp") and draw(st.booleans()))
    shared = shared_by[method]

    def parameters(*always: str) -> dict[str, Any]:
        return {k: draw(v) for k, v in shared.items() if k in always or draw(st.booleans())}

    def source(model: str, more: dict[str, Any]) -> dict[str, Any]:
        own = {} if method in UNWEIGHTED or model == "BASE" else {"parameters": {"weight": draw(weights)}}
        return {"model": model, **more, **own}

    models = ["MODEL_A"] if method == "slerp" else ["MODEL_A", "MODEL_B"]
    data: dict[str, Any] = {"merge_method": method, "parameters": parameters(*needed)}
    if not baseless:
        data["base_model"] = "BASE"
    if draw(st.booleans()):
        models = models if baseless or draw(st.booleans()) else ["BASE", *models]
        data["models"] = [source(model, {}) for model in models]
    else:
        models = models if baseless else ["BASE", *models]
        cuts = draw(st.lists(st.integers(1, LAYERS - 1), unique=True).map(sorted))
        spans = list(zip([0, *cuts], [*cuts, LAYERS], strict=True))
        data["slices"] = [
            {"sources": [source(model, {"layer_range": list(span)}) for model in models]}
            | ({"parameters": parameters()} if draw(st.booleans()) else {})
            for span in spans
        ]
    data["dtype"] = draw(st.sampled_from(["bfloat16", "float16", "float32"]))
    return data


def effect(recipe: Recipe, tensors: Checkpoint) -> dict[str, tuple[Any, ...]]:
    """Tensor -> (weights, parameters) as far as they change the merge."""
    found = {}
    for name in tensors.names:
        info = tensors.info(name)
        own, params = recipe.group_for(info).weights, dict(recipe.to_dict()["params"], **recipe.params_for(info))
        if recipe.method == "slerp":
            t = params["t"]
            own, params = (), {"t": own[1] / sum(own) if t is None else t}
        if recipe.method == "karcher":  # only the weights' proportions count
            own = tuple(weight / sum(own) for weight in own)
        if params.get("normalize") or recipe.method == "linear":
            params.pop("mode", None)
        if params.get("density") == 1:
            params = {k: v for k, v in params.items() if k not in ("scope", "rescale", "gamma", "epsilon")}
        found[name] = (own, params)
    return found


@settings(max_examples=60)
@given(data=configurations())
def test_any_configuration_comes_back(dense_family: Path, data: dict[str, Any]):
    """Read, written and read again: an equal recipe, whichever gradients, filters and slices it had."""
    first = parse(yaml.safe_dump(data), dense_family)
    again = parse(to_mergekit_yaml(first), dense_family)
    tensors = open_checkpoint(dense_family / "base")
    assert effect(again, tensors) == effect(first, tensors)
    assert again == first


METHODS: dict[str, dict[str, st.SearchStrategy]] = {
    "linear": {"normalize": st.booleans()},
    "task_arithmetic": {"scale": number},
    "ties": {
        "density": share, "normalize": st.booleans(), "scale": number, "mode": st.sampled_from(["mean", "sum"]),
        "scope": st.sampled_from(["tensor", "model"]),
    },
    "dare_linear": {"density": share, "scale": number, "rescale": st.sampled_from(["l1", "density"])},
    "dare_ties": {
        "density": share, "normalize": st.booleans(), "mode": st.sampled_from(["mean", "sum"]),
        "rescale": st.sampled_from(["l1", "density"]),
    },
    "slerp": {"t": st.none() | st.floats(0, 1)},
    "random_vectors": {"scale": number},
    "nuslerp": {"vectors": st.sampled_from(["tensor", "rows", "columns"]), "origin": st.sampled_from(["zero", "base"])},
    "multislerp": {"normalize": st.booleans(), "origin": st.sampled_from(["zero", "base"])},
    "karcher": {"steps": st.integers(0, 12), "tol": st.floats(0, 0.1)},
    "model_stock": {"vectors": st.sampled_from(["tensor", "rows"])},
    "sce": {"select_topk": st.floats(0, 1), "floor": st.just(1e-6), "scale": st.sampled_from([1.0, 2.0])},
    "ram": {"epsilon": st.floats(0, 1), "scale": st.sampled_from([1.0, 0.5])},
    "breadcrumbs": {"density": share, "gamma": st.floats(0, 1), "scale": number},
    "breadcrumbs_ties": {
        "density": share, "gamma": st.floats(0, 1), "mode": st.sampled_from(["mean", "sum"]),
    },
    "della": {
        "density": st.floats(0.4, 0.8), "epsilon": st.floats(0, 0.2), "normalize": st.booleans(),
        "mode": st.sampled_from(["mean", "sum"]), "rescale": st.sampled_from(["l1", "probability"]),
    },
    "della_linear": {"density": st.floats(0.4, 0.8), "rescale": st.sampled_from(["l1", "probability"])},
}  # fmt: skip
ONES = {"model_stock", "sce", "ram", "karcher"}  # mostly drawn with weights that mergekit can say


@st.composite
def recipes(draw, family: Path) -> Recipe:
    """Recipes of two experts: one group, or groups of layers, tensors, kinds, or all at once."""
    method = draw(st.sampled_from(sorted(METHODS)))
    names = open_checkpoint(family / "base").names

    def parameters() -> dict[str, Any]:
        return {key: draw(value) for key, value in METHODS[method].items() if draw(st.booleans())}

    own = st.floats(0.1, 2) if method in ("slerp", "nuslerp", "karcher") else number
    pair = st.just((1.0, 1.0)) if method in ONES and draw(st.integers(0, 3)) else st.tuples(own, own)
    shape = draw(st.sampled_from(["one", "layers", "tensors", "kinds", "both"]))
    groups: list[Group] = []
    if shape in ("layers", "both"):
        cuts = draw(st.lists(st.integers(1, LAYERS - 1), unique=True).map(sorted))
        for span in zip([0, *cuts], [*cuts, LAYERS], strict=True):
            groups.append(Group(draw(pair), span, parameters()))
    if shape in ("tensors", "both"):
        several = st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)
        for chosen in draw(st.lists(several, min_size=1, max_size=3)):
            groups.append(Group(draw(pair), None, parameters(), tensors=tuple(chosen)))
    if shape == "kinds":
        groups.append(Group(draw(pair), None, parameters(), kinds=("mlp",)))
    if shape != "layers":
        groups.append(Group(draw(pair), None, {} if shape == "one" else parameters()))
    base = Source("base", str(family / "base"))
    others = tuple(Source(f"expert{t}", str(family / f"expert{t}")) for t in range(2))
    experts = (base, others[0]) if method == "slerp" else others
    dtype = draw(st.sampled_from(["float16", "float32"]))
    recipe = Recipe(base, experts, method, tuple(groups), parameters(), export_dtype=dtype)
    return Recipe.from_dict(recipe.to_dict())


@settings(max_examples=60)
@given(data=st.data())
def test_any_recipe_is_said_exactly_or_refused_by_name(dense_family: Path, data):
    tensors = open_checkpoint(dense_family / "base")
    recipe = data.draw(recipes(dense_family))
    try:
        written = to_mergekit(recipe)
    except SpecError as error:
        groups = [dict(recipe.to_dict()["params"], **group.params) for group in recipe.groups]
        reasons: dict[str, Callable[[], bool]] = {
            "method random_vectors": lambda: recipe.method == "random_vectors",
            "groups by kind": lambda: any(group.kinds for group in recipe.groups),
            "beside groups of tensors": lambda: len({(g.layers is None, g.tensors is None) for g in recipe.groups}) > 1,
            "mode: mean": lambda: any(p["mode"] == "mean" and not p["normalize"] for p in groups),
            "scope: model": lambda: any(p["scope"] == "model" and p["density"] != 1 for p in groups),
            "rescale: density": lambda: any(p["rescale"] == "density" and p["density"] != 1 for p in groups),
            "rescale: probability": lambda: any(p["rescale"] == "probability" for p in groups),
            "(density + epsilon)": lambda: any(p["density"] + p["epsilon"] >= 1 for p in groups),
            " weights ": lambda: recipe.method in ONES and any(group.weights != (1.0, 1.0) for group in recipe.groups),
            "a floor": lambda: any(p["floor"] != 1e-6 for p in groups),
            "a scale": lambda: any(p["scale"] != 1 for p in groups),
            "(origin)": lambda: len({p["origin"] for p in groups}) > 1,
        }
        (reason,) = [reason for reason in reasons if reason in str(error)]
        assert reasons[reason]()
        return
    again = parse(yaml.safe_dump(written), dense_family)
    assert (again.method, again.export_dtype, again.experts) == (recipe.method, recipe.export_dtype, recipe.experts)
    assert effect(again, tensors) == effect(recipe, tensors)
    if recipe.method != "slerp" or all({**recipe.params, **g.params}["t"] is not None for g in recipe.groups):
        assert made(again) == made(recipe)


def test_paths_that_mergekit_would_take_apart(dense_family: Path, tmp_path: Path):
    """A plus or an at sign in a folder's name: written out, and read back."""
    for name in ("c++", "a@b"):
        shutil.copytree(dense_family / "expert0", tmp_path / name)
        recipe = Recipe(
            Source("base", str(dense_family / "base")), (Source(name, str(tmp_path / name)),), "task_arithmetic",
            (Group((0.5,)),), {"scale": 1.0}, 0, "float32",
        )  # fmt: skip
        written = to_mergekit(recipe)
        assert written["models"][0]["model"] == {"model": {"path": str(tmp_path / name)}}
        assert parse(yaml.safe_dump(written), dense_family).experts == recipe.experts


def test_a_tensor_whose_name_is_in_anothers_cannot_be_said_alone(dense_family: Path):
    """Filters are parts of names: not even one of a tensor that no group names may be met."""
    base = Source("base", str(dense_family / "base"))

    def of(*tensors: str) -> Recipe:
        groups = (Group((0.5,), tensors=tensors), Group((0.25,)))
        return Recipe(base, (Source("a", str(dense_family / "expert0")),), "task_arithmetic", groups)

    to_mergekit(of("model.norm.weight"))
    names = open_checkpoint(dense_family / "base").names
    assert not any(a != b and a in b for a in names for b in names)  # so that this family can say every tensor
