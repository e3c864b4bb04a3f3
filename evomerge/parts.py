"""Parts of a model that are merged in ways of their own: what ``filter`` and ``methods`` mean in recipes and spaces."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evomerge.errors import SpecError, nearest

if TYPE_CHECKING:
    from evomerge.methods.base import TensorInfo
    from evomerge.recipe import Recipe

KINDS = ("attention", "mlp", "norm", "embedding", "head", "other")
REST = "rest"  # the part that no other one holds
AVERAGE, BASE = "average", "base"
CHARACTERS = "*?["  # what makes a pattern of a tensor's name; no name has them
Refuse = Callable[[str, str, str | None], Exception]  # key, problem, remedy


@dataclass(frozen=True)
class Settled:
    """A method, its parameters and weights that one word stands for."""

    method: str
    params: Mapping[str, Any]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Entry:
    """A group as it stands in a recipe's file: its place there, its keys, and the place of its weights."""

    key: str
    data: Any
    weights_key: str


def settled(word: Any, experts: Sequence[str]) -> Settled | None:
    """What ``average`` (of the experts), ``base`` or an expert's name stands for; None for anything else.

    An average has equal weights and is linear, the base is a sum with no task vector in it, an expert a mean of one.

    Raises:
        ValueError: the word may mean two things.
    """
    from evomerge.methods import METHODS

    if not isinstance(word, str):
        return None
    meanings = [AVERAGE, BASE, *METHODS]
    if word in experts and word in meanings:
        raise ValueError(
            f"{word!r} is an expert here, and {'a method' if word in METHODS else 'a word of its own'} too"
        )
    if word == BASE:
        return Settled("task_arithmetic", {}, (0.0,) * len(experts))
    if word == AVERAGE:
        return Settled("linear", {"normalize": True}, (1.0 / len(experts),) * len(experts))
    if word in experts:
        return Settled("linear", {"normalize": True}, tuple(float(name == word) for name in experts))
    return None


def conditions(label: str) -> dict[str, list[str]]:
    """``kinds`` or ``tensors`` of the part that is called so: a kind of module, or a pattern of tensors' names.

    Raises:
        ValueError: it is neither.
    """
    if label in KINDS:
        return {"kinds": [label]}
    if any(c in label for c in CHARACTERS) or "." in label:
        return {"tensors": [label]}
    raise ValueError(f"there is no kind of module {label!r}")


def kinds_remedy(label: str) -> str:
    return f"{nearest(label, [*KINDS, REST])} A pattern of tensors' names has a * in it, such as '*{label}*'."


def is_pattern(word: str) -> bool:
    return any(c in word for c in CHARACTERS)


def matcher(words: Iterable[str]) -> Callable[[str], bool]:
    """Whether a checkpoint name is one of ``words``, or matches one that is a pattern (``*``, ``?``, ``[0-9]``)."""
    words = list(words)
    names = {word for word in words if not is_pattern(word)}
    patterns = [fnmatch.translate(word) for word in words if is_pattern(word)]
    compiled = re.compile("|".join(patterns)).match if patterns else (lambda name: None)
    return lambda name: name in names or compiled(name) is not None


def written_groups(data: Mapping[str, Any], experts: Sequence[str], refuse: Refuse) -> tuple[str, Any, list[Entry]]:
    """(place of the method, the keys there, the groups) of a recipe as its file has them, the short forms spelt out.

    Args:
        refuse: makes the error for a key.

    Raises:
        What ``refuse`` makes: keys that do not go together, or break a rule of the short forms.
    """
    given = [key for key in ("methods", "filter", "groups") if key in data]
    if len(given) > 1:
        raise refuse("", f"{given[0]} and {given[1]} exclude each other", "Write it all as groups, or leave one out.")
    if "methods" in data:
        return _by_methods(data, experts, refuse)
    if ("groups" in data) == ("weights" in data):
        raise refuse("", "exactly one of weights and groups must be given", "Give weights: {name: number}.")
    if "filter" in data:
        return "", data, _by_filter(data, experts, refuse)
    if "weights" in data:
        return "", data, [Entry("", {"weights": data["weights"]}, "weights")]
    if not isinstance(data["groups"], list) or not data["groups"]:
        raise refuse("groups", f"must be a list of groups, but is {data['groups']!r:.80}", None)
    places = [f"groups[{g}]" for g in range(len(data["groups"]))]
    return "", data, [Entry(p, entry, f"{p}.weights") for p, entry in zip(places, data["groups"], strict=True)]


def _by_filter(data: Mapping[str, Any], experts: Sequence[str], refuse: Refuse) -> list[Entry]:
    """What the filter holds is merged as the recipe says, the rest is one of average, base and an expert."""
    found = data["filter"]
    keys = ("tensors", "kinds", REST)
    if not isinstance(found, Mapping):
        raise refuse("filter", f"must be a table of {', '.join(keys)}, but is {found!r:.80}", None)
    for key in found:
        if key not in keys:
            raise refuse("filter", f"there is no {key!r} here", nearest(str(key), keys))
    if found.get("tensors") is None and found.get("kinds") is None:
        raise refuse("filter", "holds everything", "Say which tensors or kinds are merged, or leave filter out.")
    rest = word_of(found.get(REST), experts, lambda *why: refuse(f"filter.{REST}", *why))
    part = {key: found[key] for key in ("tensors", "kinds") if found.get(key) is not None}
    return [
        Entry("filter", {**part, "weights": data["weights"]}, "weights"),
        Entry(f"filter.{REST}", _table(rest), f"filter.{REST}.weights"),
    ]


def word_of(word: Any, experts: Sequence[str], refuse: Callable[[str, str | None], Exception]) -> Settled:
    """``settled`` for a key that takes nothing else."""
    try:
        found = settled(word, experts)
    except ValueError as error:
        raise refuse(str(error), "Rename the expert.") from None
    if found is None:
        what = "is missing" if word is None else f"{word!r:.80} is none of average, base and the experts"
        raise refuse(
            f"{what}: what happens to the tensors that the filter leaves out",
            f"Write average, base, or one of {', '.join(experts)}; another method for them goes into `methods`.",
        )
    return found


def _by_methods(data: Mapping[str, Any], experts: Sequence[str], refuse: Refuse) -> tuple[str, Any, list[Entry]]:
    for key in ("method", "params", "code"):
        if key in data:
            raise refuse(key, f"{key} stands beside methods", f"Write it into methods, for {REST} or a part.")
    parts = data["methods"]
    check_labels(parts, lambda *why: refuse("methods", *why))
    entries, top = [], {}
    for label, value in sorted(parts.items(), key=lambda item: item[0] == REST):  # the rest last; otherwise in order
        key = f"methods.{label}"
        try:
            word = settled(value, experts)
        except ValueError as error:
            raise refuse(key, str(error), "Rename the expert.") from None
        table = {"method": value} if isinstance(value, str) else value
        if word is not None:
            table = _table(word)
        if not isinstance(table, Mapping):
            raise refuse(key, f"must be a method, {AVERAGE}, {BASE} or an expert, but is {value!r:.80}", None)
        for name in table:
            if name not in ("method", "params", "code", "weights"):
                raise refuse(key, f"there is no {name!r} here", nearest(str(name), ("method", "params", "weights")))
        if "method" not in table:
            raise refuse(key, "names no method", "Write {method: NAME, params: {...}}.")
        own = f"{key}.weights" if "weights" in table else "weights"
        table = {"weights": data.get("weights"), **table}
        if label == REST:
            top, table = table, {"weights": table["weights"]}
        entries.append(Entry(key, {**(conditions(label) if label != REST else {}), **table}, own))
    return f"methods.{REST}", top, entries


def check_labels(parts: Any, refuse: Callable[[str, str | None], Exception]) -> None:
    """The keys of ``methods``: kinds, patterns, and ``rest``; raises what ``refuse`` makes."""
    if not isinstance(parts, Mapping) or not all(isinstance(label, str) for label in parts):
        raise refuse(
            f"must be a table of parts and methods, but is {parts!r:.80}", "Write {attention: ties, rest: base}."
        )
    for label in parts:
        try:
            _ = label == REST or conditions(label)
        except ValueError as error:
            raise refuse(str(error), kinds_remedy(label)) from None
    if REST not in parts:
        raise refuse(
            f"{REST} is missing: what happens to the tensors of no other part",
            f"Add {REST}: {AVERAGE}, {REST}: {BASE}, an expert or a method.",
        )


def _table(word: Settled) -> dict[str, Any]:
    return {"method": word.method, "params": dict(word.params), "weights": list(word.weights)}


def check_parts(recipe: Recipe, infos: Sequence[TensorInfo]) -> None:
    """A recipe's groups against the tensors that there are.

    Args:
        infos: all floating-point tensors.

    Raises:
        SpecError: a group names a tensor that is not there, a pattern matches nothing, or no group holds a tensor.
    """
    names = [info.name for info in infos]
    known = set(names)
    for group in recipe.groups:
        for word in group.tensors or ():
            if word not in known and not (is_pattern(word) and any(map(matcher([word]), names))):
                near = "" if is_pattern(word) else f" {nearest(word, names)}"
                raise SpecError(
                    f"the pattern {word!r} matches no tensor" if is_pattern(word) else f"there is no tensor {word!r}",
                    where=group.where or None,
                    remedy=f"Names are those of the checkpoint's files, such as {_typical(infos)}.{near}",
                )
    for info in infos:
        recipe.group_for(info)


def _typical(infos: Sequence[TensorInfo]) -> str:
    inner = [info.name for info in infos if info.kind in ("attention", "mlp")] or [info.name for info in infos]
    return inner[len(inner) // 2] if inner else "none"
