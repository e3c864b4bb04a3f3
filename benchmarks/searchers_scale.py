"""What a large search costs beside its evaluations: 300 dimensions and 5,000 trials. Prints one line a measurement.

    python benchmarks/searchers_scale.py [TRIALS] [DIMENSIONS] [SEARCHER ...]

The searchers propose and are told a made-up score; then they are replayed, as a resume does. The store takes the same
trials, each with 144 outcomes, one by one; then it is read as a resume and as a leaderboard read it.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from evomerge.dimensions import Point
from evomerge.evaluation import Item, Outcome
from evomerge.leaderboard import leaderboard
from evomerge.recipe import Recipe
from evomerge.searchers import make
from evomerge.searchers.base import Told
from evomerge.space import Space
from evomerge.store import Evaluation, Store
from evomerge.testing.searchers import make_space

SEARCHERS: dict[str, dict[str, Any]] = {
    "cma full": {"covariance": "full"},
    "cma diagonal": {"covariance": "diagonal"},
    "coordinate": {},
    "nsga2": {},
    "random": {},
    "sobol": {},
    "tpe": {},
}
TASKS = ("add", "topic", "spam")
ITEMS = [
    Item(f"{t}-{s}-{i}", t, f"{t} {s} {i}", split=s)
    for s in ("search", "select", "test")
    for t in TASKS
    for i in range(48)
]


def space_of(dimensions: int) -> Space:
    """A model of as many layers as experts and dimensions need."""
    experts = 5 if dimensions % 5 == 0 else 1
    layers = dimensions // experts
    data = {"method": "task_arithmetic", "weights": {"granularity": "layer", "range": [0.0, 1.5], "initial": 0.3}}
    return Space.from_dict(data, template=make_space(experts=experts).template, num_layers=layers)


def score(point: Point) -> float:
    return -sum((value - 0.5 - 0.3 * (i % 3)) ** 2 for i, value in enumerate(point.values()))


def line(what: str, seconds: list[float], note: str = "") -> None:
    tail = seconds[-max(1, len(seconds) // 50) :]
    print(
        f"{what:<28} total {sum(seconds):8.1f} s   median {1e3 * statistics.median(seconds):8.2f} ms   "
        f"at the end {1e3 * statistics.median(tail):8.2f} ms   {note}",
        flush=True,
    )


def search(label: str, space: Space, trials: int) -> list[Told]:
    """Times a searcher's own work a trial, then its replay."""
    name, options = label.split(maxsplit=1)[0], SEARCHERS[label]
    searcher, told, seconds = make(name, space, **options), [], []
    pending = 0
    for n in range(trials):
        need = searcher.needs(n)
        began = time.perf_counter()
        while pending < need:
            searcher.tell(told[pending])
            pending += 1
        point = searcher.ask(n)
        seconds.append(time.perf_counter() - began)
        told.append(Told(n, point, "complete", score(point)))
    line(f"{label}: tell and ask", seconds)
    searcher, pending, began = make(name, space, **options), 0, time.perf_counter()
    for n, trial in enumerate(told):
        while pending < searcher.needs(n):
            searcher.tell(told[pending])
            pending += 1
        searcher.replay(n, dict(trial.point))
    print(f"{label + ': replay':<28} total {time.perf_counter() - began:8.1f} s", flush=True)
    return told


def evaluation(subject: str, split: str, recipe: Recipe, objective: float) -> Evaluation:
    outcomes = tuple(Outcome(i.id, {"acc": float(k % 100 < 70)}) for k, i in enumerate(ITEMS) if i.split == split)
    scores: dict[str, float] = dict.fromkeys(TASKS, objective)
    return Evaluation(f"{subject}/{split}", subject, split, recipe.hash, recipe.to_dict(), outcomes, scores, objective)


def store_all(url: str, space: Space, told: list[Told]) -> None:
    record = {
        "spec": {"name": "scale", "objective": "mean", "evaluate": {"tasks": {t: {"weight": 1.0} for t in TASKS}}},
        "metrics": {t: {"metric": "acc", "item_mean": True} for t in TASKS},
        "dimensions": [d.to_dict() for d in space.dimensions],
    }
    store, seconds = Store.create(url, "scale", record, items=ITEMS), []
    for trial in told:
        began = time.perf_counter()
        recipe = space.decode(trial.point)
        store.add_trial(trial.n, trial.point, recipe.to_dict(), recipe.hash)
        store.save_evaluation(evaluation(f"trial:{trial.n}", "search", recipe, trial.score or 0.0))
        store.finish_trial(trial.n, "complete", trial.score)
        seconds.append(time.perf_counter() - began)
    line("store: add, save, finish", seconds)
    for n in range(5):
        store.save_evaluation(evaluation(f"trial:{n}", "select", space.decode(told[n].point), 0.5))
    store.close()


def timed(what: str, call: Any) -> None:
    began = time.perf_counter()
    call()
    print(f"{what:<28} total {time.perf_counter() - began:8.1f} s", flush=True)


def resume(url: str) -> None:
    store = Store.open(url, "scale")
    with store.lock():
        for read in (store.trials, store.evaluations, store.attempts, store.events):
            read()


def main(trials: int, dimensions: int, labels: list[str]) -> None:
    space, told = space_of(dimensions), []
    print(f"{len(space.dimensions)} dimensions, {trials} trials")
    for label in labels:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            told = search(label, space, trials)
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'scale.db'}"
        store_all(url, space, told)
        print(f"{'store: file':<28} {Path(folder, 'scale.db').stat().st_size / 2**20:14.1f} MiB")
        timed("store: read for a resume", lambda: resume(url))
        timed("store: leaderboard", lambda: leaderboard(Store.open(url, "scale")))


if __name__ == "__main__":
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    dimensions = int(sys.argv[2]) if len(sys.argv) > 2 else 300
    main(trials, dimensions, [" ".join(sys.argv[3:])] if sys.argv[3:] else list(SEARCHERS))
