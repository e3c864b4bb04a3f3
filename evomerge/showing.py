"""What the commands print about plans, studies, trials and methods, as text."""

from __future__ import annotations

import shutil
import tempfile
import textwrap
from collections import Counter
from typing import Any

from evomerge.errors import StudyError, UserError
from evomerge.exporting import merged_bytes
from evomerge.folders import find_folder
from evomerge.keeping import dense_bytes
from evomerge.launch import Options, storage_of
from evomerge.memory import worker_bytes
from evomerge.merging import written_bytes
from evomerge.methods import METHODS
from evomerge.methods_text import plain
from evomerge.modelcard import listed
from evomerge.objectives import Objective
from evomerge.planning import Plan, make_searcher
from evomerge.progress import clock, size
from evomerge.ranking import SURGERY, Judge, find_winner
from evomerge.recipe import Recipe
from evomerge.space import UNTOUCHED, Space
from evomerge.space_parts import describe_rest
from evomerge.spec import Spec
from evomerge.stages import kept_folder, stages
from evomerge.store import Evaluation, Store
from evomerge.study import idle_workers, opening_controls, sweep_values
from evomerge.surgery_stage import lines as surgery_lines
from evomerge.training import curve_in_short
from evomerge.warmstart import starting_points

# A run ends with exit code 3 when more than this share of its trials failed, or when a control or adapters did.
FAILED_SHARE = 0.1
WIDTH = 100  # columns of what is printed about a plan


def resolve_subject(store: Store, name: str) -> tuple[str, Recipe]:
    """The subject (``trial:17``, ``control:average``, ...) and recipe behind what a user typed.

    Args:
        name: ``best``, a trial's number, or a subject with or without its ``control:`` prefix; ``surgery:`` and one of
            these, for the same with its adapters.

    Raises:
        StudyError: the study has no such trial, or no winner yet.
    """
    if name.startswith(SURGERY):
        return _with_adapters(store, name)
    if name == "best":
        winner = find_winner(store.record, store.evaluations())
        if winner is None:
            raise StudyError(
                "the study has no winner yet: its finish stage has not run",
                remedy="Resume it, or name a trial, such as --trial 0.",
            )
        return winner.subject, Recipe.from_dict(winner.recipe)
    if name.isdigit():
        trials = store.trials()
        if int(name) >= len(trials):
            raise StudyError(f"there is no trial {name}; the study has {len(trials)} trials, numbered from 0")
        return f"trial:{name}", Recipe.from_dict(trials[int(name)].recipe)
    by_subject: dict[str, Evaluation] = {e.subject: e for e in store.evaluations()}
    for subject in (name, f"control:{name}", f"control:expert:{name}"):
        if subject in by_subject:
            return subject, Recipe.from_dict(by_subject[subject].recipe)
    shown = sorted(s.removeprefix("control:") for s in by_subject if not s.startswith("trial:"))
    raise StudyError(f"there is no trial {name!r}", remedy=f"Give a trial's number, best, or: {', '.join(shown)}.")


def _with_adapters(store: Store, name: str) -> tuple[str, Recipe]:
    """``surgery:NAME``: a subject that adapters were trained for; StudyError if there is none."""
    subject = SURGERY + resolve_subject(store, name.removeprefix(SURGERY))[0]
    recipes = {e.subject: e.recipe for e in store.evaluations() if e.subject.startswith(SURGERY)}
    if subject not in recipes:
        plain = subject.removeprefix(SURGERY)
        remedy = f"There are some for {' and '.join(s.removeprefix(SURGERY) for s in recipes)}."
        raise StudyError(
            f"the study has no adapters for {plain}: they are trained for its winner and its best control, if the "
            "experiment says `surgery`",
            remedy=remedy if recipes else "Write `surgery: {}` into the experiment file, and go on by evomerge resume.",
        )
    return subject, Recipe.from_dict(recipes[subject])


def card_of(store: Store, subject: str) -> dict[str, Any]:
    """What a model card says of a trial: study, scores by split and task, item counts, libraries."""
    record = store.record
    evaluations = store.evaluations()
    scores = {e.split: e for e in evaluations if e.subject == subject}
    objective = Objective.of_record(record)
    judged = {split: _judge(objective, evaluations, split)(e) for split, e in scores.items()}
    counts: dict[str, dict[str, int]] = {}
    for item in store.items():
        counts.setdefault(item.split or "", {}).setdefault(item.task, 0)
        counts[item.split or ""][item.task] += 1
    return {
        "study": record["spec"]["name"],
        "subject": subject,
        "scores": {
            split: {
                "objective": e.objective,
                "objectives": dict(zip(objective.names, judged[split].values, strict=True))
                if objective.several
                else {},
                "misses": list(judged[split].misses),
                "tasks": {t: {"score": s, "items": counts.get(split, {}).get(t, 0)} for t, s in e.scores.items()},
            }
            for split, e in scores.items()
        },
        "objective": [] if objective.word else objective.text(),
        "metrics": {task: metric["metric"] for task, metric in record["metrics"].items()},
        "compute_dtype": record["worker"]["compute_dtype"],
        "libraries": record["libraries"],
    }


def _judge(objective: Objective, evaluations: list[Evaluation], split: str) -> Judge:
    return Judge(objective, [e for e in evaluations if e.split == split])


def show_trial(store: Store, name: str) -> str:
    """One trial in full: state, scores by split, timing, attempts, failure with its traceback, recipe."""
    subject, recipe = resolve_subject(store, name)
    objective = Objective.of_record(store.record)
    lines = [subject]
    if subject.startswith("trial:"):
        trial = store.trials()[int(subject.removeprefix("trial:"))]
        lines.append(f"state     {trial.state}")
        if trial.failure:
            lines.append(f"failure   {trial.failure}")
        if trial.score is not None and objective.penalty is not None:
            paid = objective.penalty.of(trial.recipe)
            lines.append(f"told      {trial.score - paid:.4f}: its objective on search less the penalty {paid:.4f}")
        lines += [
            "point",
            *(f"  {k:<24} {f'{v:.6g}' if isinstance(v, float) else plain(v)}" for k, v in trial.point.items()),
        ]
        lines += curve_in_short(store.trainings(), trial.n)
    lines += surgery_lines(store.record, subject)
    evaluations = store.evaluations()
    for evaluation in evaluations:
        if evaluation.subject != subject:
            continue
        score = f"objective {evaluation.objective:.4f}" if objective.ready else "evaluated"
        lines.append(f"{evaluation.split:<9} {score}  on {evaluation.worker}")
        judged = _judge(objective, evaluations, evaluation.split)(evaluation)
        if objective.several:
            lines.append("  " + ", ".join(f"{n} {v:.4f}" for n, v in zip(objective.names, judged.values, strict=True)))
        lines += [f"  misses {miss}" for miss in judged.misses]
        lines += [f"  {task:<24} {score:.4f}" for task, score in evaluation.scores.items()]
        if evaluation.seconds:
            lines.append("  " + ", ".join(f"{k} {v:.2f} s" for k, v in evaluation.seconds.items()))
    attempts = [a for a in store.attempts() if a.key.rpartition("/")[0] == subject and a.state != "started"]
    for attempt in attempts:
        note = f": {attempt.reason}" if attempt.reason else ""
        lines.append(f"attempt {attempt.attempt} at {attempt.key.rpartition('/')[2]}: {attempt.state}{note}")
        if attempt.detail:
            lines.append(textwrap.indent(attempt.detail.rstrip(), "  | "))
    lines += [f"recipe    {recipe.hash}", textwrap.indent(recipe.to_yaml().rstrip(), "  ")]
    return "\n".join(lines)


def show_recipe(store: Store, name: str, format: str) -> str:
    """One trial's recipe as YAML: evomerge's own (``recipe``) or ``mergekit``'s."""
    from evomerge.mergekit_writing import to_mergekit_yaml

    _, recipe = resolve_subject(store, name)
    if format == "recipe":
        return recipe.to_yaml().rstrip()
    return to_mergekit_yaml(recipe, is_adapter=_is_adapter).rstrip()


def _is_adapter(path: str) -> bool:
    """False also for a source that is not here."""
    try:
        return (find_folder(path) / "adapter_config.json").exists()
    except UserError:
        return False


def describe_plan(plan: Plan, options: Options) -> str:
    """What ``run`` would do: sources, dimensions, items, evaluations, memory, disk."""
    spec, space = plan.spec, plan.space
    budget = int(options.budget) if options.budget and options.budget.isdigit() else spec.search.budget
    searcher = make_searcher(spec, space)
    budget = min(budget, searcher.size or budget)
    controls = len(opening_controls(plan)) + 2
    free = shutil.disk_usage(spec.folder).free
    sweep, top = len(sweep_values(plan)), spec.evaluate.finish.top
    sizes = plan.split_sizes()
    base = plan.sources.base
    assert base is not None
    count = options.workers or spec.workers.count
    lines = [
        f"study        {spec.name} in {storage_of(spec, options.storage)}",
        f"base         {plan.template.base.path}  {size(base.total_bytes)}  sha256 {plan.template.base.sha256[:12]}"
        if plan.template.base
        else "",
    ]
    lines += [f"expert       {s.name}: {s.path}  sha256 {s.sha256[:12]}" for s in plan.template.experts]
    for stage_hash, (name, stage) in stages(plan.template).items():
        there = "is there" if kept_folder(stage_hash).is_dir() else f"will be built, {size(merged_bytes(stage))}"
        lines.append(f"stage        {name}: {len(stage.experts)} experts by {listed(stage.methods)}; {there}")
    if plan.template.tokenizer is not None:
        alignment = plan.sources.alignment
        what = "the base's, as it is" if alignment is None else alignment.summary
        lines.append(f"tokenizer    {plan.template.tokenizer.source}: {what}")
    lines.append(f"space        {_methods_of(space)}, {len(space.dimensions)} dimensions")
    lines += _parts_of(plan)
    lines += [f"  {d.name:<22} {d.text()}, from {d.initial_text()}" for d in space.dimensions[:12]]
    if len(space.dimensions) > 12:
        lines.append(f"  and {len(space.dimensions) - 12} more")
    for name, code in plan.codes.items():
        lines.append(f"code         {name}: {code.path or code.package}  sha256 {code.sha256[:12]}")
    for method, collected in space.statistics.items():
        hashes = ", ".join(f"{kind} sha256 {sha256[:12]}" for kind, sha256 in collected.sha256.items())
        lines.append(f"statistics   {method}: {collected.path}  {hashes}")
    lines.append(
        f"search       {spec.search.method}, {budget} trials, {spec.search.schedule} schedule, seed {spec.seed}"
    )
    what, *constraints = plan.objective.text()
    lines.append(f"objective    {what}")
    lines += [f"constraint   {constraint}" for constraint in constraints]
    if plan.objective.subjects:
        first = ", ".join(s.removeprefix("control:").replace("expert:", "expert ") for s in plan.objective.subjects)
        lines.append(f"first        {first} on search: what scores are held against")
    starts = starting_points(plan, storage_of(spec, options.storage))
    if starts:
        lines.append(f"begins with  {len(starts)} of its own points (search.initial)")
    for split, by_task in sizes.items():
        lines.append(f"{split:<12} {sum(by_task.values())} items: " + ", ".join(f"{t} {n}" for t, n in by_task.items()))
    search, select, test = (sum(sizes[s].values()) for s in ("search", "select", "test"))
    evaluations = budget + controls + sweep
    total = evaluations * search + (controls + top + 1) * select + (controls + 1) * test
    if spec.surgery is not None:
        total += 2 * (select + test)
        lines.append(
            f"surgery      adapters of rank {spec.surgery.rank} for {len(plan.tasks)} tasks, trained for the winner "
            f"and the best control in {spec.surgery.steps} steps a task; 2 more evaluations on select and on test"
        )
    lines += [
        f"evaluations  {budget} trials + {controls + sweep} controls on search, "
        f"then up to {controls + top + 1} on select and {controls + 1} on test: {total} items in all",
        f"workers      {count} x {spec.workers.threads} threads, {spec.workers.gpus:g} GPUs each",
        *([f"note         {idle}"] if (idle := idle_workers(plan, count)) else []),
        *([f"note         {slow}"] if (slow := searcher.note(budget)) else []),
        f"memory       {_memory(plan)}",
        f"disk         {size(free)} free; an export takes about {size(base.total_bytes)}",
        "time         unknown until the first candidates have been evaluated; the progress line says how long is left",
        "nothing was written",
    ]
    return "\n".join(_wrapped(line) for line in lines if line)


def _wrapped(line: str) -> str:
    """Broken between words at WIDTH columns; what follows stands under the line's text. Paths and hashes stay whole."""
    indent = " " * (25 if line.startswith("  ") else 13)
    line = line.replace("sha256 ", "sha256\0")  # no place to break
    filled = textwrap.fill(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return filled.replace("\0", " ")


def _methods_of(space: Space) -> str:
    if not space.parts:
        return " | ".join(space.methods)
    return listed(space.all_methods) if len(space.methods) == 1 else f"{' | '.join(space.methods)}, by parts"


def _parts_of(plan: Plan) -> list[str]:
    """A line for each part of the model that is merged in its own way: its tensors, and how."""
    space, sources = plan.space, plan.sources
    if not space.parts:
        return []
    recipe = space.decode(space.initial())
    regions = {id(group): region for group, region in zip(recipe.groups, space.regions, strict=True)}
    count: Counter[tuple[str, str]] = Counter()
    for name in sources.names:
        if sources.is_float(name):
            region = regions[id(recipe.group_for(sources.info(name)))]
            count[region.of, "" if region.word == UNTOUCHED else region.word] += sources.touched(name)
    keys = {r.of: r.where.rpartition(": ")[2].removeprefix("space.").removeprefix("methods.") for r in space.regions}
    words = {r.of: r.word for r in space.regions if r.word and r.word != UNTOUCHED}
    lines = []
    for of, key in keys.items():
        tensors = sum(n for (label, _), n in count.items() if label == of)
        method = space.parts[of].method if of else " | ".join(space.methods)
        how = f"at {describe_rest(words[of])}" if of in words else f"by {method}"
        lines.append(f"  {key:<22} {tensors} tensors that experts change, {how}")
    return lines


def _memory(plan: Plan) -> str:
    """What a worker holds: its model, unless the evaluator asks for candidates on disk, and perhaps sources."""
    spec = plan.spec
    if plan.evaluator.needs == "model":
        kept_bits = [METHODS[name].kept_bits for name in dict.fromkeys(plan.space.methods) if name in METHODS]
        needed = worker_bytes(plan.sources, spec.compute_dtype, kept_bits=kept_bits)
        model = f"up to {size(needed)} a worker (its model in {spec.compute_dtype}), beside the evaluator's activations"
    else:
        written = size(written_bytes(plan.sources, spec.export_dtype))
        place = spec.scratch_path or tempfile.gettempdir()
        model = f"no model in the workers; a candidate takes {written} in {place} while it is evaluated"
    wanted = spec.workers.sources
    kept = "are memory-mapped" if wanted == "mmap" else f"({size(dense_bytes(plan.sources))}) kept as {wanted}"
    return f"{model}; sources {kept}"


def stopped_after(spec: Spec, options: Options, typed: str) -> str:
    """The last words of an interrupted run: what happened and how to go on."""
    url = storage_of(spec, options.storage)
    summaries = {s["name"]: s for s in Store.names(url)}
    if spec.name not in summaries:
        return "Stopped before the study began; nothing was written."
    summary = summaries[spec.name]
    where = f" --storage {options.storage}" if options.storage and not typed.endswith((".yaml", ".yml")) else ""
    return (
        f"Stopped after {summary['complete'] + summary['failed']} of {summary['budget']} candidates.\n"
        f"Resume with: evomerge resume {typed}{where}"
    )


def closing(store: Store, typed: str) -> str:
    """The last words of a finished run: what to do next."""
    adapted = f"  evomerge export {typed} --surgery --out adapted   the same, its adapters beside it\n"
    adapted = adapted if store.record.get("surgery") else ""
    spent = clock(sum(e.seconds.get("total", 0.0) for e in store.evaluations()))
    return (
        f"{spent} of evaluation in all. Next:\n"
        f"  evomerge export {typed} --out merged     write the winner as a checkpoint\n"
        f"{adapted}"
        f"  evomerge show {typed} best               its recipe and scores\n"
        f"  evomerge resume {typed} --budget +100    search on"
    )


def needs_a_look(store: Store) -> bool:
    """True if a control or adapters failed, or more than a tenth of the trials."""
    trials = store.trials()
    failed = sum(t.state == "fail" for t in trials)
    lost_control = any(
        a.key.startswith(("control:", SURGERY)) and a.state not in ("started", "complete", "lost")
        for a in store.attempts()
    )
    return lost_control or failed > FAILED_SHARE * max(1, len(trials))
