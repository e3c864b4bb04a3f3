"""What a plain `pip install evomerge` brings is enough for everything that evomerge imports."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Imported by name for a user who has installed an extra, and refused with that extra's name otherwise.
EXTRAS = {"psycopg": "postgres", "optuna_dashboard": "dashboard", "numba": "fast", "llvmlite": "fast"}
PARTS = {"tokenizers", "pydantic_core"}  # of transformers and pydantic, in the one version that fits
SUITES = {"pytest", "hypothesis"}  # whoever inherits a contract suite of evomerge.testing has them


def imported(file: Path) -> Iterator[tuple[str, int]]:
    """(top-level module, line) of every import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0], node.lineno


def distributions(requirements: list[str]) -> set[str]:
    names = (re.match(r"[\w.-]+", requirement) for requirement in requirements)
    return {re.sub(r"[-_.]+", "-", name.group()).lower() for name in names if name}


@pytest.mark.parametrize("folder", ["evomerge", "evaluators"])
def test_every_import_is_a_dependency(folder: str):
    declared = distributions(PROJECT["dependencies"])
    owners = importlib.metadata.packages_distributions()
    missing = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        for module, line in imported(file):
            known = {"evomerge", *EXTRAS, *PARTS, *(SUITES if file.parent.name == "testing" else ())}
            if module in sys.stdlib_module_names or module in known:
                continue
            own = {re.sub(r"[-_.]+", "-", name).lower() for name in owners.get(module, [])}
            if not own & declared:
                missing.append(f"{file.relative_to(ROOT)}:{line} imports {module}")
    assert missing == []


def test_every_dependency_is_pinned_for_development():
    pins = distributions((ROOT / "constraints.txt").read_text().splitlines())
    assert distributions(PROJECT["dependencies"]) - pins == set()
