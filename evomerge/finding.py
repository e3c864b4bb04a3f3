"""Plug-ins that are classes, by the name a user gave: evomerge's own, an installed package's, or in a user's file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from evomerge import installed
from evomerge.errors import nearest
from evomerge.plugins import (
    Code,
    Kind,
    code_files,
    code_hash,
    find_file,
    load_module,
    names_file,
    pick,
    split_reference,
)

T = TypeVar("T")
_loaded: dict[tuple[str, str, str], Any] = {}  # (kind, hash of its code, name in its file or package) -> plug-in


def find_plugin(
    kind: Kind,
    name: str,
    folder: Path,
    own: Mapping[str, T],
    parent: type,
    guarded: Callable[[Any, str, Path], T],
    methods: str,
) -> tuple[T, Code | None]:
    """What ``name`` is, and its code if that is not evomerge's own. Code runs once a process.

    Args:
        folder: of the experiment file; the code of a file below it runs.
        own: evomerge's own.
        parent: what plug-ins of this kind are derived from.
        guarded: makes of (class, place for errors, its file) what is used in its place.
        methods: which ones such a class must write, for errors.

    Raises:
        UserError: of the kind's class. There is none, its code fails, or it breaks a rule of its kind.
    """

    def fits(value: Any) -> bool:
        return isinstance(value, type) and issubclass(value, parent) and not inspect.isabstract(value)

    if names_file(name):
        path = find_file(name, folder, kind)
        code = Code(path=str(path), sha256=code_hash(code_files(path), path.parent))
        key = kind.noun, code.sha256, split_reference(name)[1]
        if key not in _loaded:
            found = pick(load_module(path, kind), key[2], fits, path, kind, f"a {parent.__name__} class")
            _loaded[key] = guarded(found, str(path), path)
        return _loaded[key], code
    installed.refuse_clash(kind, name, own)
    if name in own:
        return own[name], None
    others = installed.names(kind)
    if name not in others:
        raise kind.error(f"there is no {kind.noun} {name!r}", remedy=nearest(name, [*own, *others]))
    found, code = installed.load(kind, name)
    key = kind.noun, code.sha256, name
    if key not in _loaded:
        if not fits(found):
            raise kind.error(
                f"{kind.noun} {name!r} of the installed package {code.package} must be a class derived from "
                f"evomerge.{parent.__name__} with {methods}, but is {found!r:.80}"
            )
        _loaded[key] = guarded(found, code.package, Path(inspect.getfile(found)))
    return _loaded[key], code
