"""What tables made of studies share: a resumable file of rows, numbers for them, and their place in a page."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.launch import Options, open_or_create
from evomerge.leaderboard import Row
from evomerge.planning import build_plan
from evomerge.progress import Progress
from evomerge.spec import Spec
from evomerge.store import Evaluation, Store


class Results:
    """A file of rows, one a line; a torn last line is dropped. ``keys`` are what tells rows apart."""

    def __init__(self, path: Path, keys: Sequence[str] = ("family", "method", "setting")):
        self.path, self.keys = path, keys
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        lines = text.splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def find(self, *values: Any) -> dict[str, Any] | None:
        return next((row for row in self.rows if tuple(row[key] for key in self.keys) == values), None)

    def put(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows in the place of those of the same keys; the file is there as a whole."""
        for row in rows:
            old = self.find(*(row[key] for key in self.keys))
            if old is None:
                self.rows.append(dict(row))
            else:
                self.rows[self.rows.index(old)] = dict(row)
        temporary = self.path.with_suffix(f".{os.getpid()}")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        temporary.rename(self.path)


def take_over(
    spec: Spec,
    url: str,
    giver: str,
    options: Options,
    progress: Progress,
    others: Callable[[Evaluation], Evaluation | None] = lambda _: None,
) -> None:
    """Give the study of ``spec`` the controls that study ``giver`` of the same database has evaluated, and what
    ``others`` makes of the rest of its evaluations. SystemExit where the two have other sources, items or evaluators.
    """
    plan = build_plan(spec, progress)
    store, _ = open_or_create(plan, url, options, progress, must_exist=False)
    there = {e.key for e in store.evaluations()}
    other = Store.open(url, giver)
    changed = [
        key
        for key, value in other.record["fingerprint"].items()
        if plan.fingerprint.get(key) != value and key not in ("space", "search")
    ]
    if changed and not (options.allow_drift and all(key.startswith("evaluator ") for key in changed)):
        raise SystemExit(
            f"{other.name} was made with other inputs than {spec.name} ({', '.join(changed)}): delete {url}, or say "
            "--allow-drift if it is an evaluator that answers as before"
        )
    with store.lock():
        for e in other.evaluations(with_outcomes=True):
            given = e if e.subject.startswith(("control:", "sweep:")) else others(e)
            if given is not None and given.key not in there:
                store.save_evaluation(given)
                there.add(given.key)


def numbers(row: Row) -> dict[str, Any]:
    assert row.score is not None
    difference = None
    if row.difference is not None:
        difference = [
            rounded(x) for x in (row.difference.value, row.difference.low, row.difference.high, row.difference.p)
        ]
    return {
        "test": [rounded(x) for x in (row.score.value, row.score.low, row.score.high)],
        "items": row.score.num_items,
        "difference": difference,
        "search": rounded(row.search),
        "tasks": {task: [rounded(x) for x in (e.value, e.low, e.high)] for task, e in row.tasks.items()},
    }


def rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 4)


def short(number: float, *, sign: bool = False) -> str:
    text = f"{number:+.3f}" if sign else f"{number:.3f}"
    return text.replace("0.", ".", 1)


def put_between(file: Path, begin: str, text: str, end: str) -> None:
    """Put ``text`` between two marks in a page, in the place of what stands there."""
    page = file.read_text(encoding="utf-8")
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{file} has no place for the tables: {begin} ... {end}")
    file.write_text(f"{before}{begin}\n{text}{end}{after}", encoding="utf-8")
