"""The leaderboard: who wins, how sure that is, and that it says so honestly at every stage of a study."""

from __future__ import annotations

import csv
import io
import json
import random

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from evomerge import leaderboard as lb
from evomerge.evaluation import Item, Outcome
from evomerge.store import Evaluation, Store

TASKS = {"add": 3.0, "topic": 1.0}
SIZES = {"search": 10, "select": 60, "test": 80}
ITEMS = [Item(f"{t}/{s}/{i}", t, f"{t} {s} {i}", split=s) for t in TASKS for s, n in SIZES.items() for i in range(n)]


class Study:
    """A store that is filled evaluation by evaluation, as a driver would."""

    def __init__(self, path, *, tasks=TASKS, items=ITEMS, objective="mean", item_mean=True, name="s"):
        self.tasks, self.items, self.objective = dict(tasks), items, objective
        record = {
            "spec": {
                "name": name,
                "objective": objective,
                "search": {"schedule": "reproducible"},
                "evaluate": {"tasks": {t: {"weight": w} for t, w in tasks.items()}},
            },
            "metrics": {t: {"metric": "acc", "item_mean": item_mean} for t in tasks},
        }
        self.store = Store.create(path, "s", record, items=items)

    def evaluate(self, subject: str, split: str, quality: float | dict[str, float], *, seed: int = 0, recipe=None):
        """``quality``: how many items are right; the hard items are the same for all subjects but for some luck."""
        luck, hard = random.Random(f"{subject}{split}{seed}"), random.Random(split)
        outcomes = []
        for item in self.items:
            difficulty = hard.random()
            if item.split == split:
                q = quality[item.task] if isinstance(quality, dict) else quality
                outcomes.append(Outcome(item.id, {"acc": float(0.9 * difficulty + 0.1 * luck.random() < q)}))
        by_task = {t: [o.values["acc"] for o in outcomes if o.item_id.startswith(f"{t}/")] for t in self.tasks}
        scores = {t: sum(v) / len(v) for t, v in by_task.items()}
        total = sum(self.tasks.values())
        mean = sum(w * scores[t] for t, w in self.tasks.items()) / total
        e = Evaluation(
            key=f"{subject}/{split}",
            subject=subject,
            split=split,
            recipe_hash=subject if recipe is None else f"{subject} of its own",
            recipe=recipe or {"method": "linear", "groups": [{"weights": {"a": 0.7, "b": 0.3}}]},
            outcomes=tuple(outcomes),
            scores=scores,
            objective=min(scores.values()) if self.objective == "min" else mean,
        )
        self.store.save_evaluation(e)
        return e

    def trial(self, search: float, *, state: str = "complete", failure: str | None = None) -> str:
        n = len(self.store.trials())
        self.store.add_trial(
            n, {"x": n / 10}, {"method": "linear", "groups": [{"weights": {"a": n / 10}}]}, f"trial:{n}"
        )
        if state != "running":
            self.store.finish_trial(n, state, search if state == "complete" else None, failure)
        return f"trial:{n}"

    def controls(self, *splits: str, average: float = 0.6) -> None:
        for split in splits:
            for subject, quality in (("control:base", 0.2), ("control:expert:add", 0.4), ("control:average", average)):
                self.evaluate(subject, split, quality)

    def board(self, **options) -> lb.Leaderboard:
        return lb.leaderboard(Store.open(self.store.url, "s"), **options)


@pytest.fixture
def study(tmp_path) -> Study:
    return Study(tmp_path / "evomerge.db")


def text_of(board: lb.Leaderboard, width: int = 100) -> str:
    out = io.StringIO()
    lb.render_terminal(board, Console(file=out, width=width))
    return out.getvalue()


def finished(study: Study, winner: float = 0.85, average: float = 0.6) -> str:
    study.controls("search", "select", average=average)
    for search in (0.5, 0.9, 0.7):
        study.trial(search)
    study.evaluate("trial:1", "select", winner)
    study.evaluate("trial:2", "select", winner - 0.1)
    study.controls("test", average=average)
    study.evaluate("trial:1", "test", winner)
    study.store.update_record(rounds=[{"trials": 3, "winner": "trial:1"}])
    return "trial:1"


# Who wins


def test_a_candidate_that_is_high_on_search_and_low_on_select_does_not_win(study):
    study.controls("search", "select")
    planted, honest = study.trial(0.999), study.trial(0.7)
    study.evaluate(planted, "select", 0.3)
    study.evaluate(honest, "select", 0.8)
    board = study.board()
    assert board.winner == honest
    assert [r.subject for r in board.select if r.kind == "candidate"] == [honest, planted]
    assert {r.subject: r.search for r in board.select}[planted] == 0.999


def test_controls_never_win(study):
    finished(study, winner=0.5, average=0.9)
    board = study.board()
    assert board.select[0].subject == "control:average" and board.select[0].rank is None
    assert board.winner == "trial:1" and board.best_control == "control:average"


def test_ties_go_to_the_search_score_then_to_the_lower_number(study):
    a, b, c = study.trial(0.5), study.trial(0.6), study.trial(0.6)
    all_alike = [study.evaluate(s, "select", {"add": 1.1, "topic": 1.1}) for s in (c, b, a, "recommended:3")]
    searched = [Evaluation(f"{e.subject}/search", e.subject, "search", "", {}, None, {}, s)
                for e, s in zip(all_alike, (0.6, 0.6, 0.5, 0.6), strict=True)]  # fmt: skip
    assert lb.choose_winner([*all_alike, *searched]).subject == b
    assert lb.choose_winner(all_alike).subject == a
    assert lb.choose_winner([e for e in all_alike if e.subject.startswith("rec")]).subject == "recommended:3"
    assert lb.choose_winner([]) is None
    assert study.board().winner == b


def test_the_winner_stands_until_the_next_round_is_finished(study):
    finished(study)
    study.trial(0.95)
    study.evaluate("trial:3", "select", 0.99)
    board = study.board()
    assert board.winner == "trial:1" and board.tested is not None
    assert any("trial 3 leads" in note for note in board.notes)
    study.evaluate("trial:3", "test", 0.99)
    board = study.board()
    assert board.winner == "trial:3"
    assert any("read in 2 rounds" in note for note in board.notes)


# How sure


def values(e: Evaluation, task: str) -> np.ndarray:
    return np.array([o.values["acc"] for o in e.outcomes if o.item_id.startswith(f"{task}/")])


def test_scores_and_intervals_are_those_of_the_items(study):
    finished(study)
    e = study.store.evaluation("trial:1/select")
    row = next(r for r in study.board().select if r.subject == "trial:1")
    for task in TASKS:
        k, n = int(values(e, task).sum()), 60
        wilson = stats.binomtest(k, n).proportion_ci(method="wilson")
        t = row.tasks[task]
        assert (t.value, t.low, t.high, t.num_items) == (pytest.approx(k / n), wilson.low, wilson.high, n)
    assert row.score.value == e.objective
    assert row.score.low < e.objective < row.score.high


def test_the_difference_on_test_is_paired_and_weighted_by_the_objective(study):
    finished(study)
    d = study.board().tested
    one, other = study.store.evaluation("trial:1/test"), study.store.evaluation("control:average/test")
    assert d.value == pytest.approx(one.objective - other.objective)
    differences = {t: values(one, t) - values(other, t) for t in TASKS}
    error = sum(
        (share * x.std(ddof=1)) ** 2 / 80 for share, x in ((0.75, differences["add"]), (0.25, differences["topic"]))
    )
    assert d.high - d.low == pytest.approx(2 * stats.t.ppf(0.975, 120) * error**0.5, rel=0.02)
    # Items in common make the paired interval narrower than two independent ones.
    apart = sum(0.75**2 * values(e, "add").var() / 80 + 0.25**2 * values(e, "topic").var() / 80 for e in (one, other))
    assert d.high - d.low < 2 * 1.96 * apart**0.5


def test_only_the_best_control_on_select_is_compared_with(study):
    study.controls("select", average=0.6)
    study.trial(0.9)
    study.evaluate("trial:0", "select", 0.7)
    study.evaluate("trial:0", "test", 0.7)
    for subject, quality in (("control:base", 0.95), ("control:average", 0.5)):  # test must not choose
        study.evaluate(subject, "test", quality)
    board = study.board()
    assert board.best_control == "control:average" and board.tested.value > 0
    assert next(r for r in board.select if r.subject == "control:average").difference is None


def test_the_minimum_of_tasks_is_compared_by_a_paired_bootstrap(tmp_path):
    study = Study(tmp_path / "m.db", objective="min")
    finished(study)
    board = study.board()
    assert board.tested.test == "bootstrap" and board.tested.p < 0.01
    row = next(r for r in board.test if r.subject == "trial:1")
    assert row.score.low <= row.score.value <= row.score.high


def test_scores_that_are_no_item_means_need_the_evaluator_for_an_interval(tmp_path):
    study = Study(tmp_path / "f.db", item_mean=False)
    finished(study)
    board = study.board()
    assert board.tested.p is None and board.select[0].score.low is None
    assert "how sure that is cannot be said" in board.verdict
    assert any("not a mean over items" in note for note in board.notes)
    with_it = study.board(aggregate=lambda task, outcomes: sum(o.values["acc"] for o in outcomes) / len(outcomes))
    assert with_it.tested.test == "bootstrap" and with_it.tested.low < with_it.tested.value < with_it.tested.high
    assert with_it.select[0].tasks["add"].low is not None


# The verdict


def test_a_clear_gain_is_called_one(study):
    finished(study, winner=0.85, average=0.6)
    board = study.board()
    assert board.tested.p < 0.05
    assert board.verdict.startswith("Trial 1 beats the best control (uniform average) on test by +0.")
    assert ", p < 0.001." in board.verdict


def test_a_gain_that_chance_could_make_is_not(study):
    finished(study, winner=0.615, average=0.6)
    board = study.board()
    if board.tested.value > 0:
        assert board.tested.p > 0.05 and "can be chance" in board.verdict


def test_a_loss_sends_the_user_to_the_control(study):
    finished(study, winner=0.5, average=0.7)
    board = study.board()
    assert board.verdict.startswith("No candidate beats the best control (uniform average)")
    assert board.verdict.endswith("Use the control.")


# Unfinished studies


def test_every_stage_of_a_study_has_a_leaderboard(study):
    assert "No candidate has been evaluated yet (0 proposed)" in text_of(study.board())
    study.trial(0.0, state="running")
    study.trial(0.0, state="fail", failure="timeout: no result within 60 s")
    board = study.board()
    assert "(2 proposed)" in board.verdict
    assert "1 failed (1 timeout)" in board.notes[0] and "1 running" in board.notes[0]
    for _ in range(12):
        study.trial(0.5)
    study.trial(0.8)
    board = study.board()
    assert "trial 14 has the best search score, 0.800, which is optimistic" in board.verdict
    assert len(board.search_only) == 10 and board.search_only[0].subject == "trial:14"
    study.evaluate("trial:14", "select", 0.7)
    board = study.board()
    assert "no control has a score" in board.verdict
    study.controls("select")
    board = study.board()
    assert board.verdict.startswith("Not finished: trial 14 is the best candidate on select")
    assert board.test == () and "trial:14" not in {r.subject for r in board.search_only}
    study.evaluate("trial:14", "test", 0.7)  # killed before the controls were tested
    assert study.board().verdict.startswith("Not finished")


def test_failed_controls_and_retests_are_named_with_their_reason(study):
    study.controls("select")
    study.trial(0.9)
    study.store.log_attempt("control:expert:add/search", 1, "lost", "worker died")
    study.store.log_attempt("control:expert:add/search", 2, "complete")
    study.store.log_attempt("control:random/search", 1, "nan", "task add: a score is nan")
    study.store.log_attempt("trial:0/select", 1, "memory", "out of memory")
    study.store.log_attempt("trial:0/search", 1, "started")
    board = study.board()
    assert dict(board.failed) == {
        "random vectors": "nan on search: task add: a score is nan",
        "trial 0": "memory on select: out of memory",
    }
    assert {r.subject: r.failures for r in board.select}["control:expert:add"] == 1
    assert "random vectors failed: nan on search" in text_of(board)


# As text


@pytest.mark.parametrize("width", [100, 60])
@pytest.mark.parametrize("num_tasks", [1, 2, 7])
def test_the_terminal_table_fits_its_width(tmp_path, width, num_tasks):
    tasks = {f"a rather long task name [{i}]": 1.0 for i in range(num_tasks)}
    items = [Item(f"{t}/{s}/{i}", t, "x", split=s) for t in tasks for s in SIZES for i in range(5)]
    study = Study(tmp_path / "w.db", tasks=tasks, items=items, name="a study [bold]with brackets[/bold]")
    study.controls("search", "select", "test")
    groups = [{"weights": {f"expert number {e}": 0.1 * g for e in range(5)}} for g in range(4)]
    study.trial(0.5)
    for split in ("select", "test"):
        study.evaluate("trial:0", split, 0.9, recipe={"method": "ties", "params": {"density": 0.5}, "groups": groups})
    text = text_of(study.board(), width)
    assert max(map(len, text.splitlines())) <= width
    assert "[bold]" in text
    flat = "".join(text.split())
    assert "ties(density=0.50)" in flat and "expertnumber40.00/0.10/0.20/0.30" in flat
    for task in tasks if num_tasks > 1 else ():
        assert "".join(task.split())[-3:] in flat


def test_all_forms_hold_the_same_numbers(study):
    finished(study)
    study.store.log_attempt("trial:1/search", 1, "lost", "worker died")
    board = study.board()
    data = json.loads(lb.to_json(board))
    assert data["evomerge_leaderboard"] == 1
    assert set(data) == {
        "evomerge_leaderboard", "study", "tasks", "objectives", "constraints", "select", "test", "search_only",
        "failed", "front", "winner", "best_control", "tested", "surgery", "verdict", "notes",
    }  # fmt: skip
    assert set(data["select"][0]) == {
        "rank", "subject", "name", "kind", "score", "objectives", "misses", "tasks", "difference", "search", "failures",
        "merge",
    }  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(lb.to_csv(board))))
    assert [r["subject"] for r in rows if r["section"] == "select"] == [r["subject"] for r in data["select"]]
    by_key = {(r["section"], r["subject"]): r for r in rows}
    for r in data["test"]:
        assert float(by_key["test", r["subject"]]["score"]) == r["score"]["value"]
        assert float(by_key["test", r["subject"]]["add:low"]) == r["tasks"]["add"]["low"]
    assert by_key["select", "trial:1"]["winner"] == "1" and by_key["select", "trial:1"]["failures"] == "1"
    assert float(by_key["test", "trial:1"]["p"]) == data["tested"]["p"]
    winner = next(r for r in data["select"] if r["subject"] == data["winner"])
    shown = f"{winner['score']['value']:.3f}"
    markdown = lb.to_markdown(board)
    assert shown in text_of(board) and shown in markdown
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    widths = {line.replace("\\|", "").count("|") for line in tables[: 2 + len(board.select)]}
    assert len(widths) == 1
    assert board.verdict in text_of(board, 400)


def test_coefficients_in_short():
    def groups(*weights):
        return {
            "method": "ties",
            "params": {"density": 0.5, "sign": "mass"},
            "groups": [{"weights": {"a": w}} for w in weights],
        }

    assert lb.merge_in_short(groups(0.25)) == "ties(density=0.50, sign=mass) a 0.25"
    assert lb.merge_in_short({**groups(0.004), "params": {"lr": 1.2e-5}}) == "ties(lr=1.2e-05) a 0.004"
    assert lb.merge_in_short(groups(0.25, 0.25)) == "ties(density=0.50, sign=mass) a 0.25"
    assert lb.merge_in_short(groups(0.1, 0.2)) == "ties(density=0.50, sign=mass) a 0.10/0.20"
    assert lb.merge_in_short(groups(0.1, 0.5, 0.9, 0.2, 0.3)) == "ties(density=0.50, sign=mass) a 0.10..0.90"


# Constraints and several objectives


def test_what_misses_a_constraint_is_marked_and_the_verdict_says_when_all_do(tmp_path):
    study = Study(tmp_path / "c.db", objective={"constraints": [{"task": "add", "at_least": 0.9, "of": "base"}]})
    study.store.update_record(references={"control:base": {"add": 0.5, "topic": 0.5}})
    for subject in ("control:base", "control:average"):
        study.evaluate(subject, "select", 0.6)
    high, low = study.trial(0.9), study.trial(0.8)
    study.evaluate(high, "select", {"add": 0.3, "topic": 1.1})
    study.evaluate(low, "select", {"add": 0.4, "topic": 0.1})
    board = study.board()
    rows = {r.subject: r for r in board.select}
    assert board.winner == low and rows[high].score.value > rows[low].score.value
    assert rows[high].misses and rows["control:base"].misses == ()
    assert board.verdict.startswith("No candidate keeps every constraint on select; trial 1 is the nearest")
    assert "trial 0 (infeasible)" in text_of(board, 200) and "trial 0 misses on select: add is" in text_of(board, 200)
    assert max(map(len, text_of(board).splitlines())) <= 100
    by_subject = {r["subject"]: r for r in csv.DictReader(io.StringIO(lb.to_csv(board)))}
    assert by_subject[high]["misses"] == "; ".join(rows[high].misses) != ""
    assert "trial 0 misses on select" in lb.to_markdown(board)


@pytest.mark.parametrize(("objectives", "by_task"), [(["add", "topic"], False), (["mean", "topic"], True)])
def test_objectives_have_tables_of_their_own_and_tasks_that_are_objectives_are_shown_once(
    tmp_path, objectives, by_task
):
    study = Study(tmp_path / "o.db", objective={"of": objectives})
    study.controls("search", "select")
    study.evaluate(study.trial(0.9), "select", {"add": 0.9, "topic": 0.3})
    text = text_of(study.board())
    assert "Select by objective" in text
    assert ("Select by task" in text) == by_task
    assert max(map(len, text.splitlines())) <= 100
