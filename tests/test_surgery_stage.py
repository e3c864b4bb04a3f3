"""Surgery in a study, on features that are cheap: who gets adapters, crashes, lost workers, failures, refusals."""

# ruff: noqa: F811  (fixtures of test_study.py)

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_study import Crash, ShuffledPool, die, lost, run, scores  # noqa: F401

from evomerge.errors import UserError
from evomerge.leaderboard import leaderboard, to_csv, to_markdown
from evomerge.planning import build_plan
from evomerge.pools import Job, Result, WorkerSpec
from evomerge.progress import Progress
from evomerge.ranking import best_control, find_winner
from evomerge.recipe import Recipe
from evomerge.showing import describe_plan, needs_a_look, resolve_subject, show_trial
from evomerge.spec import load_spec
from evomerge.store import Store
from evomerge.surgery import read
from evomerge.surgery_stage import Surgeries
from evomerge.surgery_training import train
from evomerge.testing import tiny

# Features of an item are a row of the merged weights: real merges, and nothing that takes time.
EVALUATOR = """
import torch
from evomerge import Evaluator, Item, Outcome, Predictions

class Rows(Evaluator):
    def load(self):
        return [
            Item(f"{task} {i}", task, f"{task} {i}", {"label": i % 3})
            for task in self.context.tasks for i in range(12)
        ]

    def prepare(self, target, items):
        self.items = {item.id: item for item in items}

    def features(self, target, ids):
        rows = []
        for i in ids:
            task, number = i.split()
            layer = target.model.model.layers[int(number) % 4]
            weight = layer.self_attn.q_proj.weight if task == "one" else layer.self_attn.k_proj.weight
            rows.append(weight[int(number)].float() * SCALE)
        return torch.stack(rows)

    def evaluate(self, target, ids):
        found = []
        for i in ids:
            task = self.items[i].task
            logits = target.adapted(task, self.features(target, [i]))[0, :3]
            found.append(Outcome(i, {"score": float(logits.log_softmax(0)[self.items[i].data["label"]])}))
        return found

    def adapts(self, task):
        return True

    def predicts(self, task):
        return frozenset(["answers", "hidden"])

    def predictions(self, target, item_ids, *, over="answers", labels=False, hidden=False):
        features, ones = self.features(target, item_ids), torch.ones(len(item_ids))
        logits = target.adapted(self.items[item_ids[0]].task, features)[:, :3]
        return Predictions(logits, ones, None, features, ones)
"""
SURGERY = {"rank": 3, "steps": 20, "lr": 0.01, "batch": 4}


def write_study(family: Path, folder: Path, scale: str = "30.0", **keys) -> Path:
    """An experiment with adapters in ``folder``, on the tiny family and the evaluator above."""
    shutil.copytree(family, folder)
    evaluate = {
        "with": "my_eval.py",
        "tasks": {"one": {}, "two": {}},
        "split": {"search": 6, "select": 3, "test": 3},
        "finish": {"top": 2, "sweep": [0.5]},
    }
    search = {"method": "random", "budget": 3}
    path = tiny.write_experiment(folder, **{"search": search, "evaluate": evaluate, "surgery": SURGERY, **keys})
    (folder / "my_eval.py").write_text(EVALUATOR.replace("SCALE", scale))
    return path


@pytest.fixture
def write(lora_family: Path, tmp_path: Path) -> Callable[..., Path]:
    """``write(folder=NAME, **keys)`` writes one more experiment."""
    return lambda folder="experiment", **keys: write_study(lora_family, tmp_path / folder, **keys)


@pytest.fixture(scope="module")
def studied(lora_family: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Store]:
    """A finished study: its experiment file and its store. Do not change it."""
    path = write_study(lora_family, tmp_path_factory.mktemp("studied") / "experiment")
    return path, run(path)


@pytest.fixture
def copied(studied: tuple[Path, Store], tmp_path: Path) -> Path:
    """The experiment file of a copy of ``studied`` that a test may change."""
    shutil.copytree(studied[0].parent, tmp_path / "copied")
    return tmp_path / "copied" / "experiment.yaml"


def change(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def chosen(store: Store) -> list[str]:
    """The winner and the best control."""
    winner, control = find_winner(store.record, store.evaluations()), best_control(store.evaluations())
    assert winner is not None and control is not None
    return [winner.subject, control.subject]


def test_adapters_are_trained_on_the_search_items_against_each_task_s_own_expert(studied):
    """What the study keeps is what training gives on features that are taken here: from merges made one by one."""
    path, store = studied
    plan = build_plan(load_spec(path), Progress(quiet=True))
    ShuffledPool().start(plan.worker)
    worker = ShuffledPool.worker
    assert worker is not None and worker.target is not None
    features = worker.evaluator.features  # pyright: ignore  # of the evaluator above
    for subject in chosen(store):
        made = Recipe.from_dict(store.evaluation(f"surgery:{subject}/test").recipe).surgery
        assert made is not None
        adapters = read(made)
        plain = Recipe.from_dict(store.evaluation(f"{subject}/test").recipe)
        kept = store.record["surgery"][subject]
        for task, expert in (("one", "expert0"), ("two", "expert1")):  # in the order of the file
            ids = [item.id for item in plan.items if item.task == task and item.split == "search"]
            found = []
            for recipe in (plain, Recipe.from_dict(store.evaluation(f"control:expert:{expert}/test").recipe)):
                worker.merger.into(worker.target.model, recipe)
                with torch.no_grad():
                    found.append(features(worker.target, ids))
            expected = train(*found, rank=3, steps=20, lr=0.01, size=4, seed=0, task=task)
            assert torch.equal(adapters[task].up, expected.up) and torch.equal(adapters[task].down, expected.down)
            before, after = kept["distances"][task]
            assert before == pytest.approx(float((found[0] - found[1]).abs().mean()))
            assert after == pytest.approx(float((expected(found[0]) - found[1]).abs().mean()))
        assert (kept["adapters"], kept["parameters"]) == (2, sum(2 * 3 * a.down.shape[1] for a in adapters.values()))


def test_they_change_what_is_scored_and_nothing_that_is_chosen(write, studied):
    adapted = studied[1]
    plain = run(write(folder="plain", surgery=None))
    winner, control = chosen(adapted)
    assert chosen(plain) == [winner, control]
    new = {key: score for key, score in scores(adapted).items() if key not in scores(plain)}
    assert {key: scores(adapted)[key] for key in scores(plain)} == scores(plain)
    assert set(new) == {f"surgery:{s}/{split}" for s in (winner, control) for split in ("select", "test")}
    assert all(new[f"surgery:{winner}/{split}"] != scores(plain)[f"{winner}/{split}"] for split in ("select", "test"))
    board = leaderboard(adapted)
    for split, rows in (("select", board.select), ("test", board.test)):
        held = {row.subject: row for row in rows}
        for gain in board.surgery:
            if gain.split == split:
                difference = scores(adapted)[f"{gain.subject}/{split}"] - scores(adapted)[f"{gain.against}/{split}"]
                assert gain.difference.value == pytest.approx(difference)
        assert held[f"surgery:{winner}"].kind == "surgery" and held[f"surgery:{winner}"].rank is None
    assert [(g.subject, g.against) for g in board.surgery] == [
        (f"surgery:{winner}", winner),
        (f"surgery:{control}", control),
        (f"surgery:{winner}", f"surgery:{control}"),
    ]
    assert "not a plain checkpoint: 2 adapters of" in to_markdown(board) and ",surgery,0," in to_csv(board)
    assert resolve_subject(adapted, "surgery:best")[0] == f"surgery:{winner}"
    assert "L1 distance" in show_trial(adapted, "surgery:best")
    other = next(s for s in ("control:base", "control:average") if s != control)
    with pytest.raises(UserError, match=rf"no adapters for {other}.*\n.*There are some for"):
        resolve_subject(adapted, f"surgery:{other}")
    with pytest.raises(UserError, match=r"(?s)no adapters for.*surgery: {}"):
        resolve_subject(plain, "surgery:best")


def test_best_control_is_that_of_select(studied):
    store = studied[1]
    on_select = {e.subject: e.objective for e in store.evaluations("select") if e.subject.startswith("control:")}
    best = best_control(store.evaluations())
    assert best is not None and on_select[best.subject] == max(on_select.values())
    assert best_control([e for e in store.evaluations() if e.split != "select"]) is None


def test_killed_at_every_write_of_surgery_it_comes_to_the_same(write, studied, die):
    """Two trainings and four evaluations, each of three writes: its start, what came of it, its end."""
    whole, path = studied[1], write(folder="crashed", surgery=None)
    run(path)
    change(path, surgery=SURGERY)
    crashes = 0
    for write_number in (1, 2, 5, 3, 4) * 3:  # odd: after that write of the run; even: before it
        die(write_number)
        try:
            run(path)
            break
        except Crash:
            crashes += 1
    die(10**9)
    store = run(path)
    assert crashes >= 5
    assert scores(store) == scores(whole)
    assert store.record["surgery"] == whole.record["surgery"]
    names = {entry["sha256"] + ".safetensors" for entry in store.record["surgery"].values()}
    assert {p.name for p in (path.parent / "surgery").iterdir()} == names


def test_a_lost_worker_is_made_up_for(write, studied):
    seen = []

    def once(job: Job) -> Result | None:
        seen.append((job.key, job.attempt, job.surgery is not None))
        return lost(job) if job.key.startswith("surgery:") and job.attempt == 1 else None

    whole, store = studied[1], run(write(folder="lost"), ShuffledPool(2, faults=once))
    assert scores(store) == scores(whole) and store.record["surgery"] == whole.record["surgery"]
    trained = [(key, attempt) for key, attempt, trains in seen if trains]
    assert sorted(trained) == sorted((f"surgery:{s}/training", n) for s in chosen(store) for n in (1, 2))


def test_what_cannot_be_trained_has_failed_and_the_study_is_whole_without(write):
    """Features that are not finite for merges of both experts; the experts alone, and the base, have others."""
    path = write(scale="(float('nan') if torch.is_grad_enabled() is False and len(ids) > 1 else 30.0)")
    store = run(path)
    winner, _ = chosen(store)
    assert "surgery" not in store.record and not any(e.subject.startswith("surgery:") for e in store.evaluations())
    board = leaderboard(store)
    assert board.winner == winner and board.test and not board.surgery
    reasons = dict(board.failed)
    assert len(reasons) == 2
    assert set(reasons.values()) == {"nan on training: task one: features are not finite"}
    assert needs_a_look(store)
    attempts = len(store.attempts())
    run(path)
    assert len(store.attempts()) == attempts, "what failed for good is not tried again"


def test_a_file_of_adapters_that_was_changed_is_refused(copied, studied):
    store = studied[1]
    file = copied.parent / "surgery" / f"{store.record['surgery'][chosen(store)[0]]['sha256']}.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match="holds other adapters than before"):
        run(copied)


def test_other_options_are_refused_once_there_are_adapters(copied):
    path = copied
    change(path, surgery={**SURGERY, "steps": 21})
    with pytest.raises(UserError, match=r"steps 20.*steps 21"):
        run(path)
    with pytest.raises(UserError, match=r"steps 20.*steps 21"):
        run(path, allow_drift=True)
    change(path, surgery=None)
    run(path)


def test_a_later_round_gives_its_own_winner_adapters(copied, studied):
    first = chosen(studied[1])[0]
    store = run(copied, budget="+20")
    winner, control = chosen(store)
    assert set(store.record["surgery"]) == {first, winner, control}
    shown = {row.subject for row in leaderboard(store).test if row.kind == "surgery"}
    assert shown == {f"surgery:{winner}", f"surgery:{control}"}


def test_dry_run_says_what_is_to_come(write):
    from evomerge.launch import Options

    plan = build_plan(load_spec(write()), Progress(quiet=True))
    assert "adapters of rank 3 for 2 tasks" in describe_plan(plan, Options())
    job = Surgeries(plan, None).job()  # pyright: ignore  # no store is looked at
    assert {task: (t, len(ids)) for task, (t, ids) in job["tasks"].items()} == {"one": (0, 6), "two": (1, 6)}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"surgery": {"rank": 0}}, ["surgery.rank", "0"]),
        ({"surgery": {"steps": 0}}, ["surgery.steps"]),
        ({"surgery": {"lr": 0.0}}, ["surgery.lr"]),
        ({"surgery": {"batch": 1.5}}, ["surgery.batch"]),
        ({"surgery": {"ranks": 4}}, ["surgery", "ranks", "rank"]),
        ({"surgery": True}, ["surgery"]),
        ({"experts": {"expert0": "expert0", "expert1": "expert1", "third": "expert0"}}, ["'one'", "objective"]),
        ({"objective": {"experts": {"one": "expert0"}}}, ["'two'", "own expert"]),
        ({"objective": {"experts": {"one": "nobody"}}}, ["nobody"]),
    ],
    ids=str,
)
def test_what_is_refused_before_anything_is_loaded(write, monkeypatch, keys: dict, words: list[str]):
    monkeypatch.setattr(ShuffledPool, "start", lambda self, spec: pytest.fail("a worker was started"))
    with pytest.raises(UserError) as raised:
        run(write(**keys))
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize(
    "evaluator",
    [
        {"with": "my_eval.py@score", "tasks": {"one": {}, "two": {}}},
        {
            "with": "evaluators/perplexity.py",
            "tasks": {task: {"file": "my_eval.py", "unit": "line"} for task in ("one", "two")},
        },
    ],
    ids=["a function", "perplexity"],
)
def test_an_evaluator_without_a_place_for_adapters_is_refused_by_name(write, evaluator):
    path = write(evaluate={**evaluator, "split": {"search": 4, "select": 4, "test": 4}})
    (path.parent / "my_eval.py").write_text(tiny.EVALUATOR)
    with pytest.raises(UserError, match="no such place for task 'one'") as raised:
        run(path)
    assert evaluator["with"] in str(raised.value) and "Evaluator.adapts" in str(raised.value)


def test_whose_expert_is_whose_may_be_said_for_surgery_alone(write):
    swapped = {"experts": {"one": "expert1", "two": "expert0"}}
    plan = build_plan(load_spec(write(objective=swapped)), Progress(quiet=True))
    job = Surgeries(plan, None).job()  # pyright: ignore  # no store is looked at
    assert [t for t, _ in job["tasks"].values()] == [1, 0]
    with pytest.raises(UserError, match="nothing here looks at the expert"):
        load_spec(write(folder="without", objective=swapped, surgery=None))


def test_a_worker_spec_is_what_it_was(write):
    """Adapters come with recipes and jobs: a study's workers are the same with surgery and without."""
    specs: list[WorkerSpec] = [
        build_plan(load_spec(write(folder=name, surgery=keys)), Progress(quiet=True)).worker
        for name, keys in (("with", SURGERY), ("without", None))
    ]
    first, second = ({**spec.to_dict(), "folder": "", "evaluator": ""} for spec in specs)
    for spec in (first, second):
        for source in (spec["base"], *spec["experts"]):
            source["path"] = ""
    assert first == second
