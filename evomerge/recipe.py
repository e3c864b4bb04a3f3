"""A recipe: one fully determined merge. Same recipe, same bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import MethodError, SpecError, nearest
from evomerge.parts import is_pattern, matcher
from evomerge.plugins import Code, split_reference
from evomerge.tokenizer_choice import TokenizerChoice

if TYPE_CHECKING:
    from evomerge.methods.base import TensorInfo

FORMAT = 1
DTYPES = ("bfloat16", "float16", "float32", "float64")
RECIPE_FILES = (".yaml", ".yml", ".json")


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
class Surgery:
    """Adapters behind the merge (``evomerge.surgery``): their file, and the hash of what it holds."""

    path: str
    sha256: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {"path": self.path, "sha256": self.sha256}


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
    sources are brought to; None: all have the base's. ``surgery`` names adapters that stand behind the merged model,
    which is then no plain checkpoint; the merge itself is the same with them and without.
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
    surgery: Surgery | None = None

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
            **({"surgery": self.surgery.to_dict()} if self.surgery else {}),
            "groups": groups,
            "seed": self.seed,
            "export_dtype": self.export_dtype,
        }

    def _checked(self, group: Group | None = None) -> dict[str, Any]:
        """All parameters of a group, or those that the recipe has for groups without a method of their own."""
        method, code = (self.method, self.code) if group is None else self.method_of(group)
        params = dict(self.params) if group is None else self.params_of(group)
        return checked_params(method, params) if code is None else params

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
        """SHA-256 (hex) of everything but names of places: content hashes stand for sources, code, statistics and
        adapters, not their paths.

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
        if self.surgery is not None and self.surgery.sha256:
            del data["surgery"]["path"]
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
        from evomerge.recipe_reading import Reader

        return Reader(where).recipe(data)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe from a YAML (or JSON) file. Paths in it are relative to the file; plain data only is read.

        Raises SpecError if it cannot be read, is not a recipe, or breaks a rule.
        """
        from evomerge.recipe_reading import read_recipe

        return read_recipe(Path(path))

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


def holds(info: TensorInfo, layers: tuple[int, int] | None, kinds: Sequence[str] | None, end: int | None) -> bool:
    """Is this tensor among ``layers`` and ``kinds`` (None: all)? The whole recipe's layers end at ``end``."""
    if kinds is not None and info.kind not in kinds:
        return False
    if layers is None:
        return True
    if info.layer is not None:
        return layers[0] <= info.layer < layers[1]
    return layers[0] == 0 if info.kind == "embedding" else layers[1] == end


def checked_params(method: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of ``method`` in their types, defaults filled in; MethodError for what is unknown or illegal."""
    from evomerge.methods import METHODS
    from evomerge.methods.base import check_params

    if method not in METHODS:
        raise MethodError(f"there is no method {method!r}", remedy=nearest(method, METHODS))
    return check_params(method, METHODS[method], params)
