"""Who is better, who goes on to `select`, and who wins: by merit, and with several objectives by fronts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evomerge import pareto
from evomerge.objectives import PLAIN, Judged, Merit, Objective, merit

if TYPE_CHECKING:
    from evomerge.store import Evaluation, TrialRecord


SURGERY = "surgery:"  # how subjects begin that are another one with adapters behind it


def is_candidate(subject: str) -> bool:
    return subject.startswith(("trial:", "recommended:"))


def is_control(subject: str) -> bool:
    return subject.startswith("control:")


def is_surgery(subject: str) -> bool:
    """Is this another subject with adapters behind it? It is neither a candidate nor a control, and chooses nothing."""
    return subject.startswith(SURGERY)


def ranked_trials(trials: Iterable[TrialRecord], count: int) -> list[TrialRecord]:
    """The best ``count`` complete trials by what is known of search, best first; fewer if there are fewer.

    With several objectives: the one with the best mean of them, then the others by fronts, the emptiest parts of a
    front first, so that the first few cover it.
    """
    complete = sorted((t for t in trials if t.state == "complete"), key=lambda t: (t.merit, -t.n), reverse=True)
    if not any(len(t.values) > 1 for t in complete):
        return complete[:count]
    order = pareto.best(np.array([t.values for t in complete]), [t.violation for t in complete], count)
    return [complete[i] for i in [0, *(i for i in order if i != 0)][:count]]


class Standing:
    """What a search has come to, kept as results come in: one is held against the best, not against all others.

    Attributes:
        best: the complete trial of the highest merit, the first of equals; None while there is none.
        front: with several objectives, the values of the trials that miss no constraint and that nobody dominates.
        failed: how many trials have failed.
    """

    def __init__(self, trials: Iterable[TrialRecord] = ()):
        self.best: TrialRecord | None = None
        self.front: list[NDArray[np.float64]] = []
        self.failed = 0
        for trial in trials:
            self.add(trial)

    def add(self, trial: TrialRecord) -> None:
        """A trial has ended (one that still runs changes nothing)."""
        self.failed += trial.state == "fail"
        if trial.state != "complete":
            return
        if self.best is None or (trial.merit, -trial.n) > (self.best.merit, -self.best.n):
            self.best = trial
        values = np.asarray(trial.values)
        if len(values) and not trial.violation and not any(pareto.dominates(other, values) for other in self.front):
            self.front = [other for other in self.front if not pareto.dominates(values, other)] + [values]


class Judge:
    """An objective on the evaluations of one split, whose references are among them as far as they are known there."""

    def __init__(self, objective: Objective, evaluations: Iterable[Evaluation]):
        self.objective = objective
        self._references = objective.references_in({e.subject: e.scores for e in evaluations})

    def __call__(self, e: Evaluation) -> Judged:
        return self.objective.judge(e.scores, self._references)

    def merit(self, e: Evaluation) -> Merit:
        return merit(e.objective, 0.0 if not self.objective.bounds else self(e).violation)

    def front(self, evaluations: Sequence[Evaluation]) -> set[str]:
        """The subjects that miss no constraint, and that no other such one is better than in every objective."""
        judged = {e.subject: j for e in evaluations if not (j := self(e)).violation}
        subjects = list(judged)
        return {subjects[i] for i in pareto.front(np.array([judged[s].values for s in subjects]))} if judged else set()

    def ranked(self, candidates: Iterable[Evaluation], search: Mapping[str, Merit]) -> list[Evaluation]:
        """Best first. Ties go to the higher merit on search, then to the lower number, trials first."""

        def order(e: Evaluation) -> tuple[Any, ...]:
            kind, _, number = e.subject.partition(":")
            return (self.merit(e), search.get(e.subject, merit(None)), kind == "trial", -int(number))

        return sorted(candidates, key=order, reverse=True)


def choose_winner(
    evaluations: Iterable[Evaluation], objective: Objective = PLAIN, search: Mapping[str, Merit] | None = None
) -> Evaluation | None:
    """The candidate (``trial:`` or ``recommended:``) of the highest merit on select, or None.

    One that misses a constraint wins only if all do. With several objectives it is the member of the front with the
    highest mean of them.

    Args:
        search: subject -> merit on search, for ties; by default of the ``evaluations`` on search.
    """
    evaluations = list(evaluations)
    if search is None:
        judge = Judge(objective, ())
        search = {e.subject: judge.merit(e) for e in evaluations if e.split == "search"}
    latest = {e.subject: e for e in evaluations if e.split == "select"}
    candidates = [e for e in latest.values() if is_candidate(e.subject)]
    return next(iter(Judge(objective, latest.values()).ranked(candidates, search)), None)


def best_control(evaluations: Iterable[Evaluation], objective: Objective = PLAIN) -> Evaluation | None:
    """The control of the highest merit on select, which the winner is held against; None if none has a score."""
    latest = {e.subject: e for e in evaluations if e.split == "select"}
    controls = [e for e in latest.values() if is_control(e.subject)]
    return max(controls, key=Judge(objective, latest.values()).merit, default=None)


def find_winner(
    record: Mapping[str, Any], evaluations: Sequence[Evaluation], search: Mapping[str, Merit] | None = None
) -> Evaluation | None:
    """The winner of the latest finished round; while the first round is not finished, the best on select so far.

    Args:
        record: the study's; its ``rounds`` name the winners of finished rounds.
        evaluations: at least those on select and test, of controls as well.
        search: as for ``choose_winner``.
    """
    best = choose_winner(evaluations, Objective.of_record(record), search)
    tested = {e.subject for e in evaluations if e.split == "test"}
    if best is None or best.subject in tested:
        return best
    for finished in reversed(record.get("rounds", [])):
        for e in evaluations:
            if e.split == "select" and e.subject == finished["winner"] and e.subject in tested:
                return e
    return best
