"""Recipes from plain data: recipe.yaml, the short form that people write, and mergekit's configurations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.errors import MethodError, SpecError, nearest
from evomerge.parts import KINDS, Entry, written_groups
from evomerge.plugins import Code, names_file, split_reference
from evomerge.recipe import (
    DTYPES,
    FORMAT,
    RECIPE_FILES,
    Collected,
    Group,
    Recipe,
    Source,
    Surgery,
    checked_params,
    is_recipe_file,
)
from evomerge.tokenizer_choice import TokenizerChoice, read_choice
from evomerge.validation import at, read_documents, validate

MOST_STAGES = 16  # recipes inside each other
KEYS = (
    "evomerge_recipe", "base", "experts", "tokenizer", "method", "code", "params", "statistics", "surgery", "groups",
    "weights", "filter", "methods", "seed", "export_dtype",
)  # fmt: skip


def read_recipe(path: Path, inside: tuple[str, ...] = ()) -> Recipe:
    """The recipe in a file. ``inside``: the recipes that it is a stage of, the outermost first."""
    documents = read_documents(path, what="a recipe")
    if len(documents) > 1:
        from evomerge.mergekit_yaml import from_documents

        return from_documents(documents, where=str(path), folder=path.absolute().parent)
    data = documents[0] if documents else None
    return Reader(str(path), path.absolute().parent, (*inside, str(path.resolve()))).recipe(data)


class Reader:
    """Turns plain data into a Recipe; every error names the file and the key.

    Args:
        where: the file, or the file and the key that a stage stands at.
        folder: what relative paths in it are relative to (None: they are kept).
        inside: the recipes from the outermost to this one, as files or places in them.
    """

    def __init__(self, where: str, folder: Path | None = None, inside: tuple[str, ...] = ()):
        self.where, self.folder, self.inside = where, folder, inside

    def recipe(self, data: Any) -> Recipe:
        if not isinstance(data, Mapping):
            raise self.error("", f"a recipe is a table of keys, but this is {_shown(data)}")
        if "merge_method" in data:
            from evomerge.mergekit_yaml import from_mergekit

            return from_mergekit(data, where=self.where, folder=self.folder)
        self.known_keys("", data, KEYS)
        if data.get("evomerge_recipe", FORMAT) != FORMAT:
            raise self.error(
                "evomerge_recipe",
                f"the format {data['evomerge_recipe']!r} is not {FORMAT}, the one this version reads",
                "Use the version of evomerge that wrote it.",
            )
        experts = self.experts(data.get("experts"))
        names = [source.name for source in experts]
        base = None if data.get("base") is None else self.source("base", data["base"], "base")
        place, top, entries = written_groups(data, names, self.error)
        key, has_base = f"{place}." if place else "", base is not None
        method, code = self.method(top, len(experts), has_base, key)
        params = self.params(f"{key}params", method, {}, top.get("params"))
        groups = self.groups(entries, (method, params), names, has_base)
        statistics = self.statistics(data.get("statistics"), {group.method or method for group in groups})
        seed = data.get("seed", 0)
        if type(seed) is not int or not 0 <= seed < 2**63:
            raise self.error("seed", f"a seed is a whole number from 0 on, but is {_shown(seed)}")
        export_dtype = data.get("export_dtype", "bfloat16")
        if export_dtype not in DTYPES:
            raise self.error("export_dtype", f"{_shown(export_dtype)} is unknown", nearest(str(export_dtype), DTYPES))
        tokenizer = self.tokenizer(data.get("tokenizer"), names)
        surgery = self.surgery(data.get("surgery"))
        return Recipe(base, experts, method, groups, params, seed, export_dtype, code, statistics, tokenizer, surgery)

    def tokenizer(self, data: Any, names: list[str]) -> TokenizerChoice | None:
        if data is None:
            return None
        choice = validate(TokenizerChoice, read_choice(data), where=at(self.where, "tokenizer"))
        choice.check(names, where=at(self.where, "tokenizer"))
        return choice

    def experts(self, data: Any) -> tuple[Source, ...]:
        if isinstance(data, Mapping):
            found = [self.source(f"experts.{name}", value, name) for name, value in data.items()]
        elif isinstance(data, Sequence) and not isinstance(data, str):
            found = [self.source(f"experts[{t}]", value, None) for t, value in enumerate(data)]
        else:
            raise self.error("experts", f"must be a table {{name: folder}}, but is {_shown(data)}")
        if not found:
            raise self.error("experts", "there must be at least one expert")
        for source in found:
            if sum(other.name == source.name for other in found) > 1:
                raise self.error("experts", f"two experts have the name {source.name!r}", "Names must differ.")
        return tuple(found)

    def source(self, key: str, data: Any, name: Any) -> Source:
        """A source given as a path, or as {name, path or recipe, sha256}."""
        entry = {"recipe" if is_recipe_file(data) else "path": data} if isinstance(data, str) else data
        if not isinstance(entry, Mapping):
            raise self.error(key, f"must be a folder's path, but is {_shown(data)}")
        self.known_keys(key, entry, ("name", "path", "recipe", "sha256"))
        name, path, sha256 = entry.get("name", name), entry.get("path"), entry.get("sha256")
        sha256 = "" if sha256 is None else sha256
        if not isinstance(name, str) or not name:
            raise self.error(key, f"needs a name, but has {_shown(name)}")
        if not isinstance(sha256, str):
            raise self.error(key, f"sha256 must be text, but is {_shown(sha256)}", "Put it in quotation marks.")
        if "recipe" in entry:
            if path is not None:
                raise self.error(key, "has a path and a recipe", "Give the folder, or the recipe that makes it.")
            return Source(name, sha256=sha256, recipe=self.stage(f"{key}.recipe", entry["recipe"]))
        if not isinstance(path, str) or not path:
            raise self.error(key, f"needs a path, but has {_shown(path)}")
        if self.folder is not None:
            beside = self.folder / Path(path).expanduser()
            path = str(beside) if beside.exists() else path  # otherwise a Hugging Face id, or wrong: opening it tells
        return Source(name, path, sha256)

    def stage(self, key: str, data: Any) -> Recipe:
        """The recipe of a source: written here, or in a file of its own."""
        if len(self.inside) >= MOST_STAGES:
            raise self.error(key, f"more than {MOST_STAGES} recipes inside each other")
        if isinstance(data, Mapping):
            place = at(self.where, key)
            return self.plain(key, Reader(place, self.folder, (*self.inside, place)).recipe(data))
        if not isinstance(data, str) or not is_recipe_file(data):
            raise self.error(
                key, f"must be a recipe or a recipe's file ({', '.join(RECIPE_FILES)}), but is {_shown(data)}"
            )
        file = (self.folder or Path()) / Path(data).expanduser()
        place = str(file.resolve())
        if place in self.inside:
            circle = " -> ".join([*self.inside[self.inside.index(place) :], place])
            raise self.error(key, f"a recipe cannot be made from itself, but {circle}", "Name another source.")
        if not file.is_file():
            raise self.error(key, f"there is no recipe {data!r} ({file.absolute()})", "Give the path of a recipe.")
        return self.plain(key, read_recipe(file, self.inside))

    def plain(self, key: str, stage: Recipe) -> Recipe:
        """``stage``, whose weights are all that a merge of it could take."""
        if stage.surgery is not None:
            raise self.error(
                key,
                "a merge of weights cannot take the adapters of surgery that this stage has",
                "Take surgery out of the stage's recipe.",
            )
        return stage

    def method(
        self, data: Mapping[Any, Any], num_experts: int, has_base: bool, key: str = ""
    ) -> tuple[str, Code | None]:
        """The method's name, and its code if that is not evomerge's own (which is not looked at).

        Args:
            key: where ``data`` stands, with a dot at its end.
        """
        from evomerge import installed
        from evomerge.methods import METHODS
        from evomerge.methods.base import check_experts
        from evomerge.plugins import METHOD

        name = data.get("method")
        if not isinstance(name, str):
            raise self.error(f"{key}method", f"must be a method's name, but is {_shown(name)}", nearest("", METHODS))
        if names_file(name) or (name not in METHODS and "code" in data):
            return name, self.code(f"{key}code", name, data.get("code"))
        if name not in METHODS:
            others = installed.names(METHOD)
            if name not in others:
                raise self.error(
                    f"{key}method", f"there is no method {_shown(name)}", nearest(str(name), [*METHODS, *others])
                )
            return name, Code()
        if data.get("code") is not None:
            raise self.error(
                f"{key}code", f"method {name} is evomerge's own and has no code of its own", "Leave code out."
            )
        try:
            check_experts(METHODS[name], has_base, num_experts)
        except MethodError as error:
            place = f"{key}method" if key else "experts" if has_base else "base"
            raise self.error(place, error.problem, error.remedy) from None
        return name, None

    def code(self, key: str, name: str, data: Any) -> Code:
        """The code of a method, given as {path or package, sha256}; by default the file that its name says."""
        entry = {} if data is None else data
        place = "path" if names_file(name) else "package"
        if not isinstance(entry, Mapping) or not all(isinstance(value, str) for value in entry.values()):
            raise self.error(key, f"must be a table {{{place}, sha256}}, but is {_shown(data)}")
        self.known_keys(key, entry, (place, "sha256"))
        if place == "package":
            return Code(package=entry.get("package", ""), sha256=entry.get("sha256", ""))
        path = entry.get("path") or split_reference(name)[0]
        if self.folder is not None:
            path = str(self.folder / Path(path).expanduser())
        return Code(path=path, sha256=entry.get("sha256", ""))

    def statistics(self, data: Any, methods: set[str]) -> Collected | None:
        """The folder that methods weighted by data read, given as a path or as {path, sha256: {kind: hash}}."""
        from evomerge.methods import METHODS
        from evomerge.methods.statistics import how_to_collect

        known = {method: METHODS[method].statistics for method in sorted(methods) if not _foreign(method)}
        if data is None:
            for method, kind in known.items():
                if kind is not None:
                    raise self.error(
                        "statistics", f"is missing: method {method} needs them ({kind})", how_to_collect(kind)
                    )
            return None
        if len(known) == len(methods) and not any(known.values()):
            raise self.error("statistics", f"method {' and '.join(known)} uses none", "Leave statistics out.")
        entry = {"path": data} if isinstance(data, str) else data
        if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str) or not entry["path"]:
            raise self.error("statistics", f"must be the path of a folder, but is {_shown(data)}")
        self.known_keys("statistics", entry, ("path", "sha256"))
        hashes, path = entry.get("sha256") or {}, entry["path"]
        if not isinstance(hashes, Mapping) or not all(
            isinstance(word, str) for pair in hashes.items() for word in pair
        ):
            raise self.error("statistics.sha256", f"must be a table {{kind: hash}}, but is {_shown(hashes)}")
        if self.folder is not None:
            path = str(self.folder / Path(path).expanduser())
        return Collected(path, dict(hashes))

    def surgery(self, data: Any) -> Surgery | None:
        """The file of adapters behind the merge, given as a path or as {path, sha256}."""
        if data is None:
            return None
        entry = {"path": data} if isinstance(data, str) else data
        if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str) or not entry["path"]:
            raise self.error("surgery", f"must be the path of a file of adapters, but is {_shown(data)}")
        self.known_keys("surgery", entry, ("path", "sha256"))
        path, sha256 = entry["path"], entry.get("sha256") or ""
        if not isinstance(sha256, str):
            raise self.error("surgery.sha256", f"must be text, but is {_shown(sha256)}", "Put it in quotation marks.")
        return Surgery(path if self.folder is None else str(self.folder / Path(path).expanduser()), sha256)

    def params(self, key: str, method: str, shared: Mapping[str, Any], data: Any) -> dict[str, Any]:
        """Checked parameters: all of them at the top (nothing is ``shared`` yet), what is given in a group."""
        if not isinstance(data, Mapping | None):
            raise self.error(key, f"must be a table of parameters, but is {_shown(data)}")
        given = {str(name): value for name, value in (data or {}).items()}
        if _foreign(method):
            for name, value in given.items():
                if not isinstance(value, int | float | str | bool | None):
                    raise self.error(
                        f"{key}.{name}", f"must be a number, a word, true or false, but is {_shown(value)}"
                    )
            return given
        try:
            checked = checked_params(method, {**shared, **given})
        except MethodError as error:
            raise MethodError(error.problem, where=at(self.where, key), remedy=error.remedy) from None
        return {name: checked[name] for name in given} if shared else checked

    def groups(
        self, entries: Sequence[Entry], top: tuple[str, Mapping[str, Any]], names: list[str], has_base: bool
    ) -> tuple[Group, ...]:
        """``top``: the method of those that name none, and its parameters."""
        plain = not any(isinstance(e.data, Mapping) and ("kinds" in e.data or "tensors" in e.data) for e in entries)
        found: list[Group] = []
        for entry in entries:
            key, data = entry.key, entry.data
            if not isinstance(data, Mapping):
                raise self.error(key, f"must be a table with weights, but is {_shown(data)}")
            self.known_keys(key, data, ("layers", "kinds", "tensors", "weights", "params", "method", "code"))
            layers = self.layers(f"{key}.layers", data.get("layers"))
            if plain and layers is not None:
                place = found[-1].layers[1] if found and found[-1].layers else 0
                if layers[0] != place:
                    raise self.error(
                        f"{key}.layers",
                        f"groups follow each other from layer 0 on: this one must start at {place}, but is "
                        f"{list(layers)}",
                    )
            elif plain and len(entries) > 1:
                raise self.error(f"{key}.layers", "is missing: with several groups each names its layers")
            (method, shared), own, code = top, None, None
            if data.get("method") is not None:
                own, code = self.method(data, len(names), has_base, f"{key}.")
                method, shared = own, {}
            elif "code" in data:
                raise self.error(f"{key}.code", "there is no method here that it could be the code of")
            given = data.get("params")
            found.append(
                Group(
                    self.weights(entry.weights_key, method, data.get("weights"), names),
                    layers,
                    self.params(f"{key}.params", method, shared, given) if given or own is not None else {},
                    self.words(f"{key}.kinds", data.get("kinds"), KINDS),
                    self.words(f"{key}.tensors", data.get("tensors")),
                    own,
                    code,
                    at(self.where, key) if key else self.where,
                )
            )
        return tuple(found)

    def layers(self, key: str, data: Any) -> tuple[int, int] | None:
        if data is None:
            return None
        if not (isinstance(data, list) and len(data) == 2 and all(type(n) is int for n in data)):
            raise self.error(key, f"must be [first, last + 1], but is {_shown(data)}")
        first, end = data
        if not 0 <= first < end:
            raise self.error(key, f"0 <= first < last + 1 must hold, but the range is {data}")
        return first, end

    def words(self, key: str, data: Any, known: Sequence[str] = ()) -> tuple[str, ...] | None:
        """A list of names, among ``known`` if any are given."""
        if data is None:
            return None
        if not isinstance(data, list) or not data or not all(isinstance(word, str) for word in data):
            raise self.error(key, f"must be a list of names, but is {_shown(data)}")
        for word in data:
            if known and word not in known:
                raise self.error(key, f"{_shown(word)} is unknown", nearest(word, known))
        return tuple(data)

    def weights(self, key: str, method: str, data: Any, names: list[str]) -> tuple[float, ...]:
        """One finite number an expert, from {name: number}, a list in the experts' order, or one number for all."""
        from evomerge.methods import METHODS

        if isinstance(data, list) and len(data) == len(names):
            data = dict(zip(names, data, strict=True))
        elif isinstance(data, int | float) and not isinstance(data, bool):
            data = dict.fromkeys(names, data)
        if not isinstance(data, Mapping):
            raise self.error(key, f"must be a table {{name: number}} for {', '.join(names)}, but is {_shown(data)}")
        self.known_keys(key, data, names)
        weights = []
        for name in names:
            if name not in data:
                raise self.error(key, f"expert {name} has no weight", f"Give {name}: 0 to leave it out.")
            value = data[name]
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                hint = "Write numbers without quotation marks." if isinstance(value, str) else None
                raise self.error(f"{key}.{name}", f"must be a finite number, but is {_shown(value)}", hint)
            if _foreign(method):
                weights.append(float(value))
                continue
            try:
                weights.append(float(METHODS[method].weight.check(name, value, f"the weight of method {method}")))
            except MethodError as error:
                raise MethodError(error.problem, where=at(self.where, key), remedy=error.remedy) from None
        return tuple(weights)

    def known_keys(self, key: str, data: Mapping[Any, Any], known: Sequence[str]) -> None:
        for name in data:
            if name not in known:
                raise self.error(key, f"there is no {name!r} here", nearest(str(name), known))

    def error(self, key: str, problem: str, remedy: str | None = None) -> SpecError:
        return SpecError(problem, where=at(self.where, key) if key else self.where, remedy=remedy)


def _foreign(method: str) -> bool:
    """Is this method not evomerge's own, so that its rules are not known here?"""
    from evomerge.methods import METHODS

    return method not in METHODS


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
