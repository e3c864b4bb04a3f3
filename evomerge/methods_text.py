"""What ``evomerge methods`` prints: all methods, or one in full, as wide as the terminal."""

from __future__ import annotations

import math
import shutil
import textwrap
from pathlib import Path

import yaml

from evomerge import installed
from evomerge.errors import MethodError
from evomerge.methods import METHODS
from evomerge.methods.base import Method
from evomerge.methods.lookup import find
from evomerge.methods.statistics import LEARNERS
from evomerge.params import Param
from evomerge.plugins import METHOD


def show_methods() -> str:
    """Every method, what it is for, its parameters and defaults: evomerge's own, then those of installed packages."""
    others = installed.names(METHOD)
    width = 2 + max(len(name) for name in [*METHODS, *others])

    def entry(name: str, method: Method, note: str = "") -> list[str]:
        params = ", ".join(f"{key}={plain(param.default)}" for key, param in method.params.items())
        return [_entry(name, width, method.summary + note), *([_entry("", width, f"[{params}]")] if params else [])]

    lines = [line for name, method in METHODS.items() for line in entry(name, method)]
    for name in others:
        try:
            found = find(name)
        except MethodError as error:  # that package's affair, and of those who name it
            lines.append(_entry(name, width, f"cannot be used: {error.problem}"))
        else:
            lines += entry(name, found.method, f"  (from {found.code.package})" if found.code else "")
    return "\n".join(lines)


def _entry(key: str, width: int, text: str) -> str:
    """``text`` in a column of its own, ``width`` to the right, as wide as the terminal lets it be."""
    columns = min(max(shutil.get_terminal_size((100, 24)).columns, 60), 120)
    indent = " " * width
    return textwrap.fill(
        text,
        columns,
        initial_indent=f"{key:<{width}}",
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def show_method(name: str) -> str:
    """One method: summary, source, experts it takes, parameters with defaults and ranges.

    Args:
        name: as in an experiment; a file's is relative to the current folder, and its code runs.

    Raises:
        MethodError: there is no such method.
    """
    found = find(name, Path())
    method = found.method
    fewest, most = method.num_experts
    experts = f"{fewest} or more" if most is None else str(fewest) if most == fewest else f"{fewest} to {most}"
    width = 2 + max(len(key) for key in (*method.params, "statistics"))

    def param(key: str, fact: Param, whose: str = "") -> list[str]:
        return [
            _entry(key, width, f"{whose}{_range(fact)}; default {plain(fact.default)}"),
            _entry("", width, fact.meaning),
        ]

    lines = [
        _entry("", 0, f"{name}: {method.summary}"),
        _entry("source", width, method.reference),
        *(
            [_entry("code", width, f"{found.code.path or found.code.package}  sha256 {found.code.sha256}")]
            if found.code
            else []
        ),
        _entry("experts", width, experts + (", LoRA adapters of one rank" if method.needs_factors else "")),
        _entry("base", width, "needed" if method.needs_base else "not needed"),
        *([_entry("statistics", width, _whence(method.statistics))] if method.statistics else []),
        *param("weights", method.weight, "one an expert: "),
    ]
    for key, fact in method.params.items():
        lines += param(key, fact)
    return "\n".join(lines)


def _whence(kind: str) -> str:
    return (
        f"{kind}, which the searcher {LEARNERS[kind][0]} learns" if kind in LEARNERS else f"{kind}, by evomerge collect"
    )


def _range(param: Param) -> str:
    """What a parameter may be, in words."""
    if param.choices or param.type is bool:
        return param.range_text()
    number = "a whole number" if param.type is int else "a number"
    return number if param.low == -math.inf and param.high == math.inf else f"{number} in {param.range_text()}"


def plain(value: object) -> str:
    """A value as it is written in YAML."""
    if value is None:
        return "derived"
    return yaml.safe_dump(value).partition("\n")[0]
