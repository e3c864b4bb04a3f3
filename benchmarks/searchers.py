"""Searchers side by side at equal budgets, on a surrogate of a real family: what their picks are worth on other items.

    python benchmarks/searchers.py              go on where the results file stops, then print the table
    python benchmarks/searchers.py --quick      two searchers, two seeds, small budgets, into a temporary file

The surrogate (experiments/minilm_topics/surrogate.py) was learned from recorded merges of five experts of a sentence
encoder. Every searcher goes through its own ask and tell, one trial at a time, and sees the accuracy on the search
items. Then its pick, the trial with the best search score, is scored on held-out items, and so is the trial that
`evomerge run` would choose: of the five best by search score, the best on the select items. Regret is the best held-out
score that is known, less the pick's.

One line of JSON a searcher, space and seed goes to benchmarks/searchers.jsonl when it is done; what is there is not run
again, so it may be stopped anywhere. Delete the file (or lines of it) to measure anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments" / "minilm_topics"))

from surrogate import RECORDING, Surrogate, make_space  # noqa: E402  # pyright: ignore[reportMissingImports]

from evomerge.searchers import SEARCHERS, Told, make  # noqa: E402

RESULTS = Path(__file__).with_suffix(".jsonl")
SPACES = ("task", "layer_groups")
BUDGETS = (50, 200)
SEEDS = 20
RETESTED = 5
SWEEP = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)  # what `evomerge run` tries as the control

# name -> (searcher, options). Windows of 1: every proposal knows all trials before it.
CONTENDERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "cma": ("cma", {}),
    "cma, diagonal": ("cma", {"covariance": "diagonal"}),
    "cma, bipop": ("cma", {"restart": "bipop"}),
    "tpe": ("tpe", {"window": 1}),
    "gp": ("gp", {"window": 1}),
    "nsga2": ("nsga2", {}),
    "coordinate": ("coordinate", {}),
    "soup": ("soup", {}),
    "random": ("random", {}),
    "sobol": ("sobol", {}),
    "grid": ("grid", {}),
}
DETERMINISTIC = {"coordinate", "soup", "grid"}  # one seed says all
COSTLY = {"gp": (20, 4)}  # seeds, and of these with the largest budget: a proposal's time grows with the trials' cube


@dataclass(frozen=True)
class Task:
    """One run of ``budget`` trials. It answers for smaller budgets as well, since no searcher knows its budget."""

    space: str
    searcher: str
    seed: int
    budget: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.space, self.searcher, self.seed


def tasks(names: Iterable[str], seeds: int, budgets: Sequence[int]) -> list[Task]:
    """Every run, the cheapest searchers first and gp last."""
    found = []
    for name in sorted(names, key=lambda n: (n in COSTLY, list(CONTENDERS).index(n))):
        most, with_largest = COSTLY.get(name, (seeds, seeds))
        for seed in range(1 if name in DETERMINISTIC else min(most, seeds)):
            small = seed >= with_largest
            found += [Task(space, name, seed, min(budgets) if small else max(budgets)) for space in SPACES]
    return found


def search(task: Task, surrogate: Surrogate, budgets: Sequence[int]) -> dict[str, Any]:
    """Run one searcher; the row for the results file: for each budget what ``judged`` says."""
    name, options = CONTENDERS[task.searcher]
    searcher = make(name, make_space(surrogate.dimensions, task.space), seed=task.seed, **options)
    trials: list[Told] = []
    scores: list[dict[str, float]] = []
    answers: dict[str, Any] = {}
    told, seconds = 0, 0.0
    for n in range(min(task.budget, searcher.size or task.budget)):
        began = time.perf_counter()
        while told < searcher.needs(n):
            searcher.tell(trials[told])
            told += 1
        point = searcher.ask(n)
        seconds += time.perf_counter() - began
        scores.append(surrogate.score(point))
        trials.append(Told(n, point, "complete", scores[-1]["search"]))
        if n + 1 in budgets:
            answers[str(n + 1)] = judged(scores, seconds)
    for budget in budgets:  # a search that has ended earlier has spent less than its budget
        if budget <= task.budget:
            answers.setdefault(str(budget), judged(scores, seconds))
    return {"space": task.space, "searcher": task.searcher, "seed": task.seed, "budgets": answers}


def judged(scores: Sequence[Mapping[str, float]], seconds: float) -> dict[str, Any]:
    """The pick by search score, and that of the best few by select score: their scores on held-out items."""
    order = sorted(range(len(scores)), key=lambda n: (-scores[n]["search"], n))
    pick, retested = order[0], max(order[:RETESTED], key=lambda n: (scores[n]["select"], -order.index(n)))
    return {
        "trials": len(scores),
        "search": round(scores[pick]["search"], 6),
        "held": round(scores[pick]["held"], 6),
        "retested": round(scores[retested]["held"], 6),
        "seconds": round(seconds / len(scores), 6),
    }


def best_known(space: str, surrogate: Surrogate, generations: int = 400, population: int = 100, runs: int = 3) -> float:
    """The highest held-out score that a long CMA-ES on the held-out items themselves finds."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import cma

    made = make_space(surrogate.dimensions, space)
    best = -np.inf
    for run in range(runs):
        draws = np.random.default_rng([run, 7])
        es = cma.CMAEvolutionStrategy(
            [0.4] * len(made.dimensions), 0.2,
            {"popsize": population, "bounds": [0, 1], "randn": lambda *size, d=draws: d.standard_normal(size),
             "seed": np.nan, "verbose": -9, "verb_log": 0, "tolfun": 0, "tolflatfitness": 10**9},
        )  # fmt: skip
        for _ in range(generations):
            samples = es.ask()
            shares = np.array([surrogate.shares(made.at(list(np.clip(x, 0, 1)))) for x in samples])
            margins = surrogate.predict(shares)[:, surrogate.parts == "held"]
            held = (margins > 0).mean(axis=1)
            best = max(best, float(held.max()))
            es.tell(samples, list(-held - 1e-4 * np.tanh(margins).mean(axis=1)))
            if es.stop():
                break
    return round(best, 6)


class Results:
    """A file of rows, one a line. Rows of another recording are refused; a torn last line is dropped."""

    def __init__(self, path: Path, recording: str):
        self.path, self.recording = path, recording
        self.rows: list[dict[str, Any]] = []
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
            path.write_text("".join(lines), encoding="utf-8")
        for line in lines:
            row = json.loads(line)
            if row["recording"] != recording:
                raise SystemExit(
                    f"{path} holds results on another recording ({row['recording']}, not {recording}). Move it away."
                )
            self.rows.append(row)

    def add(self, row: Mapping[str, Any]) -> None:
        row = {"recording": self.recording, **row}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)


def recording_hash() -> str:
    return hashlib.sha256(RECORDING.read_bytes()).hexdigest()[:12]


def quartiles(values: Sequence[float]) -> str:
    """median [lower quartile, upper quartile]"""
    if len(set(values)) == 1:
        return f"{values[0]:.3f}"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def table(rows: Sequence[Mapping[str, Any]], surrogate: Surrogate) -> str:
    """Markdown: for each space and budget a row a searcher, by median held-out score of the re-tested pick."""
    best = {row["space"]: row["best"] for row in rows if "best" in row}
    for row in rows:
        for answer in row.get("budgets", {}).values():
            best[row["space"]] = max(best[row["space"]], answer["held"], answer["retested"])
    runs: dict[tuple[str, int], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for budget, answer in row.get("budgets", {}).items():
            runs[row["space"], int(budget)][row["searcher"]].append(answer)
    text = []
    for (space, budget), found in sorted(runs.items(), key=lambda item: (SPACES.index(item[0][0]), item[0][1])):
        size = len(make_space(surrogate.dimensions, space).dimensions)
        text += [f"### {space} ({size} dimensions), {budget} trials", ""]
        text += [f"Best held-out score known: {best[space]:.3f}. {control(space, surrogate)}", ""]
        text += ["| searcher | search | held-out | regret | over-stated by | re-tested | regret | ms | seeds |"]
        text += ["|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
        medians = {name: statistics.median(a["retested"] for a in answers) for name, answers in found.items()}
        for name in sorted(found, key=lambda n: (-medians[n], n)):
            answers = found[name]
            held, retested = ([a[key] for a in answers] for key in ("held", "retested"))
            over = [a["search"] - a["held"] for a in answers]
            regrets = [f"{best[space] - statistics.median(v):.3f}" for v in (held, retested)]
            note = f" ({answers[0]['trials']} trials)" if answers[0]["trials"] < budget else ""
            search, seconds = (statistics.median(a[key] for a in answers) for key in ("search", "seconds"))
            text.append(
                f"| {name}{note} | {search:.3f} | {quartiles(held)} | {regrets[0]} | {quartiles(over)} | "
                f"{quartiles(retested)} | {regrets[1]} | {1000 * seconds:.1f} | {len(answers)} |"
            )
        text.append("")
    return "\n".join(text)


def control(space: str, surrogate: Surrogate) -> str:
    """What the best single weight is worth, chosen by search score as `evomerge run` does."""
    shares = [surrogate.shares({d.name: w for d in make_space(surrogate.dimensions, space).dimensions}) for w in SWEEP]
    scores = surrogate.scores(np.array(shares))
    pick = int(np.argmax(scores["search"]))
    return f"Task arithmetic at its best single weight ({SWEEP[pick]:g}): {scores['held'][pick]:.3f}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS))
    parser.add_argument("--searchers", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after this long")
    parser.add_argument("--quick", action="store_true", help="cma and random, 2 seeds, budgets 10 and 20")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.budgets, args.searchers = 2, [10, 20], ["cma", "random"]
        if args.results == RESULTS:
            args.results = Path(tempfile.mkdtemp(prefix="searchers.")) / "quick.jsonl"
    began = time.monotonic()
    surrogate = Surrogate.load()
    results = Results(args.results, recording_hash())
    done = {(row["space"], row["searcher"], row["seed"]) for row in results.rows if "budgets" in row}
    todo = [task for task in tasks(args.searchers, args.seeds, args.budgets) if task.key not in done]
    for space in SPACES:
        if not any(row.get("best") and row["space"] == space for row in results.rows):
            small = {"generations": 10, "population": 20, "runs": 1} if args.quick else {}
            results.add({"space": space, "best": best_known(space, surrogate, **small)})
    print(f"{args.results}: {len(results.rows)} rows, {len(todo)} runs to do", file=sys.stderr, flush=True)
    for n, task in enumerate(todo, 1):
        if time.monotonic() - began > args.seconds:
            raise SystemExit(f"{len(todo) - n + 1} runs are left. Run this again to go on.")
        results.add(search(task, surrogate, args.budgets))
        print(
            f"{n}/{len(todo)}  {task.space}, {task.searcher}, seed {task.seed}  {time.monotonic() - began:.0f} s",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    print(table(results.rows, surrogate))


assert {name for name, _ in CONTENDERS.values()} <= set(SEARCHERS)

if __name__ == "__main__":
    main()
