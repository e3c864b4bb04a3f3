"""A study that a real run left behind, for all tests that only read it or go on from a copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from evomerge.testing import tiny

from .support import Run, Server, evomerge


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Command lines in processes of their own that start at once."""
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def finished(lora_family: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """A finished study of 8 candidates: the path of its experiment file, and what the run printed. Do not change it."""
    folder = tmp_path_factory.mktemp("finished") / "experiment"
    shutil.copytree(lora_family, folder)
    path = tiny.write_experiment(
        folder,
        search={"method": "cma", "budget": 8, "population": 4},
        evaluate={
            "with": "my_eval.py@score",
            "tasks": {"one": {}, "two": {"weight": 2}},
            "split": {"search": 8, "select": 12, "test": 16},
            "finish": {"top": 3},
        },
    )
    return path, evomerge("run", path)


@pytest.fixture
def finished_copy(finished: tuple[Path, Run], tmp_path: Path) -> Path:
    """The experiment file of a copy of ``finished`` that a test may change."""
    shutil.copytree(finished[0].parent, tmp_path / "copy")
    return tmp_path / "copy" / "experiment.yaml"


@pytest.fixture
def many(lora_family: Path, tmp_path: Path) -> Callable[..., Path]:
    """``many(**keys)`` writes one more experiment each time it is called, in a folder of its own."""
    count = iter(range(1000))

    def make(**keys) -> Path:
        folder = tmp_path / f"experiment{next(count)}"
        shutil.copytree(lora_family, folder)
        return tiny.write_experiment(folder, **keys)

    return make
