"""docs/extending.md as its reader would use it: the suites, an experiment with all three plug-ins, a package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evomerge import Predictions
from evomerge.losses import find as find_loss

from .support import Server, candidates, evomerge

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
BLOCKS = {
    name: f"# {name}\n{code}"
    for name, code in re.findall(r"^```(?:python|yaml)\n# (\S+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
}


def write_blocks(folder: Path) -> Path:
    for name, text in BLOCKS.items():
        (folder / name).write_text(text)
    return folder / "experiment.yaml"


@pytest.fixture
def documented(lora_family: Path, tmp_path: Path) -> Path:
    """The document's experiment file, with its plug-ins and a tiny family beside it."""
    shutil.copytree(lora_family, tmp_path / "mine")
    return write_blocks(tmp_path / "mine")


def edit(file: Path, before: str, after: str) -> None:
    text = file.read_text()
    assert text.count(before) == 1
    file.write_text(text.replace(before, after))


def test_each_is_under_40_lines():
    plugins = {"my_methods.py", "my_search.py", "my_descent.py", "my_eval.py", "my_losses.py"}
    assert set(BLOCKS) == {"experiment.yaml", *plugins, "test_plugins.py"}
    assert all(len(text.splitlines()) < 40 for text in BLOCKS.values())


def test_the_plug_ins_hold_their_contracts(tmp_path: Path):
    write_blocks(tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_plugins.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    passed = int(re.search(r"(\d+) passed", run.stdout)[1])  # type: ignore[index]
    assert passed > 70
    assert "failed" not in run.stdout and "error" not in run.stdout


def test_the_loss_is_one(tmp_path: Path):
    write_blocks(tmp_path)
    loss = find_loss("my_losses.py@brier", tmp_path).loss
    assert loss.needs("answers") == {"answers", "labels"}
    even = Predictions(torch.zeros(1, 2), torch.ones(1), torch.tensor([1]))
    assert loss.of(even, None).item() == 0.5  # 0.5 squared, twice


def test_an_experiment_with_all_three(server: Server, documented: Path, tmp_path: Path):
    folder = documented.parent
    shown = server.run("methods", "my_methods.py@median", cwd=folder).out
    assert "scale       a number" in shown and str(folder / "my_methods.py") in shown
    dry = server.run("run", "--dry-run", documented).out
    assert re.search(r"code +my_methods.py@median:\s+\S*my_methods.py\s+sha256 [0-9a-f]{12}", dry)
    assert re.search(r"code +my_search.py@HillClimb:\s+\S*my_search.py\s+sha256 [0-9a-f]{12}", dry)
    assert "scale                  0.5 to 1.5, from 1" in dry

    server.run("run", documented)
    assert [trial[1] for trial in candidates(documented, "mine")[:12]] == ["complete"] * 12
    exported = tmp_path / "exported"
    server.run("export", documented, "--trial", "3", "--out", exported)
    recipe = exported / "recipe.yaml"
    assert "method: my_methods.py@median\ncode:\n" in recipe.read_text()
    shown = server.run("show", documented, "3", "--format", "mergekit", code=2)
    assert "mergekit cannot say method my_methods.py@median" in shown.err

    # A recipe alone makes nothing run.
    refused = server.run("merge", recipe, "--out", tmp_path / "again", code=2)
    assert "a recipe cannot make it run" in refused.err and "--allow-code" in refused.err
    assert not (tmp_path / "again").exists()
    server.run("merge", recipe, "--out", tmp_path / "again", "--allow-code")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()
    # The experiment names the same code.
    compared = server.run("evaluate", recipe, documented, "--split", "search", "--compare").out
    assert "identical to the study's trial:3/search on all 8 items" in compared
    compared = server.run("evaluate", exported, documented, "--split", "search", "--compare").out
    assert "identical to the study's trial:3/search on all 8 items" in compared

    # Where the code lies does not matter, what it says does.
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copy(folder / "my_methods.py", moved / "elsewhere.py")
    text = recipe.read_text().replace(str(folder / "my_methods.py"), "elsewhere.py")
    (moved / "recipe.yaml").write_text(text)
    server.run("merge", moved / "recipe.yaml", "--out", moved / "out", "--allow-code")
    assert (moved / "out" / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()
    edit(moved / "elsewhere.py", "return theta_0 + scale", "return theta_0 - scale")
    refused = server.run("merge", moved / "recipe.yaml", "--out", moved / "other", "--allow-code", code=2)
    assert "but the recipe was made with" in refused.err


@pytest.mark.slow
def test_changed_code_is_drift(server: Server, documented: Path, tmp_path: Path):
    folder = documented.parent
    edit(documented, "budget: 12", "budget: 3")
    server.run("run", documented)
    by_name = ("export", "mine", "--storage", f"sqlite:///{folder}/evomerge.db", "--out")
    method = (folder / "my_methods.py").read_text()
    edit(folder / "my_methods.py", "return theta_0 + scale", "return theta_0 - scale")
    for options in ((), ("--allow-drift",)):
        refused = server.run("resume", documented, "--budget", "+1", *options, code=2).err
        assert "its method my_methods.py differ" in refused and "my_search.py" not in refused
    for study in (("export", documented, "--out"), (*by_name[:-1], "--allow-code", "--out")):
        refused = server.run(*study, tmp_path / "x", code=2).err
        assert "the code of method my_methods.py@median" in refused and "but the recipe was made with" in refused
    (folder / "my_methods.py").write_text(method)
    # A store alone makes nothing run: it may be somebody else's. The experiment file does.
    assert "a recipe cannot make it run" in server.run(*by_name, tmp_path / "x", code=2).err
    server.run(*by_name, tmp_path / "x", "--allow-code")
    server.run("export", documented, "--out", tmp_path / "y")

    # A searcher may change, if it still proposes what it proposed.
    edit(folder / "my_search.py", '"""Each', '"""As before: each')
    refused = server.run("resume", documented, "--budget", "+1", code=2).err
    assert re.search(r"searcher my_search.py: was \w{12}, is \w{12}", refused)
    server.run("resume", documented, "--budget", "+1", "--allow-drift")
    assert len([trial for trial in candidates(documented, "mine") if isinstance(trial[0], int)]) == 4
    edit(folder / "my_search.py", "standard_normal(len", "random(len")
    refused = server.run("resume", documented, "--budget", "+1", "--allow-drift", code=2).err
    assert "replaying proposal 1 gave" in refused


@pytest.mark.slow
def test_ray_workers_run_the_same_files(server: Server, documented: Path):
    """Each worker loads the plug-ins from their files; none was sent to it."""
    alone = documented.parent.parent / "alone"
    shutil.copytree(documented.parent, alone)
    evomerge("run", documented, "--workers", "2")
    server.run("run", alone / "experiment.yaml")
    assert [t[:5] for t in candidates(documented, "mine")[:12]] == [
        t[:5] for t in candidates(alone / "experiment.yaml", "mine")[:12]
    ]


ENTRY_POINTS = """
[evomerge.methods]
median = my_package.my_methods:Median
ties = my_package.my_methods:Median
broken = my_package.nowhere:Nothing

[evomerge.searchers]
hill_climb = my_package.my_search:HillClimb

[evomerge.evaluators]
letters = my_package.my_eval:score
"""


@pytest.fixture
def package(tmp_path: Path) -> dict[str, str]:
    """An environment in which the document's plug-ins are an installed package, as pip would leave it."""
    target = tmp_path / "site"
    (target / "my_package").mkdir(parents=True)
    write_blocks(target / "my_package")
    (target / "my_package" / "__init__.py").touch()
    info = target / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return {"PYTHONPATH": os.pathsep.join([str(target), *filter(None, [os.environ.get("PYTHONPATH")])])}


@pytest.mark.slow
def test_an_installed_package(documented: Path, package: dict[str, str], tmp_path: Path):
    for name in BLOCKS.keys() - {"experiment.yaml"}:
        (documented.parent / name).unlink()
    edit(documented, "my_methods.py@median", "median")
    edit(documented, "my_search.py@HillClimb, budget: 12", "hill_climb, budget: 2")
    edit(documented, "my_eval.py@score", "letters")
    evomerge("run", documented, **package)
    evomerge("export", documented, "--trial", "1", "--out", tmp_path / "exported", **package)
    recipe = tmp_path / "exported" / "recipe.yaml"
    assert re.search(r"method: median\ncode:\n  package: my-package 1.0\n  sha256: \w{64}\n", recipe.read_text())
    evomerge("merge", recipe, "--out", tmp_path / "again", **package)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "exported" / "model.safetensors"
    ).read_bytes()

    missing = evomerge("merge", recipe, "--out", tmp_path / "without", code=2).err
    assert "no installed package offers a method 'median'" in missing
    edit(tmp_path / "site" / "my_package" / "my_methods.py", "return theta_0 + scale", "return theta_0 - scale")
    changed = evomerge("merge", recipe, "--out", tmp_path / "changed", code=2, **package).err
    assert "in the installed package my-package 1.0 has the hash" in changed
    assert "method median" in evomerge("resume", documented, "--budget", "+1", code=2, **package).err


@pytest.mark.slow
def test_a_package_s_faults_are_those_of_who_names_it(server: Server, documented: Path, package: dict[str, str]):
    listed = " ".join(server.run("methods", **package).out.split())
    assert re.search(r"median +the base plus the median .*\(from my-package 1.0\)", listed)
    assert re.search(r"broken +cannot be used: .*my-package 1.0 .*nowhere", listed)
    assert re.search(r"ties +cannot be used: method 'ties' is evomerge's own, .* my-package 1.0 offers", listed)
    edit(documented, "  params: {scale: {range: [0.5, 1.5]}}\n", "")
    for name, problem in [
        ("broken", r"cannot be loaded: ModuleNotFoundError: No module named 'my_package.nowhere'"),
        ("ties", r"method 'ties' is evomerge's own, but the installed package my-package 1.0"),
        ("medain", r"there is no method 'medain'[\s\S]*Did you mean 'median'"),
    ]:
        text = documented.read_text()
        edit(documented, "my_methods.py@median", name)
        assert re.search(problem, server.run("run", "--dry-run", documented, code=2, **package).err)
        documented.write_text(text)
    server.run("run", "--dry-run", documented, **package)
    edit(documented, "my_eval.py@score", "lettres")
    assert "Did you mean 'letters'" in server.run("run", "--dry-run", documented, code=2, **package).err
