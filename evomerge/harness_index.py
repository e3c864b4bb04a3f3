"""Where lm-eval's tasks are: found by name in an experiment's folders and among those that lm-eval ships."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.util
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.errors import EvaluatorError
from evomerge.plugins import code_files


class TaskFinder:
    """Finds tasks by name: in an experiment's include_path (from its ``folder``), then among lm-eval's own."""

    def __init__(self, include_path: str | Sequence[str], folder: Path):
        from lm_eval.tasks import TaskManager

        self.folder = folder
        self.paths = [folder / path for path in ([include_path] if isinstance(include_path, str) else include_path)]
        for path in self.paths:
            if not path.is_dir():
                raise EvaluatorError(f"{path} is not a folder", where="evaluate.include_path")
        self.manager = TaskManager(include_path=list(self.paths), include_defaults=False)

    def find(self, name: str, where: str) -> tuple[Any, Path]:
        """The lm-eval task and the YAML file it is from.

        Raises:
            EvaluatorError: there is no such task, it is a group, or its YAML or data cannot be loaded.
        """
        from lm_eval.tasks._yaml_loader import load_yaml

        known = self.manager.task_index
        if name in known:
            path = known[name].yaml_path
        elif name.endswith((".yaml", ".yml")):
            path = self.folder / name
            if not path.is_file():
                raise EvaluatorError(f"there is no file {path}", where=where)
        else:
            path = _shipped_tasks().get(name)
        if path is None:
            raise EvaluatorError(f"there is no lm-eval task {name!r}", where=where, remedy=self._remedy(name, known))
        try:
            config = load_yaml(path, resolve_func=False)
            if "group" in config:
                members = [m if isinstance(m, str) else str(m.get("task")) for m in config.get("task") or []]
                remedy = f"Name tasks of it, one by one: {', '.join(members)}."
                raise EvaluatorError(f"{name!r} is a group of tasks", where=where, remedy=remedy)
            (task,) = self.manager.load(str(path))["tasks"].values()
        except EvaluatorError:
            raise
        except Exception as error:
            raise EvaluatorError(
                f"lm-eval could not load {name!r}: {type(error).__name__}: {error}",
                where=str(path),
                remedy="Are its data here? A data set of a hub that is out of reach must be in the local cache.",
            ) from error
        return task, path

    def _remedy(self, name: str, known: Mapping[str, Any]) -> str:
        from lm_eval.tasks._yaml_loader import load_yaml

        broken = []
        for file in (file for path in self.paths for file in sorted(path.glob("**/*.yaml"))):
            try:
                load_yaml(file, resolve_func=False)
            except Exception as error:
                broken.append(f"{file} cannot be read: {error}")
        close = difflib.get_close_matches(name, [*known, *_shipped_tasks()], n=3)
        hint = f"Did you mean {' or '.join(close)}? " if close else ""
        local = f"In include_path: {', '.join(sorted(known)) or 'none'}."
        return "\n  ".join([hint + local, *broken])


@functools.cache
def _shipped_tasks() -> dict[str, Path]:
    """lm-eval's own tasks and groups by name: a text search, 15 times faster than lm-eval's index of them."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None and spec.origin is not None
    line = re.compile(r"""^["']?(?:task|group)["']?:[ \t]*["']?([^\s"'#]+)["']?[ \t]*(?:#.*)?$""", re.MULTILINE)
    found: dict[str, Path] = {}
    for path in sorted(Path(spec.origin).parent.glob("tasks/**/*.yaml")):
        for name in line.findall(path.read_text(encoding="utf-8", errors="replace")):
            found.setdefault(name, path)
    return found


def task_files(path: Path) -> list[Path]:
    """A task's YAML, what it includes, and the Python files beside it that it names or that those import."""
    found: dict[Path, None] = {}
    todo = [path]
    while todo:
        file = todo.pop()
        if file in found or not file.is_file():
            continue
        found[file] = None
        if file.suffix == ".py":
            todo += code_files(file)
        elif file.suffix in (".yaml", ".yml", ""):
            text = file.read_text(encoding="utf-8", errors="replace")
            todo += [file.parent / f"{m.replace('.', '/')}.py" for m in re.findall(r"!function\s+([\w.]+)\.\w+", text)]
            included = re.findall(r"^include:\s*(.+)$", text, re.MULTILINE)
            todo += [file.parent / name for line in included for name in re.findall(r"[^\s\[\],\"']+", line)]
    return list(found)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without lm-eval's warnings about its own defaults and the progress bars of data sets."""
    import datasets

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
