"""Searchers by name: evomerge's own, those of installed packages, and those of a user's files."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.errors import CandidateError, Interrupted, SpecError, UserError
from evomerge.finding import find_plugin
from evomerge.params import Param
from evomerge.plugins import SEARCHER, Code, run_user_code
from evomerge.searchers import SEARCHERS
from evomerge.searchers.base import Searcher

# What is no fault of a searcher's code: errors that say what to do, and what its oracle raises.
PASSING = (UserError, CandidateError, Interrupted)


@dataclass(frozen=True)
class Found:
    """A searcher, and its code if that is not evomerge's own."""

    searcher: type[Searcher]
    code: Code | None = None


def find(name: str, folder: Path) -> Found:
    """The searcher that an experiment names: one of evomerge's own, of an installed package, or ``file.py@name``.

    Args:
        folder: of the experiment file; the code of a file below it runs.

    Raises:
        SpecError: there is none, its code fails, or it breaks a rule of searchers.
    """
    return Found(*find_plugin(SEARCHER, name, folder, SEARCHERS, Searcher, _guarded, "needs, ask and tell"))


def _guarded(searcher: type[Searcher], where: str, path: Path) -> type[Searcher]:
    """``searcher`` with its faults as errors that name the line of its file, and its answers checked."""
    name = searcher.name or searcher.__name__
    for key, param in searcher.params.items():
        if not isinstance(param, Param):
            raise SpecError(f"searcher {name}: the option {key} must be a Param, but is {param!r:.80}", where=where)

    def guard(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(self: Searcher, *args: Any, **options: Any) -> Any:
            return run_user_code(lambda: function(self, *args, **options), path, SEARCHER, PASSING)

        return call

    def needs(self: Searcher, n: int) -> int:
        count = guard(searcher.needs)(self, n)
        if not isinstance(count, int) or not 0 <= count <= n:
            raise SpecError(
                f"searcher {name} says that proposal {n} needs {count!r} told trials, but there are {n} before it",
                where=where,
                remedy="needs(n) is a whole number from 0 to n.",
            )
        return count

    def ask(self: Searcher, n: int) -> Any:
        point = guard(searcher.ask)(self, n)
        try:
            self.space.decode(point)
        except (SpecError, TypeError, AttributeError) as error:
            problem = error.problem if isinstance(error, SpecError) else f"it is {point!r:.80}"
            raise SpecError(
                f"searcher {name} proposed a point that is not in the space: {problem}",
                where=where,
                remedy="ask(n) gives a mapping dimension: value within the bounds; space.at and space.clip help.",
            ) from error
        return point

    methods = {key: guard(getattr(searcher, key)) for key in ("__init__", "tell", "replay", "recommend")}
    return type(searcher.__name__, (searcher,), {**methods, "needs": needs, "ask": ask, "name": name})
