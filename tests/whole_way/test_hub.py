"""A search on models of a hub: what a study recorded stays what it works on, whatever happens to the branch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import serve

from evomerge.recipe import Recipe
from evomerge.testing import tiny

from .support import Server, candidates, evomerge, store


@pytest.mark.slow
def test_a_study_keeps_to_its_commits(
    server: Server, experiment: Callable[..., Path], lora_family: Path, tmp_path: Path
):
    """The branch moves after the start; a machine with an empty cache resumes, exports and repeats the export."""
    settings = {
        "base": "org/base",
        "experts": {"expert0": "org/first@v1", "expert1": "expert1"},
        "search": {"method": "random", "budget": 2},
    }
    path = experiment(**settings)
    plain = experiment(
        folder="plain", **{**settings, "base": "base", "experts": {"expert0": "expert0", "expert1": "expert1"}}
    )
    for folder in ("base", "expert0"):
        shutil.rmtree(path.parent / folder)
    server.run("run", plain, "--budget", "4")
    with serve(tmp_path / "published") as hub:
        commit = hub.publish("org/base", lora_family / "base")
        first = hub.publish("org/first", lora_family / "expert0", branch="v1")
        here = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "here")}
        there = {**here, "HF_HOME": str(tmp_path / "there")}
        evomerge("run", path, **here)
        other = tiny.save_model(tmp_path / "other", tiny.llama_config(), seed=9)
        hub.publish("org/base", other)
        evomerge("resume", path, "--budget", "4", **there)
        trials = [row for row in candidates(path) if isinstance(row[0], int)]
        assert trials == [row for row in candidates(plain) if isinstance(row[0], int)]
        assert len(trials) == 4
        assert store(path).record["worker"]["base"]["path"] == f"org/base@{commit}"
        out = tmp_path / "out"
        evomerge("export", path, "--trial", "3", "--out", out, **there)
        # a changed experiment is another matter: the branch is asked again, and the content has changed
        data = json.loads(path.read_text())
        path.write_text(json.dumps({**data, "base": "org/base@main"}))
        refused = evomerge("resume", path, code=2, **there)
        assert "base: was" in refused.err
    card, recipe = (out / "README.md").read_text(), Recipe.load(out / "recipe.yaml")
    assert [s.path for s in (recipe.base, recipe.experts[0])] == [f"org/base@{commit}", f"org/first@{first}"]
    assert f"org/first@{first}" in card
    evomerge("merge", out / "recipe.yaml", "--out", tmp_path / "again", **{**there, "HF_HUB_OFFLINE": "1"})
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (out / weights).read_bytes()
