"""Searchers by name: evomerge's own, those of installed packages, and those of a user's files."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge import installed
from evomerge.errors import SpecError, nearest
from evomerge.params import Param
from evomerge.plugins import (
    SEARCHER,
    Code,
    code_files,
    code_hash,
    find_file,
    load_module,
    names_file,
    pick,
    run_user_code,
    split_reference,
)
from evomerge.searchers import SEARCHERS
from evomerge.searchers.base import Searcher

_loaded: dict[tuple[str, str], type[Searcher]] = {}  # (hash of its code, name in its file or package) -> searcher


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
    if names_file(name):
        path = find_file(name, folder, SEARCHER)
        code = Code(path=str(path), sha256=code_hash(code_files(path), path.parent))
        key = code.sha256, split_reference(name)[1]
        if key not in _loaded:
            found = pick(load_module(path, SEARCHER), key[1], _is_searcher, path, SEARCHER, "a Searcher class")
            _loaded[key] = _guarded(found, str(path), path)
        return Found(_loaded[key], code)
    installed.refuse_clash(SEARCHER, name, SEARCHERS)
    if name in SEARCHERS:
        return Found(SEARCHERS[name])
    others = installed.names(SEARCHER)
    if name not in others:
        raise SpecError(f"there is no searcher {name!r}", remedy=nearest(name, [*SEARCHERS, *others]))
    found, code = installed.load(SEARCHER, name)
    key = code.sha256, name
    if key not in _loaded:
        if not _is_searcher(found):
            raise SpecError(
                f"searcher {name!r} of the installed package {code.package} must be a class derived from "
                f"evomerge.Searcher with needs, ask and tell, but is {found!r:.80}"
            )
        _loaded[key] = _guarded(found, code.package, Path(inspect.getfile(found)))
    return Found(_loaded[key], code)


def _is_searcher(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Searcher) and not inspect.isabstract(value)


def _guarded(searcher: type[Searcher], where: str, path: Path) -> type[Searcher]:
    """``searcher`` with its faults as errors that name the line of its file, and its answers checked."""
    name = searcher.name or searcher.__name__
    for key, param in searcher.params.items():
        if not isinstance(param, Param):
            raise SpecError(f"searcher {name}: the option {key} must be a Param, but is {param!r:.80}", where=where)

    def guard(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(self: Searcher, *args: Any, **options: Any) -> Any:
            return run_user_code(lambda: function(self, *args, **options), path, SEARCHER)

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
