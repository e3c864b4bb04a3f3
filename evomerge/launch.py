"""Starting and resuming studies: plan, store, lock, pool, and the study itself, put together."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge import installed
from evomerge.errors import StudyError, UserError, nearest
from evomerge.hub import hub_id
from evomerge.leaderboard import Aggregate
from evomerge.planning import Plan, build_plan, code_parts, drift, refuse_drift
from evomerge.plugins import EVALUATOR, Code, names_file, split_reference
from evomerge.pools import LocalPool, Pool, WorkerSpec
from evomerge.progress import Progress
from evomerge.running import Runner, StopSignal
from evomerge.spec import Spec, load_spec
from evomerge.stages import keep
from evomerge.store import Store
from evomerge.study import Study, idle_workers
from evomerge.surgery_stage import refuse_other_surgery
from evomerge.warmstart import starting_points

DEFAULT_STORE = "evomerge.db"


@dataclass(frozen=True)
class Options:
    """What the command line may change of an experiment."""

    budget: str | None = None  # "200", or "+100" on top of what the study has
    seconds: float | None = None
    workers: int | None = None
    address: str | None = None
    storage: str | None = None
    allow_drift: bool = False


def sqlite_url(path: Path) -> str:
    return f"sqlite:///{path.resolve()}"


def storage_of(spec: Spec, override: str | None) -> str:
    """The store's URL: the command line's, EVOMERGE_STORAGE, the experiment's, or evomerge.db in its folder."""
    chosen = override or os.environ.get("EVOMERGE_STORAGE") or spec.storage
    return chosen or sqlite_url(spec.folder / DEFAULT_STORE)


def default_storage(override: str | None) -> str:
    """The store's URL for a study that is given by name."""
    return override or os.environ.get("EVOMERGE_STORAGE") or sqlite_url(Path(DEFAULT_STORE))


def find_study(study: str, storage: str | None) -> tuple[str, str, Spec | None]:
    """(store URL, study name, spec) of what the user typed: an experiment file, or a name in the storage.

    Raises:
        StudyError: there is no such study.
    """
    path = Path(study)
    if path.is_dir() and (path / "experiment.yaml").is_file():
        path = path / "experiment.yaml"
    if path.suffix in (".yaml", ".yml", ".json") or path.is_file():
        spec = load_spec(path)
        return storage_of(spec, storage), spec.name, spec
    url = default_storage(storage)
    known = [summary["name"] for summary in Store.names(url)]
    if study not in known:
        raise StudyError(
            f"there is no study {study!r} in {url}",
            remedy=nearest(study, known) if known else "Name an experiment file, or the store with --storage.",
        )
    return url, study, None


def _exists(url: str, name: str) -> bool:
    return any(summary["name"] == name for summary in Store.names(url))


def open_study(study: str, storage: str | None) -> Store:
    """The store of an existing study, for reading."""
    url, name, spec = find_study(study, storage)
    if spec is not None and not _exists(url, name):
        raise StudyError(
            f"study {name!r} has not been started yet (no such study in {url})",
            remedy=f"Start it with: evomerge run {study}",
        )
    return Store.open(url, name)


def recorded_sources(url: str, name: str) -> dict[str, str]:
    """Hugging Face id -> the same with its commit, of a study's sources; nothing if there is no such study."""
    if not _exists(url, name):
        return {}
    record = Store.open(url, name).record
    typed = [record["spec"]["base"], *record["spec"]["experts"].values()]
    worker = record["worker"]
    used = [source["path"] for source in (worker["base"], *worker["experts"])]
    return {t: u for t, u in zip(typed, used, strict=True) if (found := hub_id(u)) is not None and found.pinned}


def stored_spec(store: Store) -> Spec:
    """The experiment that a study was made from."""
    return Spec.from_dict(store.record["spec"], Path(store.record["folder"]))


def aggregate_of(store: Store) -> Aggregate | None:
    """The evaluator's ``aggregate`` where a task's score is no mean over its items, since intervals then need it.

    None where all scores are means, and where the evaluator that made them is not here: a leaderboard can be read
    without the models and the data. Code that is not the study's own does not run.
    """
    record = store.record
    if all(metric["item_mean"] for metric in record["metrics"].values()):
        return None
    from evomerge.worker import make_evaluator

    def unchanged(parts: Mapping[str, str]) -> bool:
        return all(record["fingerprint"].get(name) == digest for name, digest in parts.items())

    spec = WorkerSpec.from_dict(record["worker"])
    named = spec.evaluator
    try:
        code = Code(path=split_reference(named)[0]) if names_file(named) else installed.code_of(EVALUATOR, named)
        if not unchanged(code_parts("evaluator", named, code, Path(spec.folder))):
            return None
        evaluator = make_evaluator(spec)
        # Only it knows what else its scores depend on: data, tasks, versions.
        now = {f"evaluator {name}": digest for name, digest in evaluator.fingerprint().items()}
    except (UserError, OSError):
        return None
    return evaluator.aggregate if unchanged(now) else None


def new_budget(text: str | None, current: int) -> int:
    """A budget from ``--budget``: a number of trials in all, or ``+N`` more than ``current``."""
    if text is None:
        return current
    digits = text.removeprefix("+")
    if not digits.isdigit():
        raise StudyError(f"--budget must be a number of trials such as 200, or +100 for more, but is {text!r}")
    return current + int(digits) if text.startswith("+") else int(digits)


def pool_factory(plan: Plan, options: Options) -> Callable[[], Pool]:
    """One worker without an address runs in a local child process; everything else on Ray."""
    workers = plan.spec.workers
    count = options.workers or workers.count
    address = options.address or workers.address

    def make() -> Pool:
        if count == 1 and address is None:
            return LocalPool(timeout=workers.timeout)
        from evomerge.cluster import RayPool

        return RayPool(
            count,
            address=address,
            cpus=workers.cpus,
            gpus=workers.gpus,
            threads=workers.threads,
            timeout=workers.timeout,
        )

    return make


def new_record(plan: Plan, budget: int) -> dict[str, Any]:
    """What a study remembers of the experiment it was made from."""
    return {
        "spec": plan.spec.to_dict(),
        "folder": str(plan.spec.folder),
        "file": str(plan.spec.path) if plan.spec.path else None,
        "fingerprint": dict(plan.fingerprint),
        "libraries": dict(plan.libraries),
        "worker": plan.worker.to_dict(),
        "metrics": {
            task: {"metric": plan.evaluator.metric(task), "item_mean": plan.evaluator.is_item_mean(task)}
            for task in plan.tasks
        },
        "dimensions": [d.to_dict() for d in plan.space.dimensions],
        "budget": budget,
        "rounds": [],
        "drift": [],
        "created": time.time(),
    }


def open_or_create(
    plan: Plan, url: str, options: Options, progress: Progress, *, must_exist: bool
) -> tuple[Store, int]:
    """The study's store and its budget; refuses a study made from something else."""
    name = plan.spec.name
    if not _exists(url, name):
        if must_exist:
            raise StudyError(f"there is no study {name!r} in {url}", remedy="Start it with: evomerge run EXPERIMENT")
        budget = new_budget(options.budget, plan.spec.search.budget)
        record = new_record(plan, budget) | {"starts": starting_points(plan, url)}
        return Store.create(url, name, record, items=plan.items), budget
    store = Store.open(url, name)
    record = store.record
    changes = drift(record["fingerprint"], plan.fingerprint)
    if changes and not options.allow_drift:
        raise refuse_drift(name, changes)
    if changes:
        progress.log("going on although the inputs have changed:\n" + "\n".join(f"    {c}" for c in changes))
        store.update_record(drift=[*record.get("drift", []), {"time": time.time(), "changes": changes}])
        store.update_record(fingerprint=dict(plan.fingerprint))
        store.set_items(list(plan.items))
    versions = drift(record.get("libraries", {}), plan.libraries)
    if versions:
        progress.log(
            "note: library versions have changed, so scores may differ in the last bits: " + "; ".join(versions)
        )
    if not must_exist:
        progress.log(f"study {name!r} exists; going on with it")
    return store, new_budget(options.budget, record["budget"])


def run_study(
    spec: Spec,
    options: Options,
    progress: Progress,
    *,
    must_exist: bool = False,
    make_pool: Callable[[], Pool] | None = None,
) -> Store:
    """Plan, search, finish; returns the store for the leaderboard.

    Args:
        make_pool: another place to run workers than the options name.

    Raises:
        UserError: the input is wrong; nothing was started.
        Interrupted, KeyboardInterrupt: stopped from outside; resumable.
    """
    url = storage_of(spec, options.storage)
    plan = build_plan(
        spec,
        progress,
        workers=options.workers,
        address=options.address,
        recorded=recorded_sources(url, spec.name),
    )
    _refuse_other_search(plan, url)
    store, budget = open_or_create(plan, url, options, progress, must_exist=must_exist)
    idle = idle_workers(plan, options.workers or plan.spec.workers.count)
    if idle:
        progress.log(f"note: {idle}")
    with store.lock():
        keep(plan.template, progress)
        store.clear_stop()
        if budget != store.record["budget"]:
            store.update_record(budget=budget)
        stop = StopSignal()
        runner = Runner(
            plan, store, make_pool or pool_factory(plan, options), stop, progress, plan.spec.workers.retries
        )
        with stop.installed(progress.log):
            try:
                Study(
                    plan, store, runner, progress, budget=budget, seconds=options.seconds or plan.spec.search.seconds
                ).run()
            finally:
                runner.close()
    return store


def _refuse_other_search(plan: Plan, url: str) -> None:
    """Space, searcher, seed, objective and the code of methods and losses cannot drift, --allow-drift or not: stored
    trials could not be replayed. Nor can the options of adapters that are trained."""
    name = plan.spec.name
    if not _exists(url, name):
        return
    record = Store.open(url, name).record
    refuse_other_surgery(plan.spec, record)
    stored = record["fingerprint"]
    code = sorted(key for key in {*stored, *plan.fingerprint} if key.startswith(("method ", "loss ")))
    keys = ("space", "search", "seed", "objective", "tokenizer", *code)
    other = [key for key in keys if stored.get(key) != plan.fingerprint.get(key)]
    if other:
        raise StudyError(
            f"study {name!r} in {url} belongs to another experiment: its {', '.join(other)} differ:\n"
            + "\n".join(f"    {c}" for c in drift(stored, plan.fingerprint)),
            remedy="Restore them, or give the experiment a new name, or another --storage.",
        )
