"""`evomerge collect` by the real command line, and what searches, merges and exports make of what it wrote."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evomerge.checkpoints import content_hash
from evomerge.testing import tiny

from .support import Server, end, json_of, send, store, wait_for

TASKS = {"expert0": {"file": "zero.txt", "unit": "line"}, "expert1": {"file": "one.txt", "unit": "line"}}
SPLIT = {"search": 10, "select": 6, "test": 6}
SPACE = {
    "method": {"choices": ["fisher", "regmean", "lm_cocktail"]},
    "weights": {"granularity": "task", "range": [0.2, 2.0], "initial": 1.0},
}
# The shipped evaluator, but each item takes its time, so that a test can come in between.
SLOW = """
import time
from evomerge import Evaluator, Item, Likelihoods, Outcome, answer_loglikelihood


class Slow(Evaluator):
    def load(self):
        return [Item(f"{task}{i}", task, f"{task} text {i * 7919}") for task in self.context.tasks for i in range(30)]

    def prepare(self, target, items):
        self.texts = {item.id: item.text for item in items}

    def likelihoods(self, target, item_ids, *, alternatives=True):
        for item_id in item_ids:
            time.sleep(0.1)
            log, tokens = answer_loglikelihood(target.model, target.tokenizer, None, self.texts[item_id])
            yield Likelihoods(log[None], 0, tokens)
"""


@pytest.fixture
def experiment(lora_family: Path, tmp_path: Path) -> Path:
    """An experiment on two tasks of texts, called like the two experts."""
    folder = tmp_path / "experiment"
    shutil.copytree(lora_family, folder)
    for seed, name in enumerate(("zero", "one")):
        draw = random.Random(seed)
        lines = ["".join(draw.choices("abcdehilmnorstu ", k=draw.randint(8, 30))) + str(i) for i in range(30)]
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return write(folder)


def write(folder: Path, **changes) -> Path:
    settings = {
        "space": SPACE,
        "statistics": "measured",
        "search": {"method": "random", "budget": 6},
        "evaluate": {"with": "evaluators/perplexity.py", "tasks": TASKS, "split": SPLIT, "finish": {"top": 2}},
        **changes,
    }
    return tiny.write_experiment(folder, **settings)


def test_collect_search_export_and_score_again(experiment: Path, server: Server, tmp_path: Path):
    refused = server.run("run", experiment, code=2)
    assert "evomerge collect" in refused.text and "--what fisher" in refused.text
    assert refused.model_modules == ()
    collected = server.run("collect", experiment, "--items", "7")  # by default what the space needs: all three
    folder = experiment.parent / "measured"
    names = {f"expert{t}.{kind}.safetensors" for t in range(2) for kind in ("fisher", "gram", "loss")}
    assert {p.name for p in folder.iterdir()} == {*names, "manifest.json"}
    assert "expert1.gram.safetensors: search items of expert1 7" in collected.out
    assert "expert0.loss.safetensors: search items of expert0 7, expert1 7" in collected.out
    manifest = json.loads((folder / "manifest.json").read_text())
    search = {item.id: item.task for item in _items(experiment) if item.split == "search"}
    for kind in ("fisher", "gram", "loss"):
        entry = manifest["kinds"][kind]
        assert entry["base"] == content_hash(experiment.parent / "base")
        for expert in entry["files"]:
            assert expert["expert"] == content_hash(experiment.parent / expert["name"])
            tasks = {expert["name"]} if kind != "loss" else {"expert0", "expert1"}
            assert set(expert["items"]) == tasks
            for task, ids in expert["items"].items():
                assert len(ids) == 7 and {search[i] for i in ids} == {task}
    server.run("run", experiment)
    trials = [trial.recipe for trial in store(experiment).trials()]
    assert {recipe["method"] for recipe in trials} == {"fisher", "regmean", "lm_cocktail"}
    kinds = {"fisher": "fisher", "regmean": "gram", "lm_cocktail": "loss"}
    assert all(list(recipe["statistics"]["sha256"]) == [kinds[recipe["method"]]] for recipe in trials)
    out = tmp_path / "merged"
    server.run("export", experiment, "--out", out)
    again = json_of(server.run("evaluate", out, experiment, "--split", "test", "--compare", "--format", "json"))
    assert again["compared_with"]["equal"] == again["compared_with"]["items"] == 12
    by_recipe = server.run("merge", out / "recipe.yaml", "--out", tmp_path / "again")
    assert "wrote" in by_recipe.out
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()
    # Other statistics are another study.
    shutil.rmtree(folder)
    server.run("collect", experiment, "--items", "3")
    assert "statistics of fisher" in server.run("resume", experiment, "--budget", "+1", code=2).text


def _items(experiment: Path):
    from evomerge.planning import build_plan
    from evomerge.progress import Progress
    from evomerge.spec import load_spec

    return build_plan(load_spec(experiment), Progress(quiet=True), statistics=False).items


@pytest.mark.slow
def test_losses_are_the_studys_own(experiment: Path, server: Server):
    """An expert's mean loss by token is what its control scored: the very model of the study was measured."""
    server.run("collect", experiment, "--what", "loss")
    path = write(experiment.parent, name="plain", space={**SPACE, "method": "task_arithmetic"})
    server.run("run", path)
    opened = store(path, "plain")
    tokens = {item.id: len(item.text) for item in _items(path)}  # one a character
    for t in range(2):
        losses = load_file(experiment.parent / "measured" / f"expert{t}.loss.safetensors")
        control = opened.evaluation(f"control:expert:expert{t}/search", with_outcomes=True)
        for task, found in losses.items():
            outcomes = [o for o in control.outcomes or () if _task(opened, o.item_id) == task]
            by_token = [-o.values["loglikelihood"] / tokens[o.item_id] for o in outcomes]
            assert float(found) == pytest.approx(sum(by_token) / len(by_token), rel=1e-5)


def _task(opened, item_id: str) -> str:
    return next(item.task for item in opened.items() if item.id == item_id)


def test_what_is_there_is_kept_and_what_has_changed_is_not(experiment: Path, server: Server):
    server.run("collect", experiment, "--what", "fisher")
    folder = experiment.parent / "measured"
    before = {p.name: (p.stat().st_ino, p.read_bytes()) for p in folder.iterdir()}
    again = server.run("collect", experiment, "--what", "fisher")
    assert "2 of 2 files were there and have been kept" in again.err
    assert not any("model" in module for module in again.model_modules or ())
    after = {p.name: (p.stat().st_ino, p.read_bytes()) for p in folder.iterdir()}
    assert {n: a for n, a in after.items() if n != "manifest.json"} == {
        n: b for n, b in before.items() if n != "manifest.json"
    }
    assert after["manifest.json"][1] == before["manifest.json"][1]
    # Another expert in the place of one: its file is made anew, the other one is kept.
    shutil.rmtree(experiment.parent / "expert1")
    tiny.save_lora_expert(experiment.parent / "base", experiment.parent / "expert1", seed=7)
    only_fisher = write(experiment.parent, space={**SPACE, "method": "fisher"})
    assert "are not of the expert expert1" in server.run("run", only_fisher, code=2).text
    assert "1 of 2 files" in server.run("collect", only_fisher).err
    newest = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert newest["expert0.fisher.safetensors"] == before["expert0.fisher.safetensors"][1]
    assert newest["expert1.fisher.safetensors"] != before["expert1.fisher.safetensors"][1]
    server.run("run", only_fisher, "--dry-run")


@pytest.mark.slow
def test_fisher_labels(experiment: Path, server: Server):
    """Texts have one answer each: both ways of taking labels are the same there."""
    server.run("collect", experiment, "--what", "fisher", "--out", experiment.parent / "a")
    run = server.run("collect", experiment, "--what", "fisher", "--labels", "right", "--out", experiment.parent / "b")
    assert "labels: right" in run.out and f"statistics: {experiment.parent / 'b'}" in run.out
    first, second = (load_file(experiment.parent / f / "expert0.fisher.safetensors") for f in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all((tensor >= 0).all() and torch.isfinite(tensor).all() for tensor in first.values())


# --- stopped


@pytest.fixture
def slow(experiment: Path) -> Path:
    (experiment.parent / "slow.py").write_text(SLOW)
    evaluate = {"with": "slow.py", "tasks": {"expert0": {}, "expert1": {}}, "split": SPLIT}
    return write(experiment.parent, evaluate=evaluate)


@pytest.mark.slow
def test_killed_and_typed_again_gives_the_same_files(slow: Path, server: Server):
    undisturbed, folder = slow.parent / "undisturbed", slow.parent / "measured"
    server.run("collect", slow, "--what", "fisher", "--out", undisturbed)
    process = server.start("collect", slow, "--what", "fisher")
    wait_for((folder / "expert0.fisher.safetensors").exists)
    process.kill()
    end(process)
    assert {p.name for p in folder.iterdir()} == {"expert0.fisher.safetensors"}
    kept = (folder / "expert0.fisher.safetensors").stat().st_ino
    assert "holds none" in server.run("run", slow, code=2).text  # not complete: there is no manifest
    again = server.run("collect", slow, "--what", "fisher")
    assert "1 of 2 files" in again.err
    assert (folder / "expert0.fisher.safetensors").stat().st_ino == kept
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in undisturbed.iterdir()}


@pytest.mark.slow
def test_ctrl_c(slow: Path, server: Server):
    folder = slow.parent / "measured"
    process = server.start("collect", slow, "--what", "gram")
    wait_for((folder / "expert0.gram.safetensors").exists)
    send(process, signal.SIGINT)
    stopped = end(process)
    assert stopped.code == 130
    assert "type the same again" in stopped.err and "Traceback" not in stopped.err
    assert {p.name for p in folder.iterdir()} == {"expert0.gram.safetensors"}
    assert "1 of 2 files" in server.run("collect", slow, "--what", "gram").err


@pytest.mark.slow
def test_two_at_once(slow: Path, server: Server):
    process = server.start("collect", slow, "--what", "fisher")
    wait_for((slow.parent / "measured").exists)
    wait_for(
        lambda: (
            "another process is collecting" in server.run("collect", slow, code=None).text or process.poll() is not None
        )
    )
    assert process.poll() is None
    process.kill()
    end(process)


# --- refused before a model is loaded


@pytest.mark.parametrize(
    ("arguments", "changes", "words"),
    [
        (["--what", "fischer"], {}, ["there are no statistics 'fischer'", "fisher"]),
        (["--what", "fisher", "--labels", "true"], {}, ["--labels must be one of model, right"]),
        (["--what", "fisher", "--task", "expert0"], {}, ["--task is EXPERT=TASK"]),
        (["--what", "fisher", "--task", "nobody=expert0"], {}, ["there is no expert 'nobody'"]),
        (["--what", "fisher", "--task", "expert0=nothing"], {}, ["there is no task 'nothing'"]),
        ([], {"space": {**SPACE, "method": "ties"}}, ["no method of the space (ties) needs statistics", "--what"]),
        (["--what", "fisher", "--out", "zero.txt"], {}, ["cannot be used as a folder"]),
        (["--what", "fisher", "--out", "expert0"], {}, ["holds other things than statistics"]),
        (
            ["--what", "fisher"],
            {
                "evaluate": {
                    "with": "my_eval.py@score",
                    "tasks": {"one": {}, "two": {}},
                    "split": {"search": 4, "select": 4, "test": 4},
                }
            },
            ["my_eval.py@score says nothing of an answer's likelihood", "evaluators/harness.py"],
        ),
        (
            ["--what", "fisher"],
            {
                "evaluate": {
                    "with": "evaluators/perplexity.py",
                    "tasks": {"x": TASKS["expert0"], "expert0": TASKS["expert1"]},
                    "split": SPLIT,
                }
            },
            ["no task belongs to expert 'expert1'", "--task expert1=TASK, one of x, expert0"],
        ),
        (
            ["--what", "fisher"],
            {"evaluate": {"with": "evaluators/perplexity.py", "tasks": TASKS, "split": {"select": 4, "test": 4}}},
            ["search is missing"],
        ),
    ],
    ids=[
        "kind",
        "labels",
        "no pair",
        "expert",
        "task",
        "not needed",
        "file",
        "model folder",
        "evaluator",
        "no task",
        "no search",
    ],
)
def test_refused(experiment: Path, server: Server, arguments: list, changes: dict, words: list[str]):
    path = write(experiment.parent, **changes)
    run = server.run("collect", path, *arguments, cwd=experiment.parent, code=2)
    for word in words:
        assert word in run.err, run.err
    assert "Traceback" not in run.text
    assert run.model_modules == ()


@pytest.mark.slow
def test_tasks_belong_to_experts_by_option_or_by_order(experiment: Path, server: Server):
    tasks = {"law": TASKS["expert0"], "news": TASKS["expert1"]}
    path = write(experiment.parent, evaluate={"with": "evaluators/perplexity.py", "tasks": tasks, "split": SPLIT})
    by_order = server.run("collect", path, "--what", "gram", "--items", "2")
    assert "expert0.gram.safetensors: search items of law 2" in by_order.out
    given = ["--task", "expert0=news", "--task", "expert0=law", "--task", "expert1=law"]
    by_option = server.run("collect", path, "--what", "gram", "--items", "2", *given)
    assert "expert0.gram.safetensors: search items of news 2, law 2" in by_option.out
    assert "expert1.gram.safetensors: search items of law 2" in by_option.out


@pytest.mark.slow
def test_regmean_pp_is_a_merge_by_recipe_and_not_in_a_space(experiment: Path, server: Server, tmp_path: Path):
    path = write(experiment.parent, space={**SPACE, "method": "regmean_pp"})
    assert "is for a single merge" in server.run("run", path, code=2).text
    path = write(experiment.parent)
    collected = server.run("collect", path, "--what", "gram_merged", "--rho", "0.8", "--items", "4")
    assert "expert0.gram_merged.safetensors: search items of expert0 4, rho: 0.8" in collected.out
    recipe = {
        "method": "regmean_pp",
        "base": "base",
        "experts": {"expert0": "expert0", "expert1": "expert1"},
        "params": {"rho": 0.8},
        "weights": 1,
        "statistics": "measured",
    }
    (experiment.parent / "recipe.json").write_text(json.dumps(recipe))
    server.run("merge", experiment.parent / "recipe.json", "--out", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in merged.values())
    (experiment.parent / "recipe.json").write_text(json.dumps({**recipe, "params": {"rho": 0.9}}))
    other = server.run("merge", experiment.parent / "recipe.json", "--out", tmp_path / "other", code=2)
    assert "measured with 0.8" in other.err
