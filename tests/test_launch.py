"""Finding studies, budgets, and which pool runs the workers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from evomerge.errors import StudyError
from evomerge.launch import Options, find_study, new_budget, open_study, pool_factory, sqlite_url, storage_of
from evomerge.planning import build_plan
from evomerge.pools import LocalPool
from evomerge.progress import Progress
from evomerge.spec import load_spec


@pytest.mark.parametrize(("text", "budget"), [(None, 60), ("200", 200), ("+100", 160)])
def test_a_budget_is_a_number_or_so_many_more(text, budget):
    assert new_budget(text, 60) == budget


@pytest.mark.parametrize("text", ["", "+", "-5", "many", "1.5"])
def test_another_budget_is_refused(text):
    with pytest.raises(StudyError, match="--budget"):
        new_budget(text, 60)


def test_the_store_is_the_command_lines_then_the_environments_then_the_experiments(experiment, monkeypatch):
    path = experiment()
    monkeypatch.delenv("EVOMERGE_STORAGE", raising=False)
    assert storage_of(load_spec(path), None) == sqlite_url(path.parent / "evomerge.db")
    path.write_text(json.dumps({**json.loads(path.read_text()), "storage": "sqlite:////tmp/from_file.db"}))
    assert storage_of(load_spec(path), None) == "sqlite:////tmp/from_file.db"
    monkeypatch.setenv("EVOMERGE_STORAGE", "sqlite:////tmp/from_environment.db")
    assert storage_of(load_spec(path), None) == "sqlite:////tmp/from_environment.db"
    assert storage_of(load_spec(path), "sqlite:////tmp/typed.db") == "sqlite:////tmp/typed.db"


def test_an_unknown_study_and_one_not_yet_started_are_told_apart(experiment, tmp_path):
    with pytest.raises(StudyError, match="there is no study 'nothing'"):
        find_study("nothing", sqlite_url(tmp_path / "none.db"))
    path = experiment()
    with pytest.raises(StudyError, match="not been started yet"):
        open_study(str(path), None)
    assert not (path.parent / "evomerge.db").exists()
    assert find_study(str(path.parent), None)[1] == "tiny"  # the folder of an experiment will do


# A whole run, as the command does it; the evaluator says what its own process, the worker, has imported.
RUN = """
import sys
from evomerge.cli import main
sys.argv = ["evomerge", "run", sys.argv[1]]
try:
    main()
finally:
    print("driver:", "ray" in sys.modules)
"""
TELLING = "\nimport sys, pathlib\ndef score(model, tokenizer, items, _score=score):\n    " + (
    "pathlib.Path(__file__).with_name('worker').write_text(str('ray' in sys.modules))\n"
    "    return _score(model, tokenizer, items)\n"
)


def test_a_run_with_one_worker_imports_no_ray_anywhere(experiment):
    path = experiment(search={"method": "random", "budget": 1})
    evaluator = path.parent / "my_eval.py"
    evaluator.write_text(evaluator.read_text() + TELLING)
    run = subprocess.run([sys.executable, "-c", RUN, path], capture_output=True, text=True, check=False)
    assert "driver: False" in run.stdout, run.stdout + run.stderr
    assert (path.parent / "worker").read_text() == "False"


def test_one_worker_without_an_address_needs_no_ray(experiment):
    plan = build_plan(load_spec(experiment()), Progress(quiet=True))
    assert isinstance(pool_factory(plan, Options())(), LocalPool)
    from evomerge.cluster import RayPool

    assert isinstance(pool_factory(plan, Options(workers=2))(), RayPool)
