"""What a study maximises, under which constraints, and which of two trials is better."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from evomerge.errors import StudyError
from evomerge.objective_file import WORDS, ObjectiveSpec, read_objective

ROUNDING = 1e-9  # a margin up to this is no miss
BASE, EXPERT = "control:base", "control:expert:"  # subjects of the evaluations that scores are held against

Merit = tuple[int, float, float]
Scores = Mapping[str, float]  # task -> score
T = TypeVar("T")


def merit(score: float | None, violation: float = 0.0) -> Merit:
    """How good a trial is, as something to compare; higher is better. The one owner of that order.

    Trials that miss no constraint come first, by ``score``; then those that do, by ``violation`` (how far they miss
    them; the score breaks ties); then those without a finite score, all alike (Deb 2000, "An efficient constraint
    handling method for genetic algorithms", section 3).
    """
    if score is None or not math.isfinite(score) or not math.isfinite(violation):
        return (0, 0.0, 0.0)
    return (1, -violation, score) if violation > 0 else (2, score, 0.0)


def violation(margins: Iterable[float]) -> float:
    """How far constraints are missed, in sum. ``margins``: above 0 by how far one is missed, 0 or below: it holds."""
    return math.fsum(max(margin, 0.0) for margin in margins)


@dataclass(frozen=True)
class Term:
    """One objective: the mean of tasks' scores by their weights, or the lowest of them."""

    name: str
    weights: Mapping[str, float]  # by task
    lowest: bool = False

    @property
    def shares(self) -> dict[str, float]:
        total = math.fsum(self.weights.values())
        return {task: weight / total for task, weight in self.weights.items()}

    def of(self, scores: Scores) -> float:
        if self.lowest:
            return min(scores[task] for task in self.weights)
        return math.fsum(scores[t] * w for t, w in self.weights.items()) / math.fsum(self.weights.values())


@dataclass(frozen=True)
class Bound:
    """One constraint on one task: at least a score, or a share of the best of some subjects' scores."""

    task: str
    at_least: float
    of: str | None = None  # as it was written: base, expert, best_expert
    subjects: tuple[str, ...] = ()

    def reference(self, references: Mapping[str, Scores]) -> float | None:
        """The score that ``at_least`` is a share of; None where it is of nobody's."""
        return max(references[s][self.task] for s in self.subjects) if self.subjects else None

    def threshold(self, references: Mapping[str, Scores]) -> float:
        """The lowest score that will do. Of a score below 0 (a loss, negated) a share of 0.95 allows 5% more loss."""
        reference = self.reference(references)
        if reference is None:
            return self.at_least
        return reference * (self.at_least if reference > 0 else 2 - self.at_least)

    def margin(self, score: float, references: Mapping[str, Scores]) -> float:
        """How far ``score`` is below the threshold, as a share of the reference's size, if it has one."""
        reference = self.reference(references)
        margin = (self.threshold(references) - score) / (abs(reference) if reference else 1.0)
        return margin if margin > ROUNDING else min(margin, 0.0)

    def text(self) -> str:
        return f"{self.task} at least {self._limit()}"

    def missed(self, score: float, references: Mapping[str, Scores]) -> str:
        limit = "" if self.of is None else f" ({self.threshold(references):.4g})"
        return f"{self.task} is {score:.4g}, below {self._limit()}{limit}"

    def _limit(self) -> str:
        if self.of is None:
            return f"{self.at_least:g}"
        own = f"expert {self.subjects[0].removeprefix(EXPERT)}"
        whose = {"base": "base", "best_expert": "the best expert"}.get(self.of, own)
        return f"{100 * self.at_least:g}% of {whose}"


@dataclass(frozen=True)
class Penalty:
    """A pull on the weights: ``l1`` for each unit of their sizes, summed over experts.

    An expert whose weights differ between parts of the model counts with their mean size.
    """

    l1: float

    def of(self, recipe: Mapping[str, Any]) -> float:
        """What a candidate pays, from its recipe as plain data."""
        groups = recipe["groups"]
        return self.l1 * math.fsum(abs(w) for group in groups for w in group["weights"].values()) / len(groups)

    def text(self) -> str:
        return f"the searcher is told {self.l1:g} less for each unit of sum |weight|"


@dataclass(frozen=True)
class Judged:
    """What task scores are worth: the objectives' ``values``, their mean ``score``, and the constraints' margins."""

    score: float
    values: tuple[float, ...]
    margins: tuple[float, ...] = ()
    misses: tuple[str, ...] = ()  # in words: the constraints that are missed

    @property
    def violation(self) -> float:
        return violation(self.margins)

    @property
    def merit(self) -> Merit:
        return merit(self.score, self.violation)


@dataclass(frozen=True)
class Objective:
    """A study's objective: pure functions of task scores, once the scores that it is relative to are known.

    A normalised score is 1 where it equals the reference, and changes by what the score changes as a share of the
    reference's size: 1 + (score - reference) / |reference|. That is the ratio for references above 0. For those below 0
    (log-likelihoods, losses with their sign turned), where a ratio would rank the wrong way round, it is 2 minus the
    ratio. It is linear in the score, so that means, intervals and paired tests carry over.

    The normalising references are those on search for every split: constants of the study, on which all intervals are
    conditional. A constraint compares with the reference on the same items where it was evaluated on them, since what
    is hard for one is hard for the other, and with the one on search elsewhere.
    """

    terms: tuple[Term, ...]
    bounds: tuple[Bound, ...] = ()
    normalizers: Mapping[str, str] = field(default_factory=dict)  # task -> subject that its score is relative to
    references: Mapping[str, Scores] | None = None  # subject -> its scores on search; None: not evaluated yet
    penalty: Penalty | None = None  # on what the searcher is told, and on nothing else

    @classmethod
    def of_spec(cls, spec: ObjectiveSpec, weights: Mapping[str, float], experts: Iterable[str]) -> Objective:
        """The objective over tasks with these weights, not yet bound to references."""
        tasks = list(weights)
        terms = [Term(name, dict(weights) if name in WORDS else {name: 1.0}, lowest=name == "min") for name in spec.of]

        def subjects(of: str | None, task: str) -> tuple[str, ...]:
            if of == "best_expert":
                return tuple(f"{EXPERT}{expert}" for expert in experts)
            return {"base": (BASE,), "expert": (f"{EXPERT}{spec.own_expert(task)}",)}.get(of or "", ())

        bounds = [
            Bound(task, c.at_least, c.of, subjects(c.of, task))
            for c in spec.constraints
            for task in spec.tasks_in(c.task, tasks)
        ]
        normalized = {t for term in terms for t in term.weights} if spec.normalize == "expert" else set()
        normalizers = {t: f"{EXPERT}{spec.own_expert(t)}" for t in tasks if t in normalized}
        penalty = None if spec.penalty is None else Penalty(spec.penalty.l1)
        return cls(tuple(terms), tuple(bounds), normalizers, penalty=penalty)

    @classmethod
    def of_record(cls, record: Mapping[str, Any], tasks: Iterable[str] = ()) -> Objective:
        """The objective of a stored study.

        Args:
            record: the study's.
            tasks: what tasks there are, where the record does not say.
        """
        spec = record.get("spec", {})
        stored = spec.get("evaluate", {}).get("tasks") or spec.get("tasks") or {}
        weights = {t: float((fields or {}).get("weight", 1.0)) for t, fields in stored.items()}
        weights = weights or dict.fromkeys(tasks, 1.0)
        objective = ObjectiveSpec.model_validate(read_objective(spec.get("objective") or "mean"))
        made = cls.of_spec(objective, weights, spec.get("experts", ()))
        return made.bind(record["references"]) if "references" in record else made

    def bind(self, references: Mapping[str, Scores]) -> Objective:
        """With the references' scores on search.

        Raises:
            StudyError: a score that others are to be divided by is 0.
        """
        compared = {(b.task, subject) for b in self.bounds for subject in b.subjects} | set(self.normalizers.items())
        for task, subject in sorted(compared):
            if task not in references.get(subject, {}):
                raise StudyError(
                    f"the objective needs the score of {subject} at task {task!r}, but this study has none",
                    remedy="The tasks have changed since it was made: give the experiment a new name.",
                )
        for task, subject in self.normalizers.items():
            if references[subject][task] == 0:
                expert = subject.removeprefix(EXPERT)
                raise StudyError(
                    f"objective.normalize: {expert}, the own expert of task {task!r}, scores 0 on search, and nothing "
                    "can be relative to 0",
                    remedy="Take a metric with more than right and wrong, more search items, or another expert for the "
                    "task (objective.experts), or leave normalize out, in an experiment with another name.",
                )
        return replace(self, references={s: dict(references[s]) for s in self.subjects})

    @property
    def subjects(self) -> tuple[str, ...]:
        """The controls whose scores on search must be known first."""
        needed = {*self.normalizers.values(), *(s for bound in self.bounds for s in bound.subjects)}
        return tuple(sorted(needed))

    @property
    def ready(self) -> bool:
        """Are the references known? Until then scores are judged as they are, and no constraint is looked at."""
        return not self.subjects or self.references is not None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(term.name for term in self.terms)

    @property
    def several(self) -> bool:
        return len(self.terms) > 1

    @property
    def plain(self) -> bool:
        """One objective without constraints: its score says everything."""
        return not (self.several or self.bounds)

    @property
    def word(self) -> bool:
        """Does the name of the objective say all that there is to say of it?"""
        return self.plain and not self.normalizers and self.penalty is None

    def linear(self, terms: Iterable[Term]) -> tuple[dict[str, float], float] | None:
        """(task -> factor, offset) by which the mean of ``terms`` follows from scores; None if one is a minimum."""
        terms = list(terms)
        if any(term.lowest for term in terms):
            return None
        factors: dict[str, float] = {}
        offset = 0.0
        for term in terms:
            for task, share in term.shares.items():
                reference = self._own(task)
                factors[task] = factors.get(task, 0.0) + share / len(terms) / (abs(reference) if reference else 1.0)
                offset += share / len(terms) * (2.0 if reference is not None and reference < 0 else 0.0)
        return factors, offset

    def normalized(self, scores: Mapping[str, T]) -> dict[str, T]:
        """Task -> score (a number or an array), relative to its reference where that is asked for."""
        relative: dict[str, Any] = {}
        for task, score in scores.items():
            reference = self._own(task)
            if reference is None:
                relative[task] = score
            else:
                relative[task] = score / reference if reference > 0 else 2 - score / reference  # type: ignore
        return relative

    def _own(self, task: str) -> float | None:
        """The score that this task's is relative to; None if it is not, or not known yet."""
        if task not in self.normalizers or self.references is None:
            return None
        return self.references[self.normalizers[task]][task]

    def judge(self, scores: Scores, same_items: Mapping[str, Scores] | None = None) -> Judged:
        """What ``scores`` are worth.

        Args:
            scores: of all tasks, on one split.
            same_items: subject -> scores on that split, as far as they are known; none: those on search.
        """
        relative = self.normalized(scores)
        values = tuple(term.of(relative) for term in self.terms)
        score = values[0] if len(values) == 1 else math.fsum(values) / len(values)
        if not self.ready:
            return Judged(score, values)
        references = {**(self.references or {}), **(same_items or {})}
        margins = tuple(bound.margin(scores[bound.task], references) for bound in self.bounds)
        misses = tuple(
            bound.missed(scores[bound.task], references)
            for bound, margin in zip(self.bounds, margins, strict=True)
            if margin > 0
        )
        return Judged(score, values, margins, misses)

    def references_in(self, scores: Mapping[str, Scores]) -> dict[str, Scores]:
        """Of subject -> scores on a split, what constraints compare with there."""
        return {subject: scores[subject] for subject in self.subjects if subject in scores}

    def text(self) -> list[str]:
        """What is maximised, and a line a constraint, in words."""
        kinds = {"mean": "the mean of the tasks by weight", "min": "the lowest task"}
        what = " and ".join(kinds.get(term.name, f"task {term.name}") for term in self.terms)
        if self.several:
            what = f"{len(self.terms)} objectives: {what}"
        if self.normalizers:
            own = (f"{t}: {s.removeprefix(EXPERT)}{self._value(s, t)}" for t, s in self.normalizers.items())
            what += f"; each task's score relative to its own expert's on search ({', '.join(own)})"
        if self.penalty is not None:
            what += f"; {self.penalty.text()}"
        return [what, *(bound.text() for bound in self.bounds)]

    def _value(self, subject: str, task: str) -> str:
        return "" if self.references is None else f" {self.references[subject][task]:.4g}"


PLAIN = Objective((Term("mean", {}),))  # where only stored scores are looked at
