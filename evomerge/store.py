"""The store: a study's trials, items, outcomes, attempts and log, in a database that Optuna's tools can open.

evomerge's own tables (database.py) are the truth: one transaction a call, durable when the call returns. Optuna's study
of the same name is a copy of the trials for optuna-dashboard and the like (mirror.py), written after ours and completed
when a driver takes the lock. Readers never write, need no lock, and do not import Optuna.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from evomerge import database as db
from evomerge.database import RETRY_SECONDS, Database
from evomerge.errors import StudyError, nearest
from evomerge.evaluation import Item, Outcome
from evomerge.lock import DriverLock, is_held
from evomerge.objectives import Merit, Objective, merit, violation

if TYPE_CHECKING:
    from evomerge.mirror import Mirror

TrialState = Literal["running", "complete", "fail", "pruned"]
ENDED = ("complete", "fail", "pruned")
TEXT_SHOWN = 300  # characters of an item's text that are kept: enough to recognise it by

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrialRecord:
    """One proposal of the searcher, number ``n``. ``score``, the search objective, is None unless it is complete.

    ``values`` are the objectives where there are several, ``margins`` the constraints', if there are any.
    """

    n: int
    state: TrialState
    point: Mapping[str, float]
    recipe: Mapping[str, Any]
    recipe_hash: str
    score: float | None = None
    failure: str | None = None
    started: float = 0.0  # unix seconds
    finished: float | None = None
    values: tuple[float, ...] = ()
    margins: tuple[float, ...] = ()

    @property
    def violation(self) -> float:
        return violation(self.margins)

    @property
    def merit(self) -> Merit:
        return merit(self.score, self.violation)

    @classmethod
    def running(cls, n: int, point: Mapping[str, float], recipe: Mapping[str, Any], recipe_hash: str) -> TrialRecord:
        return cls(n, "running", dict(point), recipe, recipe_hash, started=time.time())


@dataclass(frozen=True)
class Evaluation:
    """One recipe on one split. ``outcomes`` are in the order of the items, or None where they were not asked for."""

    key: str  # f"{subject}/{split}", with "/r2" for a later round's
    subject: str  # trial:17, control:base, control:expert:add, sweep:0.7, recommended:0
    split: str
    recipe_hash: str
    recipe: Mapping[str, Any]
    outcomes: tuple[Outcome, ...] | None
    scores: Mapping[str, float]  # task -> score
    objective: float
    seconds: Mapping[str, float] = field(default_factory=dict)  # merge, evaluate, total
    worker: str = ""
    time: float = 0.0  # unix seconds
    round: int = 1


@dataclass(frozen=True)
class TrainingRecord:
    """How far a training by gradient is on its way to trial ``n``, or where it was when the trial was proposed.

    ``curve`` has a row a step since the trial before: step, loss, tasks (task -> loss), gradient (its norm).
    """

    n: int
    state: Mapping[str, Any]  # of the searcher; see GradientSearcher
    curve: tuple[Mapping[str, Any], ...]
    time: float = 0.0  # unix seconds


@dataclass(frozen=True)
class Attempt:
    """One try at an evaluation, or its end. ``state``: started, complete, or the kind of a failure (CandidateError)."""

    key: str
    attempt: int
    state: str
    reason: str
    detail: str
    seconds: float
    worker: str
    time: float  # unix seconds


class Store:
    """One study in a database. Made by ``create`` and ``open``.

    Every method that writes is durable when it returns, does nothing the second time, and raises StudyError if another
    driver owns the study, or if the store is full, read-only, or away for longer than ``retry_seconds``.
    """

    def __init__(self, database: Database, name: str, study_id: int):
        self.database, self.name, self.study_id = database, name, study_id
        self.url = database.where
        self._lock = DriverLock(database, study_id, name)
        self._mirror: Mirror | None = None
        self._items: dict[int, dict[str | None, list[str]]] = {}  # version -> split -> item ids
        self._recipes: dict[str, dict[str, Any]] = {}  # hash -> recipe

    # Making, opening, listing

    @classmethod
    def create(
        cls,
        url: str | Path,
        name: str,
        record: Mapping[str, Any],
        *,
        items: Sequence[Item] = (),
        retry_seconds: float = RETRY_SECONDS,
    ) -> Store:
        """A new study with its record (and items), all or nothing; the store is made if it is not there.

        ``record["dimensions"]`` (of ``Dimension.to_dict``) gives Optuna's copy its ranges.

        Raises:
            StudyError: the name is taken, by evomerge's or another program's study, or the store cannot be used.
        """
        from evomerge.mirror import Mirror

        database = Database(url, create=True, retry_seconds=retry_seconds)
        taken = StudyError(
            f"study {name!r} exists already",
            where=database.where,
            remedy="Go on with it by evomerge resume, or give the experiment another name.",
        )
        if not name or len(name) > 255:
            raise StudyError(f"a study's name must have 1 to 255 characters, but {name[:40]!r} has {len(name)}")
        if database.read(lambda connection: _study_row(connection, name)) is not None:
            raise taken
        if Mirror.is_taken(database, name):
            raise StudyError(
                f"an Optuna study of another program is called {name!r} here",
                where=database.where,
                remedy="Give the experiment another name, or use another --storage.",
            )
        text = _dumps(record)
        mirror = Mirror.of_record(database, name, record)  # before ours: Optuna may refuse the database

        def insert(connection: sa.Connection) -> int:
            study = sa.insert(db.studies).values(name=name, record=text, created=time.time())
            connection.execute(study)
            study_id = connection.execute(sa.select(db.studies.c.id).where(db.studies.c.name == name)).scalar_one()
            if items:
                connection.execute(sa.insert(db.items), _item_rows(study_id, 1, items))
            return study_id

        try:
            study_id = database.write(insert)
        except StudyError as error:
            raise (taken if isinstance(error.__cause__, IntegrityError) else error) from error
        store = cls(database, name, study_id)
        store._mirror = mirror.start()
        return store

    @classmethod
    def open(cls, url: str | Path, name: str, *, retry_seconds: float = RETRY_SECONDS) -> Store:
        """An existing study, to read or (under ``lock``) to go on with. Writes nothing.

        Raises:
            StudyError: no such store or study, or one written by another version of evomerge.
        """
        database = Database(url, retry_seconds=retry_seconds)
        row = None if database.is_empty else database.read(lambda connection: _study_row(connection, name))
        if row is None:
            known = [] if database.is_empty else [s["name"] for s in cls.names(url)]
            raise StudyError(
                f"there is no study {name!r}",
                where=database.where,
                remedy=nearest(name, known) if known else "It holds no study. Name another with --storage.",
            )
        return cls(database, name, row.id)

    @staticmethod
    def names(url: str | Path) -> list[dict[str, Any]]:
        """A summary of each study, oldest first; none if there is no such SQLite file yet (which is not made).

        Keys: name, created, budget, rounds, state (running, stopped, finished), driver, best, and the number of trials
        that are running, complete, failed, pruned.
        """
        resolved = db.resolve_url(url)
        if resolved.get_backend_name() == "sqlite" and not Path(str(resolved.database)).is_file():
            return []
        database = Database(resolved)
        if database.is_empty:
            return []

        def look(connection: sa.Connection) -> tuple[Any, Any, dict[int, str]]:
            t, now = db.trials.c, database.now(connection)
            counts = sa.select(t.study_id, t.state, sa.func.count().label("n"), sa.func.max(t.score).label("best"))
            return (
                connection.execute(sa.select(db.studies).order_by(db.studies.c.id)).all(),
                connection.execute(counts.group_by(t.study_id, t.state)).all(),
                {row.study_id: _driver(row) for row in connection.execute(sa.select(db.locks)) if is_held(row, now)},
            )

        studies, counts, drivers = database.read(look)
        summaries: list[dict[str, Any]] = []
        for study in studies:
            record = json.loads(study.record)
            states = {row.state: row for row in counts if row.study_id == study.id}
            number = {state: states[state].n if state in states else 0 for state in ("running", *ENDED)}
            driver = drivers.get(study.id)
            rounds = record.get("rounds", [])
            best = states["complete"].best if "complete" in states else None
            if best is not None and Objective.of_record(record).bounds:
                feasible = [
                    t for t in Store(database, study.name, study.id).trials() if t.score is not None and not t.violation
                ]
                best = max((t.score for t in feasible if t.score is not None), default=None)
            finished = bool(rounds) and rounds[-1].get("trials") == sum(number.values())
            summaries.append(
                {
                    "name": study.name,
                    "created": study.created,
                    "budget": record.get("budget"),
                    "rounds": len(rounds),
                    "state": "running" if driver else "finished" if finished else "stopped",
                    "driver": driver,
                    "best": best,
                    "running": number["running"],
                    "complete": number["complete"],
                    "failed": number["fail"],
                    "pruned": number["pruned"],
                }
            )
        return summaries

    def close(self) -> None:
        """Give back connections. The store can be used again, and opens new ones then."""
        if self._mirror is not None:
            self._mirror.close()
            self._mirror = None
        self.database.close()

    # The record, the lock, stopping

    @property
    def record(self) -> dict[str, Any]:
        """What the study remembers of its experiment, as it stands now."""
        query = sa.select(db.studies.c.record).where(db.studies.c.id == self.study_id)
        return json.loads(self.database.read(lambda connection: connection.execute(query).scalar_one()))

    def update_record(self, **changes: Any) -> None:
        """Set keys of the record, all or none."""
        of_study = db.studies.c.id == self.study_id

        def body(connection: sa.Connection) -> None:
            now = json.loads(connection.execute(sa.select(db.studies.c.record).where(of_study)).scalar_one())
            connection.execute(sa.update(db.studies).where(of_study).values(record=_dumps({**now, **changes})))

        self._write(body)

    @contextmanager
    def lock(self, *, wait: float = 0.0) -> Iterator[Store]:
        """Be the study's one driver; completes Optuna's copy if a crash left it behind.

        Args:
            wait: seconds to wait for another driver to end.

        Raises:
            StudyError: another driver owns the study; names its host and pid.
        """
        self._lock.acquire(wait=wait)
        try:
            self._open_mirror().repair(self._trial_states(), self.trials)
            yield self
        finally:
            try:
                self._lock.release()
            except StudyError as error:  # what stopped the driver matters more
                log.warning("the lock of %s could not be given back: %s", self.name, error.problem)

    def owner(self) -> str | None:
        """The process that drives the study now, such as ``pid 4711 on host node3``; None if none does."""
        owner = self._lock.owner()
        return None if owner is None else _driver(owner)

    def request_stop(self) -> None:
        """Ask the driver, wherever it runs, to stop. Needs no lock."""
        self._set_stop(time.time())

    def clear_stop(self) -> None:
        self._set_stop(None)

    def stop_requested(self) -> bool:
        query = sa.select(db.studies.c.stop_requested).where(db.studies.c.id == self.study_id)
        return self.database.read(lambda connection: connection.execute(query).scalar_one()) is not None

    def _set_stop(self, when: float | None) -> None:
        change = sa.update(db.studies).where(db.studies.c.id == self.study_id).values(stop_requested=when)
        self.database.write(lambda connection: connection.execute(change))

    # Items

    def set_items(self, items: Sequence[Item]) -> None:
        """The study's items in their order (id, task, split and a short text are kept).

        A list that differs from the present one takes its place; earlier evaluations keep theirs.
        """

        def body(connection: sa.Connection) -> None:
            version = self._items_version(connection)
            rows = _item_rows(self.study_id, version + 1, items)
            c = db.items.c
            of_version = (c.study_id == self.study_id) & (c.version == version)
            present = connection.execute(
                sa.select(c.item_id, c.task, c.split).where(of_version).order_by(c.position)
            ).all()
            if [tuple(row) for row in present] != [(r["item_id"], r["task"], r["split"]) for r in rows]:
                connection.execute(sa.insert(db.items), rows)

        self._write(body)

    def items(self) -> list[Item]:
        """The study's items in their order."""
        c = db.items.c
        newest = sa.select(sa.func.max(c.version)).where(c.study_id == self.study_id).scalar_subquery()
        query = sa.select(c.item_id, c.task, c.text, c.split).where(c.study_id == self.study_id, c.version == newest)
        rows = self.database.read(lambda connection: connection.execute(query.order_by(c.position)).all())
        return [Item(row.item_id, row.task, row.text, split=row.split) for row in rows]

    def item_tasks(self) -> dict[str, str]:
        """Item id -> task, of the present items and of all that earlier evaluations saw."""
        c = db.items.c
        query = sa.select(c.item_id, c.task).where(c.study_id == self.study_id).distinct()
        return {row.item_id: row.task for row in self.database.read(lambda connection: connection.execute(query).all())}

    def _items_version(self, connection: sa.Connection) -> int:
        c = db.items.c
        return connection.execute(sa.select(sa.func.max(c.version)).where(c.study_id == self.study_id)).scalar() or 0

    def _split_ids(self, connection: sa.Connection, version: int) -> dict[str | None, list[str]]:
        """Split -> item ids of one version of the item list. Versions never change, so they are read once."""
        if version and version not in self._items:
            c = db.items.c
            query = sa.select(c.split, c.item_id).where(c.study_id == self.study_id, c.version == version)
            splits: dict[str | None, list[str]] = {}
            for row in connection.execute(query.order_by(c.position)):
                splits.setdefault(row.split, []).append(row.item_id)
            self._items[version] = splits
        return self._items.get(version, {})

    # Trials

    def add_trial(self, n: int, point: Mapping[str, float], recipe: Mapping[str, Any], recipe_hash: str) -> None:
        """Proposal ``n`` is RUNNING from now on. Numbers have no gaps: n is the number of trials so far."""
        trial = TrialRecord.running(n, {k: _plain_value(v) for k, v in point.items()}, recipe, recipe_hash)
        row = {
            "study_id": self.study_id, "n": n, "state": "running", "point": _dumps(trial.point),
            "recipe_hash": recipe_hash, "started": trial.started,
        }  # fmt: skip

        def body(connection: sa.Connection) -> None:
            c = db.trials.c
            there = connection.execute(sa.select(c.recipe_hash).where(c.study_id == self.study_id, c.n == n)).scalar()
            if there == recipe_hash:
                return
            count = connection.execute(sa.select(sa.func.max(c.n)).where(c.study_id == self.study_id)).scalar()
            if n != (0 if count is None else count + 1):
                raise ValueError(f"trial {n} cannot follow trial {count} of study {self.name}")
            self._keep_recipe(connection, recipe_hash, recipe)
            connection.execute(sa.insert(db.trials).values(row))

        self._write(body)
        self._open_mirror().add(trial)

    def finish_trial(
        self,
        n: int,
        state: str,
        score: float | None = None,
        failure: str | None = None,
        *,
        values: Sequence[float] = (),
        margins: Sequence[float] = (),
    ) -> bool:
        """Trial ``n`` has ended: complete with a finite ``score``, fail with its reason, or pruned.

        Args:
            values, margins: for Optuna's copy; here they follow from the evaluation's scores.

        Returns:
            False, and nothing is changed, if it had ended before.
        """
        if state not in ENDED:
            raise ValueError(f"a trial ends as one of {', '.join(ENDED)}, not {state!r}")
        if (state == "complete") != (score is not None) or (score is not None and not math.isfinite(score)):
            raise ValueError(f"a complete trial, and no other, has a finite score; trial {n} is {state} with {score}")
        score = None if score is None else float(score)
        failure = None if failure is None else _text(failure)
        finished = time.time()

        def body(connection: sa.Connection) -> bool:
            c = db.trials.c
            trial = (c.study_id == self.study_id) & (c.n == n)
            ended = {"state": state, "score": score, "failure": failure, "finished": finished}
            if connection.execute(sa.update(db.trials).where(trial, c.state == "running").values(ended)).rowcount:
                return True
            there = connection.execute(sa.select(c.state, c.finished).where(trial)).one_or_none()
            if there is None:
                raise ValueError(f"study {self.name} has no trial {n}")
            return tuple(there) == (state, finished)  # our own commit, whose answer was lost

        if not self._write(body):
            log.warning("trial %d of %s had ended before: its second end (%s) is ignored", n, self.name, state)
            return False
        self._open_mirror().finish(n, state, score, failure, values=values, margins=margins)
        return True

    def trials(self) -> list[TrialRecord]:
        """All trials in the order of their numbers."""
        t, r = db.trials.c, db.recipes.c
        query = (
            sa.select(db.trials, r.recipe)
            .join(db.recipes, (r.study_id == t.study_id) & (r.hash == t.recipe_hash))
            .where(t.study_id == self.study_id)
            .order_by(t.n)
        )
        record = sa.select(db.studies.c.record).where(db.studies.c.id == self.study_id)
        rows, text = self.database.read(
            lambda connection: (connection.execute(query).all(), connection.execute(record).scalar_one())
        )
        trials = [
            TrialRecord(
                row.n, row.state, json.loads(row.point), self._recipe(row), row.recipe_hash,
                row.score, row.failure, row.started, row.finished,
            )
            for row in rows
        ]  # fmt: skip
        return self._judged(trials, Objective.of_record(json.loads(text)))

    def _judged(self, trials: list[TrialRecord], objective: Objective) -> list[TrialRecord]:
        """With the objectives and margins that follow from their scores on search."""
        if objective.plain or not trials:
            return trials
        scores = self.scores("search")
        complete = {t.n: scores.get(f"trial:{t.n}") for t in trials if t.state == "complete"}
        judged = {n: objective.judge(given) for n, given in complete.items() if given}
        return [
            replace(t, values=judged[t.n].values if objective.several else (), margins=judged[t.n].margins)
            if t.n in judged
            else t
            for t in trials
        ]

    def _trial_states(self) -> list[str]:
        t = db.trials.c
        query = sa.select(t.state).where(t.study_id == self.study_id).order_by(t.n)
        return list(self.database.read(lambda connection: connection.execute(query).scalars().all()))

    def _recipe(self, row: sa.Row[Any]) -> dict[str, Any]:
        """The recipe of a row. Each is parsed once a Store: most of the time of reading 10,000 trials goes there."""
        if row.recipe_hash not in self._recipes:
            self._recipes[row.recipe_hash] = json.loads(row.recipe)
        return self._recipes[row.recipe_hash]

    def _keep_recipe(self, connection: sa.Connection, recipe_hash: str, recipe: Mapping[str, Any]) -> None:
        c = db.recipes.c
        there = sa.select(c.hash).where(c.study_id == self.study_id, c.hash == recipe_hash)
        if connection.execute(there).first() is None:
            row = {"study_id": self.study_id, "hash": recipe_hash, "recipe": _dumps(recipe)}
            connection.execute(sa.insert(db.recipes).values(row))

    def _open_mirror(self) -> Mirror:
        if self._mirror is None:
            from evomerge.mirror import Mirror

            self._mirror = Mirror.of_record(self.database, self.name, self.record).start()
        return self._mirror

    # Trainings by gradient

    def save_training(self, n: int, state: Mapping[str, Any], curve: Sequence[Mapping[str, Any]]) -> None:
        """How far the training for trial ``n`` is, in place of what was kept of it before."""
        row = {"state": _dumps(state), "curve": _dumps(list(curve)), "time": time.time()}

        def body(connection: sa.Connection) -> None:
            db.make_training(connection)
            c = db.training.c
            this = (c.study_id == self.study_id) & (c.n == n)
            if not connection.execute(sa.update(db.training).where(this).values(row)).rowcount:
                connection.execute(sa.insert(db.training).values(study_id=self.study_id, n=n, **row))

        self._write(body)

    def trainings(self) -> list[TrainingRecord]:
        """What is kept of the training for each trial, in their order; the last may be under way."""
        c = db.training.c
        query = sa.select(c.n, c.state, c.curve, c.time).where(c.study_id == self.study_id).order_by(c.n)

        def body(connection: sa.Connection) -> Sequence[Any]:
            return connection.execute(query).all() if db.has_training(connection) else []

        return [
            TrainingRecord(row.n, json.loads(row.state), tuple(json.loads(row.curve)), row.time)
            for row in self.database.read(body)
        ]

    # What happened, in order

    def log_event(self, kind: Literal["ask", "tell"], n: int) -> None:
        """Proposal ``n`` was asked for, or told. Each is logged once; an ask whose trial was never stored moves up."""

        def body(connection: sa.Connection) -> None:
            e, t = db.events.c, db.trials.c
            this = (e.study_id == self.study_id) & (e.kind == kind) & (e.n == n)
            if connection.execute(sa.select(e.seq).where(this)).first() is not None:
                stored = sa.select(t.n).where(t.study_id == self.study_id, t.n == n)
                if kind != "ask" or connection.execute(stored).first() is not None:
                    return
                connection.execute(sa.delete(db.events).where(this))
            row = {"study_id": self.study_id, "kind": kind, "n": n, "time": time.time()}
            connection.execute(sa.insert(db.events).values(row))

        self._write(body)

    def events(self) -> list[tuple[str, int]]:
        """(ask or tell, n) in the order in which they happened."""
        e = db.events.c
        query = sa.select(e.kind, e.n).where(e.study_id == self.study_id).order_by(e.seq)
        rows = self.database.read(lambda connection: connection.execute(query).all())
        return [(row.kind, row.n) for row in rows]

    def log_attempt(
        self, key: str, attempt: int, state: str, reason="", detail="", seconds: float = 0.0, worker: str = ""
    ) -> None:
        """An attempt at evaluation ``key`` started, or ended: see Attempt."""
        row = {
            "study_id": self.study_id, "token": uuid.uuid4().hex, "key": key, "attempt": attempt, "state": state,
            "reason": _text(reason), "detail": _text(detail), "seconds": float(seconds), "worker": worker[:255],
            "time": time.time(),
        }  # fmt: skip

        def body(connection: sa.Connection) -> None:
            there = sa.select(db.attempts.c.seq).where(db.attempts.c.token == row["token"])
            if connection.execute(there).first() is None:
                connection.execute(sa.insert(db.attempts).values(row))

        self._write(body)

    def attempts(self, key: str | None = None) -> list[Attempt]:
        """Attempts in the order in which they were logged, of one evaluation or of all."""
        c = db.attempts.c
        query = sa.select(c.key, c.attempt, c.state, c.reason, c.detail, c.seconds, c.worker, c.time)
        query = query.where(c.study_id == self.study_id).order_by(c.seq)
        if key is not None:
            query = query.where(c.key == key)
        return [Attempt(*row) for row in self.database.read(lambda connection: connection.execute(query).all())]

    # Evaluations

    def save_evaluation(self, evaluation: Evaluation) -> bool:
        """Keep an evaluation with its outcomes; for a trial, before the trial is finished.

        Returns:
            False, and nothing is changed, if there is one of the same key.
        """
        if evaluation.outcomes is None:
            raise ValueError(f"evaluation {evaluation.key} comes without outcomes")
        if not all(math.isfinite(x) for x in (evaluation.objective, *evaluation.scores.values())):
            raise ValueError(f"evaluation {evaluation.key} has scores that are not finite: {dict(evaluation.scores)}")
        ids = [o.item_id for o in evaluation.outcomes]
        weights = [float(o.weight) for o in evaluation.outcomes]
        row = {
            "study_id": self.study_id, "key": evaluation.key, "subject": evaluation.subject, "split": evaluation.split,
            "round": evaluation.round, "recipe_hash": evaluation.recipe_hash, "scores": _dumps(evaluation.scores),
            "objective": float(evaluation.objective), "seconds": _dumps(evaluation.seconds),
            "worker": evaluation.worker[:255], "time": evaluation.time or time.time(), "item_ids": _dumps(ids),
            "outcomes": _dumps(_columns(evaluation.outcomes)), "items_version": None,
            "item_weights": None if all(w == 1.0 for w in weights) else _dumps(weights),
        }  # fmt: skip

        tries = itertools.count()

        def body(connection: sa.Connection) -> bool:
            c, first = db.evaluations.c, next(tries) == 0
            there = connection.execute(
                sa.select(c.time, c.outcomes).where(c.study_id == self.study_id, c.key == evaluation.key)
            ).one_or_none()
            if there is not None:  # another's, or our own commit, whose answer was lost
                return not first and tuple(there) == (row["time"], row["outcomes"])
            version = self._items_version(connection)
            if self._split_ids(connection, version).get(evaluation.split) == ids:
                row.update(items_version=version, item_ids=None)
            self._keep_recipe(connection, evaluation.recipe_hash, evaluation.recipe)
            connection.execute(sa.insert(db.evaluations).values(row))
            return True

        saved = self._write(body)
        if not saved:
            log.warning("%s of %s was evaluated before: its second evaluation is ignored", evaluation.key, self.name)
        return saved

    def evaluations(
        self, split: str | None = None, with_outcomes: bool = False, *, subjects: Sequence[str] | None = None
    ) -> list[Evaluation]:
        """Evaluations in the order in which they were saved; of one split, of some subjects, or all."""
        c = db.evaluations.c
        where = [] if split is None else [c.split == split]
        if subjects is not None:
            where.append(c.subject.in_(subjects))
        return self._evaluations(where, with_outcomes)

    def scores(self, split: str) -> dict[str, dict[str, float]]:
        """Subject -> task -> score, of the latest evaluation of each on ``split``."""
        c = db.evaluations.c
        query = sa.select(c.subject, c.scores).where(c.study_id == self.study_id, c.split == split).order_by(c.seq)
        rows = self.database.read(lambda connection: connection.execute(query).all())
        return {row.subject: json.loads(row.scores) for row in rows}

    def bind_objective(self, references: Mapping[str, Mapping[str, float]], objectives: Mapping[str, float]) -> None:
        """What scores are relative to is known: keep it, and the objectives of what was evaluated before, all or none.

        Args:
            references: subject -> task -> score on search.
            objectives: by the evaluations' keys.
        """
        of_study = db.studies.c.id == self.study_id

        def body(connection: sa.Connection) -> None:
            record = json.loads(connection.execute(sa.select(db.studies.c.record).where(of_study)).scalar_one())
            record["references"] = {subject: dict(scores) for subject, scores in references.items()}
            connection.execute(sa.update(db.studies).where(of_study).values(record=_dumps(record)))
            c = db.evaluations.c
            for key, objective in objectives.items():
                one = sa.update(db.evaluations).where(c.study_id == self.study_id, c.key == key)
                connection.execute(one.values(objective=float(objective)))

        self._write(body)

    def evaluation(self, key: str, with_outcomes: bool = True) -> Evaluation:
        """One evaluation.

        Raises:
            StudyError: there is none of that key.
        """
        found = self._evaluations([db.evaluations.c.key == key], with_outcomes)
        if not found:
            raise StudyError(f"study {self.name} holds no evaluation {key!r}", where=self.url)
        return found[0]

    def _evaluations(self, where: Sequence[sa.ColumnElement[bool]], with_outcomes: bool) -> list[Evaluation]:
        e, r = db.evaluations.c, db.recipes.c
        columns = [
            e.key, e.subject, e.split, e.recipe_hash, r.recipe, e.scores, e.objective, e.seconds, e.worker, e.time,
            e.round,
        ]  # fmt: skip
        if with_outcomes:
            columns += [e.outcomes, e.items_version, e.item_ids, e.item_weights]
        query = (
            sa.select(*columns)
            .join(db.recipes, (r.study_id == e.study_id) & (r.hash == e.recipe_hash))
            .where(e.study_id == self.study_id, *where)
            .order_by(e.seq)
        )

        def body(connection: sa.Connection) -> Sequence[sa.Row[Any]]:
            rows = connection.execute(query).all()
            if with_outcomes:
                for version in {row.items_version for row in rows if row.items_version}:
                    self._split_ids(connection, version)
            return rows

        return [
            Evaluation(
                key=row.key, subject=row.subject, split=row.split, recipe_hash=row.recipe_hash,
                recipe=self._recipe(row), outcomes=self._outcomes(row) if with_outcomes else None,
                scores=json.loads(row.scores), objective=row.objective, seconds=json.loads(row.seconds),
                worker=row.worker, time=row.time, round=row.round,
            )
            for row in self.database.read(body)
        ]  # fmt: skip

    def _outcomes(self, row: sa.Row[Any]) -> tuple[Outcome, ...]:
        ids = json.loads(row.item_ids) if row.item_ids else self._items[row.items_version][row.split]
        weights = json.loads(row.item_weights) if row.item_weights else [1.0] * len(ids)
        values: list[dict[str, float]] = [{} for _ in ids]
        for metric, runs in json.loads(row.outcomes).items():
            for start, run in runs:
                for position, value in enumerate(run, start):
                    values[position][metric] = float(value)
        return tuple(Outcome(i, v, w) for i, v, w in zip(ids, values, weights, strict=True))

    def _write(self, body: Any) -> Any:
        def checked(connection: sa.Connection) -> Any:
            self._lock.check(connection)
            return body(connection)

        return self.database.write(checked)


def _driver(lock: sa.Row[Any]) -> str:
    return f"pid {lock.pid} on host {lock.host}"


def _study_row(connection: sa.Connection, name: str) -> sa.Row[Any] | None:
    return connection.execute(sa.select(db.studies).where(db.studies.c.name == name)).one_or_none()


def _item_rows(study_id: int, version: int, items: Sequence[Item]) -> list[dict[str, Any]]:
    return [
        {
            "study_id": study_id, "version": version, "position": position, "item_id": item.id, "task": item.task,
            "split": item.split, "text": _text(item.text)[:TEXT_SHOWN],
        }
        for position, item in enumerate(items)
    ]  # fmt: skip


def _columns(outcomes: Sequence[Outcome]) -> dict[str, list[tuple[int, list[float]]]]:
    """Metric -> runs of neighbouring items that have it, as (first position, values): tasks differ in metrics."""
    columns: dict[str, list[tuple[int, list[float]]]] = {}
    for position, outcome in enumerate(outcomes):
        for metric, given in outcome.values.items():
            runs, value = columns.setdefault(metric, []), float(given)
            if not math.isfinite(value):
                raise ValueError(f"outcome of item {outcome.item_id}: {metric}={value}")
            if not runs or runs[-1][0] + len(runs[-1][1]) != position:
                runs.append((position, []))
            # 0 and 1 without a fraction: half the bytes of the most frequent outcomes.
            runs[-1][1].append(int(value) if value in (0.0, 1.0) and math.copysign(1.0, value) > 0 else value)
    return columns


def _plain_value(value: Any) -> Any:
    """Python's own number for NumPy's; words and truth values as they are."""
    return value.item() if hasattr(value, "item") else value


def _plain(value: Any) -> Any:
    """JSON for what is not quite a Python number or a dict: NumPy scalars, paths, mappings."""
    if hasattr(value, "item"):
        return value.item()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple | set | frozenset):
        return list(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be stored")


def _dumps(value: Any) -> str:
    if isinstance(value, Mapping):
        value = dict(value)
    return json.dumps(value, separators=(",", ":"), allow_nan=False, default=_plain)


def _text(text: str) -> str:
    """``text`` as any database takes it: no NUL (PostgreSQL refuses it), no lone surrogates."""
    return text.replace("\0", "\\0").encode("utf-8", "replace").decode("utf-8")
