"""Searches by gradient beside CMA-ES and the controls on real families: a table each, three seeds, resumable.

    python benchmarks/gradient_table.py                      go on where the results file stops, then write the page
    python benchmarks/gradient_table.py vit_images           this family only; --seeds 0: these seeds only
    python benchmarks/gradient_table.py --rows "hybrid, a tensor"     these rows only
    python benchmarks/gradient_table.py --write-docs         only write docs/adamerging.md from the results

Every cell is a study of evomerge's own on the family's experiment file, with another space and search; the seed is the
study's, so that it also says which items are for what. Rows by gradient all have the same steps, batches and step size,
which were set once, before any test item was looked at. A step's backward pass is counted as two forward passes:
"cma, ... at equal passes" may evaluate as many candidates as come to the same number of passes as a row by gradient,
training and candidates; "at equal time" as many as it can in the time that the row named in its place took to search.
The hybrid has as many passes, too: half of them are its descents', a quarter its products' at most, the rest CMA-ES's.

A family's studies of one seed share their controls. One line of JSON a row and seed goes to
benchmarks/gradient_table.jsonl when it is done; delete lines to measure anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from tables.studies import Results, numbers, put_between, short, take_over

from evomerge.errors import Interrupted
from evomerge.launch import Options, aggregate_of, run_study, sqlite_url
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
BACKWARD = 2  # a backward pass costs about as much as so many forward passes


@dataclass(frozen=True)
class Family:
    """A folder with an experiment.yaml, and what its searches by gradient have.

    Args:
        split: items a task; none: the experiment file's.
        over: what the losses are over.
    """

    name: str
    title: str
    steps: int
    every: int
    batch: int
    lr: float
    weights: Mapping[str, Any]
    over: str = "answers"
    split: Mapping[str, int] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return ROOT / "experiments" / self.name

    @property
    def file(self) -> dict[str, Any]:
        """Its experiment file, with the table's split."""
        data = yaml.safe_load((self.folder / "experiment.yaml").read_text(encoding="utf-8"))
        data["workers"] = {"count": 1, "threads": 1}
        if self.split:
            data["evaluate"]["split"] = dict(self.split)
        return data

    @property
    def is_built(self) -> bool:
        file = self.file
        return all((self.folder / path).is_dir() for path in (file["base"], *file["experts"].values()))

    @property
    def cache(self) -> Path:
        folder = self.folder / "cache" / "gradient_table"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def searched(self) -> int:
        """How many items a candidate is evaluated on."""
        file = self.file
        return file["evaluate"]["split"]["search"] * len(file["evaluate"]["tasks"])

    @property
    def step_passes(self) -> int:
        """Forward passes of one item that a step comes to."""
        return self.batch * len(self.file["evaluate"]["tasks"]) * (1 + BACKWARD)

    @property
    def passes(self) -> int:
        """Forward passes of one item that a search by gradient comes to."""
        return self.steps * self.step_passes + (self.steps // self.every + 1) * self.searched

    def descent(self, **changes: Any) -> dict[str, Any]:
        search = {"method": "adamerging", "steps": self.steps, "every": self.every, "batch": self.batch, "lr": self.lr}
        search |= {"over": self.over} if self.over != "answers" else {}
        search |= changes
        return {**search, "budget": self.steps // self.every + 1}

    def hybrid(self, **changes: Any) -> dict[str, Any]:
        """Half of the steps in two descents, at most a quarter in products, the rest CMA-ES's."""
        every = self.every // 2
        first, second = 3 * self.steps // 8 // every * every, self.steps // 8 // every * every
        products = min(16, self.steps // 16)  # each is two gradients of twice a step's items
        trained = (first + second + 4 * products) * self.step_passes
        descended = first // every + 1 + second // every
        candidates = max(4, (self.passes - trained) // self.searched - descended)
        search = {**self.descent(**changes), "method": "hybrid", "every": every, "steps": first, "refine": second}
        search |= {"products": products, "product_batch": 2 * self.batch, "candidates": candidates}
        return {**search, "budget": descended + candidates}


SMALL = {"range": [0.0, 1.0], "initial": 0.3}
FAMILIES = (
    Family(
        "vit_images",
        "ViT images: four encoders of 467,000 parameters, whole checkpoints",
        steps=300,
        every=50,
        batch=16,
        lr=0.002,
        weights=SMALL,
    ),
    Family(
        "minilm_topics",
        "MiniLM topics: five encoders of 22.6M parameters, whole checkpoints",
        steps=80,
        every=20,
        batch=8,
        lr=0.01,
        weights={"range": [0.0, 1.5], "initial": 0.6},
        split={"search": 40, "select": 30, "test": 150},
    ),
    Family(
        "smollm2_skills",
        "SmolLM2 skills: three LoRA adapters of a 135M language model",
        steps=24,
        every=6,
        batch=4,
        lr=0.02,
        weights={"range": [0.0, 1.5], "initial": 0.6},
        over="tokens",
        split={"search": 16, "select": 12, "test": 50},
    ),
)
EQUAL_TIME = "entropy, a tensor"  # whose time "cma, ... at equal time" may take


def rows_for(family: Family) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Row -> (granularity, method, search)."""
    descent, hybrid, plain = family.descent, family.hybrid, "task_arithmetic"
    labels = {"loss": "cross_entropy"}
    return {
        EQUAL_TIME: ("tensor", plain, descent()),
        "cross entropy, a tensor": ("tensor", plain, descent(**labels)),
        "hybrid of cross entropy, a tensor": ("tensor", plain, hybrid(**labels)),
        "cma, an expert, at equal passes": ("task", plain, {"method": "cma"}),
        "entropy, an expert": ("task", plain, descent()),
        "entropy, a tensor, ++": ("tensor", "ties_linear", descent()),
        "hybrid of cross entropy, an expert": ("task", plain, hybrid(**labels)),
        "cma, an expert, at equal time": ("task", plain, {"method": "cma"}),
        "cross entropy, an expert": ("task", plain, descent(**labels)),
        "KL to experts, a tensor": ("tensor", plain, descent(loss="kl_to_expert")),
        "cma, a layer, at equal passes": ("layer", plain, {"method": "cma"}),
        "hybrid of entropy, a tensor": ("tensor", plain, hybrid()),
        "AdaRank of cross entropy, a tensor": ("tensor", "adarank", descent(method="adarank", **labels)),
        "columns of cross entropy": ("task", "columns", descent(method="columns", **labels)),
        "AdaRank of entropy, a tensor": ("tensor", "adarank", descent(method="adarank")),
        "entropy, a tensor, transductive": ("tensor", plain, descent(protocol="transductive")),
        "hidden states, a tensor": ("tensor", plain, descent(loss="hidden_mse")),
        "concrete masks of cross entropy, a tensor": ("tensor", "concrete", descent(method="concrete", **labels)),
    }


def experiment(family: Family, row: str, seed: int) -> dict[str, Any]:
    """The experiment file of one cell."""
    data = family.file
    granularity, method, search = rows_for(family)[row]
    if "budget" not in search:
        search = {**search, "budget": family.passes // family.searched if row.endswith("passes") else 10_000}
    data |= {
        "space": {"method": method, "weights": {"granularity": granularity, **family.weights}},
        "search": search,
        "seed": seed,
    }
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:8]
    words = "-".join(row.replace(",", "").replace("+", "p").split())
    return {**data, "name": f"gradient.{words}.{seed}.{digest}"}


def settings_of(family: Family, row: str, seed: int) -> str:
    return str(experiment(family, row, seed)["name"]).rpartition(".")[2]


class NotYet(Exception):
    """A row needs another's time first."""


def run(family: Family, row: str, seed: int, results: Results, progress: Progress) -> list[dict[str, Any]]:
    """One study, finished or gone on with: its row, and those of its controls."""
    data = experiment(family, row, seed)
    file = family.cache / f"{data['name']}.yaml"
    file.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    url = sqlite_url(family.cache / "studies.db")
    spec = Spec.from_dict(data, family.folder, path=file)
    options = Options(storage=url)
    givers = [s["name"] for s in Store.names(url)] if (family.cache / "studies.db").exists() else []
    finished = [name for name in givers if name != spec.name and name.split(".")[2] == str(seed)
                and Store.open(url, name).record.get("rounds")]  # fmt: skip
    if finished:
        take_over(spec, url, finished[0], options, progress)
    if row.endswith("time"):
        other = results.find(family.name, EQUAL_TIME, seed)
        if other is None or not finished:
            raise NotYet(f"first: {EQUAL_TIME}, seed {seed}, on this machine")
        options = Options(storage=url, seconds=other["searching"])
    store = run_study(spec, options, progress, make_pool=lambda: LocalPool(inline=True))
    head = {"family": family.name, "row": row, "seed": seed, "settings": settings_of(family, row, seed)}
    return rows_of(store, head)


def rows_of(store: Store, head: Mapping[str, Any]) -> list[dict[str, Any]]:
    board = leaderboard(store, aggregate=aggregate_of(store))
    own = next(row for row in board.test if row.subject == board.winner)
    trials = store.trials()
    ended = [e.time for e in store.evaluations() if e.split == "search" and e.subject.startswith("trial:")]
    found = {
        **head,
        **numbers(own),
        "against": board.best_control,
        "trials": len(trials),
        "dimensions": len(store.record["dimensions"]),
        "winner": board.winner,
        "searching": round(max(ended) - trials[0].started, 1),  # seconds, of a study that ran in one go
    }
    common = {"family": head["family"], "seed": head["seed"], "settings": ""}
    controls = [
        {**common, "row": row.subject, **numbers(row)} for row in board.test if row.subject.startswith("control:")
    ]
    return [found, *controls]


def page(rows: Sequence[Mapping[str, Any]], families: Sequence[Family] = FAMILIES) -> str:
    """The tables in Markdown, a function of the results alone."""
    by_family = [(f, [r for r in rows if r["family"] == f.name]) for f in families]
    return "".join(table_of(f, own) for f, own in by_family if own)


def table_of(family: Family, rows: Sequence[Mapping[str, Any]]) -> str:
    data = family.file
    split, tasks = data["evaluate"]["split"], len(data["evaluate"]["tasks"])
    lines = [
        f"### {family.title}",
        "",
        f"Mean accuracy on {split['test'] * tasks} test items, the mean of the seeds {', '.join(map(str, SEEDS))} (in "
        "brackets the lowest and the highest); a seed also says which items are for what. By gradient: "
        f"{family.steps} steps of Adam at {family.lr}, {family.batch} items of each task a step, a candidate every "
        f"{family.every} steps, {split['search']} search items a task. CMA-ES and hybrid: as many candidates as come "
        f"to the same number of forward passes ({family.passes // family.searched} for CMA-ES), or as there was time "
        f'for. "Against": the mean difference to each study\'s best control, which was chosen on {split["select"]} '
        "select items a task, and for how many seeds the paired 95% interval of that difference is above zero, holds "
        "it, or is below.",
        "",
        "| | dimensions | candidates | seconds | test | against | above, level, below |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    by_row: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_row.setdefault(row["row"], []).append(row)
    middle = {name: statistics.fmean(r["test"][0] for r in found) for name, found in by_row.items()}
    for name in sorted(by_row, key=lambda name: -middle[name]):
        found = by_row[name]
        scores = [r["test"][0] for r in found]
        title = f"control: {name.removeprefix('control:').replace(':', ' ')}" if name.startswith("control:") else name
        spread = f"{short(middle[name])} [{short(min(scores))}, {short(max(scores))}]"
        differences = [r["difference"] for r in found if r.get("difference")]
        mean = short(statistics.fmean(d[0] for d in differences), sign=True) if differences else ""
        above = sum(d[1] is not None and d[1] > 0 for d in differences)
        below = sum(d[2] is not None and d[2] < 0 for d in differences)
        counts = f"{above}, {len(differences) - above - below}, {below}" if differences else ""
        seeds = "" if len(found) == len(SEEDS) else f" ({len(found)} of {len(SEEDS)} seeds)"
        size, trials, seconds = (median_of(found, key) for key in ("dimensions", "trials", "searching"))
        lines.append(f"| {title}{seeds} | {size} | {trials} | {seconds} | {spread} | {mean} | {counts} |")
    return "\n".join(lines) + "\n\n"


def median_of(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    there = [row[key] for row in rows if row.get(key) is not None]
    return f"{statistics.median(there):.0f}" if there else ""


def main() -> int:
    names = [f.name for f in FAMILIES]
    all_rows = list(rows_for(FAMILIES[0]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", choices=[*names, []], default=[], metavar="FAMILY", help="default: all")
    parser.add_argument("--rows", nargs="+", choices=all_rows, metavar="ROW", default=all_rows)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write-docs", action="store_true", help="only write docs/adamerging.md")
    options = parser.parse_args()
    chosen = [f for f in FAMILIES if f.name in (options.families or names)]
    results = Results(options.results, keys=("family", "row", "seed"))
    if not options.write_docs:
        for family in [f for f in chosen if not f.is_built]:
            print(f"{family.name} is not built: python experiments/{family.name}/build.py", file=sys.stderr)
            chosen.remove(family)
        if not chosen:
            return 2
        todo = [
            (family, row, seed)
            for seed in options.seeds
            for family in chosen
            for row in options.rows
            if (old := results.find(family.name, row, seed)) is None
            or old["settings"] != settings_of(family, row, seed)
        ]
        for n, (family, row, seed) in enumerate(todo, 1):
            print(f"\n== {n}/{len(todo)} {family.name}: {row}, seed {seed}", file=sys.stderr, flush=True)
            try:
                results.put(run(family, row, seed, results, Progress()))
            except NotYet as reason:
                print(reason, file=sys.stderr)
            except (Interrupted, KeyboardInterrupt):
                print("stopped; run it again to go on", file=sys.stderr)
                return 130
    if options.results == RESULTS:
        put_between(PAGE, BEGIN, page(results.rows), END)
    else:
        print(page(results.rows))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
