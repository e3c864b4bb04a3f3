"""benchmarks/adamerging.py, which measures, on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "adamerging.py"
OWN = {"passes", "keep", "one", "free", "autograd", "authors"}


def run(out: Path, cache: Path) -> list[dict]:
    command = [sys.executable, str(SCRIPT), "--tiny", "--no-peers", "--rounds", "1", "--settings", "3x2x8"]
    subprocess.run([*command, "--cache", str(cache), "--out", str(out)], check=True, timeout=300)
    return [json.loads(line) for line in out.with_suffix(".jsonl").open()][1:]


@pytest.mark.slow
def test_all_ways_find_the_same_losses_and_nothing_is_measured_twice(tmp_path: Path):
    rows = run(tmp_path / "table.md", tmp_path / "cache")
    assert {row["what"] for row in rows} == OWN
    ours, *others = [row["losses"] for row in rows if row["what"] != "passes"]
    assert len(ours) == 5  # a step that warms up and four
    for losses in others:  # after four steps of Adam, too
        assert losses == pytest.approx(ours, rel=1e-3)
    assert run(tmp_path / "table.md", tmp_path / "cache") == rows
    assert (tmp_path / "table.md").read_text().count("| 3x2x8 |") == len(OWN)
