"""mergekit's configurations (its version 0.1.5) as recipes; mergekit_writing.py is the other way.

What both can say comes over exactly: whole models, slices that are all layers in order, gradients, tensor filters, LoRA
references, merges of merges. What only one can say is refused by name, never dropped. Two things stay different by
their nature: mergekit computes in ``dtype``, evomerge in float32 or wider; where a method draws at random, the draws
differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from evomerge.errors import MethodError, SpecError, nearest
from evomerge.mergekit_methods import COUNTERPARTS, REQUIRED
from evomerge.mergekit_tokenizer import read_tokenizer
from evomerge.recipe import DTYPES, Group, Recipe, Source
from evomerge.validation import Strict, at, short, validate


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


class _Path(Strict):
    path: str = Field(min_length=1)
    revision: str | None = None


class _Reference(Strict):
    """A model written out. Texts are ``model``, ``model@revision`` or ``model+adapter``."""

    model: str | _Path
    lora: str | _Path | None = None
    override_architecture: None = None


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
    name: str | None = Field(default=None, min_length=1)
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


def from_mergekit(
    data: Mapping[str, Any], *, where: str, folder: Path | None = None, merges: Mapping[str, Recipe] | None = None
) -> Recipe:
    """The recipe that a mergekit configuration stands for. Opens the base (its names and layers; no tensor data).

    Args:
        where: the file that errors name.
        folder: what relative paths start from; None: the current folder.
        merges: what may be named as a model besides folders: the merges of the same file. They become stages.

    Raises:
        SpecError: what evomerge cannot say (naming it), or what mergekit would refuse too.
        CheckpointError: the base, or for methods without one the first model, cannot be opened.
    """
    return _Reading(data, where, folder or Path(), merges or {}).recipe()


def from_documents(documents: Sequence[Any], *, where: str, folder: Path | None = None) -> Recipe:
    """The recipe of several configurations in one file, of which some use others by their ``name`` (mergekit-multi).

    Raises SpecError also for merges that lead back to themselves, and for those that the last one does not need.
    """
    named: dict[str, Mapping[str, Any]] = {}
    for number, data in enumerate(documents):
        if not isinstance(data, Mapping) or "merge_method" not in data:
            raise SpecError(
                f"document {number + 1} of {len(documents)} is no mergekit configuration",
                where=where,
                remedy="A recipe is one document; only mergekit's configurations may be several.",
            )
        validate(_Configuration, data, where=where)
        name = data.get("name") or ""
        if name in named:
            problem = f"two merges have the name {name!r}" if name else "two merges have no name"
            raise SpecError(problem, where=where, remedy="Names must differ; one merge, the result, may have none.")
        named[name] = data
    done: dict[str, Recipe] = {}

    def read(name: str, inside: tuple[str, ...]) -> Recipe:
        if name in inside:
            raise SpecError(f"a merge cannot be made from itself, but {' -> '.join((*inside, name))}", where=where)
        if name not in done:
            used = [other for other in named if other and _names_model(named[name], other)]
            merges = {other: read(other, (*inside, name)) for other in used}
            place = at(where, name) if name else where
            done[name] = from_mergekit(named[name], where=place, folder=folder, merges=merges)
        return done[name]

    used = {other for name in named for other in named if other and _names_model(named[name], other)}
    results = [name for name in named if name not in used] or list(named)[-1:]
    result = read("" if "" in named else results[-1], ())
    left = [name for name in named if name not in done]
    if left:
        raise SpecError(
            f"the result does not need the merge {', '.join(left)}", where=where, remedy="Put it in a file of its own."
        )
    return result


def _names_model(data: Any, name: str) -> bool:
    """Does a configuration name the model ``name``, with an adapter or without?"""
    if isinstance(data, Mapping):
        keys = [key for key in data if key in ("base_model", "model", "path")]
        return any(_names_model(data[key], name) for key in ("models", "slices", "sources") if key in data) or any(
            data[key].partition("+")[0] == name if isinstance(data[key], str) else _names_model(data[key], name)
            for key in keys
        )
    return isinstance(data, list) and any(_names_model(entry, name) for entry in data)


class _Reading:
    """One configuration being read."""

    def __init__(self, data: Mapping[str, Any], where: str, folder: Path, merges: Mapping[str, Recipe]):
        validate(_Configuration, data, where=where)
        self.data, self.where, self.folder, self.merges = data, where, folder, merges

    def recipe(self) -> Recipe:
        from evomerge.merging import open_source
        from evomerge.methods import METHODS

        self.method = str(self.data["merge_method"])
        self.check_top()
        self.counterpart = COUNTERPARTS[self.method]
        self.base = self.model("base_model", self.data["base_model"]) if self.data.get("base_model") else None
        if self.base is None and self.counterpart.base in ("needed", "first"):
            raise self.error("base_model", f"method {self.method} needs a base_model")
        slices = self.slices()
        self.check_parameters(slices)
        self.experts = self.expert_paths(slices)
        reference = open_source(self.source("base", self.base or self.experts[0]))
        self.lay_out(slices, reference.num_layers)
        settings = {
            name: self.settings_of(name, reference.info(name), slices)
            for name in reference.names
            if reference.dtype(name).is_floating_point
        }
        settings = self.without_idle_base(settings)
        groups, params = self.groups(settings, reference)
        dtype = self.data.get("out_dtype") or self.data.get("dtype") or _stored_dtype(reference)
        if dtype not in DTYPES:
            raise self.error("dtype", f"{dtype!r} is unknown", nearest(str(dtype), DTYPES))
        base = None if self.base is None else self.source("base", self.base)
        sources = tuple(self.source(name, path) for path, name in _names(self.experts).items())
        tokenizer = read_tokenizer(self.data, self.name, where=self.where)
        if "origin" in METHODS[self.method].params:
            params["origin"] = "zero" if base is None else "base"
        method = self.method
        if method == "passthrough" and len(sources) > 1:  # layers of several models, none of them moved
            method, params = "linear", {**params, "normalize": False}
        written = Recipe(base, sources, method, groups, params, export_dtype=dtype, tokenizer=tokenizer)
        try:
            return Recipe.from_dict(written.to_dict(), where=self.where)
        except MethodError as error:  # the method's own rules
            raise self.error("", error.problem, error.remedy) from error

    def check_top(self) -> None:
        """The method, and what says something about architecture or vocabulary."""
        if self.method not in COUNTERPARTS:
            raise self.error(
                "merge_method", f"evomerge has no counterpart of {self.method!r}", nearest(self.method, COUNTERPARTS)
            )
        for key, kept, what in (
            ("modules", (None, {}), "models of several modules are not supported"),
            ("chat_template", (None, "auto"), "the base's chat template is kept"),
        ):
            if self.data.get(key) not in kept:
                raise self.error(key, what, "Leave it out.")

    def check_parameters(self, slices: Sequence[Mapping[str, Any]]) -> None:
        sources = [source for entry in slices for source in entry["sources"]]
        for parameters in (self.data.get("parameters") or {}, *(e["parameters"] for e in [*slices, *sources])):
            for key in parameters:
                if key not in self.counterpart.parameters:
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
        """What a model reference names: a folder, an id, or a merge of this file; of ``base+adapter``, the adapter."""
        if isinstance(reference, str) and reference and reference.count("+") < 2:
            model, _, adapter = reference.partition("+")
        elif isinstance(reference, Mapping):
            written = validate(_Reference, reference, where=at(self.where, key))
            model, adapter = (
                f"{one.path}@{one.revision}" if isinstance(one, _Path) and one.revision
                else one.path if isinstance(one, _Path) else one or ""
                for one in (written.model, written.lora)
            )  # fmt: skip
        else:
            raise self.error(key, f"a model is a path, or path+adapter, but this is {reference!r}")
        if adapter and self.place(model) != getattr(self, "base", None):
            raise self.error(key, f"the adapter {adapter} belongs to {model}, which is not the base_model")
        return self.place(adapter or model)

    def name(self, key: str, reference: Any) -> str:
        """The name in the recipe of a model that is merged, or ``base``."""
        path, names = self.model(key, reference), _names(self.experts)
        if path == self.base:
            return "base"
        if path not in names:
            raise self.error(key, f"{path} is none of the models that are merged", "Name one of them.")
        if names[path] in ("base", "union"):
            raise self.error(key, f"a folder called {names[path]} cannot be told from that word", "Rename it.")
        return names[path]

    def place(self, path: str) -> str:
        beside = self.folder / Path(path).expanduser()
        return str(beside) if path not in self.merges and beside.exists() else path

    def source(self, name: str, path: str) -> Source:
        return Source(name, recipe=self.merges[path]) if path in self.merges else Source(name, path)

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
        paths = list(dict.fromkeys(path for entry in models for path in entry))
        if self.method == "passthrough":
            beside = self.data.get("models") and self.base not in (None, *paths)  # mergekit takes it for a second one
            if beside or any(len(entry) > 1 for entry in models):
                raise self.error("", "passthrough takes one model" + (" a slice" if self.data.get("slices") else ""))
        elif any(sorted(other) != sorted(models[0]) for other in models):
            raise self.error("slices", "all slices must merge the same models", "Give a model the weight 0 instead.")
        elif len(paths) < len(models[0]):
            raise self.error("", "a model is named twice", "Name each model once.")
        if self.counterpart.base == "first":  # from the base to the other
            others = [path for path in paths if path != self.base]
            if len(others) != 1 or self.base is None:
                raise self.error("models", "slerp needs the base_model and one other model")
            return [self.base, *others]
        if self.counterpart.base == "model":  # a base beside whole models is one of them
            return [*paths, self.base] if self.base and self.base not in paths and self.data.get("models") else paths
        return [path for path in paths if path != self.base]

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

        values = {key: value(key, None, default) for key, default in self.counterpart.shared.items()}
        for key, found in values.items():
            if found is REQUIRED:
                raise self.error(f"parameters.{key}", f"{self.method} needs {key}, and {name} has none")
        weights = [self.weight(model, name, value, model in own) for model in self.experts]
        for key, default in self.counterpart.per_model.items():
            several = {value(key, model, default) for model in self.experts}
            if len(several) > 1:
                raise self.error(
                    f"parameters.{key}",
                    f"all models must have one {key}, but for {name} they have {sorted(several, key=str)}",
                )
            values[key] = several.pop()
        for key, found in values.items():
            if isinstance(found, str):
                raise self.error(f"parameters.{key}", f"it must be a number or true or false, but is {found!r}")

        def fail(key: str, problem: str) -> NoReturn:
            raise self.error(f"parameters.{key}", problem)

        weights, params = self.counterpart.read(weights, values, fail)
        return tuple(weights), tuple(params.items())

    def weight(self, model: str, name: str, value: Callable[..., Any], named: bool) -> float:
        """What a model counts for one tensor, in mergekit's numbers."""
        if not self.counterpart.weight:
            return 1.0
        if not named and self.method == "passthrough":  # another slice's model
            return 0.0
        weight = value(self.counterpart.weight, model, self.counterpart.weight_default)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise self.error(f"parameters.{self.counterpart.weight}", f"{model} has no weight for the tensor {name}")
        return float(weight)

    def without_idle_base(self, settings: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        """A base that a linear merge gives no weight is there for its tokenizer, and none of the experts."""
        if self.method != "linear" or self.base not in self.experts or len(self.experts) == 1:
            return settings
        place = self.experts.index(self.base)
        if any(weights[place] for weights, _ in settings.values()):
            return settings
        self.experts = [path for path in self.experts if path != self.base]
        return {name: (w[:place] + w[place + 1 :], params) for name, (w, params) in settings.items()}

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
        return SpecError(problem, where=at(self.where, key) if key else self.where, remedy=remedy)


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
