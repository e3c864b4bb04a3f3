"""Recipes as mergekit's configurations (its version 0.1.5). What mergekit cannot say is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml

from evomerge.hub import hub_id
from evomerge.mergekit_methods import COUNTERPARTS, refuse
from evomerge.mergekit_tokenizer import write_tokenizer
from evomerge.parts import is_pattern, matcher
from evomerge.recipe import Group, Recipe, Source
from evomerge.stages import stages


def to_mergekit_yaml(recipe: Recipe, *, is_adapter: Callable[[str], bool] = lambda path: False) -> str:
    """The text of a mergekit configuration that makes the recipe's merge; with stages, one document a merge.

    Args:
        is_adapter: is the folder of a source an adapter? Those are written as ``base+adapter``.

    Raises:
        SpecError: mergekit cannot say it (naming what).
    """
    names = _stage_names(recipe)
    documents = [
        {"name": names[stage_hash]} | _document(stage, is_adapter, names)
        for stage_hash, (_, stage) in stages(recipe).items()
    ]
    documents.append(_document(recipe, is_adapter, names))
    return yaml.safe_dump_all(documents, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)


def to_mergekit(recipe: Recipe, *, is_adapter: Callable[[str], bool] = lambda path: False) -> dict[str, Any]:
    """The mergekit configuration of a recipe without stages, as plain data; see ``to_mergekit_yaml``."""
    if stages(recipe):
        raise refuse("merges of merges in one configuration")
    return _document(recipe, is_adapter, {})


def _stage_names(recipe: Recipe) -> dict[str, str]:
    """hash -> the name of each stage: unlike every path, since mergekit takes a path of that name for the merge."""
    every = [recipe, *(stage for _, stage in reversed(stages(recipe).values()))]  # outer ones first
    taken = {source.path for one in every for source in (one.base, *one.experts) if source is not None}
    used: dict[str, str] = {}
    for sources in [*(one.experts for one in every), *((one.base,) for one in every)]:
        for source in sources:
            if source is not None and source.recipe is not None:
                used.setdefault(source.recipe.hash, source.name)
    names: dict[str, str] = {}
    for stage_hash in stages(recipe):
        stem = name = re.sub(r"[^\w.-]", "-", used[stage_hash]) or "stage"
        count = 2
        while name in taken:
            name, count = f"{stem}-{count}", count + 1
        names[stage_hash] = name
        taken.add(name)
    return names


def _reference(source: Source, names: Mapping[str, str], adapter_of: Source | None = None) -> Any:
    """A model as mergekit names it: a text, or written out where a text would be read as something else."""
    path = source.path if source.recipe is None else names[source.recipe.hash]
    model = path if adapter_of is None else _reference(adapter_of, names)
    parts = (path,) if adapter_of is None else (model, path)
    if all(isinstance(part, str) and "+" not in part and ("@" not in part or hub_id(part)) for part in parts):
        return "+".join(parts)
    written = model["model"] if isinstance(model, dict) else {"path": model}
    return {"model": written} if adapter_of is None else {"model": written, "lora": {"path": path}}


def _check(recipe: Recipe) -> None:
    """SpecError for what no configuration says."""
    if recipe.surgery is not None:
        raise refuse("adapters behind the merge (surgery)")
    if any(group.method is not None for group in recipe.groups):
        raise refuse(f"a method for each part of the model ({', '.join(recipe.methods)})")
    if recipe.method not in COUNTERPARTS or recipe.code is not None:
        raise refuse(f"method {recipe.method}")
    if any(group.kinds for group in recipe.groups):
        raise refuse("groups by kind of module")


def _document(recipe: Recipe, is_adapter: Callable[[str], bool], names: Mapping[str, str]) -> dict[str, Any]:
    """One configuration."""
    recipe = recipe.canonical()
    _check(recipe)
    recipe = _spelt_out(recipe)
    counterpart = COUNTERPARTS[recipe.method]
    params = recipe.to_dict()["params"]
    settings = [{**params, **group.params} for group in recipe.groups]
    base = None if recipe.base is None else _reference(recipe.base, names)
    paths = {
        s.name: _reference(s, names, recipe.base if s.recipe is None and is_adapter(s.path) else None)
        for s in recipe.experts
    }
    data: dict[str, Any] = {"merge_method": recipe.method}
    if counterpart.base == "first":
        base = paths[recipe.experts[0].name]
    elif recipe.method != "linear" and (counterpart.base == "model" or _origins(settings) == {"zero"}):
        base = None  # mergekit would merge it with the others, or start task vectors there
    if base is not None:
        data["base_model"] = base
    own = [counterpart.write(group.weights, p) for group, p in zip(recipe.groups, settings, strict=True)]
    data["parameters"] = {k: v for k, v in own[0].items() if all(p[k] == v for p in own)}
    differing = [{k: v for k, v in p.items() if k not in data["parameters"]} for p in own]
    data["dtype"] = "float64" if recipe.export_dtype == "float64" else "float32"
    data["out_dtype"] = recipe.export_dtype
    if recipe.tokenizer is not None:
        data["tokenizer"] = _tokenizer(recipe, {"base": base, **paths}, base)

    def models(group: Group, more: Mapping[str, Any]) -> list[dict[str, Any]]:
        # A slice must name the base among its sources; beside whole models it is understood, and linear takes it for
        # one of them.
        entries: list[dict[str, Any]] = []
        if base is not None and base not in paths.values() and (more or recipe.method == "linear"):
            entries = [{"model": base, **more}]
            if recipe.method == "linear":
                entries[0]["parameters"] = {"weight": 0.0}
        for source, weight in zip(recipe.experts, group.weights, strict=True):
            entry = {"model": paths[source.name], **more}
            entries.append({**entry, "parameters": {counterpart.weight: weight}} if counterpart.weight else entry)
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
        _check_filters(recipe)
        weights = [_conditions(groups, [group.weights[t] for group in groups]) for t in range(len(recipe.experts))]
        data["models"] = models(Group(tuple(weights)), {})  # type: ignore[arg-type]
        keys = dict.fromkeys(key for p in differing for key in p)
        data["parameters"] |= {key: _conditions(groups, [p[key] for p in own]) for key in keys}
    if not data["parameters"]:
        del data["parameters"]
    return data


def _tokenizer(recipe: Recipe, reference_of: Mapping[str, Any], base: Any) -> dict[str, Any]:
    assert recipe.tokenizer is not None
    if recipe.base is not None and base is None:
        raise refuse(f"a tokenizer with method {recipe.method} beside a base that is not merged")
    if recipe.method == "slerp" and recipe.base is not None and _reference(recipe.base, {}) != base:
        raise refuse("a base beside the two models of slerp, whose rows the others get for tokens that they lack")
    try:
        return write_tokenizer(recipe.tokenizer, reference_of)
    except KeyError as error:
        raise refuse(f"a token without a source ({error.args[0]})") from None


def _spelt_out(recipe: Recipe) -> Recipe:
    """``recipe`` with the names of the tensors in place of patterns of them."""
    from evomerge.merging import open_source

    if not any(is_pattern(word) for group in recipe.groups for word in group.tensors or ()):
        return recipe
    names, groups = open_source(recipe.base or recipe.experts[0]).names, []
    for group in recipe.groups:
        held = matcher(group.tensors or ())
        found = tuple(name for name in names if held(name))
        groups.append(group if group.tensors is None else replace(group, tensors=found))
    return replace(recipe, groups=tuple(groups))


def _conditions(groups: Sequence[Group], values: Sequence[Any]) -> Any:
    """One value a group as conditions by filter, one a tensor; a plain value if it is the same everywhere."""
    if len(set(values)) == 1:
        return values[0]
    found: list[dict[str, Any]] = []
    for group, value in zip(groups, values, strict=True):
        filters = [{}] if group.tensors is None else [{"filter": name} for name in group.tensors]
        found += [{**one, "value": value} for one in filters]
    return found


def _check_filters(recipe: Recipe) -> None:
    """A filter is any part of a name, so that no tensor's name may be a part of another's."""
    from evomerge.merging import open_source

    if any(group.layers for group in recipe.groups):
        raise refuse("groups of layers beside groups of tensors")
    reference = open_source(recipe.base or recipe.experts[0])
    place: dict[str, int] = {}
    for number, group in enumerate(recipe.groups):
        for name in group.tensors or ():
            place.setdefault(name, number)
    for name, number in place.items():
        for other in reference.names:
            if name != other and name in other and place.get(other, len(recipe.groups)) >= number:
                raise refuse(f"the tensor {name} alone, whose name is a part of {other}")


def _origins(settings: Sequence[Mapping[str, Any]]) -> set[str]:
    """Where the vectors start, for the methods that can choose; mergekit knows one place for the whole merge."""
    found = {params["origin"] for params in settings if "origin" in params}
    if len(found) > 1:
        raise refuse("vectors that start at the base in some groups and at zero in others (origin)")
    return found
