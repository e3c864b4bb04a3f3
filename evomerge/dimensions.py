"""One thing a searcher may move: a number, a whole number or a choice, with its bounds and where it starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Value = Any  # a float, an int, a word or a truth value
Point = dict[str, Value]  # dimension name -> value, in the space's own units


@dataclass(frozen=True)
class Dimension:
    """A named dimension. Bounds, initial value and values are all in the same units.

    Args:
        low, high: the bounds, both legal; of a choice, its first and last index.
        initial: where a search starts.
        log: equal shares of the way from ``low`` to ``high`` are equal factors.
        integer: whole numbers only.
        choices: the values of a categorical dimension, in no order that means anything; empty for a number.
        when: the method that this dimension belongs to, where the method itself is a dimension; points of other methods
            do not have it.
    """

    name: str
    low: float
    high: float
    initial: Value
    log: bool = False
    integer: bool = False
    choices: tuple[Value, ...] = ()
    when: str | None = None

    def at(self, share: float) -> Value:
        """The value at ``share`` in [0, 1] of the way through the range; choices and whole numbers have equal parts."""
        if self.choices:
            return self.choices[min(int(share * len(self.choices)), len(self.choices) - 1)]
        if self.integer:
            low, high = (int(self.low), int(self.high))
            if self.log:
                edges = math.log(low - 0.5), math.log(high + 0.5)
                return min(max(round(math.exp(edges[0] + share * (edges[1] - edges[0]))), low), high)
            return min(low + int(share * (high - low + 1)), high)
        if self.log:
            value = self.low ** (1 - share) * self.high**share  # high / low may be too large for a float
        else:
            value = self.low + float(share) * (self.high - self.low)
        return min(max(value, self.low), self.high)

    def share(self, value: Value) -> float:
        """How far through the range ``value`` is, in [0, 1]: of a choice or a whole number, the middle of its part."""
        if self.choices:
            return (self.choices.index(value) + 0.5) / len(self.choices)
        number = float(value)
        if self.integer:
            low, high = self.low - 0.5, self.high + 0.5
        else:
            low, high = self.low, self.high
        if self.log:
            return (math.log(number) - math.log(low)) / (math.log(high) - math.log(low))
        return (number - low) / (high - low)

    def part(self, value: Value) -> tuple[float, float]:
        """The shares, from and to, that a whole number has of the range; ``share`` of it lies between them."""
        low, high = self.low - 0.5, self.high + 0.5
        if self.log:
            width = math.log(high / low)
            return math.log((value - 0.5) / low) / width, math.log((value + 0.5) / low) / width
        return (value - 0.5 - low) / (high - low), (value + 0.5 - low) / (high - low)

    def holds(self, value: Any) -> bool:
        """Is ``value`` one that this dimension can have? False for NaN, and for 1 where true is meant."""
        if self.choices:
            return any(value == choice and type(value) is type(choice) for choice in self.choices)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return self.low <= value <= self.high and (not self.integer or value == int(value))

    def clip(self, value: Value) -> Value:
        """The nearest legal value; a choice must be one already."""
        if self.choices:
            return value
        inside = min(max(float(value), self.low), self.high)
        return round(inside) if self.integer else inside

    def text(self) -> str:
        """The range, as people read it: ``0 to 1.5``, ``ties | dare_ties``."""
        if self.choices:
            return " | ".join(map(_word, self.choices))
        kinds = ", ".join(word for word, on in (("whole", self.integer), ("log", self.log)) if on)
        return f"{self.low:g} to {self.high:g}" + (f" ({kinds})" if kinds else "")

    def initial_text(self) -> str:
        return _word(self.initial)

    def distribution(self) -> BaseDistribution:
        """The same for Optuna."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution(self.choices)
        if self.integer:
            return IntDistribution(int(self.low), int(self.high), log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without what is at its default."""
        data: dict[str, Any] = {"name": self.name, "low": self.low, "high": self.high, "initial": self.initial}
        data |= {key: True for key, on in (("log", self.log), ("integer", self.integer)) if on}
        data |= {"choices": list(self.choices)} if self.choices else {}
        return data | ({"when": self.when} if self.when else {})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Dimension:
        return cls(**{**data, "choices": tuple(data.get("choices", ()))})


def _word(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else f"{value:g}"
