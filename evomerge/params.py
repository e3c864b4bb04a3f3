"""Param: the facts about one parameter. Free of torch, so that the command line and the experiment file stay light."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from evomerge.errors import MethodError, nearest


@dataclass(frozen=True)
class Param:
    """One parameter of a method or a searcher: the single owner of its type, default, range and meaning.

    ``low_open`` excludes ``low`` itself. ``default=None`` means "derived"; ``meaning`` says from what.
    """

    type: type
    default: Any
    meaning: str
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    choices: tuple[str, ...] = ()

    def check(self, name: str, value: Any, owner: str) -> Any:
        """Return ``value`` in this parameter's type, or raise MethodError naming the legal range."""
        if value is None and self.default is None:
            return None
        if self.choices:
            if value not in self.choices:
                raise MethodError(
                    f"{owner}: {name}={value!r} is not one of {', '.join(self.choices)}",
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

    def range_text(self) -> str:
        if self.choices:
            return " | ".join(self.choices)
        if self.type is bool:
            return "true | false"
        left = "(" if self.low_open or self.low == -math.inf else "["
        right = ")" if self.high == math.inf else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"
