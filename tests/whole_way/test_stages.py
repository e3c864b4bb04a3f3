"""An experiment whose expert is a recipe, and a merge with stages, by the command line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from .support import Server, files

STAGE = {"method": "linear", "weights": 0.5, "experts": {"a": "expert0", "b": "other"}, "export_dtype": "float16"}


@pytest.mark.slow
def test_a_study_of_a_stage(server: Server, experiment: Callable[..., Path], dense_family: Path, tmp_path: Path):
    path = experiment(
        dense_family, search={"method": "random", "budget": 3}, experts={"first": "expert1", "mix": "stage.yaml"},
        evaluate={"with": "my_eval.py@score", "tasks": {"one": {}}, "split": {"search": 4, "select": 4, "test": 4}},
    )  # fmt: skip
    folder, cache = path.parent, tmp_path / "cache"
    shutil.copytree(dense_family / "expert1", folder / "other")
    (folder / "stage.yaml").write_text(yaml.safe_dump(STAGE))
    here = {"cwd": folder, "EVOMERGE_CACHE": str(cache)}

    shown = server.run("run", "--dry-run", "experiment.yaml", **here).out
    assert "stage        mix: 2 experts by linear; will be built" in shown
    assert not (cache / "stages").exists()
    server.run("run", "experiment.yaml", **here)
    (kept,) = (cache / "stages").iterdir()

    server.run("export", "experiment.yaml", "--out", "merged", **here)
    assert yaml.safe_load((folder / "merged" / "recipe.yaml").read_text())["experts"][1]["sha256"] == kept.name
    again = server.run("evaluate", "merged", "experiment.yaml", "--split", "test", "--compare", **here)
    assert "identical" in again.out
    again = server.run("evaluate", "merged/recipe.yaml", "experiment.yaml", "--split", "test", "--compare", **here)
    assert "identical" in again.out

    shutil.rmtree(cache)  # the recipe says all: it can be repeated without what the study kept
    server.run("merge", "merged/recipe.yaml", "--out", "repeated", **here)
    for file in files(folder / "merged") - {"README.md", "evomerge_manifest.json"}:  # the card knows the study
        assert (folder / "merged" / file).read_bytes() == (folder / "repeated" / file).read_bytes(), file
    assert not list(folder.glob("evomerge-*"))
    server.run("resume", "experiment.yaml", "--budget", "4", **here)
    assert [path.name for path in (cache / "stages").iterdir()] == [kept.name]

    (folder / "stage.yaml").write_text(yaml.safe_dump({**STAGE, "weights": [0.5, 0.25]}))
    assert "expert mix: was" in server.run("resume", "experiment.yaml", code=2, **here).err
    (folder / "stage.yaml").write_text(yaml.safe_dump({**STAGE, "experts": {"a": "expert0", "b": "stage.yaml"}}))
    assert "made from itself" in server.run("run", "--dry-run", "experiment.yaml", code=2, **here).err
