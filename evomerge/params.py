"""Param: the facts about one parameter. Free of torch, so that the command line and the experiment file stay light."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evomerge.errors import MethodError, nearest

if TYPE_CHECKING:
    from evomerge.plugins import Kind


@dataclass(frozen=True)
class Param:
    """One parameter of a method or a searcher: the single owner of its type, default, range and meaning.

    ``low_open`` excludes ``low`` itself. ``default=None`` means "derived"; ``meaning`` says from what. With ``plugin``
    there are, beside the ``choices``, the plug-ins of that kind; whether one is there is asked when it is loaded.
    """

    type: type
    default: Any
    meaning: str
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    choices: tuple[str, ...] = ()
    plugin: Kind | None = None

    def check(self, name: str, value: Any, owner: str) -> Any:
        """Return ``value`` in this parameter's type, or raise MethodError naming the legal range."""
        if value is None and self.default is None:
            return None
        if self.choices:
            if value not in self.choices and not self._is_plugin(value):
                raise MethodError(
                    f"{owner}: {name}={value!r} is not one of {', '.join(self.choices)}"
                    + (f", nor a {self.plugin.noun} in a file (file.py@name)" if self.plugin else ""),
                    remedy=nearest(str(value), self.choices),
                )
            return value
        if self.type is bool:
            if not isinstance(value, bool):
                raise MethodError(f"{owner}: {name} must be true or false, but is {value!r}")
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise MethodError(f"{owner}: {name} must be a number, but is {value!r}")
        if self.type is int and value != int(value):
            raise MethodError(f"{owner}: {name} must be a whole number, but is {value!r}")
        value = self.type(value)
        low_ok = value > self.low if self.low_open else value >= self.low
        if not (low_ok and value <= self.high and math.isfinite(value)):
            raise MethodError(f"{owner}: {name}={value} is outside its legal range {self.range_text()}")
        return value

    def _is_plugin(self, value: Any) -> bool:
        if self.plugin is None or not isinstance(value, str):
            return False
        from evomerge import installed
        from evomerge.plugins import names_file

        return names_file(value) or value in installed.names(self.plugin)

    def range_text(self) -> str:
        if self.choices:
            return " | ".join([*self.choices, *(["file.py@name"] if self.plugin else [])])
        if self.type is bool:
            return "true | false"
        left = "(" if self.low_open or self.low == -math.inf else "["
        right = ")" if self.high == math.inf else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"
