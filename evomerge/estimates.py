"""How sure a stored score or difference is: the statistics of an objective, from the outcomes of its items."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from evomerge import statistics as st
from evomerge.objectives import Objective, Term
from evomerge.statistics import Difference, Estimate

if TYPE_CHECKING:
    from evomerge.evaluation import Outcome
    from evomerge.store import Evaluation

Aggregate = Callable[[str, Sequence["Outcome"]], float]


class Estimates:
    """Intervals and paired tests of one study.

    What a normalised score is relative to counts as known: intervals are conditional on the references, which are
    scores on search with errors of their own, the same for everybody.

    Args:
        tasks: all of them.
        metrics: task -> its metric, and whether its score is that metric's mean over items (``item_mean``).
        item_tasks: item -> task.
        aggregate: the evaluator's, for scores that are no means; without it these have no intervals.
    """

    def __init__(
        self,
        objective: Objective,
        tasks: Sequence[str],
        metrics: Mapping[str, Mapping[str, Any]],
        item_tasks: Mapping[str, str],
        aggregate: Aggregate | None,
    ):
        self.objective, self.tasks, self.metrics = objective, tasks, metrics
        self.item_tasks, self.aggregate = item_tasks, aggregate
        self._aggregated: dict[tuple[str, str, tuple[str, ...]], st.Array] = {}

    def is_mean(self, task: str) -> bool:
        return bool(self.metrics.get(task, {}).get("item_mean"))

    def task(self, e: Evaluation, task: str) -> Estimate:
        """One task's score, as it is: never relative to anything."""
        outcomes, score = self._by_task(e)[task], e.scores[task]
        if outcomes and self.is_mean(task):
            estimate = st.mean_interval(*self._values(task, outcomes))
            if math.isclose(estimate.value, score, rel_tol=1e-6, abs_tol=1e-9):
                return replace(estimate, value=score)
        elif outcomes and self.aggregate is not None:
            return st.bootstrap_estimate(score, self._samples(e, {task: outcomes})[task], len(outcomes))
        return Estimate(score, None, None, len(outcomes))

    def score(self, e: Evaluation) -> Estimate:
        """The objective; of several, their mean."""
        return self._estimate(e, self.objective.terms, e.objective)

    def objectives(self, e: Evaluation) -> dict[str, Estimate]:
        """Each objective by its name."""
        values = self.objective.judge(e.scores).values
        return {t.name: self._estimate(e, (t,), v) for t, v in zip(self.objective.terms, values, strict=True)}

    def _estimate(self, e: Evaluation, terms: Sequence[Term], value: float) -> Estimate:
        by_task = self._tasks_of(terms, self._by_task(e))
        linear, n = self.objective.linear(terms), sum(map(len, by_task.values()))
        if linear is not None and all(t in e.scores for t in by_task):
            factors, offset = linear
            whole = st.combine([(factor, self.task(e, task)) for task, factor in factors.items()])
            if math.isclose(whole.value + offset, value, rel_tol=1e-6, abs_tol=1e-9):
                low, high = (None if x is None else x + offset for x in (whole.low, whole.high))
                return Estimate(value, low, high, n)
        elif linear is None and self._can_resample(by_task):
            return st.bootstrap_estimate(value, self._objective_samples(e, terms, by_task), n)
        return Estimate(value, None, None, n)

    def difference(self, e: Evaluation, against: Evaluation) -> Difference:
        """``e`` minus ``against``, on the items that both were evaluated on."""
        terms = self.objective.terms
        first, second = self._tasks_of(terms, self._by_task(e)), self._tasks_of(terms, self._by_task(against))
        for task in first:
            one, other = {o.item_id: o for o in first[task]}, {o.item_id: o for o in second[task]}
            first[task] = [o for i, o in one.items() if i in other]
            second[task] = [other[o.item_id] for o in first[task]]
        n = sum(map(len, first.values()))
        value, linear = e.objective - against.objective, self.objective.linear(terms)
        if linear is not None and all(self.is_mean(t) and first[t] for t in first):
            strata = []
            for task, factor in linear[0].items():
                values, weights = self._values(task, first[task])
                strata.append(st.Stratum(factor, values, self._values(task, second[task])[0], weights))
            return st.paired_difference(strata)
        if self._can_resample(first):
            samples = self._objective_samples(e, terms, first) - self._objective_samples(against, terms, second)
            return st.bootstrap_difference(value, samples, n)
        return Difference(value, None, None, None, n, "none")

    def _by_task(self, e: Evaluation) -> dict[str, list[Outcome]]:
        by_task: dict[str, list[Outcome]] = {t: [] for t in self.tasks}
        for outcome in e.outcomes or ():
            task = self.item_tasks.get(outcome.item_id)
            if task in by_task:
                by_task[task].append(outcome)
        return by_task

    @staticmethod
    def _tasks_of(terms: Sequence[Term], by_task: dict[str, list[Outcome]]) -> dict[str, list[Outcome]]:
        wanted = {task for term in terms for task in term.weights}
        return {task: outcomes for task, outcomes in by_task.items() if task in wanted}

    def _values(self, task: str, outcomes: Sequence[Outcome]) -> tuple[st.Array, st.Array]:
        metric = self.metrics[task]["metric"]
        values = np.array([o.values[metric] for o in outcomes], dtype=float)
        return values, np.array([o.weight for o in outcomes], dtype=float)

    def _can_resample(self, by_task: Mapping[str, Sequence[Outcome]]) -> bool:
        return all(by_task[t] and (self.is_mean(t) or self.aggregate is not None) for t in by_task)

    def _objective_samples(
        self, e: Evaluation, terms: Sequence[Term], by_task: Mapping[str, Sequence[Outcome]]
    ) -> st.Array:
        relative = self.objective.normalized(self._samples(e, by_task))
        samples = [st.objective_of("min" if t.lowest else "mean", t.shares, relative) for t in terms]
        return np.mean(np.stack(samples), axis=0)

    def _samples(self, e: Evaluation, by_task: Mapping[str, Sequence[Outcome]]) -> dict[str, st.Array]:
        """Task -> scores of the bootstrap samples. The same positions for every subject, hence paired."""
        picked = st.resampled_items({t: len(outcomes) for t, outcomes in by_task.items()})
        samples = {}
        for task, outcomes in by_task.items():
            if self.is_mean(task):
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
