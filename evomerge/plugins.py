"""A user's Python files: run under a private name, errors that name the line, hashed with what they import."""

from __future__ import annotations

import ast
import hashlib
import importlib.machinery
import importlib.util
import itertools
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from evomerge.errors import EvaluatorError, EvomergeError, MethodError, SpecError, UserError, nearest

_loads = itertools.count()


@dataclass(frozen=True)
class Kind:
    """What a plug-in can be: what errors call it, and which error they are."""

    noun: str
    error: type[UserError]
    plural: str

    @property
    def group(self) -> str:
        """The group of entry points by which an installed package offers such plug-ins."""
        return f"evomerge.{self.plural}"


METHOD = Kind("method", MethodError, "methods")
SEARCHER = Kind("searcher", SpecError, "searchers")
EVALUATOR = Kind("evaluator", EvaluatorError, "evaluators")
LOSS = Kind("loss", SpecError, "losses")


@dataclass(frozen=True)
class Code:
    """The code of a plug-in: the file it stands in, or the package that brought it, and the hash of what that says.

    Args:
        path: of the file, absolute.
        package: name and version of an installed package.
        sha256: of the code (see ``code_hash``); empty where nobody has looked yet.
    """

    path: str = ""
    package: str = ""
    sha256: str = ""

    def to_dict(self) -> dict[str, str]:
        place = {"path": self.path} if self.path else {"package": self.package}
        return {**place, "sha256": self.sha256}


def names_file(reference: str) -> bool:
    """Is ``reference`` a plug-in by path (``file.py``, ``file.py@name``), not by name?"""
    return split_reference(reference)[0].endswith(".py")


def split_reference(reference: str) -> tuple[str, str]:
    """(file, name in it, empty for its only one) of ``file.py`` or ``file.py@name``."""
    file, _, name = reference.rpartition("@")
    return (file, name) if file else (name, "")


def find_file(reference: str, folder: Path, kind: Kind) -> Path:
    """The absolute path of the file that ``reference`` names, relative to ``folder``; an error of the kind's class."""
    file, _ = split_reference(reference)
    path = (folder / Path(file).expanduser()).resolve()
    if not path.is_file():
        raise kind.error(f"there is no file {file!r} ({path})", remedy="Check the path.")
    return path


class _FromSource(importlib.machinery.SourceFileLoader):
    """Runs what the file says now. Compiled files go by size and second, so that one of them may say something else."""

    def get_code(self, fullname: str) -> Any:
        return self.source_to_code(self.get_data(self.path), self.path)


def load_module(path: Path, kind: Kind = EVALUATOR) -> ModuleType:
    """Run a Python file as a module of its own, under a private name, with its folder importable while it runs.

    Raises:
        UserError: of the kind's class. There is no such file, it is not Python, or it raises (with the line).
    """
    if not path.is_file():
        raise kind.error(f"there is no such {kind.noun} file", where=str(path))
    if path.suffix != ".py":
        raise kind.error(
            f"{kind.plural} stand in Python files", where=str(path), remedy="Name a file that ends in .py."
        )
    private = f"_evomerge_{kind.noun}_{next(_loads)}_{re.sub(r'[^0-9a-zA-Z_]', '_', path.stem)}"
    loader = _FromSource(private, str(path))
    spec = importlib.util.spec_from_file_location(private, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[private] = module  # dataclasses and pickle look a class's module up there
    sys.path.insert(0, str(path.parent))
    try:
        run_user_code(lambda: loader.exec_module(module), path, kind)
    except BaseException:
        del sys.modules[private]
        raise
    finally:
        sys.path.remove(str(path.parent))
    return module


def pick(module: ModuleType, name: str, fits: Callable[[Any], bool], path: Path, kind: Kind, what: str) -> Any:
    """What ``file.py@name`` names in its module: a variable, or a plug-in that calls itself so; without a name the only
    plug-in that the file defines.

    Args:
        fits: whether something is a plug-in of this kind.
        what: a plug-in is, for errors: "a Searcher class".
    """
    here = {key: value for key, value in vars(module).items() if fits(value)}
    own = {k: v for k, v in here.items() if getattr(v, "__module__", None) == module.__name__}
    if not name:
        if len(own) != 1:
            raise kind.error(
                f"a file named without @ must define exactly one {kind.noun}, but defines {len(own)}",
                where=str(path),
                remedy=f"Write {path.name}@NAME with one of {', '.join(own)}." if own else f"Define {what} in it.",
            )
        return next(iter(own.values()))
    if name in here:
        return here[name]
    called = [value for value in own.values() if getattr(value, "name", None) == name]
    if len(called) == 1:
        return called[0]
    problem = f"{name!r} is not {what}" if hasattr(module, name) else f"{name!r} is not there"
    raise kind.error(problem, where=str(path), remedy=nearest(name, own) if own else f"Define {what} in it.")


def run_user_code(
    function: Callable[[], Any],
    path: Path,
    kind: Kind = EVALUATOR,
    passing: tuple[type[EvomergeError], ...] = (UserError,),
) -> Any:
    """What ``function`` returns; what it raises as an error of the kind's class that names the line of ``path``.

    Args:
        passing: what is no fault of that code, and raised as it is.
    """
    try:
        return function()
    except passing:
        raise
    except (Exception, SystemExit) as error:
        raise kind.error(explain(error, path), where=str(path)) from error


def explain(error: BaseException, path: Path) -> str:
    """One line for ``error``, with the last line of ``path`` that it went through."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {type(error).__name__}: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    place = f"{path.name}, line {lines[-1]}: " if lines else ""
    return f"{place}{type(error).__name__}: {error}"


def code_files(path: Path) -> list[Path]:
    """``path`` and the Python files and packages beside it that it imports, directly or through each other."""
    found: dict[Path, None] = {}
    todo = [path]
    while todo:
        file = todo.pop()
        found[file] = None
        for name in _imported(file):
            beside = path.parent / name
            files = sorted(beside.rglob("*.py")) if (beside / "__init__.py").is_file() else [beside.with_suffix(".py")]
            todo += [file for file in files if file.is_file() and file not in found]
    return list(found)


def _imported(file: Path) -> list[str]:
    """The top-level names that a file imports; none if it is not Python (running it tells)."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return []
    names: dict[str, None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= dict.fromkeys(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names[node.module.partition(".")[0]] = None
    return list(names)


def hash_files(files: Iterable[Path], folder: Path) -> dict[str, str]:
    """SHA-256 of each file, by its path from ``folder`` if it lies below, else by its own and its folder's name."""
    hashes = {}
    for file in files:
        below = file.is_relative_to(folder)
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        name = file.relative_to(folder).as_posix() if below else f"{file.parent.name}/{file.name}"
        hashes[name if name not in hashes else file.as_posix()] = digest
    return hashes


def code_hash(files: Iterable[Path], folder: Path) -> str:
    """SHA-256 of code: of the one file, or of the sorted lines ``hash  name`` of several, names from ``folder``."""
    hashes = hash_files(files, folder)
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    lines = sorted(f"{digest}  {name}\n" for name, digest in hashes.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()
