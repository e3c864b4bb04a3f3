"""Reading what users write: YAML that can run nothing, and pydantic's findings as SpecErrors with a remedy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from evomerge.errors import SpecError, nearest

MAX_NODES = 100_000  # of a YAML document with its aliases expanded: far beyond any experiment, far below a memory bomb

M = TypeVar("M", bound=BaseModel)


class Strict(BaseModel):
    """What users write, as it must be: no unknown keys, no conversions, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def at(where: str, key: str) -> str:
    """``where`` (a file, or a file and a key) extended by ``key``: ``a.yaml``, ``a.yaml: key``, ``a.yaml: key.sub``."""
    return f"{where}.{key}" if ": " in where else f"{where}: {key}"


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and alias bombs, and reads 1e-3 as a number (YAML 1.2), not as text."""

    def compose_document(self) -> Any:
        node = super().compose_document()
        if node is not None:
            _expanded_size(node, {}, set())
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float | bool):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} stands twice in one mapping", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _expanded_size(node: yaml.Node, sizes: dict[int, int], path: set[int]) -> int:
    """How many nodes ``node`` stands for once aliases are expanded."""
    if id(node) in sizes:
        return sizes[id(node)]
    if id(node) in path:
        raise yaml.constructor.ConstructorError(None, None, "an alias contains itself", node.start_mark)
    path.add(id(node))
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    size = 1 + sum(_expanded_size(child, sizes, path) for child in children)
    if size > MAX_NODES:
        raise yaml.constructor.ConstructorError(
            None, None, f"the document holds more than {MAX_NODES} values", node.start_mark
        )
    path.discard(id(node))
    sizes[id(node)] = size
    return size


def read_yaml(path: Path, *, what: str) -> Any:
    """The plain data in a YAML (or JSON) file. No tag can construct anything but plain data.

    Args:
        path: of the file.
        what: it is, for the errors: "an experiment file".

    Raises:
        SpecError: there is no such file, it cannot be read, or it is not valid YAML; names the line.
    """
    documents = read_documents(path, what=what)
    if len(documents) > 1:
        raise SpecError(f"{what} is one document, but here are {len(documents)}, parted by ---", where=str(path))
    return documents[0] if documents else None


def read_documents(path: Path, *, what: str) -> list[Any]:
    """The same of a file with any number of documents."""
    if path.is_dir():
        raise SpecError(f"{what} is a file, but {path.resolve()} is a folder", where=str(path))
    if not path.is_file():
        raise SpecError(
            f"there is no such file ({path.resolve()})", where=str(path), remedy=f"Give the path of {what}."
        )
    try:
        text = path.read_text(encoding="utf-8")
        return list(yaml.load_all(text, _Loader))
    except UnicodeDecodeError as error:
        raise SpecError(f"{what} must be UTF-8 text: {error}", where=str(path)) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise SpecError(f"not valid YAML: {problem}{line}", where=str(path)) from error
    except (OSError, RecursionError) as error:
        raise SpecError(f"{what} cannot be read: {error}", where=str(path)) from error


def plain_mapping(data: Any, *, where: str, what: str) -> dict[str, Any]:
    """``data`` if it is a mapping whose keys, at every depth, are text; SpecError otherwise."""
    if not isinstance(data, Mapping):
        raise SpecError(f"{what} must be a mapping (key: value), but is {short(data)}", where=where)

    def check(value: Any, key: str) -> None:
        if isinstance(value, Mapping):
            for k, v in value.items():
                if not isinstance(k, str):
                    raise SpecError(
                        f"keys must be text, but {k!r} is read as {type(k).__name__}",
                        where=at(where, key) if key else where,
                        remedy=f'Put it in quotes: "{k}". YAML reads bare on, off, yes and no as true and false.',
                    )
                check(v, f"{key}.{k}" if key else k)
        elif isinstance(value, list | tuple):
            for i, v in enumerate(value):
                check(v, f"{key}[{i}]")

    check(data, "")
    return dict(data)


def validate(model: type[M], data: Any, *, where: str) -> M:
    """``data`` as ``model``; every finding of pydantic becomes part of one SpecError, the first one in full."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        # A key that is unknown here is often the one that is missing there, misspelt: name it first.
        findings = sorted(error.errors(include_url=False), key=lambda f: f["type"] != "extra_forbidden")
        first = findings[0]
        problem, remedy = _explain(model, first)
        more = [f"{_dotted(f['loc'])}: {_explain(model, f)[0]}" for f in findings[1:6]]
        if more:
            remedy = "\n  ".join(
                [remedy, "Also wrong:", *(f"  {m}" for m in more)] if remedy else ["Also wrong:", *more]
            )
        key = _dotted(first["loc"])
        raise SpecError(problem, where=at(where, key) if key else where, remedy=remedy) from None


def short(value: Any) -> str:
    """``value`` as an error shows it: at most about 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


_RULES = {
    "too_short": "must not be empty",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "dict_type": "must be a mapping (key: value)",
    "model_type": "must be a mapping (key: value)",
    "model_attributes_type": "must be a mapping (key: value)",
    "list_type": "must be a list",
    "string_too_short": "must not be empty",
}
_COMPARISONS = {
    "greater_than": ("gt", ">"),
    "greater_than_equal": ("ge", ">="),
    "less_than": ("lt", "<"),
    "less_than_equal": ("le", "<="),
}


def _explain(model: type[BaseModel], finding: Any) -> tuple[str, str | None]:
    """(problem, remedy) of one of pydantic's findings."""
    kind, loc, value, context = finding["type"], finding["loc"], finding["input"], finding.get("ctx", {})
    name = _dotted(loc).rpartition(".")[2] or "it"
    meaning = _meaning(model, loc)
    if kind == "extra_forbidden":
        owner = _owner(model, loc[:-1])
        return f"there is no key {name!r} here", nearest(name, _fields(owner)) if owner else None
    if kind == "missing":
        return f"the key {name!r} is missing", meaning
    if kind == "literal_error":
        owner_field = _field(model, loc)
        choices = [str(c) for c in get_args(_some(owner_field.annotation))] if owner_field else []
        return f"{name} is {short(value)}, which is not one of {', '.join(choices)}", nearest(str(value), choices)
    if kind in _COMPARISONS:
        key, sign = _COMPARISONS[kind]
        return f"{name} {sign} {context[key]} must hold, but {name} is {short(value)}", meaning
    if "remedy" in context:
        return finding["msg"], context["remedy"] or meaning
    rule = _length_rule(kind, context) or _RULES.get(kind, finding["msg"])
    return f"{name} {rule}, but is {short(value)}", meaning


def _length_rule(kind: str, context: Mapping[str, Any]) -> str | None:
    """What a list of the wrong length must have."""
    if kind == "too_short" and context["actual_length"]:
        return f"must have at least {context['min_length']} values"
    return f"must have at most {context['max_length']} values" if kind == "too_long" else None


def _dotted(loc: tuple[Any, ...]) -> str:
    """``search.initial[0].from``"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def _fields(model: type[BaseModel]) -> dict[str, Any]:
    """Fields by the names that users write."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _owner(model: Any, loc: tuple[Any, ...]) -> type[BaseModel] | None:
    """The model that ``loc`` leads to, through fields and mappings of models."""
    here: Any = model
    for part in loc:
        if isinstance(here, type) and issubclass(here, BaseModel):
            field = _fields(here).get(str(part))
            here = field.annotation if field else None
        elif get_origin(here) in (dict, list):
            here = get_args(here)[-1]
        else:
            return None
    return here if isinstance(here, type) and issubclass(here, BaseModel) else None


def _some(annotation: Any) -> Any:
    """What ``annotation`` says of a value that is not None."""
    parts = [part for part in get_args(annotation) if part is not type(None)]
    return parts[0] if len(parts) == 1 and type(None) in get_args(annotation) else annotation


def _field(model: Any, loc: tuple[Any, ...]) -> Any:
    owner = _owner(model, loc[:-1]) if loc else None
    return _fields(owner).get(str(loc[-1])) if owner else None


def _meaning(model: Any, loc: tuple[Any, ...]) -> str | None:
    """What the key at ``loc`` means, as its field says; the nearest field above it for values in mappings."""
    for end in range(len(loc), 0, -1):
        field = _field(model, loc[:end])
        if field is not None and field.description:
            return f"{'.'.join(map(str, loc[:end]))}: {field.description}."
    return None
