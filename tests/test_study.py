"""The study loop on a real tiny family: schedules, retries, crashes at every store write, finish."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from evomerge.errors import Interrupted, UserError
from evomerge.evaluation import Outcome
from evomerge.launch import Options, aggregate_of, run_study, sqlite_url
from evomerge.leaderboard import leaderboard
from evomerge.mirror import Mirror
from evomerge.planning import build_plan
from evomerge.pools import Failure, Job, Result, WorkerSpec
from evomerge.progress import Progress
from evomerge.recipe import Recipe
from evomerge.showing import show_trial
from evomerge.spec import load_spec
from evomerge.store import Store
from evomerge.study import NothingCompleted, idle_workers
from evomerge.worker import Worker

# Looks at the merged weights only: real merges, and hundreds of evaluations a second.
EVALUATOR = """
import torch

def items():
    return [{"task": task, "text": f"{task} {i}"} for task in ("one", "two") for i in range(12)]

def score(model, tokenizer, items):
    scores = []
    for item in items:
        task, number = item["text"].split()
        layer = model.model.layers[int(number) % 4]
        weight = layer.self_attn.q_proj.weight if task == "one" else layer.mlp.up_proj.weight
        scores.append(-float((weight[int(number)].double() * 1000).sum().abs() + weight.double().pow(2).sum()))
    return scores
"""

# The same items, but a task is worth its worst one.
WORST = f"""{EVALUATOR}

from types import SimpleNamespace
from evomerge.evaluation import FunctionEvaluator

class Worst(FunctionEvaluator):
    def __init__(self, context):
        super().__init__(context, SimpleNamespace(**globals()), "score")

    def aggregate(self, task, outcomes):
        return min(outcome.values["score"] for outcome in outcomes)

    def is_item_mean(self, task):
        return False
"""

BUDGET = 14


class ShuffledPool:
    """Real workers' results in a random order, with faults on demand: a pool that a test can steer.

    Args:
        slots: how many jobs run at the same time.
        faults: (key, attempt) -> what comes back instead of the worker's own result.
    """

    worker: Worker | None = None  # shared: an outcome is a function of recipe and item

    def __init__(self, slots: int = 1, order_seed: int = 0, faults: Callable[[Job], Result | None] | None = None):
        self.slots, self.random, self.faults = slots, random.Random(order_seed), faults
        self.jobs: list[Job] = []
        self.submitted: list[Job] = []
        self.extra: list[Result] = []

    def start(self, spec: WorkerSpec) -> None:
        if ShuffledPool.worker is None or ShuffledPool.worker.spec != spec:
            ShuffledPool.worker = Worker(spec)

    def idle(self) -> int:
        return self.slots - len(self.jobs)

    def submit(self, job: Job) -> None:
        assert self.idle() > 0
        self.jobs.append(job)
        self.submitted.append(job)

    def wait(self, seconds: float) -> list[Result]:
        if self.extra:
            late, self.extra = self.extra, []
            return late
        if not self.jobs:
            return []
        job = self.jobs.pop(self.random.randrange(len(self.jobs)))
        fault = self.faults(job) if self.faults else None
        if fault is not None:
            return [fault]
        assert self.worker is not None
        return [self.worker.evaluate(job)]

    def close(self) -> None:
        self.jobs.clear()


def lost(job: Job) -> Result:
    return Result(job.key, job.attempt, None, Failure("lost", "the worker was killed (SIGKILL)"))


@pytest.fixture
def write(experiment: Callable[..., Path]) -> Callable[..., Path]:
    """An experiment file of the tiny family with the weights evaluator."""

    def make(**keys) -> Path:
        search = {"method": "cma", "budget": BUDGET, "population": 4, **keys.pop("search", {})}
        if search["method"] != "cma":
            del search["population"]
        split = {"search": 4, "select": 4, "test": 4}
        evaluate = {"with": "my_eval.py@score", "tasks": {"one": {}, "two": {}}, "split": split}
        evaluate["finish"] = {"top": 3, "sweep": [0.5, 1.0]}
        path = experiment(search=search, evaluate=evaluate, **keys)
        (path.parent / "my_eval.py").write_text(EVALUATOR)
        return path

    return make


def run(path: Path, pool: ShuffledPool | None = None, *, store: str = "study.db", **options) -> Store:
    storage = sqlite_url(path.parent / store)
    pool = pool or ShuffledPool()
    return run_study(load_spec(path), Options(storage=storage, **options), Progress(quiet=True), make_pool=lambda: pool)


def trajectory(store: Store) -> list[tuple]:
    return [(t.n, t.state, dict(t.point), t.score, t.failure) for t in store.trials()]


def scores(store: Store) -> dict[str, float]:
    return {e.key: e.objective for e in store.evaluations()}


@pytest.mark.parametrize("method", ["cma", "tpe", "random"])
@pytest.mark.parametrize("slots", [2, 4])
def test_the_reproducible_schedule_gives_one_study_whatever_the_workers_and_the_order(write, method, slots):
    path = write(search={"method": method})
    alone = run(path, store="alone.db")
    shuffled = run(path, ShuffledPool(slots, order_seed=slots), store="shuffled.db")
    assert len(alone.trials()) == BUDGET
    assert trajectory(shuffled) == trajectory(alone)
    assert scores(shuffled) == scores(alone)


def test_a_search_begins_with_merges_of_other_studies_recipes_and_controls(write, tmp_path):
    """And resumes with the same ones, whatever has become of where they came from."""
    first = run(write(name="first", folder="one", search={"method": "random", "budget": 6}))
    best = max(first.trials(), key=lambda t: t.merit)
    (tmp_path / "two.yaml").write_text(Recipe.from_dict(first.trials()[3].recipe).to_yaml())
    initial = [
        {"from": f"first:{best.n}"},
        {"recipe": "../two.yaml"},
        {"control": "average"},
        {"control": "expert:expert1"},
        {"from": f"first:{best.n}"},
    ]
    path = write(name="second", folder="two", search={"budget": 4, "initial": initial})
    store = tmp_path / "one" / "study.db"
    run(path, store=store)
    (tmp_path / "two.yaml").unlink()
    second = run(path, store=store, budget="6")
    points = [dict(t.point) for t in second.trials()]
    assert points[:2] == [best.point, first.trials()[3].point]
    assert set(points[2].values()) == {0.5}
    assert points[3] == {d: float(d.startswith("expert1")) for d in points[3]}
    assert len(points) == 6 and len(first.trials()) == 6


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"from": "nothing:3"}, "'nothing'"),
        ({"from": "best"}, "STUDY:TRIAL"),
        ({"recipe": "none.yaml"}, "none.yaml"),
        ({"control": "expert:expert7"}, "expert:expert1"),
        ({"control": "average", "recipe": "x"}, "exactly one"),
        ({"control": "task_aritmetic"}, "task_arithmetic"),
    ],
    ids=str,
)
def test_a_start_that_is_not_there_is_named(write, entry, words):
    with pytest.raises(UserError, match=words) as raised:
        run(write(search={"initial": [{"control": "average"}, entry]}))
    assert "search.initial" in str(raised.value) and "1" in str(raised.value)


def test_a_search_begins_with_the_best_single_weight_of_its_own_sweep(write):
    """Known after the controls, kept in the record; entries that are the same point count once."""
    initial = [{"control": "task_arithmetic"}, {"control": "average"}, {"control": "base"}]
    path = write(search={"budget": 6, "initial": initial})
    store = run(path)
    best = max((e.objective, -float(e.subject[6:])) for e in store.evaluations("search") if e.subject[:6] == "sweep:")
    expected = [-best[1], 0.5, 0.0] if best[1] != -0.5 else [0.5, 0.0]
    assert [set(t.point.values()) for t in store.trials()[: len(expected)]] == [{weight} for weight in expected]
    assert [set(point.values()) for point in store.record["starts"]] == [{weight} for weight in expected]
    assert len(store.trials()) == 6


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"method": "task_arithmetic", "weights": {"granularity": "task", "range": [0.1, 1.0]}}, "one at 0.1"),
        ({"method": "linear", "weights": {"granularity": "task", "range": [0.0, 1.0]}}, "linear"),
    ],
    ids=["out of bounds", "a mean"],
)
def test_a_search_begins_with_the_base_only_where_the_space_holds_it(write, space, words):
    with pytest.raises(UserError, match=words) as raised:
        run(write(space=space, search={"initial": [{"control": "base"}]}))
    assert "search.initial[0]" in str(raised.value)


@pytest.mark.parametrize(("needs_base", "words"), [(True, None), (False, "no merge by plug.py@Plug")])
def test_a_search_by_a_plug_in_begins_with_the_base_where_the_plug_in_adds_to_it(write, needs_base, words):
    space = {"method": "plug.py@Plug", "weights": {"granularity": "task", "range": [0.0, 1.0]}}
    path = write(space=space, search={"budget": 2, "method": "random", "initial": [{"control": "base"}]})
    path.with_name("plug.py").write_text(
        f"# {path}\nfrom evomerge.methods.basic import TaskArithmetic\n"
        f"class Plug(TaskArithmetic):\n    name = 'plug'\n    needs_base = {needs_base}\n"
    )
    if words is None:
        assert set(run(path).trials()[0].point.values()) == {0.0}
    else:
        with pytest.raises(UserError, match=words):
            run(path)


@pytest.mark.parametrize("slots", [1, 3])
def test_a_soup_ends_by_itself_and_keeps_what_does_not_get_worse(write, slots):
    """Two experts: each alone, then both; nothing comes after that, whatever the budget."""
    space = {"method": "linear", "weights": {"granularity": "task", "range": [0.0, 1.0]}}
    store = run(write(space=space, search={"method": "soup"}), ShuffledPool(slots))
    assert [tuple(t.point.values()) for t in store.trials()] == [(1, 0), (0, 1), (0.5, 0.5)]


@pytest.mark.parametrize("method", ["soup", "coordinate"])
def test_searchers_that_need_an_order_refuse_the_asynchronous_schedule(write, method):
    space = {"method": "linear", "weights": {"granularity": "task", "range": [0.0, 1.0]}}
    with pytest.raises(UserError, match="reproducible") as raised:
        run(write(space=space, search={"method": method, "schedule": "asynchronous"}))
    assert "search.method" in str(raised.value) and "tpe" in str(raised.value)


def test_a_grid_ends_the_search_when_all_of_it_was_tried(write):
    """2 experts x 2 groups with 2 values each, and the initial point between them."""
    store = run(write(search={"method": "grid", "steps": 2, "budget": 30}))
    assert len(store.trials()) == 1 + 2**4
    assert len({t.recipe_hash for t in store.trials()}) == 1 + 2**4
    assert store.evaluations("test")


@pytest.mark.parametrize(
    ("search", "most"),
    [
        ({"method": "cma", "population": 6}, 6),
        ({"method": "tpe", "window": 3}, 3),
        ({"method": "random"}, BUDGET),
        ({"method": "cma", "schedule": "asynchronous"}, BUDGET),
    ],
)
def test_workers_that_the_search_cannot_keep_busy_are_told_of(write, search, most):
    plan = build_plan(load_spec(write(search=search)), Progress(quiet=True))
    assert idle_workers(plan, most) is None
    assert f"at most {most} candidates" in str(idle_workers(plan, most + 1))


def test_a_result_costs_no_walk_over_all_trials(write, monkeypatch):
    walks = []

    class Walked(list):
        def __iter__(self):
            walks.append(len(self))
            return super().__iter__()

    read = Store.trials
    monkeypatch.setattr(Store, "trials", lambda store: Walked(read(store)))
    counts = {}
    for budget in (2, 10):
        walks.clear()
        store = run(write(folder=str(budget), search={"method": "random", "budget": budget}))
        assert len(read(store)) == budget
        counts[budget] = len(walks)
    assert counts[2] == counts[10]


def test_a_score_that_is_no_mean_gets_its_interval_while_its_evaluator_is_there_unchanged(write):
    path = write(search={"method": "random", "budget": 2})
    evaluator = path.parent / "my_eval.py"
    evaluator.write_text(WORST)
    path.write_text(path.read_text().replace("my_eval.py@score", "my_eval.py"))
    store = run(path)
    aggregate = aggregate_of(store)
    base = store.evaluation("control:base/select")
    assert aggregate is not None and base.outcomes is not None
    ones = [o for o in base.outcomes if store.item_tasks()[o.item_id] == "one"]
    assert aggregate("one", ones) == min(o.values["score"] for o in ones) == base.scores["one"]
    score = leaderboard(store, aggregate=aggregate).select[0].score
    assert score is not None and score.low is not None and score.high is not None
    assert score.low <= score.value <= score.high

    evaluator.write_text(f"import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n{WORST}")
    assert aggregate_of(store) is None
    assert not evaluator.with_name("ran").exists()  # reading a leaderboard runs no code that the study did not run
    evaluator.unlink()
    assert aggregate_of(store) is None


CHOICE = {
    "method": {"choices": ["task_arithmetic", "ties"]},
    "params": {
        "ties": {"density": {"range": [0.1, 1.0], "log": True, "initial": 0.5}, "mode": {"choices": ["mean", "sum"]}}
    },
    "weights": {
        "granularity": "layer_module",
        "groups": 2,
        "range": [0.0, 2.0],
        "initial": 1.0,
        "fixed": {"expert1": 1},
    },
}


@pytest.mark.parametrize("method", ["tpe", "random", "grid"])
def test_methods_words_and_factors_are_searched_stored_and_resumed(write, die, method):
    """Optuna's copy has the same parameters, of the trial's own method only."""
    path = write(space=CHOICE, search={"method": method})
    whole = run(path)
    methods = {t.point["method"] for t in whole.trials()}
    assert methods == {t.recipe["method"] for t in whole.trials()} == {"task_arithmetic", "ties"}
    for trial in whole.trials():
        own = {"ties.density", "ties.mode"} & set(trial.point)
        assert own == ({"ties.density", "ties.mode"} if trial.point["method"] == "ties" else set())
    study = optuna.load_study(study_name="tiny", storage=sqlite_url(path.parent / "study.db"))
    assert [t.params for t in study.trials] == [dict(t.point) for t in whole.trials()]
    assert show_trial(whole, "3").count("method") >= 2
    again = crash_again_and_again(write(space=CHOICE, search={"method": method}, folder="again"), die, range(1, 40, 3))
    assert trajectory(again) == trajectory(whole)


class Crash(BaseException):
    """The driver dies here: not an Exception, so that nothing tidies up after it."""


WRITES = (
    "add_trial", "save_evaluation", "finish_trial", "log_attempt", "log_event", "update_record", "bind_objective",
    "save_training",
)  # fmt: skip


@pytest.fixture
def die(monkeypatch) -> Callable[[int], None]:
    """``die(k)``: the process is gone at the k-th store write from now, before it (even k) or after it (odd k)."""
    counter = {"left": 10**9, "after": False}

    def dying(original):
        def write_or_die(self, *args, **kwargs):
            counter["left"] -= 1
            if counter["left"] == 0 and not counter["after"]:
                raise Crash
            result = original(self, *args, **kwargs)
            if counter["left"] == 0:
                raise Crash
            return result

        return write_or_die

    for name in WRITES:
        monkeypatch.setattr(Store, name, dying(getattr(Store, name)))
    return lambda k: counter.update(left=k, after=bool(k % 2))


def crash_again_and_again(path: Path, die: Callable[[int], None], steps: range) -> Store:
    """Run into a crash at every step, resume into the next, and then to the end."""
    crashes = 0
    for step in steps:
        die(step)
        try:
            run(path, ShuffledPool(2, order_seed=step), store="crashed.db")
        except Crash:
            crashes += 1
    die(10**9)
    assert crashes >= 8
    return run(path, ShuffledPool(2), store="crashed.db")


BASE_AT_LEAST = {"task": "all", "at_least": 0.95, "of": "base"}


def task_of(item_id: str, store: Store) -> str:
    return store.item_tasks()[item_id]


@pytest.mark.parametrize(
    "search",
    [
        {"method": "cma", "initial": [{"control": "task_arithmetic"}, {"control": "average"}]},
        {"method": "tpe"},
        {"method": "coordinate"},
    ],
    ids=lambda search: search["method"],
)
def test_a_driver_that_dies_around_any_store_write_resumes_as_if_it_had_not(write, die, search):
    path = write(search={"budget": 8, **search})
    whole = run(path, store="whole.db")
    resumed = crash_again_and_again(path, die, range(2, 15))
    assert trajectory(resumed) == trajectory(whole)
    assert scores(resumed) == scores(whole)


RELATIVE = {
    "normalize": "expert",
    "experts": {"one": "expert0", "two": "expert1"},
    "constraints": [{"task": "all", "at_least": 0.9, "of": "best_expert"}],
}


@pytest.mark.parametrize(
    ("search", "objective"),
    [
        ({"method": "nsga2", "population": 4}, {"of": ["one", "two"], **RELATIVE}),
        ({"method": "tpe", "n_startup": 3}, {"of": ["min", "two"], **RELATIVE}),
        ({"method": "cma"}, {"of": "mean", **RELATIVE}),
    ],
    ids=["nsga2", "tpe", "cma"],
)
def test_references_and_objectives_survive_deaths_around_any_store_write(write, die, search, objective):
    path = write(search={"budget": 8, **search}, objective=objective)
    whole = run(path, store="whole.db")
    resumed = crash_again_and_again(path, die, range(2, 15))
    assert [(t.values, t.margins) for t in resumed.trials()] == [(t.values, t.margins) for t in whole.trials()]
    assert trajectory(resumed) == trajectory(whole)
    assert scores(resumed) == scores(whole)
    assert resumed.record["references"] == whole.record["references"]
    copy = Mirror.of_record(resumed.database, "tiny", resumed.record).start().storage.get_all_trials(1)
    assert [tuple(t.values) for t in copy] == [t.values or (t.score,) for t in whole.trials()]
    assert [tuple(t.constraints.values()) for t in copy] == [t.margins for t in whole.trials()]


def test_a_reference_that_fails_ends_the_study_and_a_resume_says_so_again(write):
    path = write(objective={"normalize": "expert", "experts": {"one": "expert0", "two": "expert1"}})

    def fault(job: Job) -> Result | None:
        if job.key == "control:expert:expert1/search":
            return Result(job.key, job.attempt, None, Failure("nan", "the score of item x is nan"))
        return None

    for pool in (ShuffledPool(faults=fault), ShuffledPool()):
        with pytest.raises(NothingCompleted, match=r"relative to expert:expert1.*score of item x is nan"):
            run(path, pool)
    store = Store.open(sqlite_url(path.parent / "study.db"), "tiny")
    assert not store.trials() and "references" not in store.record


def test_a_reference_of_0_ends_the_study_before_the_search(write):
    path = write(objective={"of": "one", "normalize": "expert", "experts": {"one": "expert0"}})
    evaluator = path.parent / "my_eval.py"
    evaluator.write_text(evaluator.read_text().replace("return scores", "return [0.0 for _ in scores]"))
    for _ in range(2):
        with pytest.raises(UserError, match=r"expert0, the own expert of task 'one', scores 0"):
            run(path)


def test_one_that_misses_a_constraint_on_select_does_not_win(write):
    """Planted: the best on search by far, which keeps everything there, falls below the base on the select items."""
    path = write(search={"method": "random", "budget": 6}, objective={"constraints": [BASE_AT_LEAST]})
    whole = run(path, store="whole.db")
    base = {split: whole.scores(split)["control:base"] for split in ("search", "select")}

    def planted(job: Job) -> Result | None:
        subject, _, split = job.key.partition("/")
        if not subject.startswith("trial:") or split == "test":
            return None
        lift = dict.fromkeys(base[split], 2.0 if subject == "trial:3" else 1.0)
        if subject == "trial:3" and split == "select":  # the highest mean by far, with one task below the base
            size = abs(base[split]["two"])
            lift = {"one": 10 * size, "two": -size}
        tasks = {i: task_of(i, whole) for i in job.item_ids}
        values = [Outcome(i, {"score": base[split][task] + lift[task]}) for i, task in tasks.items()]
        return Result(job.key, job.attempt, tuple(values), None)

    store = run(path, ShuffledPool(faults=planted))
    board = leaderboard(store)
    rows = {row.subject: row for row in board.select}
    values = {s: r.score.value for s, r in rows.items() if r.kind == "candidate" and r.score is not None}
    top = rows[max(values, key=lambda s: values[s])]
    assert (top.subject, top.misses != ()) == ("trial:3", True)
    assert max(store.trials(), key=lambda t: t.merit).n == 3 and store.trials()[3].violation == 0
    assert board.winner != "trial:3" and rows[str(board.winner)].misses == ()
    assert [s for s, r in rows.items() if r.kind == "candidate"][-1] == "trial:3"
    assert store.record["rounds"][-1]["winner"] == board.winner


@pytest.mark.parametrize("method", ["cma", "tpe"])
def test_an_asynchronous_study_survives_deaths_around_any_store_write(write, die, method):
    path = write(search={"method": method, "budget": 8, "schedule": "asynchronous"})
    resumed = crash_again_and_again(path, die, range(2, 15))
    assert [(t.n, t.state) for t in resumed.trials()] == [(n, "complete") for n in range(8)]
    tells = [n for kind, n in resumed.events() if kind == "tell"]
    assert sorted(tells) == list(range(8))


def test_a_lost_worker_costs_an_attempt_and_changes_nothing(write):
    path = write()
    whole = run(path, store="whole.db")

    def fault(job: Job) -> Result | None:
        return lost(job) if job.attempt == 1 and job.key in ("trial:3/search", "trial:9/search") else None

    pool = ShuffledPool(2, faults=fault)
    disturbed = run(path, pool, store="disturbed.db")
    assert trajectory(disturbed) == trajectory(whole)
    assert [j.attempt for j in pool.submitted if j.key == "trial:3/search"] == [1, 2]
    states = [(a.attempt, a.state) for a in disturbed.attempts("trial:3/search")]
    assert states == [(1, "started"), (1, "lost"), (2, "started"), (2, "complete")]


def test_a_candidate_that_loses_every_worker_fails_after_the_stated_retries(write):
    path = write(workers={"retries": 1})
    pool = ShuffledPool(faults=lambda job: lost(job) if job.key == "trial:2/search" else None)
    store = run(path, pool)
    trial = store.trials()[2]
    assert (trial.state, trial.score) == ("fail", None)
    assert trial.failure is not None and "lost its worker 2 times" in trial.failure and "SIGKILL" in trial.failure
    assert [j.attempt for j in pool.submitted if j.key == "trial:2/search"] == [1, 2]
    assert len(store.trials()) == BUDGET


def test_a_failed_candidate_is_not_retried_does_not_rank_and_does_not_stop_the_search(write):
    def fault(job: Job) -> Result | None:
        n = job.key.removeprefix("trial:").partition("/")[0]
        if job.key.startswith("trial:") and job.key.endswith("/search") and int(n) % 2:
            return Result(job.key, job.attempt, None, Failure("nan", "the score of item x is nan"))
        return None

    path = write()
    pool = ShuffledPool(2, faults=fault)
    store = run(path, pool)
    trials = store.trials()
    assert [t.state for t in trials] == ["complete", "fail"] * (BUDGET // 2)
    assert all(t.failure == "nan: the score of item x is nan" for t in trials[1::2])
    assert len([j for j in pool.submitted if j.key.startswith("trial:") and j.key.endswith("/search")]) == BUDGET
    finalists = {e.subject for e in store.evaluations("select") if e.subject.startswith("trial:")}
    assert finalists and all(int(s.removeprefix("trial:")) % 2 == 0 for s in finalists)
    # A failure stays one when the study is opened again.
    again = ShuffledPool()
    run(path, again)
    assert again.submitted == []


def test_the_same_result_twice_and_a_result_after_the_end_are_ignored(write):
    path = write()
    whole = run(path, store="whole.db")

    class Stuttering(ShuffledPool):
        """Says every result twice, the second time when others may have come in between."""

        def wait(self, seconds: float) -> list[Result]:
            second_time = bool(self.extra)
            results = super().wait(seconds)
            self.extra = [] if second_time else list(results)
            return results

    stuttering = run(path, Stuttering(2), store="twice.db")
    assert trajectory(stuttering) == trajectory(whole)


def test_all_candidates_failing_ends_with_the_reason(write):
    def fault(job: Job) -> Result | None:
        failed = job.key.startswith("trial:")
        return Result(job.key, job.attempt, None, Failure("error", "no such luck")) if failed else None

    path = write()
    with pytest.raises(NothingCompleted, match="no such luck"):
        run(path, ShuffledPool(faults=fault))


def test_a_base_that_cannot_be_evaluated_ends_the_run_before_the_search(write):
    path = write()
    pool = ShuffledPool(faults=lambda job: Result(job.key, job.attempt, None, Failure("error", "broken evaluator")))
    with pytest.raises(NothingCompleted, match="broken evaluator"):
        run(path, pool)
    assert not any(job.key.startswith("trial:") for job in pool.submitted)


@pytest.mark.parametrize("method", ["cma", "tpe", "random"])
def test_a_larger_budget_later_gives_what_it_would_have_given_at_once(write, method):
    path = write(search={"method": method, "budget": 10})
    run(path, store="grown.db")
    grown = run(path, store="grown.db", budget="+7")
    whole = run(path, store="whole.db", budget="17")
    assert len(grown.trials()) == 17
    assert trajectory(grown) == trajectory(whole)
    assert [r["trials"] for r in grown.record["rounds"]] == [10, 17]


def test_a_stop_drains_and_the_study_resumes_as_if_uninterrupted(write):
    path = write()
    whole = run(path, store="whole.db")

    class Stopping(ShuffledPool):
        def wait(self, seconds: float) -> list[Result]:
            results = super().wait(seconds)
            if any(r.key == "trial:6/search" for r in results):
                Store.open(sqlite_url(path.parent / "stopped.db"), "tiny").request_stop()
            return results

    import evomerge.running

    poll, evomerge.running.STOP_POLL_SECONDS = evomerge.running.STOP_POLL_SECONDS, 0.0
    try:
        with pytest.raises(Interrupted):
            run(path, Stopping(2), store="stopped.db")
    finally:
        evomerge.running.STOP_POLL_SECONDS = poll
    halfway = Store.open(sqlite_url(path.parent / "stopped.db"), "tiny").trials()
    assert 6 < len(halfway) < BUDGET
    assert all(t.state == "complete" for t in halfway)  # drained
    assert trajectory(run(path, store="stopped.db")) == trajectory(whole)


def test_the_asynchronous_schedule_replays_its_own_log(write, monkeypatch):
    """After a crash the searcher has been told the same trials in the same order as before it."""
    path = write(search={"schedule": "asynchronous"})
    told: list[int] = []
    from evomerge.searchers.cma import CMASearcher

    tell = CMASearcher.tell
    monkeypatch.setattr(CMASearcher, "tell", lambda self, trial: (told.append(trial.n), tell(self, trial))[1])

    class Dying(ShuffledPool):
        def wait(self, seconds: float) -> list[Result]:
            if len(told) >= 9:
                raise Crash
            return super().wait(seconds)

    with pytest.raises(Crash):
        run(path, Dying(4, order_seed=3))
    before, told[:] = list(told), []
    store = run(path, ShuffledPool(4, order_seed=4))
    assert before != sorted(before)  # they did come out of order
    assert told[: len(before)] == before
    assert sorted(told) == list(range(BUDGET))
    assert [t.state for t in store.trials()] == ["complete"] * BUDGET


def test_the_searcher_is_told_the_score_less_the_penalty(write, monkeypatch):
    """Also after a crash; and nobody else is: scores, finalists and winner are without it."""
    from evomerge.searchers.cma import CMASearcher

    told: dict[int, float | None] = {}
    tell = CMASearcher.tell
    monkeypatch.setattr(
        CMASearcher, "tell", lambda self, trial: (told.update({trial.n: trial.score}), tell(self, trial))[1]
    )
    path = write(objective={"of": "mean", "penalty": {"l1": 5000}})
    whole = run(path)
    trials = whole.trials()
    assert set(told) == {t.n for t in trials}
    for t in trials:
        groups = [list(group["weights"].values()) for group in t.recipe["groups"]]
        sizes = [sum(abs(group[e]) for group in groups) / len(groups) for e in range(len(groups[0]))]
        assert t.score is not None and told[t.n] == pytest.approx(t.score - 5000 * sum(sizes), rel=1e-12)
        assert t.score == whole.evaluation(f"trial:{t.n}/search").objective
    best = max(trials, key=lambda t: (t.merit, -t.n))
    assert whole.evaluation(f"trial:{best.n}/select")
    assert f"told      {told[0]:.4f}: its objective on search less the penalty" in show_trial(whole, "0")
    assert any("5000 less for each unit" in note for note in leaderboard(whole).notes)

    first = dict(told)
    told.clear()
    run(path, budget="+4")  # the replay tells the same
    assert {n: told[n] for n in first} == first
    assert trajectory(whole)[:BUDGET] != trajectory(run(write(folder="plain")))


def test_identical_recipes_are_evaluated_once(write):
    """Task arithmetic at its best lambda is one of the sweep, and random proposals may repeat."""
    pool = ShuffledPool()
    store = run(write(), pool)
    started = [(job.recipe["method"], str(job.recipe["groups"]), job.item_ids) for job in pool.submitted]
    assert len(started) == len(set(started))
    assert store.evaluation("control:task_arithmetic/search").objective in {
        e.objective for e in store.evaluations("search") if e.subject.startswith("sweep:")
    }


def test_controls_and_winner_are_on_every_split_and_only_they_read_test(write):
    store = run(write())
    controls = {"base", "expert:expert0", "expert:expert1", "average", "task_arithmetic", "random"}
    subjects = {split: {e.subject for e in store.evaluations(split)} for split in ("search", "select", "test")}
    for found in subjects.values():
        assert {f"control:{name}" for name in controls} <= found
    winner = store.record["rounds"][-1]["winner"]
    assert subjects["test"] == {f"control:{name}" for name in controls} | {winner}
    best = max(
        (e for e in store.evaluations("select") if not e.subject.startswith("control:")), key=lambda e: e.objective
    )
    assert best.subject == winner
    # top: 3 in the experiment, and the mean that the searcher recommends
    assert len(subjects["select"] - {f"control:{name}" for name in controls}) <= 4


def test_the_base_control_is_the_base_and_an_expert_control_is_that_expert(write):
    """Held against the checkpoints themselves, loaded by transformers and PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from evomerge.merging import Merger, load_resident
    from evomerge.recipe import Recipe

    path = write()
    store = run(path)
    base = path.parent / "base"
    controls = {e.subject: Recipe.from_dict(e.recipe) for e in store.evaluations("search")}
    model = load_resident(base, auto_class="AutoModelForCausalLM", compute_dtype="float32", device="cpu")
    assert ShuffledPool.worker is not None
    merger: Merger = ShuffledPool.worker.merger
    merger.into(model, controls["control:expert:expert0"])
    adapted = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(adapted, path.parent / "expert0").merge_and_unload()
    for (name, ours), (_, theirs) in zip(model.named_parameters(), merged.named_parameters(), strict=True):
        assert torch.allclose(ours, theirs.to(torch.bfloat16).float(), rtol=2**-7, atol=1e-6), name
    merger.into(model, controls["control:base"])
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_time_limit_ends_proposing_and_finish_still_runs(write, monkeypatch):
    """The clock is the test's: a minute an evaluation, from the first trial on."""
    import types

    clock = {"now": 0.0}
    monkeypatch.setattr("evomerge.study.time", types.SimpleNamespace(monotonic=lambda: clock["now"], time=lambda: 0.0))

    class Minutes(ShuffledPool):
        def wait(self, seconds: float) -> list[Result]:
            results = super().wait(seconds)
            clock["now"] += 60 * sum(r.key.startswith("trial:") and r.key.endswith("/search") for r in results)
            return results

    store = run(write(), Minutes(), seconds=270.0)
    assert [t.state for t in store.trials()] == ["complete"] * 5  # the fifth was proposed at 240 s
    assert store.record["rounds"][-1]["trials"] == 5


def test_a_time_limit_before_the_first_candidate_says_so(write):
    with pytest.raises(NothingCompleted, match="time limit"):
        run(write(), seconds=-1.0)
