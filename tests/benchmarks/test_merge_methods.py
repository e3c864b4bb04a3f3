"""benchmarks/merge_methods.py: its arithmetic by hand, and that it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from merging.family import SIZES, write_family  # noqa: E402
from merging.peers import mergekit_config, run_script  # noqa: E402
from merging.table import median_ratio, tables  # noqa: E402

from evomerge.checkpoints import open_checkpoint  # noqa: E402


def test_ratios_by_hand():
    assert median_ratio([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]) == (3.0, 2.0, 4.0)
    assert median_ratio([2.0, 4.0], [2.0]) == (1.5, 1.0, 2.0)


def row(part: str, what: str, quantity: str, *seconds: float) -> dict:
    return {"size": "s", "part": part, "what": what, "quantity": quantity, "seconds": list(seconds)}


def test_floors_by_hand():
    """ties reads four checkpoints and writes one; linear needs no base; dare_ties draws for three experts."""
    about = {
        "date": "2026",
        "rounds": 1,
        "threads": 1,
        "load": 0.1,
        "cores": 2,
        "python": "3",
        "torch": "2",
        "problems": {},
    }
    rows: list[dict] = []
    for name in ("linear", "ties", "dare_ties"):
        part = f"merge {name}"
        rows += [{"size": "s", "part": part, "about": about}]
        rows += [row(part, "floor", "copy", 2.0), row(part, "floor", "read", 1.0), row(part, "floor", "write", 10.0)]
        rows += [row(part, "floor", "draws", 100.0), row(part, name, "stream", 628.0)]
        rows += [row(part, name, "first candidate", 3.0), row(part, name, "next candidate", 5.0)]
    rows += [row("merge ties", "ties", "mergekit", 6280.0)]
    text = tables(rows)
    files, candidates = text.split("Candidates of a search")
    assert "| linear | 628 | - | - | - | 13 | 48.3 |" in files
    assert "| ties | 628 | - | 6.28e+03 | 10 | 14 | 44.9 |" in files
    assert "| dare_ties | 628 | - | - | - | 314 | 2 |" in files
    # Copying one checkpoint (2 s) reads one and writes one: linear moves four, ties five.
    assert "| linear | 3 | 5 | - | - | 4 | 1.25 |" in candidates
    assert "| ties | 3 | 5 | 2.09e+03 | 1.26e+03 | 5 | 1 |" in candidates


def test_the_random_checkpoints_are_checkpoints(tmp_path: Path):
    base, expert = write_family(tmp_path, "tiny", num_experts=1, dtype="bfloat16")
    first, second = open_checkpoint(base), open_checkpoint(expert)
    name = "model.layers.1.mlp.up_proj.weight"
    difference = second.tensor(name).float() - first.tensor(name).float()
    assert 0.001 < float(difference.std()) < 0.004
    assert SIZES["134M"].parameters == 134_515_008  # SmolLM2-135M's
    assert SIZES["1.1B"].parameters == 1_100_048_384  # TinyLlama's


def test_mergekit_is_asked_for_the_same_merge():
    experts = [Path("a"), Path("b")]
    config = mergekit_config("della", Path("base"), experts, [0.3, 0.4], {"density": 0.5, "epsilon": 0.1})
    assert config["base_model"] == "base"
    assert config["models"][1] == {"model": "b", "parameters": {"weight": 0.4, "density": 0.5, "epsilon": 0.1}}
    assert "base_model" not in mergekit_config("linear", Path("base"), experts, [0.3, 0.4], {})


def test_a_peer_that_fails_is_named_with_its_reason(tmp_path: Path):
    script = tmp_path / "peer.py"
    script.write_text("raise SystemExit('no such method')")
    problems: dict[str, str] = {}
    assert run_script(sys.executable, script, {"threads": 1, "what": "ties"}, problems) is None
    assert problems == {"peer ties": "no such method"}


@pytest.mark.slow
def test_it_runs(tmp_path: Path):
    out = tmp_path / "table.md"
    command = [sys.executable, str(ROOT / "benchmarks" / "merge_methods.py"), "--size", "tiny", "--rounds", "1"]
    command += ["--no-peers", "--parts", "merge,copy,matrices", "--cache", str(tmp_path), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for method in ("linear", "ties", "dare_ties", "wudi, 100 steps in both"):
        assert f"| {method} |" in out.read_text()
    rows = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert all(seconds > 0 for row in rows for seconds in row.get("seconds", []))
    assert {row["part"].split()[0] for row in rows} == {"merge", "copy", "matrices"}
