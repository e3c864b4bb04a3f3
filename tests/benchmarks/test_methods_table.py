"""benchmarks/methods_table.py: its rows, that it goes on where it stopped, and that the page says what was found."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from evomerge.launch import Options
from evomerge.leaderboard import leaderboard
from evomerge.methods import METHODS
from evomerge.progress import Progress
from evomerge.spec import Spec
from evomerge.store import Store

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "methods_table.py"

sys.path.insert(0, str(ROOT / "benchmarks"))

import methods_table as table  # noqa: E402


@pytest.mark.parametrize("family", table.FAMILIES, ids=lambda family: family.name)
def test_every_method_has_an_experiment_or_a_reason(family):
    for method in METHODS:
        for setting in table.SETTINGS:
            try:
                data = table.experiment(family, method, setting)
            except table.NotForThis as reason:
                assert len(str(reason)) > 10
                continue
            checked = Spec.from_dict(data, family.home, check_files=False)  # raises if a space does not fit its method
            assert checked.seed == 0
            assert checked.search.budget == (1 if setting == "default" else family.budget)


def test_spaces_start_from_the_defaults_and_hold_them():
    for method in METHODS.values():
        space = table.space(method, "search", 3)
        assert space["weights"]["initial"] == method.weight.default
        low, high = space["weights"]["range"]
        assert low <= method.weight.default <= high
        for key, how in space["params"].items():
            default = method.params[key].default
            assert how["range"][0] <= how.get("initial", default) <= how["range"][1]


def test_reasons():
    topics, skills = table.FAMILIES
    with pytest.raises(table.NotForThis, match=r"^takes exactly 2 experts, but got 5$"):
        table.experiment(topics, "slerp", "default")
    with pytest.raises(table.NotForThis, match=r"^is of numbers that a search by gradient learns$"):
        table.experiment(topics, "adarank", "default")
    with pytest.raises(table.NotForThis, match=r"^takes LoRA adapters only$"):
        table.experiment(topics, "lorahub", "search")
    assert table.experiment(skills, "lorahub", "search")["space"]["method"] == "lorahub"


def test_where_only_proportions_count_each_expert_has_a_weight():
    assert table.space(METHODS["linear"], "search", 3)["weights"]["granularity"] == "task"
    assert table.space(METHODS["multislerp"], "search", 3)["weights"]["granularity"] == "task"
    assert table.space(METHODS["task_arithmetic"], "search", 3)["weights"]["granularity"] == "global"


@pytest.fixture
def tiny(experiment: Callable[..., Path]):
    """The tiny LoRA family as a family of the table."""
    file = experiment()
    return table.Family("tiny", "Tiny", 4, {"search": 6, "select": 4, "test": 8}, "1h", folder=file.parent)


def without_times(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row.pop("merge_seconds", None)
        row.pop("seconds", None)
    return rows


def run(tiny, results: Path, *methods: str) -> int:
    return table.main(["--results", str(results), "--methods", *methods], [tiny])


@pytest.mark.slow
def test_rows_are_the_studies_and_it_goes_on_where_it_was_killed(tiny, tmp_path: Path, monkeypatch, capsys):
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    assert run(tiny, whole, "ties", "slerp", "passthrough") == 0
    rows = {(row["method"], row["setting"]): row for row in without_times(whole)}
    assert rows["passthrough", "default"]["skipped"] == "takes exactly 1 expert, but got 2"
    assert rows["task_arithmetic", "default"]["test"][1] <= rows["task_arithmetic", "default"]["test"][0]
    controls = {method for method, setting in rows if setting == "control"}
    assert controls >= {"base", "uniform average", "task arithmetic", "random vectors"}

    # A row says what the study's own leaderboard says.
    row = rows["ties", "search"]
    store = Store.open(tiny.store, table.experiment(tiny, "ties", "search")["name"])
    board = leaderboard(store)
    (winner,) = [r for r in board.test if r.subject == board.winner]
    assert row["test"] == [round(x, 4) for x in (winner.score.value, winner.score.low, winner.score.high)]
    assert row["difference"][0] == round(winner.difference.value, 4)
    assert (row["trials"], row["dimensions"], row["items"]) == (4, 2, 16)
    # The first candidate of a search is the method at its defaults, and was not evaluated again.
    default = Store.open(tiny.store, table.experiment(tiny, "ties", "default")["name"])
    assert store.trials()[0].recipe_hash == default.trials()[0].recipe_hash
    assert store.evaluation("trial:0/search").worker.startswith("as default:0")
    assert store.evaluation("control:base/test").outcomes == default.evaluation("control:base/test").outcomes

    # Stopped in the middle of a row, and the results file torn: a second run ends up with the same rows.
    monkeypatch.setattr(table, "rows_of", lambda *_, **__: pytest.fail("nothing is to be done"))
    assert run(tiny, whole, "ties", "slerp", "passthrough") == 0
    assert "2 rows to do" in capsys.readouterr().err  # the reasons are looked at again
    monkeypatch.undo()
    broken.write_text(whole.read_text()[:-30])
    assert run(tiny, broken, "ties", "slerp", "passthrough") == 0
    assert sorted(map(str, without_times(broken))) == sorted(map(str, without_times(whole)))

    # A fresh clone has the results and no studies: the controls are evaluated again, and nothing else.
    shutil.rmtree(tiny.cache)
    assert run(tiny, broken, "ties", "magmax") == 0
    assert {summary["name"].split(".")[1] for summary in Store.names(tiny.store)} == {"task_arithmetic", "magmax"}
    assert table.Results(broken).find("tiny", "magmax", "default")["test"]
    text = table.page(table.Results(broken).rows, [tiny])
    assert "| `ties` | " in text
    assert "`passthrough` takes exactly 1 expert, but got 2" in text


@pytest.mark.slow
def test_a_method_that_no_space_takes_is_its_studys_only_candidate(experiment: Callable[..., Path], tmp_path: Path):
    tasks = {f"expert{t}": {"file": f"expert{t}.txt"} for t in range(2)}
    file = experiment(evaluate={"with": "evaluators/perplexity.py", "tasks": tasks, "split": {"search": 6}})
    for t, name in enumerate(tasks):
        lines = ["a" * (i % 5 + 1) + "bcde"[t + i % 3] * (i % 7 + 2) + str(i) for i in range(30)]
        (file.parent / f"{name}.txt").write_text("\n\n".join(lines))
    texts = table.Family("tiny", "Tiny", 4, {"search": 6, "select": 4, "test": 8}, "1h", folder=file.parent)
    results = tmp_path / "rows.jsonl"
    assert table.main(["--results", str(results), "--methods", "regmean_pp"], [texts]) == 0
    rows = {row["setting"]: row for row in without_times(results) if row["method"] == "regmean_pp"}
    assert "failed" not in rows["default"], rows["default"]["failed"]
    assert rows["default"]["merge"].startswith("regmean_pp(")
    assert rows["default"]["trials"] == 1
    assert rows["search"]["skipped"] == "is a merge by a recipe, not in a space"
    tested = Store.open(texts.store, table.experiment(texts, "regmean_pp", "default")["name"]).evaluation(
        "trial:0/test"
    )
    assert tested.recipe["method"] == "regmean_pp"
    assert list(tested.recipe["statistics"]["sha256"]) == ["gram_merged"]


@pytest.mark.slow
def test_studies_of_other_inputs_are_not_mixed(tiny):
    progress, options = Progress(quiet=True), Options(storage=tiny.store)
    table.run(tiny, "task_arithmetic", "default", progress)
    other = replace(tiny, split={"search": 5, "select": 4, "test": 8})
    data = table.experiment(other, "ties", "default")
    given = Spec.from_dict(data, tiny.home)
    with pytest.raises(SystemExit, match="other inputs"):
        table.hand_over(tiny, "ties", "default", given, options, progress)


def test_what_settings_change_is_run_again(tiny):
    row = table.experiment(tiny, "ties", "search")
    done = {"settings": table.settings_of(row), "test": [0.5, 0.4, 0.6]}
    assert table.is_done(done, tiny, "ties", "search")
    assert not table.is_done(done, replace(tiny, budget=5), "ties", "search")
    for without in ({"skipped": "why"}, {"failed": "why"}):
        assert not table.is_done({"settings": done["settings"], **without}, tiny, "ties", "search")
    assert not table.is_done(None, tiny, "ties", "search")


def test_the_page_says_what_the_results_say():
    text = (ROOT / "docs" / "methods.md").read_text()
    between = text.partition(table.BEGIN)[2].partition(table.END)[0]
    assert between == "\n" + table.page(table.Results(table.RESULTS).rows)


def test_cells():
    row = {"test": [0.5, 0.45, 0.55], "difference": [0.02, 0.001, 0.04, 0.0004], "trial": 3, "trials": 6, "failures": 1}
    row["merge"] = "ties(density=0.20, mode=mean, normalize=False, scale=1.00, scope=tensor) a 0.60, b 0.60"
    assert table.interval(row) == ".500 [.450, .550]"
    assert table.versus(row) == "**+.020 [+.001, +.040]**"
    assert table.p_value(row) == "< .001"
    assert table.found(row) == "density 0.20, weight 0.60 (4 of 6, 1 failed)"
    assert table.found(row | {"trial": 0, "failures": 0}) == "the defaults (1 of 6)"
    assert table.in_short("linear(normalize=True) a 0.20, b -1.30") == "a 0.20, b -1.30"
    assert table.in_short("task_arithmetic(scale=0.50) a 1.00, b 0.00") == "scale 0.50, a 1.00"
    assert table.in_short("passthrough a 1.00") == "weight 1.00"
    assert table.interval({}) == "-"
    assert table.short(-0.25, sign=True) == "-.250"
    assert table.short(1.0) == "1.000"
