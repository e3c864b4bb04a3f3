"""`evomerge init`: what it writes runs at once, and from a plain installation of the wheel."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml

from .support import Server, files, json_of

ROOT = Path(__file__).parents[2]


def test_a_new_folder_runs_at_once(server: Server, tmp_path: Path):
    run = server.run("init", "my search!", cwd=tmp_path)
    folder = tmp_path / "my search!"
    assert "evomerge run experiment.yaml" in run.out
    assert yaml.safe_load((folder / "experiment.yaml").read_text())["name"] == "my-search"
    server.run("run", "experiment.yaml", "--budget", "6", cwd=folder)
    board = json_of(server.run("leaderboard", "experiment.yaml", "--format", "json", cwd=folder))
    score = {row["subject"]: {task: s["value"] for task, s in row["tasks"].items()} for row in board["test"]}
    base = score["control:base"]
    for expert, other in (("count", "letters"), ("letters", "count")):  # there is something to trade off
        own = score[f"control:expert:{expert}"]
        assert own[expert] > base[expert] + 0.5 and own[other] < base[other]


def test_nothing_is_overwritten(server: Server, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    before = files(tmp_path)
    assert "not empty" in server.run("init", "mine", cwd=tmp_path, code=2).err
    assert files(tmp_path) == before


@pytest.mark.slow
def test_from_the_wheel_outside_the_checkout(tmp_path: Path):
    """The wheel alone in a new environment, which borrows this one's dependencies (but not its evomerge)."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path / "dist", ROOT], check=True, timeout=300)
    (wheel,) = (tmp_path / "dist").glob("evomerge-*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, *pip[1:], "install", "--no-deps", "--no-index", wheel], check=True, timeout=300)
    packages = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    # A path from a .pth file is searched last, and its own .pth files (this checkout's evomerge) are not read.
    (Path(packages) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    where = subprocess.run(
        [python, "-c", "import evomerge; print(evomerge.__file__)"],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    ).stdout
    assert str(tmp_path) in where
    command = tmp_path / "venv" / "bin" / "evomerge"
    subprocess.run([command, "init", "x"], check=True, cwd=tmp_path, timeout=300)
    subprocess.run([command, "run", "experiment.yaml", "--budget", "4"], check=True, cwd=tmp_path / "x", timeout=300)
    text = (tmp_path / "x" / "experiment.yaml").read_text()
    data = yaml.safe_load(text)
    (tmp_path / "x" / "other.yaml").write_text(
        yaml.safe_dump({**data, "name": "shipped", "space": "search_spaces/layer.yaml"})
    )
    run = [command, "run", "--dry-run", "other.yaml"]
    shown = subprocess.run(run, check=True, cwd=tmp_path / "x", capture_output=True, text=True, timeout=300).stdout
    assert "8 dimensions" in shown  # 4 layers x 2 experts, by a space from inside the wheel
