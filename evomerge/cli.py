"""The command line: parse, call, print. Heavy libraries are imported by the commands that need them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from evomerge import __version__
from evomerge.errors import Interrupted, UserError

EXIT_INPUT, EXIT_FAILURES, EXIT_INTERRUPTED = 2, 3, 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Find the best way to merge fine-tuned checkpoints of one base model.

    A search is described by an experiment file, kept as a study in a store, and ends with a leaderboard. STUDY below is
    an experiment file, or the name of a study in --storage, EVOMERGE_STORAGE or ./evomerge.db.

    Exit codes: 0 done; 2 the input is wrong; 3 the study ended with failures that need a look; 130 interrupted, and
    resumable.""",
)

Storage = Annotated[
    str | None,
    typer.Option("--storage", help="URL of the store, such as sqlite:///my.db or postgresql+psycopg://host/db."),
]
Workers = Annotated[int | None, typer.Option("--workers", min=1, help="Workers, in place of the experiment's.")]
Address = Annotated[str | None, typer.Option("--address", help="Ray cluster: auto, or ray://host:10001.")]
Allow = Annotated[bool, typer.Option("--allow-code", help="Run the file that the recipe names as its method's code.")]
Seconds = Annotated[str | None, typer.Option("--time", help="Propose no candidate after this long: 90s, 30m, 6h.")]
Budget = Annotated[str | None, typer.Option("--budget", help="Trials in all; +N for N more than the study has.")]
Drift = Annotated[bool, typer.Option("--allow-drift", help="Go on although sources, evaluator or data have changed.")]
AsWhat = Annotated[
    str,
    typer.Option("--as", help="checkpoint; adapter: a LoRA adapter, of a weighted sum of LoRA adapters."),
]
ShardSize = Annotated[
    str | None, typer.Option("--shard-size", help="Most that one weight file holds: 500MB, 2GiB; 5GB by default.")
]
Tokenizer = Annotated[
    str | None, typer.Option("--tokenizer", help="base, expert:NAME, or a folder or id; the base's by default.")
]
ChatTemplate = Annotated[
    str | None,
    typer.Option("--chat-template", help="base, expert:NAME, a folder or a .jinja file; the tokenizer's by default."),
]
StudyArgument = Annotated[str, typer.Argument(metavar="STUDY", help="An experiment file, or a study's name.")]


def _version(show: bool) -> None:
    if show:
        print(f"evomerge {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


def _example(text: str) -> str:
    return f"Example: {text}"


@app.command(epilog=_example("evomerge init my-search"))
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that does not exist yet, or is empty.")],
) -> None:
    """Make a folder with an experiment that runs at once. On a tiny family; its comments lead to your own models."""
    from evomerge.progress import Progress
    from evomerge.scaffold import scaffold

    with Progress().stage("training a tiny base and two experts", 1) as stage:

        def report(done: int, total: int) -> None:
            stage.total = total
            stage.update(done)

        made = scaffold(folder, report)
    print(f"made {made}\nNext:\n  cd {folder}\n  evomerge run experiment.yaml")


@app.command(epilog=_example("evomerge run experiment.yaml --budget 200 --workers 4"))
def run(
    experiment: Annotated[Path, typer.Argument(metavar="EXPERIMENT", help="The experiment file.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would happen, stop.")] = False,
    budget: Budget = None,
    time: Seconds = None,
    workers: Workers = None,
    address: Address = None,
    storage: Storage = None,
) -> None:
    """Search for the best merge. Controls, candidates, finish, leaderboard; goes on with a study that exists."""
    from evomerge.launch import Options
    from evomerge.spec import load_spec

    spec = load_spec(experiment)
    options = Options(budget, _seconds(time), workers, address, storage)
    if dry_run:
        _dry_run(spec, options)
        return
    _run(spec, options, str(experiment), must_exist=False)


@app.command(epilog=_example("evomerge resume experiment.yaml --budget +100"))
def resume(
    study: StudyArgument,
    budget: Budget = None,
    time: Seconds = None,
    workers: Workers = None,
    address: Address = None,
    storage: Storage = None,
    allow_drift: Drift = False,
) -> None:
    """Go on after any stop, crash or kill. Refuses inputs that have changed, with a list of what did."""
    from evomerge.launch import Options, find_study, open_study, stored_spec

    url, _, spec = find_study(study, storage)
    options = Options(budget, _seconds(time), workers, address, url, allow_drift)
    _run(spec or stored_spec(open_study(study, storage)), options, study, must_exist=True)


@app.command(epilog=_example("evomerge stop experiment.yaml"))
def stop(study: StudyArgument, storage: Storage = None) -> None:
    """Ask a running study to stop. It finishes what is running, wherever it runs, as after Ctrl-C."""
    from evomerge.launch import open_study

    store = open_study(study, storage)
    owner = store.owner()
    if owner is None:
        print("nothing is running this study")
        return
    store.request_stop()
    print(f"asked {owner} to stop; resume later with: evomerge resume {study}")


@app.command(epilog=_example("evomerge studies --storage sqlite:///evomerge.db"))
def studies(storage: Storage = None) -> None:
    """List the studies of a store."""
    from rich.console import Console
    from rich.table import Table

    from evomerge.launch import default_storage
    from evomerge.store import Store

    url = default_storage(storage)
    summaries = Store.names(url)
    if not summaries:
        print(f"no studies in {url}")
        return
    table = Table("study", "trials", "failed", "budget", "best on search", "rounds", "state", box=None)
    for s in summaries:
        best = "" if s["best"] is None else f"{s['best']:.3f}"
        cells = (s["complete"], s["failed"], s["budget"], best, s["rounds"], s["state"])
        table.add_row(s["name"], *(str(cell) for cell in cells))
    Console().print(table)


@app.command(epilog=_example("evomerge leaderboard experiment.yaml --format md"))
def leaderboard(
    study: StudyArgument,
    format: Annotated[str, typer.Option("--format", help="table, json, csv or md.")] = "table",
    storage: Storage = None,
) -> None:
    """Rank candidates and controls. With 95% intervals, and the winner on the test items."""
    from evomerge.launch import open_study

    _print_leaderboard(open_study(study, storage), format)


@app.command(epilog=_example("evomerge show experiment.yaml 17"))
def show(
    study: StudyArgument,
    trial: Annotated[
        str,
        typer.Argument(
            metavar="TRIAL", help="A trial's number, best, or a control's name; surgery:NAME, with its adapters."
        ),
    ],
    format: Annotated[
        str, typer.Option("--format", help="text; recipe or mergekit: the merge alone, as YAML for either tool.")
    ] = "text",
    storage: Storage = None,
) -> None:
    """Show one trial in full. Recipe, scores, timing, attempts, failure."""
    _choice("--format", format, ("text", "recipe", "mergekit"))
    from evomerge.launch import open_study
    from evomerge.showing import show_recipe, show_trial

    store = open_study(study, storage)
    print(show_trial(store, trial) if format == "text" else show_recipe(store, trial, format))


@app.command(
    epilog=_example("evomerge export experiment.yaml --trial best --out merged --shard-size 2GB")
    + "\n\n"
    + _example("evomerge export experiment.yaml --out adapter --as adapter --chat-template expert:chat")
)
def export(
    study: StudyArgument,
    out: Annotated[Path, typer.Option("--out", help="A folder that does not exist yet, or is empty.")],
    trial: Annotated[str, typer.Option("--trial", help="A trial's number, best, or a control's name.")] = "best",
    surgery: Annotated[
        bool, typer.Option("--surgery", help="With its adapters beside it, which make it no plain checkpoint.")
    ] = False,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu or cuda; by default the study's, for its very numbers.")
    ] = None,
    allow_code: Allow = False,
    as_what: AsWhat = "checkpoint",
    shard_size: ShardSize = None,
    tokenizer: Tokenizer = None,
    chat_template: ChatTemplate = None,
    storage: Storage = None,
) -> None:
    """Write a merge as a checkpoint. A Hugging Face folder, with its recipe and a model card."""
    from evomerge.export_command import Wanted
    from evomerge.launch import open_study
    from evomerge.methods.lookup import permit
    from evomerge.ranking import SURGERY
    from evomerge.showing import card_of, resolve_subject

    store = open_study(study, storage)
    if surgery and not trial.startswith(SURGERY):
        trial = SURGERY + trial
    subject, recipe = resolve_subject(store, trial)
    worker = store.record["worker"]
    recipe = permit(recipe, allow=allow_code)
    wanted = Wanted(as_what, shard_size, tokenizer, chat_template)
    where = {"threads": worker["threads"], "device": device or worker["device"]}
    _write_out(recipe, out, wanted, card=card_of(store, subject), **where)


@app.command(epilog=_example("evomerge merge recipe.yaml --out merged"))
def merge(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, or a mergekit configuration.")],
    out: Annotated[Path, typer.Option("--out", help="A folder that does not exist yet, or is empty.")],
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads.")] = 1,
    device: Annotated[str, typer.Option("--device", help="Where to compute: cpu or cuda.")] = "cpu",
    as_what: AsWhat = "checkpoint",
    shard_size: ShardSize = None,
    tokenizer: Tokenizer = None,
    chat_template: ChatTemplate = None,
    allow_code: Allow = False,
) -> None:
    """One merge, without a search."""
    from evomerge.export_command import Wanted
    from evomerge.methods.lookup import permit
    from evomerge.recipe import Recipe

    wanted = Wanted(as_what, shard_size, tokenizer, chat_template)
    _write_out(permit(Recipe.load(recipe), allow=allow_code), out, wanted, threads=threads, device=device)


@app.command(epilog=_example("evomerge collect experiment.yaml --what fisher --items 256"))
def collect(
    experiment: Annotated[Path, typer.Argument(metavar="EXPERIMENT", help="The experiment file.")],
    what: Annotated[
        list[str] | None,
        typer.Option(
            "--what",
            metavar="KIND",
            help="fisher, gram, gram_merged, loss; by default what the space's methods need.",
        ),
    ] = None,
    items: Annotated[
        int | None, typer.Option("--items", min=1, help="How many search items of a task; by default 256, or all.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder to write; by default the experiment's, or statistics beside it."),
    ] = None,
    labels: Annotated[
        str,
        typer.Option(
            "--labels", help="For fisher: model (all answers, as the model weighs them) or right (the right one only)."
        ),
    ] = "model",
    rho: Annotated[
        float,
        typer.Option("--rho", min=0.0, max=1.0, help="For gram_merged: regmean_pp's rho, by which layers are merged."),
    ] = 0.9,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="EXPERT=TASK", help="Whose own task it is, where names do not say so."),
    ] = None,
) -> None:
    """Measure the experts, for methods that are weighted by data. On search items; a stopped run goes on."""
    _choice("--labels", labels, ("model", "right"))
    from evomerge.collecting import Wanted, collect
    from evomerge.progress import Progress
    from evomerge.spec import load_spec

    tasks: dict[str, list[str]] = {}
    for pair in task or ():
        expert, equals, name = pair.partition("=")
        if not equals:
            raise UserError(f"--task is EXPERT=TASK, but is {pair!r}")
        tasks.setdefault(expert, []).append(name)
    spec = load_spec(experiment)
    try:
        made = collect(spec, Wanted(tuple(what or ()), items, out, labels, rho, tasks), Progress())
    except (Interrupted, KeyboardInterrupt):
        print("Stopped. The experts that are done are kept: type the same again to go on.", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    print("\n".join(made.lines))
    print(f"wrote {made.folder}")
    if spec.statistics_path != made.folder:
        print(f"Name it in the experiment or recipe:\n  statistics: {made.folder}")


@app.command(epilog=_example("evomerge evaluate merged experiment.yaml --split test --compare"))
def evaluate(
    target: Annotated[
        Path, typer.Argument(metavar="MODEL|RECIPE", help="A checkpoint's folder or id, or a recipe file.")
    ],
    experiment: Annotated[Path, typer.Argument(metavar="EXPERIMENT", help="The experiment whose items to use.")],
    split: Annotated[str, typer.Option("--split", help="search, select or test.")] = "select",
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Compare with what the study stored for the same recipe; exit 3 if it differs."),
    ] = False,
    surgery: Annotated[
        bool,
        typer.Option("--surgery/--no-surgery", help="Put the adapters that an export has beside it behind the model."),
    ] = True,
    format: Annotated[str, typer.Option("--format", help="text or json (item by item).")] = "text",
    allow_code: Allow = False,
    storage: Storage = None,
) -> None:
    """Score a checkpoint or a recipe. On an experiment's items, by its evaluator, in this process."""
    _choice("--split", split, ("search", "select", "test"))
    _choice("--format", format, ("text", "json"))
    import json

    from evomerge import rescoring
    from evomerge.launch import open_study, recorded_sources, storage_of
    from evomerge.planning import build_plan
    from evomerge.progress import Progress
    from evomerge.spec import load_spec

    spec = load_spec(experiment)
    recorded = recorded_sources(storage_of(spec, storage), spec.name)
    plan = build_plan(spec, Progress(), workers=1, recorded=recorded)
    store = open_study(str(experiment), storage) if compare else None
    if store is not None:
        rescoring.check_comparable(plan, store)
    elif plan.objective.subjects:
        store = _study_if_any(str(experiment), storage)
    scores = rescoring.score_target(target, plan, split, allow_code=allow_code, study=store, surgery=surgery)
    comparison = rescoring.compare(scores, store) if store and compare else None
    if format == "json":
        print(json.dumps(rescoring.as_json(scores, comparison), indent=2))
    else:
        print("\n".join(rescoring.lines(scores, comparison)))
    if comparison is not None and not comparison.identical:
        raise typer.Exit(EXIT_FAILURES)


@app.command(epilog=_example("evomerge dump experiment.yaml --out study.json.gz"))
def dump(
    study: StudyArgument,
    out: Annotated[Path, typer.Option("--out", help="A file that does not exist yet; .gz compresses it.")],
    storage: Storage = None,
) -> None:
    """Write all of a study to a JSON file. For another store or machine (evomerge load), or for other tools."""
    from evomerge import transfer
    from evomerge.launch import open_study
    from evomerge.progress import Progress

    print(f"wrote {transfer.dump(open_study(study, storage), out, Progress())}")


@app.command(epilog=_example("evomerge load study.json.gz --storage postgresql+psycopg://host/db"))
def load(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What evomerge dump wrote.")],
    name: Annotated[str | None, typer.Option("--name", help="Another name for the study.")] = None,
    storage: Storage = None,
) -> None:
    """Read a study from a JSON file into a store. All of it or nothing; an existing name is refused."""
    from evomerge import transfer
    from evomerge.launch import default_storage
    from evomerge.progress import Progress

    url = default_storage(storage)
    store = transfer.load(file, url, name=name, progress=Progress())
    print(f"loaded {store.name} into {store.url}\nNext:\n  evomerge leaderboard {store.name} --storage {store.url}")


@app.command(epilog=_example("evomerge methods ties"))
def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One method, in full; also file.py@name, which is run.")
    ] = None,
) -> None:
    """List the merge methods, or show one. With its parameters and source."""
    from evomerge.methods_text import show_method, show_methods

    print(show_method(name) if name else show_methods())


@app.command(epilog=_example("evomerge schema > experiment.schema.json"))
def schema() -> None:
    """Print the schema of experiment files. JSON, for editors that complete and check."""
    import json

    from evomerge.spec import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command(epilog=_example("evomerge doctor"))
def doctor() -> None:
    """Check this machine. What it has, and whether evomerge can work on it."""
    from evomerge.doctor import examine

    checks = examine()
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<{width}}  {check.found}")
    if not all(check.ok for check in checks):
        raise typer.Exit(EXIT_INPUT)


def _study_if_any(experiment: str, storage: str | None) -> Any:
    from evomerge.errors import StudyError
    from evomerge.launch import open_study

    try:
        return open_study(experiment, storage)
    except StudyError:
        return None


def _choice(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{option} must be one of {', '.join(known)}, but is {value!r}")


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    from evomerge.spec import parse_duration

    return parse_duration(text, where="--time")


def _dry_run(spec: Any, options: Any) -> None:
    from evomerge.launch import recorded_sources, storage_of
    from evomerge.planning import build_plan
    from evomerge.progress import Progress
    from evomerge.showing import describe_plan

    recorded = recorded_sources(storage_of(spec, options.storage), spec.name)
    plan = build_plan(spec, Progress(), workers=options.workers, address=options.address, recorded=recorded)
    print(describe_plan(plan, options))


def _run(spec: Any, options: Any, typed: str, *, must_exist: bool) -> None:
    from evomerge.launch import run_study
    from evomerge.progress import Progress
    from evomerge.showing import closing, needs_a_look, stopped_after
    from evomerge.study import NothingCompleted

    progress = Progress()
    try:
        store = run_study(spec, options, progress, must_exist=must_exist)
    except (Interrupted, KeyboardInterrupt):
        print(stopped_after(spec, options, typed), file=sys.stderr)
        _leave(EXIT_INTERRUPTED)
    except NothingCompleted as error:
        print(f"evomerge: {error}\n  See: evomerge show {typed} 0", file=sys.stderr)
        raise typer.Exit(EXIT_FAILURES) from None
    _print_leaderboard(store, "table")
    print(closing(store, typed))
    if needs_a_look(store):
        raise typer.Exit(EXIT_FAILURES)


def _leave(code: int) -> NoReturn:
    """End with ``code``. The pool is closed by now, but Ray's threads can crash an interpreter that takes itself apart
    after a start that was interrupted, and its exit code would be a signal's."""
    if "ray" in sys.modules:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise typer.Exit(code)


def _print_leaderboard(store: Any, format: str) -> None:
    from evomerge import leaderboard as board
    from evomerge.launch import aggregate_of

    _choice("--format", format, ("table", "json", "csv", "md"))
    ranking = board.leaderboard(store, aggregate=aggregate_of(store))
    if format == "table":
        board.render_terminal(ranking)
        return
    text = {"json": board.to_json, "csv": board.to_csv, "md": board.to_markdown}[format](ranking)
    print(text, end="" if text.endswith("\n") else "\n")


def _write_out(recipe: Any, out: Path, wanted: Any, **where: Any) -> None:
    _choice("--as", wanted.as_what, ("checkpoint", "adapter"))
    _choice("--device", where["device"].partition(":")[0], ("cpu", "cuda"))
    from evomerge.export_command import write_out
    from evomerge.progress import Progress

    print(f"wrote {write_out(recipe, out, wanted, Progress(), **where)}")


def main() -> None:
    """The ``evomerge`` command: users' mistakes are printed without a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except UserError as error:
        print(f"evomerge: {error}", file=sys.stderr)
        sys.exit(EXIT_INPUT)
    except (Interrupted, KeyboardInterrupt):
        print("evomerge: interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


if __name__ == "__main__":
    main()
