"""Stages: recipes whose sources are recipes. Read, hashed, built once, and the same numbers as built by hand."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from evomerge.errors import CheckpointError, SpecError
from evomerge.exporting import MANIFEST, export
from evomerge.merging import open_sources, verify_sources
from evomerge.progress import Progress
from evomerge.recipe import Recipe
from evomerge.recipe_reading import MOST_STAGES
from evomerge.stages import built, keep, kept_folder, stages

QUIET = Progress(quiet=True)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EVOMERGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def write(tmp_path: Path):
    def to(name: str, **data) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        return path

    return to


@pytest.fixture
def two_stages(write, dense_family: Path, lora_family: Path) -> Path:
    """A recipe of a stage (a file), of one written out that uses the first again, and of an adapter."""
    family = dense_family
    write(
        "parts/first.yaml", method="ties", base=str(family / "base"), weights=0.7, export_dtype="float16",
        experts={"a": str(family / "expert0"), "b": str(family / "expert1")},
    )  # fmt: skip
    second = {
        "method": "linear", "weights": [0.25, 0.75], "export_dtype": "float32",
        "experts": {"again": {"recipe": "parts/first.yaml"}, "b": str(family / "expert1")},
    }  # fmt: skip
    return write(
        "top.yaml", method="task_arithmetic", base=str(family / "base"), weights=[0.5, -0.3, 1.0],
        experts={"s": "parts/first.yaml", "t": {"recipe": second}, "l": str(lora_family / "expert0")},
    )  # fmt: skip


def by_hand(path: Path, out: Path) -> Path:
    """The stages exported one by one, and merged as folders."""
    data = yaml.safe_load(path.read_text())
    first = export(Recipe.load(path.parent / "parts" / "first.yaml"), out / "first")
    second = {**data["experts"]["t"]["recipe"]}
    second["experts"] = {"again": str(first), "b": second["experts"]["b"]}
    folder = export(Recipe.from_dict(second), out / "second")
    top = {**data, "experts": {**data["experts"], "s": str(first), "t": str(folder)}}
    return export(Recipe.from_dict(top), out / "top")


def test_the_same_bytes_as_built_by_hand(two_stages: Path, cache: Path, tmp_path: Path):
    """A stage is rounded once, to its own type; float16 and float32 stages below a bfloat16 merge."""
    recipe = verify_sources(Recipe.load(two_stages))
    with built(recipe, tmp_path / "deep" / "folder", QUIET) as ready:
        merged = export(ready, tmp_path / "merged")
    expected = by_hand(two_stages, tmp_path / "hand")
    assert (merged / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert not list(tmp_path.glob("*evomerge*"))  # temporary stages are gone
    assert not (cache / "stages").exists()
    again = Recipe.load(merged / "recipe.yaml")
    assert again == recipe
    assert again.hash == recipe.hash == json.loads((merged / MANIFEST).read_text())["recipe"]


def test_each_stage_is_built_once_and_inner_ones_first(two_stages: Path):
    recipe = verify_sources(Recipe.load(two_stages))
    assert [name for name, _ in stages(recipe).values()] == ["s", "t"]
    inner = recipe.experts[1].recipe
    assert inner is not None
    assert [name for name, _ in stages(inner, "t").values()] == ["t/again"]


def test_cards_and_manifests_name_all_sources(two_stages: Path, tmp_path: Path):
    recipe = verify_sources(Recipe.load(two_stages))
    with built(recipe, tmp_path, QUIET) as ready:
        merged = export(ready, tmp_path / "merged")
    listed = json.loads((merged / MANIFEST).read_text())["sources"]
    assert [(s["role"], s["name"]) for s in listed] == [
        ("base", "base"), ("expert", "s"), ("base of s", "base"), ("expert of s", "a"), ("expert of s", "b"),
        ("expert", "t"), ("expert of t", "again"), ("base of again, t", "base"), ("expert of again, t", "a"),
        ("expert of again, t", "b"), ("expert of t", "b"), ("expert", "l"),
    ]  # fmt: skip
    first = recipe.experts[0]
    assert listed[1]["sha256"] == first.sha256 == first.recipe.hash != ""
    card = (merged / "README.md").read_text()
    for source in listed:
        assert f"| {source['role']} | {source['name']}" in card
        assert source["sha256"][:16] in card


def test_round_trips(two_stages: Path, tmp_path: Path):
    """Through plain data and YAML, before and after the content hashes are known."""
    for recipe in (Recipe.load(two_stages), verify_sources(Recipe.load(two_stages))):
        again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
        assert again == recipe
        (tmp_path / "again.yaml").write_text(recipe.to_yaml())
        assert Recipe.load(tmp_path / "again.yaml").hash == recipe.hash == again.hash


def test_the_hash_is_what_a_stage_is_made_of(two_stages: Path, write, dense_family: Path, tmp_path: Path):
    recipe = verify_sources(Recipe.load(two_stages))
    shutil.copytree(dense_family, tmp_path / "moved")
    moved = yaml.safe_load(recipe.to_yaml().replace(str(dense_family), str(tmp_path / "moved")))
    assert Recipe.from_dict(moved).hash == recipe.hash  # places do not count, those of stages neither
    assert replace(recipe, experts=(replace(recipe.experts[0], path="/built"), *recipe.experts[1:])).hash == recipe.hash
    for change in ({"weights": 0.8}, {"seed": 1}, {"export_dtype": "bfloat16"}, {"params": {"density": 0.3}}):
        first = two_stages.parent / "parts" / "first.yaml"
        before = first.read_text()
        first.write_text(yaml.safe_dump({**yaml.safe_load(before), **change}))
        assert verify_sources(Recipe.load(two_stages)).hash != recipe.hash
        first.write_text(before)


def test_a_base_may_be_a_stage(write, dense_family: Path, tmp_path: Path):
    """Zero weights give the stage, rounded once more."""
    family = dense_family
    path = write(
        "top.yaml", method="task_arithmetic", weights=0.0, export_dtype="float16",
        experts={"a": str(family / "expert0")},
        base={"recipe": {"method": "linear", "experts": {"b": str(family / "expert1"), "c": str(family / "base")},
                         "weights": 0.5, "export_dtype": "float32"}},
    )  # fmt: skip
    recipe = verify_sources(Recipe.load(path))
    with built(recipe, tmp_path, QUIET) as ready:
        merged = load_file(export(ready, tmp_path / "merged") / "model.safetensors")
    b, c = (load_file(family / name / "model.safetensors") for name in ("expert1", "base"))
    for name, tensor in merged.items():
        assert (tensor == ((b[name].float() + c[name].float()) / 2).half()).all(), name


# --- refused by name ---------------------------------------------------------------------------------------------


def test_a_circle(write):
    for name, other in (("a.yaml", "b/b.yaml"), ("b/b.yaml", "../c.yaml"), ("c.yaml", "b/b.yaml")):
        write(name, method="linear", experts={"x": other, "y": "somewhere"}, weights=1)
    with pytest.raises(SpecError, match=r"made from itself, but \S*b\.yaml -> \S*c\.yaml -> \S*b\.yaml"):
        Recipe.load(write("a.yaml", method="linear", experts={"x": "b/b.yaml"}, weights=1))


def test_too_deep():
    data: dict = {"method": "linear", "experts": {"x": "x"}, "weights": 1}
    for _ in range(MOST_STAGES):
        data = {"method": "linear", "experts": {"x": {"recipe": data}}, "weights": 1}
    Recipe.from_dict(data)
    with pytest.raises(SpecError, match=f"more than {MOST_STAGES}"):
        Recipe.from_dict({"method": "linear", "experts": {"x": {"recipe": data}}, "weights": 1})


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("none.yaml", ["experts.x", "none.yaml", "no recipe"]),
        ({"recipe": "folder"}, ["experts.x.recipe", "'folder'", ".yaml"]),
        ({"recipe": 3}, ["experts.x.recipe", "3"]),
        ({"recipe": {"method": "linear"}}, ["my.yaml: experts.x.recipe.experts"]),
        ({"recipe": {"method": "linear", "experts": {"y": "y"}, "weights": 1, "wieght": 2}}, ["'wieght'", "weights"]),
        ({"recipe": {"method": "tise", "experts": {"y": "y"}, "weights": 1}}, ["experts.x.recipe.method", "'ties'"]),
        ({"recipe": {"method": "linear", "experts": {"y": "y"}, "weights": 1}, "path": "x"}, ["path and a recipe"]),
    ],
    ids=str,
)
def test_refused(source, words: list[str]):
    with pytest.raises(SpecError) as raised:
        Recipe.from_dict({"method": "linear", "experts": {"x": source}, "weights": 1}, where="my.yaml")
    for word in ("my.yaml", *words):
        assert word in str(raised.value)


def test_a_stage_that_does_not_fit_is_refused_before_anything_is_built(two_stages: Path, moe_family: Path, write):
    write(
        "parts/first.yaml", method="linear", weights=0.5,
        experts={"a": str(moe_family / "expert0"), "b": str(moe_family / "expert1")},
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=r"expert s: .*architecture"):
        open_sources(Recipe.load(two_stages))


def test_a_stage_that_changed(two_stages: Path):
    data = verify_sources(Recipe.load(two_stages)).to_dict()
    data["experts"][0]["recipe"]["groups"][0]["weights"]["a"] = 0.1
    with pytest.raises(CheckpointError, match=r"expert s: .*the recipe was made with"):
        verify_sources(Recipe.from_dict(data))


def test_an_unbuilt_stage_has_no_numbers(two_stages: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="has not been built"):
        export(Recipe.load(two_stages), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stage_that_overflows_leaves_nothing(two_stages: Path, write, cache: Path, tmp_path: Path):
    first = two_stages.parent / "parts" / "first.yaml"
    first.write_text(yaml.safe_dump({**yaml.safe_load(first.read_text()), "weights": 1e6}))
    recipe = verify_sources(Recipe.load(two_stages))
    before = {path.name for path in tmp_path.iterdir()}
    for build in (lambda: keep(recipe, QUIET), lambda: built(recipe, tmp_path, QUIET).__enter__()):
        with pytest.raises(CheckpointError, match=r"stage s: .*not finite in float16"):
            build()
    assert {path.name for path in tmp_path.iterdir()} - before <= {"cache"}
    assert not list(cache.glob("stages/*"))


def test_room_for_all_stages_and_the_result_is_looked_at_first(
    two_stages: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The stages alone would find room."""
    numbers = sum(
        t.numel() for t in load_file(yaml.safe_load(two_stages.read_text())["base"] + "/model.safetensors").values()
    )
    recipe = verify_sources(Recipe.load(two_stages))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=8 * numbers - 1))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match="GB left"), built(recipe, tmp_path, QUIET, more=2 * numbers):
        raise AssertionError("built")
    assert sorted(tmp_path.rglob("*")) == before
    with built(recipe, tmp_path, QUIET):  # float16 and float32: 6 bytes a number
        pass


def test_what_a_killed_merge_left_is_removed_by_the_next(two_stages: Path, tmp_path: Path):
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from evomerge.merging import verify_sources; from evomerge.stages import *\n"
        "with built(verify_sources(Recipe.load(sys.argv[1])), Path(sys.argv[2]), Progress(quiet=True)):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    out = tmp_path / "out"
    out.mkdir()
    done = subprocess.run([sys.executable, "-c", script, two_stages, out], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(out.glob("*/*/model.safetensors"))) == 2
    with built(verify_sources(Recipe.load(two_stages)), out, QUIET):
        assert len(list(out.glob("*/*/model.safetensors"))) == 2
    assert not list(out.iterdir())


def test_a_folder_that_cannot_be_written_is_named(two_stages: Path):
    recipe = verify_sources(Recipe.load(two_stages))
    with pytest.raises(CheckpointError, match="cannot be written to /proc"), built(recipe, Path("/proc"), QUIET):
        raise AssertionError("built")


# --- kept for studies ----------------------------------------------------------------------------------------------


def test_kept_stages_are_built_once_and_again_when_damaged(two_stages: Path, cache: Path, tmp_path: Path):
    recipe = verify_sources(Recipe.load(two_stages))
    ready = keep(recipe, QUIET)
    first, second = (kept_folder(h) for h in stages(recipe))
    assert [ready.experts[0].path, ready.experts[1].path] == [str(first), str(second)]
    weights = first / "model.safetensors"
    content, written = weights.read_bytes(), weights.stat().st_mtime_ns
    keep(recipe, QUIET)
    with built(recipe, tmp_path / "unused", QUIET) as found:  # a merge takes what a study has kept
        assert found == ready
    assert weights.stat().st_mtime_ns == written
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    keep(recipe, QUIET)
    assert weights.read_bytes() == content
    shutil.rmtree(first)
    keep(recipe, QUIET)
    assert weights.read_bytes() == content
