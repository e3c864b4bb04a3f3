"""Plug-ins of installed packages, by entry point. Nothing is imported before somebody names it.

A package offers them in the groups ``evomerge.methods``, ``evomerge.searchers``, ``evomerge.evaluators`` and
``evomerge.losses``; in its pyproject.toml: ``[project.entry-points."evomerge.methods"]``,
``median = "my_package.median:Median"``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from evomerge.plugins import Code, Kind, code_hash

CODE = (".py", ".so", ".pyd")


def names(kind: Kind) -> list[str]:
    """The names that installed packages offer."""
    return sorted({point.name for point in entry_points(group=kind.group)})


def package_of(point: EntryPoint) -> str:
    """Name and version of the package that brought ``point``."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unnamed package"


def refuse_clash(kind: Kind, name: str, own: Iterable[str]) -> None:
    """An error if an installed package offers one of evomerge's ``own`` names, or two packages offer the same."""
    points = list(entry_points(group=kind.group, name=name))
    packages = " and ".join(package_of(point) for point in points)
    if points and name in own:
        raise kind.error(
            f"{kind.noun} {name!r} is evomerge's own, but the installed package {packages} offers one of that name too",
            remedy="Uninstall the package, or have its entry point renamed.",
        )
    if len(points) > 1:
        raise kind.error(
            f"{kind.noun} {name!r} is offered by more than one installed package: {packages}",
            remedy="Uninstall all but one of them.",
        )


def load(kind: Kind, name: str) -> tuple[Any, Code]:
    """What the entry point called ``name`` stands for, and its code.

    Raises:
        UserError: of the kind's class. No package offers it, or two do, or the package cannot be imported (which
            breaks those who name it, and nobody else).
    """
    point = _point(kind, name)
    return _loadable(kind, point, point.load), code_of(kind, name)


def code_of(kind: Kind, name: str) -> Code:
    """The code behind the entry point called ``name``, none of which runs.

    Raises:
        UserError: of the kind's class. No package offers it, or two do, or the package is not there.
    """
    point = _point(kind, name)
    return Code(package=package_of(point), sha256=_loadable(kind, point, lambda: package_hash(point)))


def _point(kind: Kind, name: str) -> EntryPoint:
    refuse_clash(kind, name, ())
    points = list(entry_points(group=kind.group, name=name))
    if not points:
        raise kind.error(
            f"no installed package offers a {kind.noun} {name!r}", remedy="Install the package that does, or check it."
        )
    return points[0]


def _loadable(kind: Kind, point: EntryPoint, look: Callable[[], Any]) -> Any:
    """What ``look`` returns; what it raises as an error that names the package."""
    try:
        return look()
    except (Exception, SystemExit) as error:
        raise kind.error(
            f"the {kind.noun} {point.name!r} of the installed package {package_of(point)} ({point.value}) cannot be "
            f"loaded: {type(error).__name__}: {error}",
            remedy="Repair, update or uninstall the package.",
        ) from error


def package_hash(point: EntryPoint) -> str:
    """The hash of the code of the package that ``point`` leads into: all of it, since its files import each other."""
    top = point.module.partition(".")[0]
    spec = importlib.util.find_spec(top)
    if spec is None:
        raise ModuleNotFoundError(f"there is no module {top!r}")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = [file for folder in folders for file in sorted(folder.rglob("*")) if file.suffix in CODE]
    if not folders and spec.origin:
        files = [Path(spec.origin)]
    return code_hash(files, folders[0] if folders else Path())
