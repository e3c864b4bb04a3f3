"""`evomerge init`: what it writes runs at once, and from a plain installation of the wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from .support import Server, files, json_of

ROOT = Path(__file__).parents[2]


def test_a_new_folder_runs_at_once(server: Server, tmp_path: Path):
    run = server.run("init", "my search!", cwd=tmp_path)
    folder = tmp_path / "my search!"
    assert "evomerge run experiment.yaml" in run.out
    text = (folder / "experiment.yaml").read_text()
    assert yaml.safe_load(text)["name"] == "my-search"
    assert max(map(len, text.splitlines())) <= 120
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
    elsewhere = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*command: str | Path, cwd: Path = tmp_path) -> str:
        return subprocess.run(
            command, check=True, cwd=cwd, env=elsewhere, stdout=subprocess.PIPE, text=True, timeout=300
        ).stdout

    pip = ("-m", "pip", "--disable-pip-version-check", "-q")
    run(sys.executable, *pip, "wheel", "--no-deps", "-w", tmp_path / "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("evomerge-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = archive.namelist()
    assert {name.split("/")[0] for name in held} == {"evomerge", f"{wheel.name.split('-py3')[0]}.dist-info"}
    assert {name.split("/")[2] for name in held if "/_data/" in name} == {"search_spaces", "evaluators", "experiments"}
    assert not [n for n in held if n.endswith((".pyc", ".db")) or "/output/" in n or "/cache/" in n or "/tests/" in n]

    venv.create(tmp_path / "venv", with_pip=True)
    python, command = (tmp_path / "venv" / "bin" / name for name in ("python", "evomerge"))
    run(python, *pip, "install", "--no-deps", "--no-index", wheel)
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # A path from a .pth file is searched last, and its own .pth files (this checkout's evomerge) are not read.
    (Path(packages) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert str(tmp_path) in run(python, "-c", "import evomerge; print(evomerge.__file__)")

    run(command, "init", "x")
    folder = tmp_path / "x"
    run(command, "run", "experiment.yaml", "--budget", "4", cwd=folder)
    data = yaml.safe_load((folder / "experiment.yaml").read_text())

    def plan(name: str, **keys) -> str:
        """What a dry run says of the experiment with other keys."""
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**data, "name": name, **keys}))
        return run(command, "run", "--dry-run", f"{name}.yaml", cwd=folder)

    assert "8 dimensions" in plan("layers", space="search_spaces/layer.yaml")  # 4 layers x 2 experts
    (folder / "texts.txt").write_text("\n\n".join(f"{i} {i + 1} {i + 2}" for i in range(40)))
    texts = {"with": "evaluators/perplexity.py", "tasks": {"count": {"file": "texts.txt"}}}
    assert "10 items" in plan("texts", evaluate={**texts, "split": {"search": 10, "select": 10, "test": 10}})
    for argument, words in (("schema", '"$schema"'), ("methods", "task_arithmetic"), ("--version", "evomerge ")):
        assert words in run(command, argument)
