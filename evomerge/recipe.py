"""A recipe: one fully determined merge. Same recipe, same bytes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import MethodError, SpecError, nearest
from evomerge.parts import KINDS, Entry, is_pattern, matcher, written_groups
from evomerge.plugins import Code, names_file, split_reference
from evomerge.tokenizer_choice import TokenizerChoice, read_choice
from evomerge.validation import at, read_documents, validate

if TYPE_CHECKING:
    from evomerge.methods.base import TensorInfo

FORMAT = 1
DTYPES = ("bfloat16", "float16", "float32", "float64")
RECIPE_FILES = (".yaml", ".yml", ".json")
MOST_STAGES = 16  # recipes inside each other
KEYS = (
    "evomerge_recipe", "base", "experts", "tokenizer", "method", "code", "params", "statistics", "groups", "weights",
    "filter", "methods", "seed", "export_dtype",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A base or an expert: its name in the experiment, where it lies, and the hash of what it holds.

    With ``recipe`` it is a stage: what that recipe makes. Then ``sha256`` is the recipe's hash, and ``path`` where it
    has been built (empty: nowhere yet), which is no part of what it is.
    """

    name: str
    path: str = ""
    sha256: str = ""
    recipe: Recipe | None = None


@dataclass(frozen=True)
class Collected:
    """Statistics of the experts that ``evomerge collect`` wrote: the folder, and the hash of what is used, by kind."""

    path: str
    sha256: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"path": self.path, "sha256": dict(sorted(self.sha256.items()))}


@dataclass(frozen=True)
class Group:
    """The weights (one an expert, in the recipe's order) for a part of the model.

    A tensor belongs to the first group that holds it by all that the group names. ``layers`` is a half-open range of
    layer indices; tensors outside any layer go with layer 0 when they come before the layers (embeddings), otherwise
    with the last layer that the recipe names (final norm, head, the rest). ``kinds`` are among KINDS; ``tensors`` are
    checkpoint names, or patterns of them (``*``, ``?``, ``[0-9]``). None is no condition.

    Without a ``method`` of its own a group has the recipe's, whose parameters its ``params`` override. With one (and
    its ``code``, if it is not evomerge's) its ``params`` are all of that method's.

    ``where`` is the place in a file that errors name, and no part of what the group is.
    """

    weights: tuple[float, ...]
    layers: tuple[int, int] | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] | None = None
    tensors: tuple[str, ...] | None = None
    method: str | None = None
    code: Code | None = None
    where: str = field(default="", compare=False, repr=False)

    @property
    def part(self) -> tuple[tuple[int, int] | None, tuple[str, ...] | None, tuple[str, ...] | None]:
        """(layers, kinds, tensors): which part of the model this is."""
        return self.layers, self.kinds, self.tensors


@dataclass(frozen=True)
class Recipe:
    """Sources (with content hashes), method, every number and seed.

    ``statistics`` are those of a method that is weighted by data; ``collected.verify_collected`` fills in their hashes.
    ``method`` and ``params`` are those of the groups that have none of their own.

    ``code`` is that of a method which is not evomerge's own. It does not run by being named here, so that the numbers
    of such a recipe are checked when it is merged (``methods.lookup.permit``). ``tokenizer`` is the vocabulary that the
    sources are brought to; None: all have the base's.
    """

    base: Source | None
    experts: tuple[Source, ...]
    method: str
    groups: tuple[Group, ...]
    params: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    export_dtype: str = "bfloat16"
    code: Code | None = None
    statistics: Collected | None = None
    tokenizer: TokenizerChoice | None = None

    def group_for(self, info: TensorInfo) -> Group:
        """The one group that ``info`` belongs to; SpecError if the recipe has none for it."""
        by_name, others = self._by_tensor
        for number in sorted({*by_name.get(info.name, ()), *others}) if info.name in by_name else others:
            group, matches = self.groups[number], self._patterns.get(number)
            if (number in by_name.get(info.name, ()) or matches is None or matches(info.name)) and holds(
                info, group.layers, group.kinds, self.end
            ):
                return group
        raise SpecError(
            f"no group of the recipe holds the tensor {info.name}",
            where=self.groups[-1].where or None,
            remedy="Add a last group that names neither layers nor kinds nor tensors: it takes what is left.",
        )

    @cached_property
    def end(self) -> int | None:
        """One more than the last layer that a group names; None if none names layers."""
        return max((group.layers[1] for group in self.groups if group.layers is not None), default=None)

    @cached_property
    def _by_tensor(self) -> tuple[dict[str, list[int]], list[int]]:
        """(tensor name -> numbers of the groups that name it, numbers of those with patterns, or without tensors)."""
        by_name: dict[str, list[int]] = {}
        for number, group in enumerate(self.groups):
            for name in group.tensors or ():
                by_name.setdefault(name, []).append(number)
        others = [n for n, group in enumerate(self.groups) if group.tensors is None or n in self._patterns]
        return by_name, others

    @cached_property
    def _patterns(self) -> dict[int, Callable[[str], bool]]:
        """Number of a group -> whether one of its patterns matches a name; of groups that have any."""
        written = {n: [w for w in group.tensors or () if is_pattern(w)] for n, group in enumerate(self.groups)}
        return {number: matcher(words) for number, words in written.items() if words}

    def params_for(self, info: TensorInfo) -> dict[str, Any]:
        return self.params_of(self.group_for(info))

    def method_of(self, group: Group) -> tuple[str, Code | None]:
        """The method of a group and its code."""
        return (self.method, self.code) if group.method is None else (group.method, group.code)

    def params_of(self, group: Group) -> dict[str, Any]:
        """The parameters of a group's method, as far as the recipe gives them."""
        return {**(self.params if group.method is None else {}), **group.params}

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that its groups have, each once."""
        return tuple(dict.fromkeys(self.method_of(group)[0] for group in self.groups))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as it stands in recipe.yaml: every number of the merge, the method's defaults included.

        Paths are kept as they were given. A stage is written out with all that it is made of.
        """

        def source(s: Source) -> dict[str, Any]:
            if s.recipe is not None:
                return {"name": s.name, "sha256": s.sha256, "recipe": s.recipe.to_dict()}
            return {"name": s.name, "path": s.path, "sha256": s.sha256}

        groups = []
        for group in self.groups:
            entry: dict[str, Any] = {
                key: list(value)
                for key, value in zip(("layers", "kinds", "tensors"), group.part, strict=True)
                if value is not None
            }
            entry["weights"] = {s.name: float(w) for s, w in zip(self.experts, group.weights, strict=True)}
            if group.method is not None:
                entry["method"] = group.method
                entry |= {"code": group.code.to_dict()} if group.code else {}
            if group.method is not None or group.params:
                checked = self._checked(group)
                own = checked if group.method is not None else {key: checked[key] for key in group.params}
                entry |= {"params": own} if own else {}
            groups.append(entry)
        return {
            "evomerge_recipe": FORMAT,
            "base": source(self.base) if self.base else None,
            "experts": [source(s) for s in self.experts],
            **({"tokenizer": self.tokenizer.short()} if self.tokenizer else {}),
            "method": self.method,
            **({"code": self.code.to_dict()} if self.code else {}),
            "params": self._checked(),
            **({"statistics": self.statistics.to_dict()} if self.statistics else {}),
            "groups": groups,
            "seed": self.seed,
            "export_dtype": self.export_dtype,
        }

    def _checked(self, group: Group | None = None) -> dict[str, Any]:
        """All parameters of a group, or those that the recipe has for groups without a method of their own."""
        method, code = (self.method, self.code) if group is None else self.method_of(group)
        params = dict(self.params) if group is None else self.params_of(group)
        return _check_params(method, params) if code is None else params

    def canonical(self) -> Recipe:
        """The same merge as its equals are written: the last group's method is the recipe's, and nobody repeats it."""
        if all(group.method is None for group in self.groups):
            return self
        last, params = self.method_of(self.groups[-1]), self._checked(self.groups[-1])
        groups = []
        for group in self.groups:
            (method, code), own = self.method_of(group), self._checked(group)
            if (method, code) == last and own.keys() == params.keys():
                different = {key: value for key, value in own.items() if value != params[key]}
                groups.append(replace(group, method=None, code=None, params=different))
            else:
                groups.append(replace(group, method=method, code=code, params=own))
        return replace(self, method=last[0], code=last[1], params=params, groups=tuple(groups))

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of everything but names of places: content hashes stand for sources, code and statistics, not
        their paths.

        A stage's is the hash of its recipe. Where groups have methods of their own, it does not matter which of the
        methods stands at the top.
        """
        return self.canonical()._hash()

    def _hash(self) -> str:
        data = self.to_dict()
        written = [data["base"], *data["experts"]]
        for source, entry in zip((self.base, *self.experts), written, strict=True):
            if source is not None and source.recipe is not None:
                entry["recipe"] = source.recipe.hash
                del entry["sha256"]
            elif source is not None and source.sha256:
                del entry["path"]
        for thing, entry in ((self, data), *zip(self.groups, data["groups"], strict=True)):
            if thing.code is not None and thing.code.sha256:
                name = str(thing.method)
                entry["method"], entry["code"] = split_reference(name)[1] or name, thing.code.sha256
        if self.statistics is not None and self.statistics.sha256:
            del data["statistics"]["path"]
        return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
        """A recipe from plain data: what ``to_dict`` gives, the short form people write, or a mergekit configuration.

        The short form may leave out hashes and everything that has a default, gives ``base`` as a path, ``experts`` as
        {name: path}, and ``weights`` (one number, or {name: number}) at the top level instead of ``groups``. ``filter``
        and ``methods`` are short for groups as well (``evomerge.parts``). A source that is a recipe file, or {recipe:
        data or file}, is a stage.

        Args:
            where: the file that errors name.

        Raises SpecError (or MethodError for the method's own parameters) for what is unknown, missing or out of range.
        """
        return _Reader(where).recipe(data)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe from a YAML (or JSON) file. Paths in it are relative to the file; plain data only is read.

        Raises SpecError if it cannot be read, is not a recipe, or breaks a rule.
        """
        return _load(Path(path), ())

    def to_yaml(self) -> str:
        """The text of a recipe.yaml that ``load`` reads back to an equal recipe."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)


def is_recipe_file(path: str) -> bool:
    """Does ``path``, as a user wrote it for a source, name a recipe (a stage) and not a folder?"""
    return path.endswith(RECIPE_FILES)


def source_at(name: str, path: str) -> Source:
    """The source that a folder, or a recipe's file, is; raises SpecError for a recipe that breaks a rule."""
    return Source(name, recipe=Recipe.load(path)) if is_recipe_file(path) else Source(name, path)


def _load(path: Path, inside: tuple[str, ...]) -> Recipe:
    """The recipe in a file. ``inside``: the recipes that it is a stage of, the outermost first."""
    documents = read_documents(path, what="a recipe")
    if len(documents) > 1:
        from evomerge.mergekit_yaml import from_documents

        return from_documents(documents, where=str(path), folder=path.absolute().parent)
    data = documents[0] if documents else None
    return _Reader(str(path), path.absolute().parent, (*inside, str(path.resolve()))).recipe(data)


def holds(info: TensorInfo, layers: tuple[int, int] | None, kinds: Sequence[str] | None, end: int | None) -> bool:
    """Is this tensor among ``layers`` and ``kinds`` (None: all)? The whole recipe's layers end at ``end``."""
    if kinds is not None and info.kind not in kinds:
        return False
    if layers is None:
        return True
    if info.layer is not None:
        return layers[0] <= info.layer < layers[1]
    return layers[0] == 0 if info.kind == "embedding" else layers[1] == end


def _foreign(method: str) -> bool:
    """Is this method not evomerge's own, so that its rules are not known here?"""
    from evomerge.methods import METHODS

    return method not in METHODS


def _check_params(method: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of ``method`` in their types, defaults filled in; MethodError for what is unknown or illegal."""
    from evomerge.methods import METHODS
    from evomerge.methods.base import check_params

    if method not in METHODS:
        raise MethodError(f"there is no method {method!r}", remedy=nearest(method, METHODS))
    return check_params(method, METHODS[method], params)


class _Reader:
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
        return Recipe(base, experts, method, groups, params, seed, export_dtype, code, statistics, tokenizer)

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
            return _Reader(place, self.folder, (*self.inside, place)).recipe(data)
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
        return _load(file, self.inside)

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
            checked = _check_params(method, {**shared, **given})
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


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
