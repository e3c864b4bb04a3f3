"""How long a store of many trials takes to read, to resume and to write to. Prints one line a measurement.

    python benchmarks/store.py [TRIALS] [URL]

Fills a new study of TRIALS (10,000) trials with 24 dimensions and 144 items each, in bulk, then times what the commands
do. Without a URL an SQLite file in a temporary folder is used.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import sqlalchemy as sa

from evomerge import database as db
from evomerge.evaluation import Item, Outcome
from evomerge.leaderboard import leaderboard
from evomerge.store import Evaluation, Store

TASKS, DIMENSIONS, GROUPS = ("add", "topic", "spam"), 24, 8
SIZES = {"search": 48, "select": 100, "test": 150}
ITEMS = [Item(f"{t}-{s}-{i}", t, f"{t} {s} {i}", split=s) for s, n in SIZES.items() for t in TASKS for i in range(n)]
RECORD = {
    "spec": {"name": "bench", "objective": "mean", "evaluate": {"tasks": {t: {"weight": 1.0} for t in TASKS}}},
    "metrics": {t: {"metric": "acc", "item_mean": True} for t in TASKS},
    "dimensions": {f"d{i}": [0.0, 1.0] for i in range(DIMENSIONS)},
}


def recipe(n: int) -> dict:
    weights = [{t: (n * 7 + g * 3 + k) % 97 / 97 for k, t in enumerate(TASKS)} for g in range(GROUPS)]
    groups = [{"layers": [4 * g, 4 * g + 4], "weights": w} for g, w in enumerate(weights)]
    return {"method": "task_arithmetic", "params": {}, "groups": groups, "seed": 0, "export_dtype": "bfloat16"}


def evaluation(n: int, subject: str, split: str) -> Evaluation:
    ids = [item.id for item in ITEMS if item.split == split]
    outcomes = tuple(Outcome(i, {"acc": float((n * 31 + k * 17) % 100 < 70 + n % 7)}) for k, i in enumerate(ids))
    size = SIZES[split]
    means = (sum(o.values["acc"] for o in outcomes[k * size : (k + 1) * size]) / size for k in range(len(TASKS)))
    scores = dict(zip(TASKS, means, strict=True))
    objective = sum(scores.values()) / len(scores)
    return Evaluation(f"{subject}/{split}", subject, split, f"{subject} {n}", recipe(n), outcomes, scores, objective)


def point(n: int) -> dict[str, float]:
    return {f"d{i}": (n * 13 + i) % 101 / 101 for i in range(DIMENSIONS)}


def fill(store: Store, trials: int) -> None:
    """What ``trials`` calls of add_trial, save_evaluation and finish_trial leave, written as whole tables."""
    sample = evaluation(0, "trial:0", "search")
    columns = json.dumps({"acc": [[0, [int(o.values["acc"]) for o in sample.outcomes or ()]]]})
    study, now = store.study_id, time.time()
    ours: dict[sa.Table, list[dict]] = {db.recipes: [], db.trials: [], db.evaluations: [], db.attempts: []}
    for n in range(trials):
        name, score = f"trial:{n}", 0.5 + n % 1000 / 3000
        base = {"study_id": study, "recipe_hash": f"{name} {n}"}
        ours[db.recipes].append({"study_id": study, "hash": f"{name} {n}", "recipe": json.dumps(recipe(n))})
        ended = {"n": n, "state": "complete", "score": score, "started": now, "finished": now}
        ours[db.trials].append(base | ended | {"point": json.dumps(point(n))})
        row = {"key": f"{name}/search", "subject": name, "split": "search", "round": 1, "objective": score, "time": now}
        row |= {"scores": json.dumps(dict(sample.scores)), "seconds": "{}", "worker": "w", "outcomes": columns}
        ours[db.evaluations].append(base | row | {"items_version": 1, "item_ids": None, "item_weights": None})
        for state in ("started", "complete"):
            attempt = {"study_id": study, "token": f"{n}{state}", "key": f"{name}/search", "attempt": 1, "state": state}
            ours[db.attempts].append(attempt | {"reason": "", "detail": "", "seconds": 1.0, "worker": "w", "time": now})
    store.database.write(lambda c: [c.execute(sa.insert(table), rows) for table, rows in ours.items()])

    def copy(c: sa.Connection) -> None:  # Optuna's own tables, as its storage fills them
        optuna_id = c.execute(sa.text("SELECT study_id FROM studies")).scalar_one()
        trial = sa.text("INSERT INTO trials (trial_id, number, study_id, state) VALUES (:i, :n, :s, 'COMPLETE')")
        c.execute(trial, [{"i": n + 1, "n": n, "s": optuna_id} for n in range(trials)])
        one = '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.0, "high": 1.0, "log": false}}'
        param = (
            "INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json) VALUES (:i, :k, :v, :d)"
        )
        rows = [{"i": n + 1, "k": k, "v": v, "d": one} for n in range(trials) for k, v in point(n).items()]
        c.execute(sa.text(param), rows)
        if c.engine.name == "postgresql":
            c.execute(sa.text("SELECT setval('trials_trial_id_seq', (SELECT max(trial_id) FROM trials))"))

    store.database.write(copy)


def timed(what: str, call: Callable[[], object]) -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    print(f"{what:<52} {time.perf_counter() - wall:8.3f} s wall {time.process_time() - cpu:8.3f} s CPU", flush=True)


def resume(url: str) -> None:
    """What the driver reads before it goes on: the lock, Optuna's copy held against ours, trials, evaluations, log."""
    store = Store.open(url, "bench")
    with store.lock():
        for read in (store.trials, store.evaluations, store.attempts, store.events):
            read()


def write(store: Store, first: int, count: int) -> None:
    for n in range(first, first + count):
        store.add_trial(n, point(n), recipe(n), f"trial:{n} {n}")
        e = evaluation(n, f"trial:{n}", "search")
        store.save_evaluation(e)
        store.finish_trial(n, "complete", e.objective)


def main(trials: int = 10_000, url: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        url = url or f"sqlite:///{Path(folder) / 'bench.db'}"
        store = Store.create(url, "bench", RECORD, items=ITEMS)
        timed(f"fill with {trials} trials, in bulk", lambda: fill(store, trials))
        for k, subject in enumerate(
            ["control:base", "control:average", *(f"trial:{trials - 1 - i}" for i in range(5))]
        ):
            store.save_evaluation(evaluation(k, subject, "select"))
        for k, subject in enumerate(["control:base", "control:average", f"trial:{trials - 3}"]):
            store.save_evaluation(evaluation(k, subject, "test"))
        if store.database.is_sqlite:
            print(f"{'file':<52} {Path(store.url).stat().st_size / 2**20:8.1f} MiB")
        timed("Store.names", lambda: Store.names(url))
        timed("trials()", lambda: Store.open(url, "bench").trials())
        timed("evaluations()", lambda: Store.open(url, "bench").evaluations())
        timed("evaluations(with_outcomes=True)", lambda: Store.open(url, "bench").evaluations(with_outcomes=True))
        timed("leaderboard", lambda: leaderboard(Store.open(url, "bench")))
        timed("resume: lock and all that is read", lambda: resume(url))
        timed("20 more trials: add, save outcomes, finish", lambda: write(store, trials, 20))
        store.close()


if __name__ == "__main__":
    main(*(int(a) if a.isdigit() else a for a in sys.argv[1:]))  # pyright: ignore[reportArgumentType]
