"""Surgery by the command line, on tiny encoders: adapters trained, scored, shown, exported, and applied again."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from .support import Server, candidates, end, evomerge, files, json_of, kill_tree, store, wait_for
from .test_encoders import write_family

SURGERY = {"rank": 4, "steps": 60, "lr": 0.01, "batch": 8}


def with_keys(path: Path, **keys) -> Path:
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **keys}))
    return path


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``family(NAME, **keys)`` is one more copy of an encoder's experiment; those of one kind have the same files."""
    folder = tmp_path_factory.mktemp("surgery")

    def make(name: str, kind: str = "images", **keys) -> Path:
        if not (folder / kind).exists():
            write_family(folder / kind, kind)
        shutil.copytree(folder / kind, folder / name)
        return with_keys(folder / name / "experiment.yaml", **{"surgery": SURGERY, **keys})

    return make


@pytest.fixture(scope="module")
def operated(server: Server, family) -> Path:
    """The experiment file of a finished study with adapters. Do not change it."""
    path = family("operated")
    server.run("run", path)
    return path


@pytest.fixture(scope="module")
def without(server: Server, family) -> Path:
    """The experiment file of the same study without."""
    path = family("without", surgery=None)
    server.run("run", path)
    return path


def test_winner_and_best_control_get_adapters_and_choose_nothing(server: Server, operated: Path, without: Path):
    plain, adapted = (json_of(server.run("leaderboard", p, "--format", "json")) for p in (without, operated))
    winner, control = adapted["winner"], adapted["best_control"]
    assert (winner, control, adapted["verdict"]) == (plain["winner"], plain["best_control"], plain["verdict"])
    subjects = {f"surgery:{winner}", f"surgery:{control}"}
    for split in ("select", "test"):
        rows = {row["subject"]: row for row in adapted[split]}
        assert [row for row in adapted[split] if row["kind"] != "surgery"] == plain[split]
        assert {s for s, row in rows.items() if row["kind"] == "surgery"} == subjects
        for subject in subjects:
            assert rows[subject]["rank"] is None
            assert "not a plain checkpoint: 2 adapters of 512 parameters" in rows[subject]["merge"]
            assert rows[subject]["difference"]["low"] <= rows[subject]["difference"]["high"]
    pairs = [(gain["subject"], gain["against"], gain["split"]) for gain in adapted["surgery"]]
    both = (f"surgery:{winner}", winner, "test"), (f"surgery:{control}", control, "test")
    assert pairs == [*both, (f"surgery:{winner}", f"surgery:{control}", "test")]
    assert any("not a plain checkpoint" in note and "never the winner" in note for note in adapted["notes"])
    assert "(not a plain checkpoint)" in server.run("leaderboard", operated).out
    shown = server.run("show", operated, "surgery:best").out
    assert f"surgery:{winner}" in shown and "behind the merge" in shown
    # Each task's L1 distance became smaller; the file is called by its hash, and nothing else lies beside it.
    kept = store(operated).record["surgery"]
    assert all(after < before for before, after in kept[winner]["distances"].values())
    there = {p.stem for p in (operated.parent / "surgery").iterdir()}
    assert there == {entry["sha256"] for entry in kept.values()}


def test_exports_are_whole_with_adapters_and_without(server: Server, operated: Path, tmp_path: Path):
    adapted, plain = tmp_path / "adapted", tmp_path / "plain"
    server.run("export", operated, "--surgery", "--out", adapted)
    server.run("export", operated, "--out", plain)
    assert files(adapted) - files(plain) == {"surgery.safetensors"}
    assert (adapted / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    tensors = load_file(adapted / "surgery.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "one.down": (4, 32), "one.up": (32, 4), "two.down": (4, 32), "two.up": (32, 4),
    }  # fmt: skip
    manifest = json.loads((adapted / "evomerge_manifest.json").read_text())
    assert "Not a plain checkpoint" in manifest["surgery"] and "surgery.safetensors" in manifest["files"]
    card = (adapted / "README.md").read_text()
    assert "Not a plain checkpoint" in card and "Z' = Z - ReLU(Z down^T) up^T" in card
    assert "| loglikelihood |" in card  # a metric's name, in the table of scores
    assert "surgery" not in json.loads((plain / "evomerge_manifest.json").read_text())

    for folder, options, key in (
        (adapted, (), "surgery:trial:"),
        (adapted, ("--no-surgery",), "trial:"),
        (plain, (), "trial:"),
        (adapted / "recipe.yaml", (), "surgery:trial:"),
    ):
        for split in ("select", "test"):
            run = server.run("evaluate", folder, operated, "--split", split, "--compare", *options)
            assert f"identical to the study's {key}" in run.out
            assert ("not a plain checkpoint" in run.out) == key.startswith("surgery")
    again = tmp_path / "again"
    server.run("merge", adapted / "recipe.yaml", "--out", again)
    for name in ("model.safetensors", "surgery.safetensors"):
        assert (again / name).read_bytes() == (adapted / name).read_bytes()
    named = tmp_path / "named"
    server.run("export", operated, "--trial", "surgery:best", "--out", named)
    assert (named / "surgery.safetensors").read_bytes() == (adapted / "surgery.safetensors").read_bytes()


def test_the_readme_s_formula_on_plain_transformers_gives_the_study_s_items(
    server: Server, operated: Path, tmp_path: Path
):
    """What the export says is to be done, done by transformers and torch alone: log-likelihoods on the test items."""
    import numpy as np
    from transformers import AutoModel

    out = tmp_path / "adapted"
    server.run("export", operated, "--surgery", "--out", out)
    model, info = AutoModel.from_pretrained(out, output_loading_info=True, dtype=torch.float32)
    assert all(name.startswith("pooler.") for name in info["missing_keys"]) and not info["unexpected_keys"]
    opened = store(operated)
    winner = opened.record["rounds"][-1]["winner"]
    stored = {o.item_id: o.values for o in opened.evaluation(f"surgery:{winner}/test").outcomes or ()}
    from evomerge.evaluation import EvaluatorContext, TaskSpec, load_evaluator
    from evomerge.spec import load_spec, resolve_evaluator

    spec = load_spec(operated)
    context = EvaluatorContext(spec.folder, {n: TaskSpec(n, options=t.options) for n, t in spec.evaluate.tasks.items()})
    images = {task: np.load(operated.parent / f"{task}.npz")["images"] for task in ("one", "two")}
    compared = 0
    with safe_open(out / "surgery.safetensors", "pt") as adapters, torch.no_grad():
        for item in load_evaluator(resolve_evaluator(spec), context).load():
            if item.id not in stored:
                continue
            pixels = torch.from_numpy(images[item.task][item.data["image"]]).float()[None]
            z = model.eval()(pixel_values=pixels).last_hidden_state[:, 0]
            down, up = adapters.get_tensor(f"{item.task}.down"), adapters.get_tensor(f"{item.task}.up")
            z = z - torch.relu(z @ down.T) @ up.T
            logits = z @ load_file(operated.parent / f"{item.task}.safetensors")["weight"].T
            found = float(logits.log_softmax(1)[0, item.data["label"]])
            assert found == pytest.approx(stored[item.id]["loglikelihood"], abs=1e-3)
            compared += 1
    assert compared == len(stored) == 24


@pytest.mark.slow
def test_texts_go_the_same_way(server: Server, family, tmp_path: Path):
    path = family("texts_operated", "texts")
    server.run("run", path)
    server.run("export", path, "--surgery", "--out", tmp_path / "out")
    assert "identical to the study's surgery:" in server.run("evaluate", tmp_path / "out", path, "--compare").out


def test_a_study_that_is_finished_can_have_adapters_later(server: Server, without: Path, tmp_path: Path):
    shutil.copytree(without.parent, tmp_path / "later")
    path = tmp_path / "later" / "experiment.yaml"
    before = candidates(path)
    with_keys(path, surgery=SURGERY)
    server.run("resume", path)
    after = candidates(path)
    new = [row for row in after if row not in before]
    assert [row for row in after if row in before] == before
    assert len(new) == 4 and all(row[0].startswith("surgery:") for row in new)
    server.run("resume", path)
    assert candidates(path) == after
    # Other options would be other adapters under the same name.
    with_keys(path, surgery={**SURGERY, "rank": 8})
    refused = server.run("resume", path, code=2).err
    assert "rank 4" in refused and "rank 8" in refused
    # A file that was changed, or is gone, is not trained anew in silence.
    with_keys(path, surgery=SURGERY)
    adapters = next((path.parent / "surgery").iterdir())
    content = adapters.read_bytes()
    adapters.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "holds other adapters than before" in server.run("resume", path, code=2).err
    adapters.unlink()
    assert "cannot be read" in server.run("resume", path, code=2).err


@pytest.mark.slow
def test_killed_at_any_point_it_comes_to_the_same_bits(server: Server, without: Path, tmp_path: Path):
    """kill -9 as soon as one more thing is stored of a study that gets its adapters now, or a moment later."""
    whole, broken = tmp_path / "whole" / "experiment.yaml", tmp_path / "broken" / "experiment.yaml"
    for path in (whole, broken):
        shutil.copytree(without.parent, path.parent)
        with_keys(path, surgery={**SURGERY, "steps": 1500})
    server.run("resume", whole)
    draw = random.Random(0)

    def progress() -> int:
        opened = store(broken)
        adapted = [e for e in opened.evaluations() if e.subject.startswith("surgery:")]
        return len(opened.record.get("surgery", {})) + len(adapted) + len(opened.attempts())

    kills = 0
    for _ in range(6):
        before = progress()
        process = server.start("resume", broken)
        wait_for(lambda p=process, n=before: p.poll() is not None or progress() > n, every=0.02)
        time.sleep(draw.uniform(0.0, 1.0))
        kills += process.poll() is None
        kill_tree(process.pid)
        end(process)
    assert kills >= 2
    server.run("resume", broken)
    assert candidates(broken) == candidates(whole)
    assert files(broken.parent / "surgery") == files(whole.parent / "surgery")
    assert store(broken).record["surgery"] == store(whole).record["surgery"]


@pytest.mark.slow
def test_two_workers_train_the_same_bits_as_one(operated: Path, family):
    path = family("two_workers")
    evomerge("run", path, "--workers", "2")
    assert candidates(path) == candidates(operated)
