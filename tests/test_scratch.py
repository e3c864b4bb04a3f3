"""Folders that live for one evaluation, and candidates written into them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from evomerge.errors import CandidateError, ResourceError
from evomerge.evaluation import EvaluatorContext, Item, Target, TaskSpec, load_evaluator
from evomerge.exporting import MANIFEST, export
from evomerge.merging import Merger, open_sources, written_bytes
from evomerge.progress import size
from evomerge.recipe import Group, Recipe, Source
from evomerge.scratch import check_scratch, remove_stale, scratch_folder, written
from evomerge.testing import engines
from evomerge.testing.pools import wait_for_file


@pytest.fixture
def recipe(lora_family: Path) -> Recipe:
    return Recipe(
        base=Source("base", str(lora_family / "base")),
        experts=tuple(Source(f"skill{t}", str(lora_family / f"expert{t}")) for t in range(2)),
        method="task_arithmetic",
        groups=(Group((0.4, 0.7)),),
    )


def merge_of(recipe: Recipe) -> tuple[Merger, Recipe]:
    return Merger(open_sources(recipe)), recipe


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_what_is_scored_is_what_is_exported_byte_for_byte(recipe: Recipe, tmp_path: Path):
    export(recipe, tmp_path / "export")
    exported = content(tmp_path / "export")
    del exported[MANIFEST]
    with written(*merge_of(recipe), str(tmp_path / "scratch")) as target:
        assert target.model is None
        assert target.checkpoint is not None
        assert target.scratch is not None
        assert content(target.checkpoint) == exported
        assert list(target.scratch.iterdir()) == []
        (target.scratch / "cache").write_text("an engine's own")
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_folder_is_removed_however_its_block_ends(tmp_path: Path):
    with pytest.raises(RuntimeError), scratch_folder(str(tmp_path)) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


HOLDER = """
import sys, time
from pathlib import Path
from evomerge.scratch import scratch_folder
with scratch_folder(sys.argv[1]) as folder:
    (folder / "file").write_text("x")
    Path(sys.argv[2]).write_text(str(folder))
    time.sleep(600)
"""


def test_the_folder_of_a_killed_process_is_removed_by_the_next_and_no_others(tmp_path: Path):
    place, said = tmp_path / "scratch", tmp_path / "said"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(place), str(said)])
    try:
        folder = Path(wait_for_file(said))
        stranger = place / "evomerge-another-machine-abc"
        stranger.mkdir()
        stranger.with_suffix(".lock").touch()
        with scratch_folder(str(place)) as ours:
            assert remove_stale(str(place)) == 0
            assert (folder / "file").exists()
            holder.kill()
            holder.wait()
            assert remove_stale(str(place)) == 1
            assert ours.exists()
            assert not folder.exists()
    finally:
        holder.kill()
        holder.wait()
    assert sorted(p.name for p in place.iterdir()) == [stranger.name, f"{stranger.name}.lock"]


def test_links_in_a_scratch_folder_are_not_followed(tmp_path: Path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    with scratch_folder(str(tmp_path / "scratch")) as folder:
        (folder / "link").symlink_to(tmp_path / "precious")
    assert (tmp_path / "precious" / "file").exists()


def test_merges_that_are_not_finite_are_failures_of_their_own_kind(recipe: Recipe, tmp_path: Path):
    huge = replace(recipe, export_dtype="float16", groups=(Group((1e9, 1e9)),))
    with pytest.raises(CandidateError, match="not finite") as caught, written(*merge_of(huge), str(tmp_path)):
        pass
    assert caught.value.kind == "nan"
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_refused_with_the_numbers(tmp_path: Path):
    free = shutil.disk_usage(tmp_path).free
    check_scratch(str(tmp_path), free // 2)
    with pytest.raises(ResourceError, match=rf"{size(2 * free)} \(2 workers write {size(free)} each\), but {tmp_path}"):
        check_scratch(str(tmp_path / "new" / "folder"), 2 * free, workers=2)
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="not a folder that can be written"):
        check_scratch(str(tmp_path / "file"), 0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 100 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_a_failure_that_says_so_and_leaves_nothing(recipe: Recipe, small_disk: Path):
    whole = replace(recipe, export_dtype="float32")
    needed = written_bytes(open_sources(whole), "float32")
    assert needed > 100_000
    reason = rf"its disk is full; it needs {size(needed)}, and {small_disk} has {size(100 * 1024)} left"
    with pytest.raises(CandidateError, match=reason) as caught, written(*merge_of(whole), str(small_disk)):
        pass
    assert caught.value.kind == "error"
    assert list(small_disk.iterdir()) == []


def test_no_room_for_what_a_program_reads_is_a_failure_that_says_where(lora_family: Path, small_disk: Path):
    engines.write(small_disk)
    context = EvaluatorContext(small_disk, {"one": TaskSpec("one")})
    evaluator = load_evaluator("engine_eval.py", context)
    items = [Item("x", "one", "long " * 100_000)]
    evaluator.prepare(None, items)
    target = Target(checkpoint=lora_family / "base", scratch=small_disk)
    with pytest.raises(CandidateError, match=rf"items could not be written to {small_disk}: .*No space left"):
        evaluator.evaluate(target, ["x"])


def test_a_process_that_ends_by_a_signal_leaves_no_lock(tmp_path: Path):
    """The kernel lets go of it, whatever the process was doing."""
    said = tmp_path / "said"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "scratch"), str(said)])
    wait_for_file(said)
    os.kill(holder.pid, signal.SIGTERM)
    holder.wait()
    assert remove_stale(str(tmp_path / "scratch")) == 1
