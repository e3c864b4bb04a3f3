"""The leaderboard: ranking, intervals, paired tests and a verdict, as pure functions of what the study stored."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from evomerge.estimates import Aggregate, Estimates
from evomerge.leaderboard_text import render_terminal, to_csv, to_json, to_markdown
from evomerge.modelcard import listed
from evomerge.objectives import Objective, merit
from evomerge.ranking import (
    SURGERY,
    Judge,
    best_control,
    choose_winner,
    find_winner,
    is_candidate,
    is_control,
    is_surgery,
    ranked_trials,
)
from evomerge.statistics import Difference, Estimate
from evomerge.surgery_stage import in_short as surgery_in_short
from evomerge.training import in_short, is_transductive

if TYPE_CHECKING:
    from evomerge.store import Evaluation, Store, TrialRecord

__all__ = [
    "Aggregate", "Difference", "Estimate", "Leaderboard", "Row", "choose_winner", "find_winner", "leaderboard",
    "render_terminal", "to_csv", "to_json", "to_markdown",
]  # fmt: skip

SHOWN_SEARCH_ONLY = 10
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Row:
    """A candidate or a control on one split, or one of them with adapters behind it (surgery)."""

    rank: int | None  # among candidates; None for controls and for what has not been re-tested
    subject: str
    name: str
    kind: Literal["candidate", "control", "surgery"]
    score: Estimate | None  # the objective; of several, their mean
    objectives: Mapping[str, Estimate]  # each of them, where there are several
    misses: tuple[str, ...]  # the constraints that it misses, in words
    tasks: Mapping[str, Estimate]  # as they are, relative to nothing
    difference: Difference | None  # to the best control, on the same items; None for that control itself
    search: float | None  # its objective on search: what it was chosen by, and too high for the best
    failures: int  # attempts that failed
    merge: str  # method and coefficients in short


@dataclass(frozen=True)
class Gain:
    """``subject`` minus ``against`` on the items of ``split``."""

    subject: str
    against: str
    split: str
    difference: Difference


@dataclass(frozen=True)
class Leaderboard:
    """What a study found. ``select`` ranks; ``test`` holds the winner and the controls once a winner was tested, and
    what was tested with adapters: those rows have no rank, and are never the winner or the best control."""

    study: str
    tasks: tuple[str, ...]
    objectives: tuple[str, ...]
    constraints: tuple[str, ...]
    select: tuple[Row, ...]  # candidates and controls, best first
    test: tuple[Row, ...]
    search_only: tuple[Row, ...]  # the best by search score that were not re-tested: optimistic
    failed: tuple[tuple[str, str], ...]  # (name, reason) of controls and finalists without a score
    front: tuple[str, ...]  # with several objectives: the subjects that nothing on select beats in all of them
    winner: str | None  # subject
    best_control: str | None  # subject, chosen on select
    tested: Difference | None  # winner minus best control, on test
    surgery: tuple[Gain, ...]  # what adapters give winner and best control, and what is then between these
    verdict: str
    notes: tuple[str, ...]


def leaderboard(store: Store, *, aggregate: Aggregate | None = None) -> Leaderboard:
    """The leaderboard of a study as it stands, finished or not.

    Args:
        store: the study; only read.
        aggregate: the evaluator's ``aggregate``. With it, tasks whose score is not a mean over items get intervals
            (bootstrap) too.
    """
    return _Board(store, aggregate).build()


class _Board:
    """One reading of the store, and what is computed from it."""

    def __init__(self, store: Store, aggregate: Aggregate | None):
        self.record, self.trials, item_tasks = store.record, store.trials(), store.item_tasks()
        self.splits = Counter(item.split for item in store.items())
        self.select = {e.subject: e for e in store.evaluations("select", True)}
        self.test = {e.subject: e for e in store.evaluations("test", True)}
        self.attempts = store.attempts()
        self.trainings = [training.state for training in store.trainings()]
        unusual = {_split_key(a.key)[0] for a in self.attempts if not a.key.startswith(("trial:", "sweep:"))}
        others = [s for s in {*self.select, *unusual} if not s.startswith("trial:")]
        self.search = {e.subject: e.objective for e in store.evaluations("search", subjects=others)} | {
            f"trial:{t.n}": t.score for t in self.trials if t.score is not None
        }
        spec = self.record.get("spec", {})
        self.study = spec.get("name") or store.name
        self.schedule = spec.get("search", {}).get("schedule", "reproducible")
        tasks = spec.get("evaluate", {}).get("tasks") or spec.get("tasks") or {}
        tasks = tasks or {t: {} for e in (*self.select.values(), *self.test.values()) for t in e.scores}
        self.tasks = tuple(tasks)
        self.objective = Objective.of_record(self.record, self.tasks)
        self.estimates = Estimates(self.objective, self.tasks, self.record.get("metrics", {}), item_tasks, aggregate)
        self.merits = {s: merit(score) for s, score in self.search.items()}  # on search
        self.merits |= {f"trial:{t.n}": t.merit for t in self.trials}
        self.judges = {split: Judge(self.objective, of.values()) for split, of in self._retested.items()}

    @property
    def _retested(self) -> dict[str, dict[str, Evaluation]]:
        return {"select": self.select, "test": self.test}

    def build(self) -> Leaderboard:
        control = best_control(self.select.values(), self.objective)
        winner = find_winner(self.record, [*self.select.values(), *self.test.values()], self.merits)
        select = self._rows("select", self.select, control.subject if control else None)
        front = self.judges["select"].front(list(self.select.values())) if self.objective.several else set()
        adapted = {SURGERY + e.subject for e in (winner, control) if e is not None}
        shown = {
            s: e for s, e in self.test.items() if is_control(s) or s in adapted or (winner and s == winner.subject)
        }
        in_test = winner is not None and winner.subject in shown
        test = self._rows("test", shown, control.subject if control else None) if in_test else ()
        gains = tuple(self._gains(winner, control))
        tested = next((r.difference for r in test if winner and r.subject == winner.subject), None)
        board = Leaderboard(
            study=self.study,
            tasks=self.tasks,
            objectives=self.objective.names,
            constraints=tuple(bound.text() for bound in self.objective.bounds),
            select=select,
            test=test,
            search_only=self._search_only(),
            failed=self._failed(),
            front=tuple(r.subject for r in select if r.subject in front),
            winner=winner.subject if winner else None,
            best_control=control.subject if control else None,
            tested=tested,
            surgery=gains,
            verdict="",
            notes=(*self._notes(winner), *_of_surgery(gains, self.record)),
        )
        return replace(board, verdict=_verdict(board, self.trials))

    def _rows(self, split: str, evaluations: Mapping[str, Evaluation], reference: str | None) -> tuple[Row, ...]:
        """Best first; a control goes before a candidate of the same score: it is the simpler answer."""
        against = evaluations.get(reference) if reference else None
        judge = self.judges[split]
        ranked = judge.ranked((e for s, e in evaluations.items() if is_candidate(s)), self.merits)
        ranks = {e.subject: rank for rank, e in enumerate(ranked, 1)}
        controls = [e for s, e in evaluations.items() if is_control(s)]
        adapted = [e for s, e in evaluations.items() if is_surgery(s)]
        best_first = sorted([*controls, *ranked, *adapted], key=judge.merit, reverse=True)
        return tuple(self._row(e, ranks.get(e.subject), against, judge(e).misses) for e in best_first)

    def _row(self, e: Evaluation, rank: int | None, against: Evaluation | None, misses: tuple[str, ...]) -> Row:
        compared = against if against is not None and against.subject != e.subject else None
        difference = None if compared is None else self.estimates.difference(e, compared)
        return Row(
            rank=rank,
            subject=e.subject,
            name=name_of(e.subject),
            kind="control" if is_control(e.subject) else "surgery" if is_surgery(e.subject) else "candidate",
            score=self.estimates.score(e),
            objectives=self.estimates.objectives(e) if self.objective.several else {},
            misses=misses,
            tasks={t: self.estimates.task(e, t) for t in self.tasks if t in e.scores},
            difference=difference,
            search=self.search.get(e.subject),
            failures=self._failures[e.subject],
            merge=merge_in_short(e.recipe) + self._behind(e.subject),
        )

    def _behind(self, subject: str) -> str:
        """What stands behind the merge of ``subject``, in words."""
        if not is_surgery(subject):
            return ""
        return f"; not a plain checkpoint: {surgery_in_short(self.record, subject) or 'adapters'}"

    def _gains(self, winner: Evaluation | None, control: Evaluation | None) -> Iterable[Gain]:
        """On test as soon as all was tested, else on select: what adapters give, and winner minus control with them."""
        plain = [e.subject for e in (winner, control) if e is not None]
        names = [s for s in plain if SURGERY + s in self.select]
        if not names:
            return
        split = "test" if all(s in self.test and SURGERY + s in self.test for s in names) else "select"
        there = self._retested[split]
        pairs = [(SURGERY + s, s) for s in names]
        pairs += [(SURGERY + names[0], SURGERY + names[1])] if len(names) == 2 else []
        for subject, against in pairs:
            yield Gain(subject, against, split, self.estimates.difference(there[subject], there[against]))

    # What did not make it into the ranking

    @cached_property
    def _failures(self) -> Counter[str]:
        return Counter(_split_key(a.key)[0] for a in self.attempts if a.state not in ("started", "complete"))

    def _search_only(self) -> tuple[Row, ...]:
        best = ranked_trials([t for t in self.trials if f"trial:{t.n}" not in self.select], SHOWN_SEARCH_ONLY)
        return tuple(
            Row(
                rank=None, subject=f"trial:{t.n}", name=f"trial {t.n}", kind="candidate", score=None, objectives={},
                misses=self._missed_on_search(t), tasks={}, difference=None, search=t.score,
                failures=self._failures[f"trial:{t.n}"], merge=merge_in_short(t.recipe),
            )
            for t in best
        )  # fmt: skip

    def _missed_on_search(self, trial: TrialRecord) -> tuple[str, ...]:
        missed = zip(self.objective.bounds, trial.margins, strict=False)
        return tuple(bound.text() for bound, margin in missed if margin > 0)

    def _failed(self) -> tuple[tuple[str, str], ...]:
        """Controls, and candidates that were re-tested, whose last word on a split is a failure."""
        last = {a.key: a for a in self.attempts if a.state != "started"}
        failed = []
        for key, attempt in last.items():
            subject, split = _split_key(key)
            if attempt.state != "complete" and (is_control(subject) or split != "search"):
                failed.append((name_of(subject), f"{attempt.state} on {split}: {attempt.reason}"))
        return tuple(failed)

    def _notes(self, winner: Evaluation | None) -> Iterable[str]:
        if not self.objective.word:
            what, *constraints = self.objective.text()
            yield f"Objective: {what}." + (f" Constraints: {'; '.join(constraints)}." if constraints else "")
        learned = in_short(self.trainings)
        if learned is not None:
            yield learned
        states = Counter(t.state for t in self.trials)
        kinds = Counter((t.failure or "unknown").partition(":")[0] for t in self.trials if t.state == "fail")
        why = f" ({', '.join(f'{n} {kind}' for kind, n in kinds.most_common())})" if kinds else ""
        yield (
            f"{len(self.trials)} trials: {states['complete']} complete, {states['fail']} failed{why}, "
            f"{states['pruned']} pruned, {states['running']} running; {self.schedule} schedule"
        )
        transductive = any(is_transductive(state) for state in self.trainings)
        seen = "which the training has seen without their labels" if transductive else "which no choice has seen"
        yield (
            f"The searcher learns from {self.splits['search']} search items, {self.splits['select']} select items pick "
            f"the winner, and {self.splits['test']} test items, {seen}, say what it is worth."
        )
        reads = len([s for s in self.test if is_candidate(s)])
        if reads > 1:
            yield f"The test items have been read in {reads} rounds: the more often, the less they prove."
        elif self.test:
            yield "The test items have been read once."
        if winner is not None and winner.subject in self.test:
            candidates = (e for s, e in self.select.items() if is_candidate(s))
            best = self.judges["select"].ranked(candidates, self.merits)[0]
            if best.subject not in self.test:
                yield f"A later round is not finished; {name_of(best.subject)} leads it on select. Resume to finish it."
        if self.select and len({tuple(sorted(o.item_id for o in e.outcomes or ())) for e in self.select.values()}) > 1:
            yield "The items have changed during the study: differences are taken on the items both sides share."
        odd = ", ".join(t for t in self.tasks if not self.estimates.is_mean(t))
        if odd and self.estimates.aggregate is None and self.select:
            yield f"No intervals for {odd}: the score is not a mean over items, and its evaluator was not at hand."


def _of_surgery(gains: Sequence[Gain], record: Mapping[str, Any]) -> Iterable[str]:
    if not gains:
        return
    behind = surgery_in_short(record, gains[0].subject) or "adapters"
    says = [f"{name_of(g.subject)} scores {_by(g.difference)} against {name_of(g.against)}" for g in gains]
    yield (
        f"With surgery there are {behind} behind a merge, trained on search items without labels: not a plain "
        f"checkpoint, and never the winner. On {gains[0].split} {listed(says)}."
    )


def _split_key(key: str) -> tuple[str, str]:
    """(subject, split) of an evaluation's key, ``subject/split`` or ``subject/split/r2``."""
    subject, _, split = re.sub(r"/r\d+$", "", key).rpartition("/")
    return subject, split


def name_of(subject: str) -> str:
    """A subject as a reader would call it: ``control:average`` is the uniform average."""
    kind, _, rest = subject.partition(":")
    if kind == "control":
        known = {"average": "uniform average", "random": "random vectors"}
        return known.get(rest, rest.replace("expert:", "expert ").replace("task_arithmetic", "task arithmetic"))
    if kind == "recommended":
        return f"searcher's pick after {rest}"
    if is_surgery(subject):
        return f"{name_of(rest)} + surgery"
    return f"{kind} {rest}"


def merge_in_short(recipe: Mapping[str, Any]) -> str:
    """Method, parameters and coefficients: each group's while they are few, then their range."""
    groups = recipe.get("groups", [])
    params = ", ".join(f"{k}={_number(v)}" for k, v in recipe.get("params", {}).items())
    parts = []
    for name in groups[0]["weights"] if groups else ():
        weights = [group["weights"][name] for group in groups]
        if len(set(weights)) == 1:
            text = _number(weights[0])
        elif len(weights) <= 4:
            text = "/".join(map(_number, weights))
        else:
            text = f"{_number(min(weights))}..{_number(max(weights))}"
        parts.append(f"{name} {text}")
    head = f"{recipe.get('method', '')}({params})" if params else str(recipe.get("method", ""))
    return f"{head} {', '.join(parts)}".strip()


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2g}" if 0 < abs(value) < 0.005 else f"{value:.2f}"  # a learning rate is not 0.00


def _verdict(board: Leaderboard, trials: Sequence[TrialRecord]) -> str:
    if board.winner is None:
        complete = [t for t in trials if t.score is not None]
        if not complete:
            return f"No candidate has been evaluated yet ({len(trials)} proposed)."
        best = max(complete, key=lambda t: (t.merit, -t.n))
        keeps = "" if not best.violation else " No candidate keeps every constraint so far, and it misses the least."
        return (
            f"Not finished: trial {best.n} has the best search score, {best.score:.3f}, which is optimistic; no "
            f"candidate has been re-tested on select yet.{keeps}"
        )
    winner = name_of(board.winner)
    if board.best_control is None:
        return f"{_start(winner)} is the best candidate on select, but no control has a score to compare it with."
    control = f"the best control ({name_of(board.best_control)})"
    row = next(r for r in board.select if r.subject == board.winner)
    first = " ".join([*_missing(board, row), *_on_the_front(board)])
    if board.tested is not None:
        return f"{first} {_tested_verdict(board.tested, winner, control)}".strip()
    assert row.difference is not None
    return f"{first} ".lstrip() + (
        f"Not finished: {winner} is the best candidate on select, {_by(row.difference)} against {control} there, which "
        "flatters it, since it was chosen on these items; on test they have not been compared yet."
    )


def _missing(board: Leaderboard, winner: Row) -> Iterable[str]:
    """What constraints the winner misses: on select only if every candidate does, and on test whatever was chosen."""
    if winner.misses:
        yield (
            f"No candidate keeps every constraint on select; {winner.name} is the nearest, but "
            f"{' and '.join(winner.misses)}."
        )
    tested = next((r for r in board.test if r.subject == winner.subject), None)
    if tested is not None and tested.misses:
        yield f"On test {winner.name} misses a constraint: {' and '.join(tested.misses)}."


def _on_the_front(board: Leaderboard) -> Iterable[str]:
    if len(board.objectives) < 2:
        return
    members = [s for s in board.front if is_candidate(s)]
    if not members:
        yield "No candidate is on the front of select: in every objective a control is as good."
    elif board.winner in members:
        yield (
            f"{_count(len(members), 'candidate')} on the front of select, of which {name_of(board.winner)} has the "
            "highest mean of the objectives."
        )


def _count(n: int, noun: str) -> str:
    return f"{n} {noun} is" if n == 1 else f"{n} {noun}s are"


def _tested_verdict(d: Difference, winner: str, control: str) -> str:
    if d.value <= 0:
        return (
            f"No candidate beats {control}: {winner}, the best on select, scores {_by(d)} against it on test. "
            "Use the control."
        )
    if d.p is None:
        return f"{_start(winner)} scores {_by(d)} against {control} on test; how sure that is cannot be said."
    if d.p < SIGNIFICANT:
        return f"{_start(winner)} beats {control} on test by {_by(d)}."
    return f"{_start(winner)} is ahead of {control} on test by {_by(d)}; with {d.num_items} items that can be chance."


def _start(name: str) -> str:
    return name[0].upper() + name[1:]


def _by(d: Difference) -> str:
    interval = "" if d.low is None or d.high is None else f" [{d.low:+.3f}, {d.high:+.3f}]"
    p = "" if d.p is None else f", p {p_text(d.p)}"
    return f"{d.value:+.3f}{interval}{p}"


def p_text(p: float) -> str:
    """``= 0.012``, or ``< 0.001``: what a test by random sign flips can resolve."""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"
