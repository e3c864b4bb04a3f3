"""The leaderboard: ranking, intervals, paired tests and a verdict, as pure functions of what the study stored."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from evomerge import statistics as st
from evomerge.leaderboard_text import render_terminal, to_csv, to_json, to_markdown
from evomerge.statistics import Difference, Estimate

if TYPE_CHECKING:
    from evomerge.evaluation import Outcome
    from evomerge.store import Evaluation, Store, TrialRecord

__all__ = [
    "Difference", "Estimate", "Leaderboard", "Row", "choose_winner", "find_winner", "leaderboard", "render_terminal",
    "to_csv", "to_json", "to_markdown",
]  # fmt: skip

SHOWN_SEARCH_ONLY = 10
SIGNIFICANT = 0.05
Aggregate = Callable[[str, Sequence["Outcome"]], float]


@dataclass(frozen=True)
class Row:
    """A candidate or a control on one split."""

    rank: int | None  # among candidates; None for controls and for what has not been re-tested
    subject: str
    name: str
    kind: Literal["candidate", "control"]
    score: Estimate | None  # the objective
    tasks: Mapping[str, Estimate]
    difference: Difference | None  # to the best control, on the same items; None for that control itself
    search: float | None  # its objective on search: what it was chosen by, and too high for the best
    failures: int  # attempts that failed
    merge: str  # method and coefficients in short


@dataclass(frozen=True)
class Leaderboard:
    """What a study found. ``select`` ranks; ``test`` holds the winner and the controls once a winner was tested."""

    study: str
    tasks: tuple[str, ...]
    select: tuple[Row, ...]  # candidates and controls, best first
    test: tuple[Row, ...]
    search_only: tuple[Row, ...]  # the best by search score that were not re-tested: optimistic
    failed: tuple[tuple[str, str], ...]  # (name, reason) of controls and finalists without a score
    winner: str | None  # subject
    best_control: str | None  # subject, chosen on select
    tested: Difference | None  # winner minus best control, on test
    verdict: str
    notes: tuple[str, ...]


def choose_winner(evaluations: Iterable[Evaluation]) -> Evaluation | None:
    """The candidate (``trial:`` or ``recommended:``) with the highest objective on select, or None.

    Ties go to the higher search score where ``evaluations`` holds it, then to the lower number, trials first.
    """
    evaluations = list(evaluations)
    search = {e.subject: e.objective for e in evaluations if e.split == "search"}
    latest = {e.subject: e for e in evaluations if e.split == "select" and is_candidate(e.subject)}
    return next(iter(_ranked(latest.values(), search)), None)


def _ranked(candidates: Iterable[Evaluation], search: Mapping[str, float]) -> list[Evaluation]:
    def order(e: Evaluation) -> tuple[Any, ...]:
        kind, _, number = e.subject.partition(":")
        return (-e.objective, -search.get(e.subject, -math.inf), kind != "trial", int(number))

    return sorted(candidates, key=order)


def find_winner(record: Mapping[str, Any], evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """The winner of the latest finished round; while the first round is not finished, the best on select so far.

    Args:
        record: the study's; its ``rounds`` name the winners of finished rounds.
        evaluations: at least those on select and test.
    """
    best = choose_winner(evaluations)
    tested = {e.subject for e in evaluations if e.split == "test"}
    if best is None or best.subject in tested:
        return best
    for finished in reversed(record.get("rounds", [])):
        for e in evaluations:
            if e.split == "select" and e.subject == finished["winner"] and e.subject in tested:
                return e
    return best


def is_candidate(subject: str) -> bool:
    return subject.startswith(("trial:", "recommended:"))


def is_control(subject: str) -> bool:
    return subject.startswith("control:")


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
        self.aggregate = aggregate
        self.record, self.trials, self.item_tasks = store.record, store.trials(), store.item_tasks()
        self.splits = Counter(item.split for item in store.items())
        self.select = {e.subject: e for e in store.evaluations("select", True)}
        self.test = {e.subject: e for e in store.evaluations("test", True)}
        self.attempts = store.attempts()
        unusual = {_split_key(a.key)[0] for a in self.attempts if not a.key.startswith(("trial:", "sweep:"))}
        others = [s for s in {*self.select, *unusual} if not s.startswith("trial:")]
        self.search = {e.subject: e.objective for e in store.evaluations("search", subjects=others)} | {
            f"trial:{t.n}": t.score for t in self.trials if t.score is not None
        }
        spec = self.record.get("spec", {})
        self.study = spec.get("name") or store.name
        self.schedule = spec.get("search", {}).get("schedule", "reproducible")
        self.objective = spec.get("objective") or "mean"
        tasks = spec.get("evaluate", {}).get("tasks") or spec.get("tasks") or {}
        weights = {t: float((fields or {}).get("weight", 1.0)) for t, fields in tasks.items()}
        if not weights:
            weights = {t: 1.0 for e in (*self.select.values(), *self.test.values()) for t in e.scores}
        total = sum(weights.values()) or 1.0
        self.shares = {t: w / total for t, w in weights.items()}
        self.metrics = self.record.get("metrics", {})
        self._aggregated: dict[tuple[str, str, tuple[str, ...]], st.Array] = {}

    def build(self) -> Leaderboard:
        controls = [e for s, e in self.select.items() if is_control(s)]
        best_control = max(controls, key=lambda e: e.objective, default=None)
        searched = [e for e in self.select.values() if is_candidate(e.subject)]
        searches = [replace(e, split="search", objective=self.search.get(e.subject, -math.inf)) for e in searched]
        winner = find_winner(self.record, [*searches, *searched, *self.test.values()])
        select = self._rows(self.select, best_control.subject if best_control else None)
        shown = {s: e for s, e in self.test.items() if is_control(s) or (winner and s == winner.subject)}
        in_test = winner is not None and winner.subject in shown
        test = self._rows(shown, best_control.subject if best_control else None) if in_test else ()
        tested = next((r.difference for r in test if winner and r.subject == winner.subject), None)
        board = Leaderboard(
            study=self.study,
            tasks=tuple(self.shares),
            select=select,
            test=test,
            search_only=self._search_only(),
            failed=self._failed(),
            winner=winner.subject if winner else None,
            best_control=best_control.subject if best_control else None,
            tested=tested,
            verdict="",
            notes=tuple(self._notes(winner)),
        )
        return replace(board, verdict=_verdict(board, self.trials))

    def _rows(self, evaluations: Mapping[str, Evaluation], reference: str | None) -> tuple[Row, ...]:
        """Best first; a control goes before a candidate of the same score: it is the simpler answer."""
        against = evaluations.get(reference) if reference else None
        ranked = _ranked((e for s, e in evaluations.items() if is_candidate(s)), self.search)
        controls = [self._row(e, None, against) for s, e in evaluations.items() if is_control(s)]
        candidates = [self._row(e, rank, against) for rank, e in enumerate(ranked, 1)]
        return tuple(sorted([*controls, *candidates], key=lambda r: -r.score.value if r.score else math.inf))

    def _row(self, e: Evaluation, rank: int | None, against: Evaluation | None) -> Row:
        difference = None if against is None or against.subject == e.subject else self._difference(e, against)
        return Row(
            rank=rank,
            subject=e.subject,
            name=name_of(e.subject),
            kind="control" if is_control(e.subject) else "candidate",
            score=self._objective_estimate(e),
            tasks={t: self._task_estimate(e, t) for t in self.shares if t in e.scores},
            difference=difference,
            search=self.search.get(e.subject),
            failures=self._failures[e.subject],
            merge=merge_in_short(e.recipe),
        )

    # Statistics

    def _by_task(self, e: Evaluation) -> dict[str, list[Outcome]]:
        by_task: dict[str, list[Outcome]] = {t: [] for t in self.shares}
        for outcome in e.outcomes or ():
            task = self.item_tasks.get(outcome.item_id)
            if task in by_task:
                by_task[task].append(outcome)
        return by_task

    def _is_mean(self, task: str) -> bool:
        return bool(self.metrics.get(task, {}).get("item_mean"))

    def _values(self, task: str, outcomes: Sequence[Outcome]) -> tuple[st.Array, st.Array]:
        metric = self.metrics[task]["metric"]
        values = np.array([o.values[metric] for o in outcomes], dtype=float)
        return values, np.array([o.weight for o in outcomes], dtype=float)

    def _task_estimate(self, e: Evaluation, task: str) -> Estimate:
        outcomes, score = self._by_task(e)[task], e.scores[task]
        if outcomes and self._is_mean(task):
            estimate = st.mean_interval(*self._values(task, outcomes))
            if math.isclose(estimate.value, score, rel_tol=1e-6, abs_tol=1e-9):
                return replace(estimate, value=score)
        elif outcomes and self.aggregate is not None:
            return st.bootstrap_estimate(score, self._samples(e, {task: outcomes})[task], len(outcomes))
        return Estimate(score, None, None, len(outcomes))

    def _objective_estimate(self, e: Evaluation) -> Estimate:
        by_task = self._by_task(e)
        n = sum(map(len, by_task.values()))
        if self.objective == "mean" and all(t in e.scores for t in self.shares):
            whole = st.combine([(share, self._task_estimate(e, t)) for t, share in self.shares.items()])
            if math.isclose(whole.value, e.objective, rel_tol=1e-6, abs_tol=1e-9):
                return replace(whole, value=e.objective)
        elif self.objective == "min" and self._can_resample(by_task):
            return st.bootstrap_estimate(e.objective, self._objective_samples(e, by_task), n)
        return Estimate(e.objective, None, None, n)

    def _difference(self, e: Evaluation, against: Evaluation) -> Difference:
        """``e`` minus ``against`` on the items that both were evaluated on."""
        first, second = self._by_task(e), self._by_task(against)
        for task in self.shares:
            one, other = {o.item_id: o for o in first[task]}, {o.item_id: o for o in second[task]}
            first[task] = [o for i, o in one.items() if i in other]
            second[task] = [other[o.item_id] for o in first[task]]
        n = sum(map(len, first.values()))
        value = e.objective - against.objective
        if self.objective == "mean" and all(self._is_mean(t) and first[t] for t in self.shares):
            strata = []
            for task, share in self.shares.items():
                values, weights = self._values(task, first[task])
                strata.append(st.Stratum(share, values, self._values(task, second[task])[0], weights))
            return st.paired_difference(strata)
        if self.objective in ("mean", "min") and self._can_resample(first):
            samples = self._objective_samples(e, first) - self._objective_samples(against, second)
            return st.bootstrap_difference(value, samples, n)
        return Difference(value, None, None, None, n, "none")

    def _can_resample(self, by_task: Mapping[str, Sequence[Outcome]]) -> bool:
        return all(by_task[t] and (self._is_mean(t) or self.aggregate is not None) for t in self.shares)

    def _objective_samples(self, e: Evaluation, by_task: Mapping[str, Sequence[Outcome]]) -> st.Array:
        return st.objective_of(self.objective, self.shares, self._samples(e, by_task))

    def _samples(self, e: Evaluation, by_task: Mapping[str, Sequence[Outcome]]) -> dict[str, st.Array]:
        """Task -> scores of the bootstrap samples. The same positions for every subject, hence paired."""
        picked = st.resampled_items({t: len(outcomes) for t, outcomes in by_task.items()})
        samples = {}
        for task, outcomes in by_task.items():
            if self._is_mean(task):
                samples[task] = st.resampled_mean(*self._values(task, outcomes), picked[task])
            else:
                assert self.aggregate is not None
                # The slow part, and wanted again for the task, the objective and each difference to this subject.
                key = (e.key, task, tuple(o.item_id for o in outcomes))
                if key not in self._aggregated:
                    scores = [self.aggregate(task, [outcomes[i] for i in row]) for row in picked[task]]
                    self._aggregated[key] = np.array(scores)
                samples[task] = self._aggregated[key]
        return samples

    # What did not make it into the ranking

    @cached_property
    def _failures(self) -> Counter[str]:
        return Counter(_split_key(a.key)[0] for a in self.attempts if a.state not in ("started", "complete"))

    def _search_only(self) -> tuple[Row, ...]:
        complete = [t for t in self.trials if t.score is not None and f"trial:{t.n}" not in self.select]
        best = sorted(complete, key=lambda t: (-(t.score or 0.0), t.n))[:SHOWN_SEARCH_ONLY]
        return tuple(
            Row(
                rank=None, subject=f"trial:{t.n}", name=f"trial {t.n}", kind="candidate", score=None, tasks={},
                difference=None, search=t.score, failures=self._failures[f"trial:{t.n}"],
                merge=merge_in_short(t.recipe),
            )
            for t in best
        )  # fmt: skip

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
        states = Counter(t.state for t in self.trials)
        kinds = Counter((t.failure or "unknown").partition(":")[0] for t in self.trials if t.state == "fail")
        why = f" ({', '.join(f'{n} {kind}' for kind, n in kinds.most_common())})" if kinds else ""
        yield (
            f"{len(self.trials)} trials: {states['complete']} complete, {states['fail']} failed{why}, "
            f"{states['pruned']} pruned, {states['running']} running; {self.schedule} schedule"
        )
        yield (
            f"The searcher learns from {self.splits['search']} search items, {self.splits['select']} select items pick "
            f"the winner, and {self.splits['test']} test items, which no choice has seen, say what it is worth."
        )
        reads = len([s for s in self.test if is_candidate(s)])
        if reads > 1:
            yield f"The test items have been read in {reads} rounds: the more often, the less they prove."
        elif self.test:
            yield "The test items have been read once."
        if winner is not None and winner.subject in self.test:
            best = _ranked((e for s, e in self.select.items() if is_candidate(s)), self.search)[0]
            if best.subject not in self.test:
                yield f"A later round is not finished; {name_of(best.subject)} leads it on select. Resume to finish it."
        if self.select and len({tuple(sorted(o.item_id for o in e.outcomes or ())) for e in self.select.values()}) > 1:
            yield "The items have changed during the study: differences are taken on the items both sides share."
        if not all(self._is_mean(t) for t in self.shares) and self.aggregate is None and self.select:
            odd = ", ".join(t for t in self.shares if not self._is_mean(t))
            yield f"No intervals for {odd}: the score is not a mean over items, and its evaluator was not at hand."


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
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _verdict(board: Leaderboard, trials: Sequence[TrialRecord]) -> str:
    if board.winner is None:
        complete = [t for t in trials if t.score is not None]
        if not complete:
            return f"No candidate has been evaluated yet ({len(trials)} proposed)."
        best = max(complete, key=lambda t: (t.score, -t.n))
        return (
            f"Not finished: trial {best.n} has the best search score, {best.score:.3f}, which is optimistic; no "
            "candidate has been re-tested on select yet."
        )
    winner = name_of(board.winner)
    if board.best_control is None:
        return f"{_start(winner)} is the best candidate on select, but no control has a score to compare it with."
    control = f"the best control ({name_of(board.best_control)})"
    if board.tested is not None:
        return _tested_verdict(board.tested, winner, control)
    row = next(r for r in board.select if r.subject == board.winner)
    assert row.difference is not None
    return (
        f"Not finished: {winner} is the best candidate on select, {_by(row.difference)} against {control} there, which "
        "flatters it, since it was chosen on these items; on test they have not been compared yet."
    )


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
