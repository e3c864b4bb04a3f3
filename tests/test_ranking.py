"""Who goes on to select, and who wins: with constraints, with several objectives, and on items of their own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge import pareto
from evomerge.objective_file import ObjectiveSpec
from evomerge.objectives import Objective
from evomerge.ranking import Judge, Standing, choose_winner, ranked_trials
from evomerge.store import Evaluation, TrialRecord

TASKS = {"one": 1.0, "two": 1.0}
BASE = {"one": 0.5, "two": 0.5}


def objective(**keys) -> Objective:
    made = Objective.of_spec(ObjectiveSpec.model_validate(keys), TASKS, ("one", "two"))
    return made.bind({"control:base": BASE}) if made.subjects else made


def evaluation(subject: str, split: str, one: float, two: float, of: Objective) -> Evaluation:
    scores = {"one": one, "two": two}
    return Evaluation(f"{subject}/{split}", subject, split, "h", {}, None, scores, of.judge(scores).score)


def trial(n: int, *values: float, margins: tuple[float, ...] = (), state="complete") -> TrialRecord:
    score = sum(values) / len(values) if values else None
    return TrialRecord(n, state, {}, {}, str(n), score, values=values if len(values) > 1 else (), margins=margins)


KEEP = [{"task": "all", "at_least": 0.9, "of": "base"}]


def test_one_that_misses_a_constraint_on_select_is_not_the_winner():
    """However well it did on search, where it missed nothing, and however high its score."""
    of = objective(constraints=KEEP)
    evaluations = [
        evaluation("control:base", "search", 0.5, 0.5, of),
        evaluation("trial:0", "search", 1.0, 0.6, of),
        evaluation("trial:1", "search", 0.6, 0.6, of),
        evaluation("control:base", "select", 0.5, 0.5, of),
        evaluation("trial:0", "select", 1.0, 0.44, of),
        evaluation("trial:1", "select", 0.55, 0.55, of),
    ]
    assert choose_winner(evaluations, of).subject == "trial:1"
    assert choose_winner(evaluations, objective()).subject == "trial:0"
    nobody = [*evaluations[:5], evaluation("trial:1", "select", 0.2, 0.55, of)]
    assert choose_winner(nobody, of).subject == "trial:0"  # the nearest


def test_the_base_on_the_same_items_is_what_counts():
    of = objective(constraints=KEEP)
    hard = [evaluation("trial:0", "select", 0.9, 0.40, of), evaluation("trial:1", "select", 0.5, 0.5, of)]
    assert choose_winner(hard, of).subject == "trial:1"  # 0.40 < 0.9 * 0.5, all that is known of base
    assert choose_winner([*hard, evaluation("control:base", "select", 0.5, 0.41, of)], of).subject == "trial:0"


def test_the_winner_of_several_objectives_is_on_the_front():
    of = objective(of=["one", "two"], constraints=[{"task": "one", "at_least": 0.2}])
    given = {"trial:0": (0.9, 0.3), "trial:1": (0.6, 0.7), "trial:2": (0.5, 0.6), "trial:3": (0.1, 1.4)}
    evaluations = [evaluation(s, "select", *scores, of) for s, scores in given.items()]
    assert choose_winner(evaluations, of).subject == "trial:1"
    judge = Judge(of, evaluations)
    assert judge.front(evaluations) == {"trial:0", "trial:1"}
    assert judge.front([]) == set()


def test_finalists_of_several_objectives_are_the_best_mean_then_the_ends_of_the_front():
    trials = [
        trial(0, 0.0, 1.0),
        trial(1, 0.6, 0.62),
        trial(2, 0.7, 0.5),
        trial(3, 1.0, 0.0),
        trial(4, 0.3, 0.3),
        trial(5, 9.0, 9.0, margins=(0.1,)),
        trial(6, state="fail"),
        trial(7, 0.2, 0.8),
    ]
    assert [t.n for t in ranked_trials(trials, 4)] == [1, 0, 3, 2]  # room: 0.4 + 0.62 for 2, 0.6 + 0.38 for 7
    assert [t.n for t in ranked_trials(trials, 10)][-2:] == [4, 5]
    assert len(ranked_trials(trials, 10)) == 7


def test_finalists_of_one_objective_keep_the_constraints_first():
    trials = [trial(0, 0.9, margins=(0.2, -1)), trial(1, 0.5, margins=(0, -1)), trial(2, 0.8, margins=(0.1, -1)),
              trial(3, 0.5, margins=(-1, -1)), trial(4, state="fail")]  # fmt: skip
    assert [t.n for t in ranked_trials(trials, 9)] == [1, 3, 2, 0]
    assert ranked_trials([], 3) == []


VALUE = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0])


@pytest.mark.parametrize("objectives", [1, 2, 3])
@given(data=st.data())
def test_what_is_kept_as_results_come_in_is_what_all_of_them_say(objectives, data):
    """In any order, with equal ones, failures and missed constraints: the rules on all trials at once."""
    kinds = data.draw(st.lists(st.sampled_from(["fails", "misses", "keeps"]), max_size=12))
    trials = []
    for n, kind in enumerate(kinds):
        values = [data.draw(VALUE) for _ in range(objectives)]
        margins = (0.5,) if kind == "misses" else (-0.5,)
        trials.append(trial(n, state="fail") if kind == "fails" else trial(n, *values, margins=margins))
    standing = Standing(data.draw(st.permutations(trials)))
    assert standing.failed == kinds.count("fails")
    complete = [t for t in trials if t.state == "complete"]
    assert standing.best == max(complete, key=lambda t: (t.merit, -t.n), default=None)
    feasible = [t.values for t in complete if t.values and not t.violation]
    on_front = [feasible[i] for i in pareto.front(np.array(feasible))] if feasible else []
    assert sorted(map(tuple, standing.front)) == sorted(on_front)
