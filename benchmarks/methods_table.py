"""Every merge method on two real families: at its defaults, and after a short search for its weights and parameters.

    python benchmarks/methods_table.py                  go on where the results file stops, then write the page
    python benchmarks/methods_table.py smollm2_skills   one family only; --methods ties sce: these methods only
    python benchmarks/methods_table.py --write-docs     only write docs/methods.md from the results
    python benchmarks/methods_table.py --experiment minilm_topics ties search    print that experiment file

The families are experiments/minilm_topics (five whole encoders) and experiments/smollm2_skills (three LoRA adapters of
a language model); their build.py makes what they need. Each row is a study of evomerge's own, run by `launch.run_study`
on an experiment file that this script writes from the family's: of one candidate, the method at its defaults; or of a
few that start from there. The methods are those of METHODS, so that a new one has its rows on the next run. All studies
of a family share items, seed, searcher and budget. The controls are evaluated by the first and handed to the others.

One line of JSON a family, method and setting goes to benchmarks/methods_table.jsonl when it is done. What is there, and
was made with the same settings, is not run again, so it may be stopped anywhere; delete lines to measure anew. Where
the studies are gone (a fresh clone has the results only) the controls are evaluated again, for the missing rows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from tables.studies import Results, numbers, put_between, short, take_over

from evomerge import __version__
from evomerge.collected import verify_collected
from evomerge.errors import Interrupted, UserError
from evomerge.launch import Options, aggregate_of, run_study, sqlite_url
from evomerge.leaderboard import leaderboard, merge_in_short
from evomerge.methods import METHODS, merge_state_dicts
from evomerge.methods.base import Method, check_experts, check_params
from evomerge.methods.statistics import LEARNED
from evomerge.params import Param
from evomerge.planning import build_plan
from evomerge.pools import LocalPool
from evomerge.progress import Progress
from evomerge.recipe import Collected, Group
from evomerge.spec import Spec
from evomerge.store import Evaluation, Store
from evomerge.study import NothingCompleted

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_suffix(".jsonl")
PAGE = ROOT / "docs" / "methods.md"
BEGIN, END = "<!-- begin: benchmarks/methods_table.py -->", "<!-- end: benchmarks/methods_table.py -->"
SETTINGS = ("default", "search")
CONTROLS_FROM = ("task_arithmetic", "default")  # the study that evaluates the controls for all others
CONTROL_METHODS = ("random_vectors",)  # rows of METHODS that are controls already
RECIPES_ONLY = ("gram_merged",)  # statistics that are those of one merge: their method is refused in spaces
COLLECTED = 16  # search items a task, for methods that are weighted by data
PATIENCE = 1800  # seconds after which a search proposes no more, whatever the experiment says: machines may be busy
SWEEP = [0.2, 0.4, 0.6, 0.8, 1.0]

# What moves of a method's parameters, by name, as it stands in a space file. Everything else stays at its default.
MOVING: Mapping[str, Any] = {
    "density": {"range": [0.05, 1.0], "log": True},
    "gamma": {"range": [0.001, 0.1], "log": True},
    "l": {"range": [0.1, 1.0]},
    "r": {"range": [0.02, 0.5], "log": True},
    "select_topk": {"range": [0.05, 1.0], "log": True},
    "common": {"range": [0.2, 0.95]},
    "lr": {"range": [1e-6, 1e-3], "log": True},
    "rho": {"range": [0.5, 1.0]},
    "t": {"range": [0.0, 1.0], "initial": 0.5},
    "temperature": {"range": [0.1, 10.0], "log": True},
}
# Methods that want it otherwise. None: does not move. An initial is what a default that is derived comes to.
MOVING_OF: Mapping[str, Mapping[str, Any]] = {
    "consensus": {"density": None},  # is of the inner ties only
    "della": {"density": {"range": [0.15, 0.85]}},
    "della_linear": {"density": {"range": [0.15, 0.85]}},
    "knots": {"density": {"range": [0.05, 1.0], "log": True, "initial": 0.2}},
    "lines": {"density": None, "b": {"range": [0.0, 2.0], "initial": lambda num_experts: 1 - 1 / num_experts}},
}
SCALE = {"range": [0.3, 2.0], "log": True}  # moves only where the weights' common size does nothing


@dataclass(frozen=True)
class Family:
    """A folder with an experiment.yaml, and how much of it the table takes."""

    name: str
    title: str
    budget: int
    split: Mapping[str, int]  # items a task
    time: str  # no candidate is proposed after this long
    folder: Path = Path()

    @property
    def home(self) -> Path:
        return self.folder if self.folder != Path() else ROOT / "experiments" / self.name

    @property
    def file(self) -> dict[str, Any]:
        """Its experiment file."""
        return yaml.safe_load((self.home / "experiment.yaml").read_text(encoding="utf-8"))

    @property
    def is_built(self) -> bool:
        file = self.file
        return all((self.home / path).is_dir() for path in (file["base"], *file["experts"].values()))

    @property
    def cache(self) -> Path:
        """Studies and experiment files."""
        folder = self.home / "cache" / "methods_table"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def store(self) -> str:
        return sqlite_url(self.cache / "studies.db")


FAMILIES = (
    Family(
        "minilm_topics",
        "MiniLM topics: five encoders of 22.6M parameters, whole checkpoints",
        budget=8,
        split={"search": 40, "select": 30, "test": 150},
        time="2m",
    ),
    Family(
        "smollm2_skills",
        "SmolLM2 skills: three LoRA adapters of a 135M language model",
        budget=6,
        split={"search": 16, "select": 12, "test": 50},
        time="2m",
    ),
)


# --- experiments -----------------------------------------------------------------------------------------------------


def experiment(family: Family, method: str, setting: str) -> dict[str, Any]:
    """The experiment file of one row: the family's own with another space, search and split.

    Raises:
        NotForThis: the method cannot be run on this family.
    """
    data = family.file
    refuse(METHODS[method], setting, [family.home / expert for expert in data["experts"].values()])
    searched = "task_arithmetic" if METHODS[method].statistics in RECIPES_ONLY else method
    data |= {
        "space": space(METHODS[searched], setting, len(data["experts"])),
        "search": {"method": "gp", "n_startup": 4, "window": 1, "budget": family.budget, "time": family.time},
        "workers": {"count": 1, "threads": 1},
    }
    if setting == "default":
        data["search"] = {"method": "random", "budget": 1}
    if METHODS[method].statistics:
        data["statistics"] = str((family.cache / "statistics").relative_to(family.home))
    data["evaluate"] |= {"split": dict(family.split), "finish": {"top": 1, "sweep": SWEEP}}
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:8]
    return {**data, "name": f"{family.name}.{method}.{setting}.{digest}"}


class NotForThis(Exception):
    """Why a method has no row here."""


def refuse(method: Method, setting: str, experts: Sequence[Path]) -> None:
    """NotForThis if the method takes another number or kind of experts, or cannot be searched."""
    if method.needs_factors and not all((expert / "adapter_config.json").is_file() for expert in experts):
        raise NotForThis("takes LoRA adapters only")
    if method.statistics in LEARNED:
        raise NotForThis("is of numbers that a search by gradient learns")
    if method.statistics in RECIPES_ONLY and setting == "search":
        raise NotForThis("is a merge by a recipe, not in a space")
    try:
        check_experts(method, True, len(experts))
    except UserError as error:
        raise NotForThis(error.problem.removeprefix(f"method {method.name} ")) from None


def space(method: Method, setting: str, num_experts: int) -> dict[str, Any]:
    """One weight for all experts, and the method's main parameters; it starts from the method's defaults.

    Few dimensions, since there are few candidates. Where only the weights' proportions count there is a weight an
    expert, and the scale moves. For the setting ``default`` only the start counts.
    """
    start = method.weight.default
    low, high = max(0.0, method.weight.low), min(max(1.5, 2 * start), method.weight.high)
    # Where the method weighs by data the weights are shares.
    one, doubled, others = (trial_merge(method, num_experts, factors) for factors in ((1, 1), (2, 2), (1, 2)))
    proportions, weights_count = same(one, doubled) or method.statistics is not None, not same(one, others)
    weights = {"granularity": "task" if proportions else "global", "range": [low, high], "initial": start}
    params: dict[str, Any] = {}
    if setting == "search":
        moving = {**MOVING, **MOVING_OF.get(method.name, {}), **({"scale": SCALE} if proportions else {})}
        params = {k: moved(p, moving[k], num_experts) for k, p in method.params.items() if moving.get(k)}
        if not params and not weights_count:
            raise NotForThis("has no weight and no parameter to search")
    if not weights_count:
        weights |= {"range": [min(0.5, start), max(1.5, start)]}
    if not params and not weights_count:  # a space must have something that moves, though only its start is evaluated
        return {"method": {"choices": [method.name, "task_arithmetic"]}, "params": {}, "weights": weights}
    return {"method": method.name, "params": params, "weights": weights}


def moved(param: Param, how: Mapping[str, Any], num_experts: int) -> dict[str, Any]:
    """``how`` within the parameter's legal range, starting from its default."""
    if callable(how.get("initial")):
        how = {**how, "initial": how["initial"](num_experts)}
    low, high = how["range"]
    low, high = max(low, param.low), min(high, param.high)
    if isinstance(param.default, int | float):
        low, high = min(low, param.default), max(high, param.default)
    return {**how, "range": [low, high]}


def trial_merge(method: Method, num_experts: int, factors: tuple[float, float]) -> torch.Tensor | None:
    """One random matrix merged, the first expert's weight times one factor and the others' times the other."""
    draws = torch.Generator().manual_seed(0)
    name = "model.layers.0.mlp.up_proj.weight"
    base, *taus = (torch.randn(16, 12, generator=draws, dtype=torch.float64) for _ in range(num_experts + 1))
    weights = [(0.3 + 0.1 * t) * factors[t > 0] for t in range(num_experts)]
    try:
        return merge_state_dicts(method, {name: base}, [{name: base + tau} for tau in taus], weights=weights)[name]
    except UserError:
        return None


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.allclose(one, other, rtol=1e-9, atol=1e-9)


# --- running ---------------------------------------------------------------------------------------------------------


def run(
    family: Family, method: str, setting: str, progress: Progress, *, allow_drift: bool = False
) -> list[dict[str, Any]]:
    """One study, finished or gone on with; the rows of it for the results file."""
    head = {"family": family.name, "method": method, "setting": setting, "version": __version__}
    try:
        data = experiment(family, method, setting)
    except NotForThis as reason:
        return [head | {"skipped": str(reason)}]
    head["settings"] = settings_of(data)
    try:
        file = family.cache / f"{method}.{setting}.yaml"
        file.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
        spec = Spec.from_dict(data, family.home, path=file)
        options = Options(storage=family.store, seconds=PATIENCE, allow_drift=allow_drift)
        kind = METHODS[method].statistics
        if kind is not None:
            measure(family, kind, progress)
        if (method, setting) != CONTROLS_FROM:
            if not has_study(family, *CONTROLS_FROM):  # the results are there, but from another checkout
                run(family, *CONTROLS_FROM, progress, allow_drift=allow_drift)
            hand_over(family, method, setting, spec, options, progress)
        if kind in RECIPES_ONLY:
            put_candidate(family, method, spec, progress)
        store = run_study(spec, options, progress, make_pool=lambda: LocalPool(inline=True))
    except (UserError, NothingCompleted) as error:
        problem = str(getattr(error, "problem", error)).partition("\n")[0]
        return [head | {"failed": problem.replace(f"{family.home}{os.sep}", "")}]
    return rows_of(store, head, controls=(method, setting) == CONTROLS_FROM)


def has_study(family: Family, method: str, setting: str) -> bool:
    name = experiment(family, method, setting)["name"]
    return any(summary["name"] == name for summary in Store.names(family.store))


def measure(family: Family, kind: str, progress: Progress) -> None:
    """What `evomerge collect` measures of the experts, on search items; what is there is kept."""
    from evomerge.collecting import Wanted, collect

    spec = Spec.from_dict(experiment(family, *CONTROLS_FROM), family.home)
    collect(spec, Wanted((kind,), COLLECTED, out=family.cache / "statistics"), progress)


def hand_over(family: Family, method: str, setting: str, spec: Spec, options: Options, progress: Progress) -> None:
    """Give the new study what others have evaluated: the controls, and (to its search) the method's defaults.

    Sources, items, evaluator and seed are the same, so that an equal recipe has equal outcomes.
    """
    own = (method, "default")
    givers = [CONTROLS_FROM, own] if setting == "search" and has_study(family, *own) else [CONTROLS_FROM]
    for giver in givers:

        def as_default(e: Evaluation, giver: tuple[str, str] = giver) -> Evaluation | None:
            if giver == CONTROLS_FROM and method != CONTROLS_FROM[0]:
                return None
            return replace(e, key=f"default:0/{e.split}", subject="default:0")

        take_over(spec, family.store, experiment(family, *giver)["name"], options, progress, as_default)


def put_candidate(family: Family, method: str, spec: Spec, progress: Progress) -> None:
    """Make the merge at the method's defaults the study's only candidate, in the place of its space's initial point.

    It is then evaluated, chosen and tested as any other.
    """
    store = Store.open(family.store, spec.name)
    if store.trials():
        return
    plan = build_plan(spec, progress)
    start = METHODS[method].weight.default
    recipe = replace(
        plan.template,
        method=method,
        params=check_params(method, METHODS[method], {}),
        groups=(Group((start,) * len(spec.experts)),),
    )
    kinds = [str(METHODS[method].statistics)]
    recipe = replace(recipe, statistics=verify_collected(Collected(str(spec.statistics_path)), kinds, recipe))
    with store.lock():
        store.add_trial(0, plan.space.initial(), recipe.to_dict(), recipe.hash)


def settings_of(data: Mapping[str, Any]) -> str:
    return str(data["name"]).rpartition(".")[2]


# --- results ---------------------------------------------------------------------------------------------------------


def rows_of(store: Store, head: Mapping[str, Any], *, controls: bool) -> list[dict[str, Any]]:
    """What the study says of its winner on test (and of the controls), as plain data."""
    board = leaderboard(store, aggregate=aggregate_of(store))
    own = next(row for row in board.test if row.subject == board.winner)
    evaluations = {e.key: e for e in store.evaluations()}
    trials = store.trials()
    merges = [e.seconds["merge"] for e in evaluations.values() if e.subject == "trial:0" or "trial:" in e.subject
              if "merge" in e.seconds]  # fmt: skip
    chosen = next(t for t in trials if t.recipe_hash == evaluations[f"{own.subject}/test"].recipe_hash)
    rows = [
        {
            **head,
            **numbers(own),
            "against": board.best_control,
            "merge": merge_in_short(evaluations[f"{own.subject}/test"].recipe),
            "trial": chosen.n,
            "trials": len(trials),
            "failures": sum(t.state == "fail" for t in trials),
            "dimensions": len(store.record["dimensions"]),
            "merge_seconds": round(statistics.median(merges), 3) if merges else None,
            "seconds": round(math.fsum(e.seconds.get("total", 0.0) for e in evaluations.values()
                                       if "trial:" in e.subject), 1),
        }
    ]  # fmt: skip
    if controls:
        common = {key: head[key] for key in ("family", "version", "settings")}
        rows += [
            {**common, "method": row.name, "setting": "control", **numbers(row), "against": board.best_control,
             "merge": merge_in_short(evaluations[f"{row.subject}/test"].recipe)}
            for row in board.test if row.kind == "control"
        ]  # fmt: skip
    return rows


def is_done(row: Mapping[str, Any] | None, family: Family, method: str, setting: str) -> bool:
    """Is this row what a run would give? Reasons for having no numbers are looked at again each time."""
    if row is None or "test" not in row:
        return False
    try:
        return row.get("settings") == settings_of(experiment(family, method, setting))
    except NotForThis:
        return False


def work(families: Sequence[Family], methods: Sequence[str]) -> list[tuple[Family, str, str]]:
    """Every row, the one with the controls first, defaults before searches."""
    first = CONTROLS_FROM[0]
    order = [first, *(name for name in methods if name != first)]
    wanted = [(f, m, s) for s in SETTINGS for f in families for m in order if m not in CONTROL_METHODS]
    return [w for w in wanted if w[1] in methods or (w[1], w[2]) == CONTROLS_FROM]


# --- the page --------------------------------------------------------------------------------------------------------


def page(rows: Sequence[Mapping[str, Any]], families: Sequence[Family] = FAMILIES) -> str:
    """The tables in Markdown, a function of the results alone."""
    by_family = [(f, [r for r in rows if r["family"] == f.name]) for f in families]
    return "".join(table(own, family) + "\n\n" for family, own in by_family if own)


def table(rows: Sequence[Mapping[str, Any]], family: Family) -> str:
    by_key = {(r["method"], r["setting"]): r for r in rows}
    measured = [r for r in rows if "test" in r]
    against = sorted({r["against"].removeprefix("control:") for r in measured})
    tasks = len(next((r["tasks"] for r in measured), {}))
    test = next((r["items"] for r in measured), 0)
    lines = [
        f"### {family.title}",
        "",
        f"Mean accuracy on {test} test items ({family.split['test']} for each of {tasks} tasks) with 95% intervals. "
        f"Search: {family.budget} candidates of `gp`, of which the defaults are the first (seed 0; where a merge takes "
        f"long some fewer, as the last column says); the best on {family.split['search']} search items a task is "
        "tested. What moves is one "
        "weight for all experts (where only proportions count, one for each, and `scale`) and the method's main "
        'parameters. "Against": the paired difference to the best control, '
        f"{' or '.join(a.replace('_', ' ') for a in against)}, which was chosen on {family.split['select']} other "
        f"items a task. `fisher`, `regmean`, `regmean_pp` and `lm_cocktail` have seen {COLLECTED} search items a task.",
        "",
        "| method | at its defaults | against | after a search | against | p | found |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    controls = [r for r in rows if r["setting"] == "control"]
    lines += [
        f"| control: {r['method']} | {interval(r)} | {versus(r)} | | | | {in_short(r['merge'])} |"
        for r in sorted(controls, key=lambda r: -r["test"][0])
    ]
    names = sorted({r["method"] for r in rows if r["setting"] != "control"})
    with_rows = [n for n in names if any("test" in by_key.get((n, s), {}) for s in SETTINGS)]
    best = {n: max(by_key[n, s]["test"][0] for s in SETTINGS if "test" in by_key.get((n, s), {})) for n in with_rows}
    for name in sorted(with_rows, key=lambda n: (-best[n], n)):
        default, search = (by_key.get((name, s), {}) for s in SETTINGS)
        lines.append(
            f"| `{name}` | {interval(default)} | {versus(default)} | {interval(search)} | {versus(search)} | "
            f"{p_value(search)} | {found(search)} |"
        )
    reasons = {n: why(by_key, n) for n in names if why(by_key, n)}
    if reasons:
        lines += [
            "",
            "Without a number: " + "; ".join(f"`{n}` {reason}" for n, reason in sorted(reasons.items())) + ".",
        ]
    return "\n".join(lines)


def why(by_key: Mapping[tuple[str, str], Mapping[str, Any]], name: str) -> str:
    for setting in SETTINGS:
        row = by_key.get((name, setting), {})
        if "skipped" in row:
            return row["skipped"]
        if "failed" in row:
            return f"({setting}) failed: {row['failed']}"
    return ""


def interval(row: Mapping[str, Any]) -> str:
    if "test" not in row:
        return "-"
    value, low, high = row["test"]
    return short(value) + ("" if low is None else f" [{short(low)}, {short(high)}]")


def versus(row: Mapping[str, Any]) -> str:
    if row.get("difference") is None:
        return ""
    value, low, high, _ = row["difference"]
    text = f"{short(value, sign=True)}" + (
        "" if low is None else f" [{short(low, sign=True)}, {short(high, sign=True)}]"
    )
    return f"**{text}**" if low is not None and low > 0 else text


def p_value(row: Mapping[str, Any]) -> str:
    p = (row.get("difference") or [None] * 4)[3]
    return "" if p is None else "< .001" if p < 0.001 else short(p)


def found(row: Mapping[str, Any]) -> str:
    """What the search chose, and which of its candidates that was."""
    if "test" not in row:
        return ""
    failed = f", {row['failures']} failed" if row["failures"] else ""
    which = "the defaults" if row["trial"] == 0 else in_short(row["merge"])
    return f"{which} ({row['trial'] + 1} of {row['trials']}{failed})"


def in_short(merge: str) -> str:
    """Of a merge as the leaderboard has it: what can move, and the weights."""
    head, _, weights = merge.partition(") ") if ")" in merge else ("", "", merge.partition(" ")[2])
    moving = {*MOVING, *(key for own in MOVING_OF.values() for key in own), "scale"}
    params = [pair.split("=") for pair in head.partition("(")[2].split(", ") if "=" in pair]
    numbers = [entry.rpartition(" ")[::2] for entry in weights.split(", ")]
    texts = [f"{key} {value}" for key, value in params if key in moving and (key, value) != ("scale", "1.00")]
    one = {weight for _, weight in numbers}
    named = ", ".join(f"{name} {weight}" for name, weight in numbers if weight != "0.00")
    return ", ".join([*texts, f"weight {min(one)}" if len(one) == 1 else named])


def main(arguments: Sequence[str] | None = None, families: Sequence[Family] = FAMILIES) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", choices=[*(f.name for f in families), []], metavar="FAMILY")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), metavar="METHOD", default=list(METHODS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write-docs", action="store_true", help="only write docs/methods.md")
    parser.add_argument("--allow-drift", action="store_true", help="go on with studies made with an older evaluator")
    parser.add_argument("--experiment", nargs=3, metavar=("FAMILY", "METHOD", "SETTING"), help="print that file")
    options = parser.parse_args(arguments)
    results = Results(options.results)
    if options.experiment:
        wanted, method, setting = options.experiment
        family = next(f for f in families if f.name == wanted)
        print(yaml.safe_dump(experiment(family, method, setting), sort_keys=False), end="")
        return 0
    if not options.write_docs:
        chosen = [f for f in families if not options.families or f.name in options.families]
        for family in [f for f in chosen if not f.is_built]:
            print(f"{family.name} is not built: python experiments/{family.name}/build.py", file=sys.stderr)
            chosen.remove(family)
        todo = [w for w in work(chosen, options.methods) if not is_done(results.find(w[0].name, *w[1:]), *w)]
        print(f"{len(todo)} rows to do", file=sys.stderr)
        for n, (family, method, setting) in enumerate(todo, 1):
            print(f"\n== {n}/{len(todo)} {family.name}: {method}, {setting}", file=sys.stderr, flush=True)
            try:
                results.put(run(family, method, setting, Progress(), allow_drift=options.allow_drift))
            except (Interrupted, KeyboardInterrupt):
                print("stopped; run it again to go on", file=sys.stderr)
                return 130
    if options.results == RESULTS:
        put_between(PAGE, BEGIN, page(results.rows), END)
    else:
        print(page(results.rows, families))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
