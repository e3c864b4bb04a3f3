"""mergekit's configurations as recipes, and recipes as mergekit's configurations (its version 0.1.5).

What both can say comes over exactly: whole models, slices that are all layers in order, gradients, tensor filters, LoRA
references. What only one can say is refused by name, never dropped. Two things stay different by their nature: mergekit
computes in ``dtype``, evomerge in float32 or wider; and where a method draws at random, the draws differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from evomerge.errors import SpecError, nearest
from evomerge.recipe import DTYPES, Group, Recipe, Source
from evomerge.validation import Strict, short, validate

# method -> defaults of the parameters that are read for it; what every expert has of its own is in PER_MODEL
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "linear": {"normalize": True},
    "task_arithmetic": {"normalize": False, "lambda": 1.0},
    "ties": {"normalize": True, "lambda": 1.0, "density": 1.0},
    "dare_linear": {"normalize": False, "lambda": 1.0, "density": 1.0, "rescale": True},
    "dare_ties": {"normalize": False, "lambda": 1.0, "density": 1.0, "rescale": True},
    "slerp": {"t": None},
}
PER_MODEL = ("weight", "density")
WITHOUT_EFFECT = ("int8_mask",)  # how mergekit keeps its masks


def _check_setting(value: Any) -> Any:
    """A value, a list of numbers or words, or conditions ``{filter, value}`` of these."""

    def plain(v: Any) -> bool:
        return isinstance(v, int | float | bool | str) or (isinstance(v, list) and bool(v) and all(map(plain, v)))

    def condition(v: Any) -> bool:
        return (
            isinstance(v, Mapping)
            and set(v) <= {"filter", "value"}
            and plain(v.get("value"))
            and isinstance(v.get("filter"), str | None)
        )

    if plain(value) or condition(value) or (isinstance(value, list) and value and all(map(condition, value))):
        return value
    raise PydanticCustomError(
        "setting",
        "a parameter is a value, a list of values, or conditions {conditions}, but this is {value}",
        {"conditions": "{filter: part of a name, value: ...}", "value": short(value), "remedy": ""},
    )


Setting = Annotated[Any, BeforeValidator(_check_setting)]


class _Model(Strict):
    model: Any
    parameters: dict[str, Setting] | None = None


class _SliceSource(_Model):
    layer_range: list[int] = Field(min_length=2, max_length=2)


class _Slice(Strict):
    sources: list[_SliceSource] = Field(min_length=1)
    base_model: Any = None
    residual_weight: float | None = None
    parameters: dict[str, Setting] | None = None


class _Configuration(Strict):
    """The shape of a mergekit configuration; what it may say is up to the reading."""

    merge_method: str
    models: list[_Model] | None = None
    slices: list[_Slice] | None = None
    modules: Any = None
    base_model: Any = None
    parameters: dict[str, Setting] | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: Any = None
    tokenizer: Any = None
    chat_template: str | None = None


def from_mergekit(data: Mapping[str, Any], *, where: str, folder: Path | None = None) -> Recipe:
    """The recipe that a mergekit configuration stands for. Opens the base (its names and layers; no tensor data).

    Args:
        where: the file that errors name.
        folder: what relative paths start from; None: the current folder.

    Raises:
        SpecError: what evomerge cannot say (naming it), or what mergekit would refuse too.
        CheckpointError: the base, or for methods without one the first model, cannot be opened.
    """
    return _Reading(data, where, folder or Path()).recipe()


class _Reading:
    """One configuration being read."""

    def __init__(self, data: Mapping[str, Any], where: str, folder: Path):
        validate(_Configuration, data, where=where)
        self.data, self.where, self.folder = data, where, folder

    def recipe(self) -> Recipe:
        from evomerge.checkpoints import open_checkpoint

        self.method = str(self.data["merge_method"])
        self.check_top()
        self.base = self.model("base_model", self.data["base_model"]) if self.data.get("base_model") else None
        if self.base is None and self.method != "linear":
            raise self.error("base_model", f"method {self.method} needs a base_model")
        slices = self.slices()
        self.check_parameters(slices)
        self.experts = self.expert_paths(slices)
        sources = tuple(Source(name, path) for path, name in _names(self.experts).items())
        reference = open_checkpoint(self.base or self.experts[0])
        self.lay_out(slices, reference.num_layers)
        settings = {
            name: self.settings_of(name, reference.info(name), slices)
            for name in reference.names
            if reference.dtype(name).is_floating_point
        }
        groups, params = self.groups(settings, reference)
        dtype = self.data.get("out_dtype") or self.data.get("dtype") or _stored_dtype(reference)
        if dtype not in DTYPES:
            raise self.error("dtype", f"{dtype!r} is unknown", nearest(str(dtype), DTYPES))
        base = None if self.base is None else Source("base", self.base)
        written = Recipe(base, sources, self.method, groups, params, export_dtype=dtype)
        return Recipe.from_dict(written.to_dict(), where=self.where)  # the method's own rules

    def check_top(self) -> None:
        """The method, and what says something about architecture or vocabulary."""
        if self.method not in DEFAULTS:
            raise self.error(
                "merge_method", f"evomerge has no counterpart of {self.method!r}", nearest(self.method, DEFAULTS)
            )
        for key, kept, what in (
            ("modules", (None, {}), "models of several modules are not supported"),
            ("tokenizer", (None, {}), "only the base's tokenizer is supported"),
            ("tokenizer_source", (None, "base"), "only the base's tokenizer is supported"),
            ("chat_template", (None, "auto"), "the base's chat template is kept"),
        ):
            if self.data.get(key) not in kept:
                raise self.error(key, what, "Leave it out.")

    def check_parameters(self, slices: Sequence[Mapping[str, Any]]) -> None:
        sources = [source for entry in slices for source in entry["sources"]]
        for parameters in (self.data.get("parameters") or {}, *(e["parameters"] for e in [*slices, *sources])):
            for key in parameters:
                if key not in (*DEFAULTS[self.method], *PER_MODEL, *WITHOUT_EFFECT):
                    raise self.error(
                        f"parameters.{key}", f"method {self.method} has no parameter {key!r} that evomerge knows"
                    )

    def lay_out(self, slices: Sequence[dict[str, Any]], num_layers: int) -> None:
        """Check that the slices are all layers, each once and in order; fills in their ranges."""
        remedy = "Only slices that together are all layers, each once and in order, are a merge without surgery."
        place = 0
        for number, entry in enumerate(slices):
            entry["range"] = entry["range"] or (0, num_layers)
            first, end = entry["range"]
            if first != place or end <= first:
                raise self.error(f"slices[{number}]", f"layers out of order: it is {first} to {end}", remedy)
            place = end
        if place != num_layers:
            raise self.error("slices", f"they end at layer {place}, but the model has {num_layers} layers", remedy)

    # --- models ----------------------------------------------------------------------------------------------------

    def model(self, key: str, reference: Any) -> str:
        """The folder that a model reference names: ``model``, or ``base+adapter``, which is the adapter's."""
        if isinstance(reference, Mapping):
            inner = reference.get("model")
            reference = inner.get("path") if isinstance(inner, Mapping) else inner
        if not isinstance(reference, str) or not reference:
            raise self.error(key, f"a model is a path, but this is {reference!r}")
        model, plus, adapter = reference.partition("+")
        if plus and self.place(model) != getattr(self, "base", None):
            raise self.error(key, f"the adapter {adapter} belongs to {model}, which is not the base_model")
        return self.place(adapter if plus else model)

    def place(self, path: str) -> str:
        beside = self.folder / Path(path).expanduser()
        return str(beside) if beside.exists() else path

    def slices(self) -> list[dict[str, Any]]:
        """Each slice: its range of layers (None: all), parameters, and (model, parameters) for each source."""
        data = self.data
        if bool(data.get("models")) == bool(data.get("slices")):
            raise self.error("", "exactly one of models and slices must be given")
        if data.get("models"):
            return [{"range": None, "parameters": {}, "sources": self.sources("models", data["models"])}]
        found = []
        for number, entry in enumerate(data["slices"]):
            key = f"slices[{number}]"
            if entry.get("residual_weight") is not None:
                raise self.error(key, "residual_weight is not supported")
            if entry.get("base_model") and self.model(key, entry["base_model"]) != self.base:
                raise self.error(key, "all slices must have one base_model")
            sources = self.sources(f"{key}.sources", entry["sources"])
            ranges = {tuple(source["layer_range"]) for source in entry["sources"]}
            if len(ranges) > 1:
                raise self.error(
                    key, "all sources of a slice must have one layer_range", "Layers cannot change places."
                )
            found.append({"range": ranges.pop(), "parameters": entry.get("parameters") or {}, "sources": sources})
        return found

    def sources(self, key: str, entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [
            {"model": self.model(f"{key}[{n}].model", e["model"]), "parameters": e.get("parameters") or {}}
            for n, e in enumerate(entries)
        ]

    def expert_paths(self, slices: Sequence[Mapping[str, Any]]) -> list[str]:
        """The models that are merged. Task vectors of the base itself are zero, so it is none of them."""
        models = [[source["model"] for source in entry["sources"]] for entry in slices]
        if any(sorted(other) != sorted(models[0]) for other in models):
            raise self.error("slices", "all slices must merge the same models", "Give a model the weight 0 instead.")
        paths = list(dict.fromkeys(models[0]))
        if len(paths) < len(models[0]):
            raise self.error("", "a model is named twice", "Name each model once.")
        if self.method == "slerp":  # from the base to the other
            others = [path for path in paths if path != self.base]
            if len(others) != 1 or self.base is None:
                raise self.error("models", "slerp needs the base_model and one other model")
            return [self.base, *others]
        return paths if self.method == "linear" else [path for path in paths if path != self.base]

    # --- numbers ---------------------------------------------------------------------------------------------------

    def settings_of(self, name: str, info: Any, slices: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
        """(weights, parameters as pairs) of one tensor."""
        entry, t = slices[0], 0.0  # what comes before the layers reads the first slice; what comes after the last one
        if info.layer is not None:
            entry = next(s for s in slices if s["range"][0] <= info.layer < s["range"][1])
            first, end = entry["range"]
            t = (info.layer - first) / (end - first - 1) if end - first > 1 else 1.0
        elif info.kind != "embedding":
            entry = slices[-1]
        levels = [entry["parameters"], self.data.get("parameters") or {}]
        own = {source["model"]: source["parameters"] for source in entry["sources"]}

        def value(key: str, model: str | None, default: Any) -> Any:
            for parameters in [own[model], *levels] if model in own else levels:
                found = _evaluate(parameters.get(key), name, t)
                if found is not None:
                    return found
            return default

        values = {k: value(k, None, default) for k, default in DEFAULTS[self.method].items() if k not in PER_MODEL}
        if self.method == "slerp":
            if values["t"] is None:
                raise self.error("parameters.t", f"slerp needs t, and {name} has none")
            return (1.0, 1.0), tuple(values.items())
        weights = [value("weight", model, None) for model in self.experts]
        for model, weight in zip(self.experts, weights, strict=True):
            if not isinstance(weight, int | float):
                raise self.error("parameters.weight", f"{model} has no weight for the tensor {name}")
        if "density" in DEFAULTS[self.method]:
            densities = {value("density", model, 1.0) for model in self.experts}
            if len(densities) > 1:
                raise self.error(
                    "parameters.density",
                    f"all models must have one density, but for {name} they have {sorted(densities)}",
                )
            values["density"] = densities.pop()
        return self.translated([float(weight) for weight in weights], values)

    def translated(self, weights: list[float], values: dict[str, Any]) -> tuple[Any, ...]:
        """mergekit's numbers as evomerge's: (weights, parameters as pairs)."""
        params: dict[str, Any] = {}
        if self.method == "linear":
            return tuple(weights), (("normalize", values["normalize"]),)
        params["scale"] = float(values["lambda"])
        if self.method in ("task_arithmetic", "dare_linear"):
            total = sum(weights)
            if values["normalize"] and abs(total) >= 1e-8:
                weights = [weight / total for weight in weights]
        else:
            params |= {"normalize": values["normalize"], "mode": "sum"}
        if "density" in values:
            params["density"] = float(values["density"])
        if "rescale" in values:
            if not values["rescale"] and values["density"] != 1:
                raise self.error("parameters.rescale", "DARE without rescaling is not supported")
            params["rescale"] = "l1"
        return tuple(weights), tuple(params.items())

    def groups(
        self, settings: Mapping[str, tuple[Any, ...]], reference: Any
    ) -> tuple[tuple[Group, ...], dict[str, Any]]:
        """The fewest groups that say it (one, one a range of layers, or lists of tensors), and what they share."""
        shared = dict(next(iter(settings.values()))[1])
        for _, params in settings.values():
            shared = {k: v for k, v in shared.items() if dict(params)[k] == v}
        by_setting: dict[tuple[Any, ...], list[str]] = {}
        for name, setting in settings.items():
            by_setting.setdefault(setting, []).append(name)

        def group(setting: tuple[Any, ...], **part: Any) -> Group:
            own = {k: v for k, v in setting[1] if k not in shared}
            return Group(setting[0], params=own, **part)

        if len(by_setting) == 1:
            return (group(next(iter(by_setting))),), shared
        spans: list[tuple[int, tuple[Any, ...]]] = []  # (first layer, setting), if settings depend on the layer alone
        layered = None
        for layer in range(reference.num_layers):
            here = {setting for name, setting in settings.items() if reference.info(name).layer == layer}
            if len(here) != 1:
                break
            if not spans or spans[-1][1] not in here:
                spans.append((layer, here.pop()))
        else:
            ends = [first for first, _ in spans[1:]] + [reference.num_layers]
            layered = tuple(group(s, layers=(first, end)) for (first, s), end in zip(spans, ends, strict=True))
            probe = Recipe(None, (Source("x", "x"),), self.method, layered)
            for name, (weights, params) in settings.items():
                found = probe.group_for(reference.info(name))
                if found.weights != weights or {**shared, **found.params} != dict(params):
                    layered = None
                    break
        if layered:
            return layered, shared
        return tuple(group(setting, tensors=tuple(names)) for setting, names in by_setting.items()), shared

    # --- errors ----------------------------------------------------------------------------------------------------

    def error(self, key: str, problem: str, remedy: str | None = None) -> SpecError:
        return SpecError(problem, where=f"{self.where}: {key}" if key else self.where, remedy=remedy)


def _evaluate(setting: Any, name: str, t: float) -> Any:
    """A parameter of mergekit's for one tensor; None if it is not set for it.

    A setting is a value, a list that is run through from t = 0 to 1, or conditions with a filter each.
    """
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if all(isinstance(e, int | float) and not isinstance(e, bool) for e in setting):
        place = t * (len(setting) - 1)
        low = int(place)
        high = min(low + 1, len(setting) - 1)
        return (1 - (place - low)) * setting[low] + (place - low) * setting[high]
    if all(not isinstance(e, Mapping) for e in setting):
        return setting[int(t * (len(setting) - 1))]
    for condition in setting:
        wanted = condition.get("filter")
        if wanted is None or wanted == "*" or wanted in name:
            return _evaluate(condition.get("value"), name, t)
    return None


def _stored_dtype(checkpoint: Any) -> str:
    """The type that most tensors of a checkpoint have."""
    types = Counter(str(checkpoint.dtype(name)).removeprefix("torch.") for name in checkpoint.names)
    return types.most_common(1)[0][0]


def _names(paths: Sequence[str]) -> dict[str, str]:
    """path -> a name: the folder's own, with a number where two have one."""
    names: dict[str, str] = {}
    for path in paths:
        stem = name = Path(path).name or "model"
        count = 2
        while name in names.values():
            name, count = f"{stem}-{count}", count + 1
        names[path] = name
    return names


def to_mergekit(recipe: Recipe, *, lora: Iterable[str] = ()) -> dict[str, Any]:
    """The mergekit configuration of a recipe, as plain data.

    Args:
        lora: names of the experts that are adapters; they are written as ``base+adapter``.

    Raises:
        SpecError: mergekit cannot say it (naming what).
    """

    def refuse(what: str) -> SpecError:
        return SpecError(f"mergekit cannot say {what}", remedy="Keep the recipe.yaml; `evomerge merge` reads it.")

    if recipe.method not in DEFAULTS:
        raise refuse(f"method {recipe.method}")
    if any(s.recipe is not None for s in (recipe.base, *recipe.experts) if s is not None):
        raise refuse("a source that is a recipe itself")
    if any(group.kinds for group in recipe.groups):
        raise refuse("groups by kind of module")
    adapters = set(lora)
    base = recipe.base.path if recipe.base else None
    paths = {s.name: f"{base}+{s.path}" if s.name in adapters else s.path for s in recipe.experts}
    data: dict[str, Any] = {"merge_method": recipe.method}
    if recipe.method == "slerp":
        base = recipe.experts[0].path
    if base is not None:
        data["base_model"] = base
    shared = _to_params(recipe.method, recipe.to_dict()["params"], refuse)
    own = [_to_params(recipe.method, {**recipe.to_dict()["params"], **g.params}, refuse) for g in recipe.groups]
    if recipe.method == "slerp" and shared.get("t") is None and all(p.get("t") is None for p in own):
        own = [{**p, "t": g.weights[1] / sum(g.weights)} for p, g in zip(own, recipe.groups, strict=True)]
        shared.pop("t", None)
    data["parameters"] = {k: v for k, v in shared.items() if all(p.get(k) == v for p in own) and v is not None}
    differing = [{k: v for k, v in p.items() if k not in data["parameters"]} for p in own]
    data["dtype"] = "float32"
    data["out_dtype"] = recipe.export_dtype

    def models(group: Group, more: Mapping[str, Any]) -> list[dict[str, Any]]:
        # A slice must name the base among its sources; beside whole models it is understood.
        entries = [{"model": base, **more}] if more and base not in (None, *paths.values()) else []
        for source, weight in zip(recipe.experts, group.weights, strict=True):
            entry = {"model": paths[source.name], **more}
            entries.append(entry if recipe.method == "slerp" else {**entry, "parameters": {"weight": weight}})
        return entries

    groups = recipe.groups
    if len(groups) == 1 and groups[0].part == (None, None, None):
        data["models"] = models(groups[0], {})
        data["parameters"] |= differing[0]
    elif all(group.layers and not group.tensors for group in groups):
        data["slices"] = [
            {"sources": models(group, {"layer_range": list(group.layers or ())})} | ({"parameters": p} if p else {})
            for group, p in zip(groups, differing, strict=True)
        ]
    else:
        _check_filters(recipe, refuse)
        weights = [_conditions(groups, [group.weights[t] for group in groups]) for t in range(len(recipe.experts))]
        data["models"] = models(Group(tuple(weights)), {})  # type: ignore[arg-type]
        keys = dict.fromkeys(key for p in differing for key in p)
        data["parameters"] |= {key: _conditions(groups, [p[key] for p in own]) for key in keys}
    if not data["parameters"]:
        del data["parameters"]
    return data


def _conditions(groups: Sequence[Group], values: Sequence[Any]) -> Any:
    """One value a group as conditions by filter, one a tensor; a plain value if it is the same everywhere."""
    if len(set(values)) == 1:
        return values[0]
    found: list[dict[str, Any]] = []
    for group, value in zip(groups, values, strict=True):
        filters = [{}] if group.tensors is None else [{"filter": name} for name in group.tensors]
        found += [{**one, "value": value} for one in filters]
    return found


def _check_filters(recipe: Recipe, refuse: Any) -> None:
    """A filter is any part of a name, so that no tensor's name may be a part of another's."""
    if any(group.layers for group in recipe.groups):
        raise refuse("groups of layers beside groups of tensors")
    names = [name for group in recipe.groups for name in group.tensors or ()]
    for name in names:
        if any(name != other and name in other for other in names):
            raise refuse(f"the tensor {name} alone, whose name is a part of another's")


def _to_params(method: str, params: Mapping[str, Any], refuse: Any) -> dict[str, Any]:
    """evomerge's parameters as mergekit's."""
    if method == "slerp":
        return {"t": params["t"]}
    if method == "linear":
        return {"normalize": params["normalize"]}
    found: dict[str, Any] = {"lambda": params["scale"], "normalize": False}
    if method in ("ties", "dare_ties"):
        if not params["normalize"] and params["mode"] == "mean":
            raise refuse("the mean over the experts that agree (mode: mean)")
        found["normalize"] = params["normalize"]
    if method == "ties" and params["scope"] != "tensor" and params["density"] != 1:
        raise refuse("thresholds over the whole model (scope: model)")
    if "density" in params:
        found["density"] = params["density"]
    if "rescale" in params:
        if params["rescale"] != "l1" and params["density"] != 1:
            raise refuse("DARE's own rescaling by 1 / density (rescale: density)")
        found["rescale"] = True
    return found
