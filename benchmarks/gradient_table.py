"""Searches by gradient beside CMA-ES and the controls on a real family: one table, three seeds, resumable.

    python benchmarks/gradient_table.py                 go on where the results file stops, then write the page
    python benchmarks/gradient_table.py --rows cma      these rows only; --seeds 0: these seeds only
    python benchmarks/gradient_table.py --write-docs    only write docs/adamerging.md from the results

Every cell is a study of evomerge's own on the family's experiment file, with another space and search; the seed is the
study's, so that it also says which items are for what. Rows by gradient all have the same steps, batches and step size,
which were set once, before any test item was looked at. A step's backward pass is counted as two forward passes: "cma"
may evaluate as many candidates as come to the same number of passes as a row by gradient, training and candidates.

One line of JSON a row and seed goes to benchmarks/gradient_table.jsonl when it is done; delete lines to measure anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import methods_table as table
import yaml

from evomerge.errors import Interrupted
from evomerge.launch import Options, aggregate_of, run_study
from evomerge.leaderboard import leaderboard
from evomerge.pools import LocalPool
from evomerge.progress import Progress
from evomerge.spec import Spec
from evomerge.store import Store

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_suffix(".jsonl")
PAGE = ROOT / "docs" / "adamerging.md"
BEGIN, END = "<!-- begin: benchmarks/gradient_table.py -->", "<!-- end: benchmarks/gradient_table.py -->"
SEEDS = (0, 1, 2)
FOLDER = ROOT / "experiments" / "vit_images"
TITLE = "ViT images: four encoders of 467,000 parameters, whole checkpoints"
STEPS, EVERY, BATCH, LR = 300, 50, 16, 0.002
BACKWARD = 2  # a backward pass costs about as much as so many forward passes
WEIGHTS = {"range": [0.0, 1.0], "initial": 0.3}


def gradient(**changes: Any) -> dict[str, Any]:
    return {"method": "adamerging", "steps": STEPS, "every": EVERY, "batch": BATCH, "lr": LR, **changes}


# row -> (granularity, method, search); what the searches by gradient cost CMA-ES may cost, too
ROWS: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "entropy, an expert": ("task", "task_arithmetic", gradient()),
    "entropy, a tensor": ("tensor", "task_arithmetic", gradient()),
    "entropy, a tensor, ++": ("tensor", "ties_linear", gradient()),
    "entropy, a tensor, transductive": ("tensor", "task_arithmetic", gradient(protocol="transductive")),
    "cross entropy, an expert": ("task", "task_arithmetic", gradient(loss="cross_entropy")),
    "cross entropy, a tensor": ("tensor", "task_arithmetic", gradient(loss="cross_entropy")),
    "KL to experts, a tensor": ("tensor", "task_arithmetic", gradient(loss="kl_to_expert")),
    "hidden states, a tensor": ("tensor", "task_arithmetic", gradient(loss="hidden_mse")),
    "cma, an expert": ("task", "task_arithmetic", {"method": "cma"}),
    "cma, a layer": ("layer", "task_arithmetic", {"method": "cma"}),
}


def experiment(row: str, seed: int, folder: Path = FOLDER) -> dict[str, Any]:
    """The experiment file of one cell."""
    data = yaml.safe_load((folder / "experiment.yaml").read_text(encoding="utf-8"))
    granularity, method, search = ROWS[row]
    candidates = search.get("steps", STEPS) // search.get("every", EVERY) + 1
    if search["method"] == "cma":
        candidates = passes(data) // searched(data)
    data |= {
        "space": {"method": method, "weights": {"granularity": granularity, **WEIGHTS}},
        "search": {**search, "budget": candidates},
        "seed": seed,
    }
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:8]
    words = "-".join(row.replace(",", "").replace("+", "p").split())
    return {**data, "name": f"gradient.{words}.{seed}.{digest}"}


def searched(data: Mapping[str, Any]) -> int:
    """How many items a candidate is evaluated on."""
    return data["evaluate"]["split"]["search"] * len(data["evaluate"]["tasks"])


def passes(data: Mapping[str, Any]) -> int:
    """Forward passes of one item that a search by gradient comes to."""
    training = STEPS * BATCH * len(data["evaluate"]["tasks"]) * (1 + BACKWARD)
    return training + (STEPS // EVERY + 1) * searched(data)


def run(row: str, seed: int, progress: Progress, folder: Path = FOLDER) -> list[dict[str, Any]]:
    """One study, finished or gone on with: its row, and those of its controls."""
    data = experiment(row, seed, folder)
    cache = folder / "cache" / "gradient_table"
    cache.mkdir(parents=True, exist_ok=True)
    file = cache / f"{data['name']}.yaml"
    file.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    options = Options(storage=f"sqlite:///{cache / 'studies.db'}")
    spec = Spec.from_dict(data, folder, path=file)
    store = run_study(spec, options, progress, make_pool=lambda: LocalPool(inline=True))
    return rows_of(store, {"row": row, "seed": seed, "settings": str(data["name"]).rpartition(".")[2]})


def rows_of(store: Store, head: Mapping[str, Any]) -> list[dict[str, Any]]:
    board = leaderboard(store, aggregate=aggregate_of(store))
    own = next(row for row in board.test if row.subject == board.winner)
    trials = store.trials()
    seconds = sum(e.seconds.get("total", 0.0) for e in store.evaluations() if e.key.endswith("/search"))
    found = {
        **head,
        **table.numbers(own),
        "against": board.best_control,
        "trials": len(trials),
        "dimensions": len(store.record["dimensions"]),
        "winner": board.winner,
        "evaluating": round(seconds, 1),
    }
    controls = [
        {"row": row.subject, "seed": head["seed"], "settings": "", **table.numbers(row)}
        for row in board.test
        if row.subject.startswith("control:")
    ]
    return [found, *controls]


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table in Markdown, a function of the results alone."""
    data = yaml.safe_load((FOLDER / "experiment.yaml").read_text(encoding="utf-8"))
    split, tasks = data["evaluate"]["split"], len(data["evaluate"]["tasks"])
    lines = [
        f"### {TITLE}",
        "",
        f"Mean accuracy on {split['test'] * tasks} test items, the mean of the seeds {', '.join(map(str, SEEDS))} (in "
        "brackets the lowest and the highest); a seed also says which items are for what. By gradient: "
        f"{STEPS} steps of Adam at {LR}, {BATCH} items of each task a step, a candidate every {EVERY} steps, "
        f"{split['search']} search items a task. CMA-ES: as many candidates as come to the same number of forward "
        f'passes ({passes(data) // searched(data)}). "Against": the mean difference to each study\'s best control, '
        f"which was chosen on {split['select']} select items a task, and for how many seeds the paired 95% interval "
        "of that difference is above zero, holds it, or is below.",
        "",
        "| | dimensions | test | against | above, level, below |",
        "|---|--:|--:|--:|---|",
    ]
    by_row: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_row.setdefault(row["row"], []).append(row)
    middle = {name: statistics.fmean(r["test"][0] for r in found) for name, found in by_row.items()}
    for name in sorted(by_row, key=lambda name: -middle[name]):
        found = by_row[name]
        scores = [r["test"][0] for r in found]
        title = f"control: {name.removeprefix('control:').replace(':', ' ')}" if name.startswith("control:") else name
        spread = f"{table.short(middle[name])} [{table.short(min(scores))}, {table.short(max(scores))}]"
        differences = [r["difference"] for r in found if r.get("difference")]
        mean = table.short(statistics.fmean(d[0] for d in differences), sign=True) if differences else ""
        above = sum(d[1] is not None and d[1] > 0 for d in differences)
        below = sum(d[2] is not None and d[2] < 0 for d in differences)
        counts = f"{above}, {len(differences) - above - below}, {below}" if differences else ""
        seeds = "" if len(found) == len(SEEDS) else f" ({len(found)} of {len(SEEDS)} seeds)"
        lines.append(f"| {title}{seeds} | {found[0].get('dimensions', '')} | {spread} | {mean} | {counts} |")
    return "\n".join(lines) + "\n\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), metavar="ROW", default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write-docs", action="store_true", help="only write docs/adamerging.md")
    options = parser.parse_args()
    results = table.Results(options.results, keys=("row", "seed"))
    if not options.write_docs:
        if not (FOLDER / "cache" / "experts").is_dir():
            print("vit_images is not built: python experiments/vit_images/build.py", file=sys.stderr)
            return 2
        todo = [
            (row, seed)
            for seed in options.seeds
            for row in options.rows
            if (old := results.find(row, seed)) is None
            or old["settings"] != str(experiment(row, seed)["name"]).rpartition(".")[2]
        ]
        for n, (row, seed) in enumerate(todo, 1):
            print(f"\n== {n}/{len(todo)} {row}, seed {seed}", file=sys.stderr, flush=True)
            try:
                results.put(run(row, seed, Progress()))
            except (Interrupted, KeyboardInterrupt):
                print("stopped; run it again to go on", file=sys.stderr)
                return 130
    if options.results == RESULTS:
        table.put_between(PAGE, BEGIN, page(results.rows), END)
    else:
        print(page(results.rows))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
