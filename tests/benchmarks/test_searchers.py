"""benchmarks/searchers.py: what it measures, and that it goes on where it stopped."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from evomerge.searchers import SEARCHERS
from evomerge.searchers.base import GradientSearcher

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "searchers.py"

spec = importlib.util.spec_from_file_location("searcher_benchmark", SCRIPT)  # `searchers` is a package of tests
benchmark = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = benchmark
spec.loader.exec_module(benchmark)


@pytest.fixture(scope="module")
def surrogate():
    return benchmark.Surrogate.load()


def quick(results: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--quick", "--results", str(results)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def without_times(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        for answer in row.get("budgets", {}).values():
            answer.pop("seconds")
    return rows


def test_it_goes_on_where_it_was_killed(tmp_path: Path):
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    first = quick(whole)
    assert first.returncode == 0, first.stderr
    rows = without_times(whole)
    assert len(rows) == 2 + 2 * 2 * 2  # the best of two spaces; two searchers with two seeds in each
    lines = whole.read_text().splitlines(keepends=True)
    broken.write_text("".join(lines[:5]) + lines[5][:40])
    assert quick(broken).returncode == 0
    assert without_times(broken) == rows
    text = broken.read_text()
    again = quick(broken)
    assert broken.read_text() == text
    assert "0 runs to do" in again.stderr
    assert again.stdout.count("### ") == 4  # two spaces, two budgets
    assert again.stdout.count("| cma |") == again.stdout.count("| random |") == 4
    broken.write_text(text.replace('"recording": "', '"recording": "other'))
    refused = quick(broken)
    assert refused.returncode == 1
    assert "another recording" in refused.stderr


def test_picks_by_hand():
    def trial(search: float, select: float, held: float) -> dict[str, float]:
        return {"search": search, "select": select, "held": held}

    scores = [trial(0.5, 0.9, 0.1), trial(0.7, 0.6, 0.2), trial(0.7, 0.6, 0.3), trial(0.6, 0.8, 0.4)]
    scores += [trial(0.6, 0.8, 0.5), trial(0.55, 0.7, 0.6)]
    answer = benchmark.judged(scores, 3.0)
    assert answer == {"trials": 6, "search": 0.7, "held": 0.2, "retested": 0.4, "seconds": 0.5}


@pytest.mark.parametrize("name", benchmark.CONTENDERS)
def test_every_contender_proposes_and_learns(name: str, surrogate):
    task = benchmark.Task("task", name, 0, 12)
    one, again = (benchmark.search(task, surrogate, (6, 12)) for _ in range(2))
    for row in (one, again):
        for answer in row["budgets"].values():
            answer.pop("seconds")
    assert one == again
    assert set(one["budgets"]) == {"6", "12"}
    small, large = one["budgets"]["6"], one["budgets"]["12"]
    assert small["search"] <= large["search"]
    assert large["trials"] == (9 if name == "soup" else 12)  # greedy soup: 2T - 1 averages of T experts


def test_every_searcher_that_learns_from_scores_is_a_contender():
    wanted = {name for name, searcher in SEARCHERS.items() if not issubclass(searcher, GradientSearcher)}
    assert {name for name, _ in benchmark.CONTENDERS.values()} == wanted


def test_the_committed_results_are_whole_and_of_this_recording():
    results = benchmark.Results(benchmark.RESULTS, benchmark.recording_hash())
    found = {(row["space"], row["searcher"], row["seed"]) for row in results.rows if "budgets" in row}
    wanted = benchmark.tasks(benchmark.CONTENDERS, benchmark.SEEDS, benchmark.BUDGETS)
    assert {task.key for task in wanted} == found
    text = (ROOT / "docs" / "searchers.md").read_text()
    table = benchmark.table(results.rows, benchmark.Surrogate.load())
    for line in table.splitlines():
        assert line in text, "docs/searchers.md holds the table that the script prints"
