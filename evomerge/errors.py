"""The errors of evomerge, one tree.

EvomergeError
|-- UserError            the user's input is wrong: printed without a traceback, exit code 2
|   |-- SpecError        an experiment file, space or recipe
|   |-- CheckpointError  a base, an expert or an output folder
|   |-- MethodError      a merge method or its parameters
|   |-- EvaluatorError   an evaluator file, a task, items and splits
|   |-- StudyError       a store, a study, its lock, drift
|   `-- ResourceError    GPUs, memory or workers that are not there
|-- CandidateError       one candidate could not be evaluated: its trial fails, the search goes on
`-- Interrupted          stopped by the user or the scheduler; resumable, exit code 130
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EvomergeError(Exception):
    """Root of all errors raised by evomerge on purpose."""


class UserError(EvomergeError):
    """What the user gave is wrong. Says the rule, the values and the remedy.

    Args:
        problem: one sentence with the rule that does not hold and the values that break it.
        where: the file (and key) it was found in, such as ``experiment.yaml: search.method``.
        remedy: what to do about it, as a sentence.
    """

    def __init__(self, problem: str, *, where: str | None = None, remedy: str | None = None):
        self.problem, self.where, self.remedy = problem, where, remedy
        text = f"{where}: {problem}" if where else problem
        super().__init__(f"{text}\n  {remedy}" if remedy else text)


class SpecError(UserError):
    """An experiment file, a search space or a recipe breaks a rule."""


class CheckpointError(UserError):
    """A base, an expert or an output folder cannot be used."""


class MethodError(UserError):
    """A merge method is unknown or its parameters are out of range."""


class EvaluatorError(UserError):
    """An evaluator file, a task, or its items and splits cannot be used."""


class StudyError(UserError):
    """A store, a study, its lock, or a study whose inputs have changed."""


class ResourceError(UserError):
    """Workers, GPUs or memory were asked for that are not there."""


class CandidateError(EvomergeError):
    """One candidate could not be evaluated.

    Args:
        kind: one of ``error``, ``nan``, ``timeout``, ``memory``, ``lost``, ``incomplete``.
        reason: one line for the leaderboard.
        detail: the traceback or more, kept in the store.
    """

    def __init__(self, kind: str, reason: str, detail: str = ""):
        self.kind, self.reason, self.detail = kind, reason, detail
        super().__init__(f"{kind}: {reason}")

    def __reduce__(self):
        return type(self), (self.kind, self.reason, self.detail)


class Interrupted(EvomergeError):
    """The run was stopped from outside and can be resumed."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A remedy for an unknown name: the closest known one, then all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(known)}."
