"""A mixture-of-experts model goes the whole way: its checkpoint names are not its module's parameter names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from .support import Server, json_of, store


def weights(folder: Path) -> dict:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_mixture_of_experts(
    server: Server, experiment: Callable[..., Path], moe_family: Path, tmp_path: Path, method: str
):
    path = experiment(
        moe_family,
        space={
            "method": method,
            "weights": {"granularity": "layer_groups", "groups": 2, "range": [0.0, 2.0], "initial": 1.0},
        },
        search={"method": "random", "budget": 4},
        evaluate={
            "with": "my_eval.py@score",
            "tasks": {"one": {}},
            "split": {"search": 6, "select": 6, "test": 6},
            "finish": {"top": 2},
        },
    )
    server.run("run", path)
    out = tmp_path / "winner"
    server.run("export", path, "--out", out)

    merged, base = weights(out), weights(moe_family / "base")
    assert {name: t.shape for name, t in merged.items()} == {name: t.shape for name, t in base.items()}
    assert any(".experts.0.w1" in name for name in merged), "checkpoint names, as the base's files have them"
    assert all(not (merged[name] == base[name]).all() for name in base if ".experts." in name)

    winner = store(path).record["rounds"][-1]["winner"]
    stored = store(path).evaluation(f"{winner}/test", with_outcomes=True)
    again = json_of(server.run("evaluate", out, path, "--split", "test", "--format", "json"))
    assert {o["id"]: o["values"] for o in again["items"]} == {o.item_id: dict(o.values) for o in stored.outcomes}
    assert "identical" in server.run("evaluate", out, path, "--split", "test", "--compare").out
    json.loads((out / "config.json").read_text())
