"""A user's Python files: run under a private name, errors that name the line, hashed with what they import."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from evomerge.errors import EvaluatorError, UserError

_loads = itertools.count()


def load_module(path: Path) -> ModuleType:
    """Run a Python file as a module of its own, under a private name, with its folder importable while it runs.

    Raises:
        EvaluatorError: there is no such file, it is not Python, or it raises (with the line).
    """
    if not path.is_file():
        raise EvaluatorError("there is no such evaluator file", where=str(path))
    private = f"_evomerge_evaluator_{next(_loads)}_{re.sub(r'[^0-9a-zA-Z_]', '_', path.stem)}"
    spec = importlib.util.spec_from_file_location(private, path)
    if spec is None or spec.loader is None:
        raise EvaluatorError(
            "an evaluator must be a Python file", where=str(path), remedy="Name a file that ends in .py."
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[private] = module  # dataclasses and pickle look a class's module up there
    sys.path.insert(0, str(path.parent))
    try:
        loader = spec.loader
        run_user_code(lambda: loader.exec_module(module), path)
    except BaseException:
        del sys.modules[private]
        raise
    finally:
        sys.path.remove(str(path.parent))
    return module


def run_user_code(function: Callable[[], Any], path: Path) -> Any:
    """What ``function`` returns; what it raises as an EvaluatorError that names the line of ``path``."""
    try:
        return function()
    except UserError:
        raise
    except Exception as error:
        raise EvaluatorError(explain(error, path), where=str(path)) from error


def explain(error: Exception, path: Path) -> str:
    """One line for ``error``, with the last line of ``path`` that it went through."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {type(error).__name__}: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    place = f"{path.name}, line {lines[-1]}: " if lines else ""
    return f"{place}{type(error).__name__}: {error}"


def code_files(path: Path) -> list[Path]:
    """``path`` and the Python files beside it that it imports, directly or through each other."""
    found: dict[Path, None] = {}
    todo = [path]
    while todo:
        file = todo.pop()
        found[file] = None
        for name in re.findall(r"^\s*(?:from|import)\s+([A-Za-z_]\w*)", file.read_text(errors="replace"), re.MULTILINE):
            beside = path.parent / f"{name}.py"
            if beside.is_file() and beside not in found:
                todo.append(beside)
    return list(found)


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
