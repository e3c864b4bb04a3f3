"""Objectives and constraints: which trial is better, what a score is worth against a reference, and what is refused."""

from __future__ import annotations

import math
from typing import Annotated

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BeforeValidator

from evomerge.errors import SpecError, StudyError
from evomerge.objective_file import ObjectiveSpec, read_objective
from evomerge.objectives import Objective, Penalty, merit, violation
from evomerge.searchers.base import Told
from evomerge.validation import Strict, validate

numbers = st.integers(-3, 3).map(float)
margins = st.lists(st.integers(-2, 2).map(float), max_size=2).map(tuple)
told = st.builds(
    Told,
    n=st.just(0),
    point=st.just({}),
    state=st.sampled_from(["complete", "complete", "fail", "pruned"]),
    score=st.one_of(numbers, st.sampled_from([math.nan, math.inf, -math.inf, None])),
    values=st.just(()),
    margins=margins,
)


@settings(max_examples=300)
@given(told, told)
def test_feasible_before_infeasible_before_failed(a: Told, b: Told):
    """Deb's three rules, said directly."""
    for one, other in ((a, b), (b, a)):
        good = one.state == "complete" and one.score is not None and math.isfinite(one.score)
        also = other.state == "complete" and other.score is not None and math.isfinite(other.score)
        if good and not also:
            assert one.merit > other.merit
        elif good and also and not any(m > 0 for m in one.margins):
            assert one.score is not None and other.score is not None
            worse = any(m > 0 for m in other.margins) or one.score > other.score
            assert not worse or one.merit > other.merit
        elif good and also and one.violation < other.violation:
            assert one.merit > other.merit
        elif not good and not also:
            assert one.merit == other.merit


def test_nothing_that_is_not_a_number_ranks():
    for bad in (math.nan, math.inf, -math.inf):
        assert Told(0, {}, "complete", 1.0, (1.0, bad)).merit == merit(None)
        assert Told(0, {}, "complete", 1.0, (), (bad,)).merit == merit(None)
        assert merit(0.0, 1e9) > merit(bad) == merit(1.0, bad) == merit(None)


def test_violation_adds_what_is_missed_and_forgives_nothing_for_what_is_kept():
    assert violation(()) == violation((-5.0, 0.0)) == 0.0
    assert violation((-5.0, 0.25, 0.5)) == 0.75


# What scores are worth

TASKS = {"add": 3.0, "topic": 1.0}
EXPERTS = ("add", "topics", "spare")
REFERENCES = {
    "control:base": {"add": 0.2, "topic": 0.5},
    "control:expert:add": {"add": 0.8, "topic": 0.3},
    "control:expert:topics": {"add": 0.1, "topic": 0.9},
    "control:expert:spare": {"add": 0.9, "topic": 0.2},
}


def objective(references=REFERENCES, **keys) -> Objective:
    spec = ObjectiveSpec.model_validate(keys)
    spec.check(list(TASKS), EXPERTS, "file: objective")
    made = Objective.of_spec(spec, TASKS, EXPERTS)
    return made if references is None else made.bind(references)


scores_01 = st.fixed_dictionaries({task: st.floats(0, 1) for task in TASKS})
signed = st.floats(-5, 5).filter(lambda x: abs(x) > 0.01)


@given(scores_01)
def test_mean_and_minimum_and_one_task(scores):
    assert objective(of="mean").judge(scores).score == (3 * scores["add"] + scores["topic"]) / 4
    assert objective(of="min").judge(scores).score == min(scores.values())
    assert objective(of="topic").judge(scores).score == scores["topic"]
    several = objective(of=["min", "add", "mean"]).judge(scores)
    assert several.values == (min(scores.values()), scores["add"], (3 * scores["add"] + scores["topic"]) / 4)
    assert math.isclose(several.score, sum(several.values) / 3, abs_tol=1e-12)


def test_each_task_is_relative_to_its_own_expert():
    relative = objective(normalize="expert", experts={"topic": "topics"})
    assert relative.judge({"add": 0.8, "topic": 0.9}).score == 1.0
    assert math.isclose(relative.judge({"add": 0.4, "topic": 0.9}).score, (3 * 0.5 + 1.0) / 4)
    assert relative.subjects == ("control:expert:add", "control:expert:topics")
    assert "add: add 0.8" in relative.text()[0] and "topic: topics 0.9" in relative.text()[0]
    unbound = objective(None, normalize="expert", experts={"topic": "topics"})
    assert not unbound.ready and unbound.judge({"add": 0.4, "topic": 0.4}).score == 0.4
    only = objective(of="add", normalize="expert")
    assert only.subjects == ("control:expert:add",)  # nothing of topic is looked at


@given(signed, st.floats(-5, 5), st.floats(-5, 5))
def test_a_relative_score_rises_with_the_score_and_is_1_at_the_reference(reference, a, b):
    """Whatever the sign: 1 + the change as a share of the reference's size."""
    references = {**REFERENCES, "control:expert:add": {"add": reference, "topic": 0.5}}
    of = objective(references, of="add", normalize="expert")
    worth = [of.judge({"add": x, "topic": 0.0}).score for x in (a, b, reference)]
    assert math.isclose(worth[2], 1.0)
    for x, value in zip((a, b), worth, strict=False):
        assert math.isclose(value, 1 + (x - reference) / abs(reference), rel_tol=1e-9, abs_tol=1e-9)
    if abs(a - b) > 1e-6:
        assert (a < b) == (worth[0] < worth[1])


def test_a_loss_one_tenth_above_the_experts_is_worth_nine_tenths():
    references = {**REFERENCES, "control:expert:add": {"add": -1.0, "topic": 0.5}}  # bits per byte, negated
    assert math.isclose(objective(references, of="add", normalize="expert").judge({"add": -1.1, "topic": 0}).score, 0.9)


@settings(max_examples=100)
@given(scores_01, st.sampled_from(["mean", "add", ["mean", "add"], ["add", "topic"]]), st.booleans(), signed)
def test_the_linear_form_says_the_same(scores, of, relative, reference):
    references = {**REFERENCES, "control:expert:add": {"add": reference, "topic": 0.5}}
    keys = {"normalize": "expert", "experts": {"topic": "topics"}} if relative and of != "add" else {}
    made = objective(references, of=of, **keys)
    linear = made.linear(made.terms)
    assert linear is not None
    factors, offset = linear
    assert math.isclose(
        offset + sum(f * scores[t] for t, f in factors.items()), made.judge(scores).score, rel_tol=1e-9, abs_tol=1e-9
    )
    assert objective(of="min").linear(objective(of="min").terms) is None


# Constraints


def test_constraints_hold_scores_against_others():
    constraints = [
        {"task": "all", "at_least": 0.95, "of": "base"},
        {"task": "topic", "at_least": 0.5, "of": "expert"},
        {"task": "add", "at_least": 1.0, "of": "best_expert"},
        {"task": "topic", "at_least": 0.4},
    ]
    of = objective(constraints=constraints, experts={"topic": "topics"})
    judged = of.judge({"add": 0.6, "topic": 0.44})
    # 0.19 and 0.475 of base's, 0.45 of topics', 0.9 of the best expert's (spare), 0.4
    expected = [(0.19 - 0.6) / 0.2, (0.475 - 0.44) / 0.5, (0.45 - 0.44) / 0.9, (0.9 - 0.6) / 0.9, 0.4 - 0.44]
    assert all(math.isclose(a, b) for a, b in zip(judged.margins, expected, strict=True))
    assert math.isclose(judged.violation, sum(m for m in expected if m > 0))
    assert len(judged.misses) == 3
    assert judged.misses[0] == "topic is 0.44, below 95% of base (0.475)"
    assert judged.merit < of.judge({"add": 0.9, "topic": 0.5}).merit == (2, 0.8, 0.0)


@given(signed, st.floats(0.1, 2.0))
def test_a_reference_keeps_its_own_share_of_itself_up_to_1(reference, share):
    references = {**REFERENCES, "control:base": {"add": reference, "topic": 0.5}}
    of = objective(references, constraints=[{"task": "add", "at_least": share, "of": "base"}])
    assert (of.judge({"add": reference, "topic": 0.0}).violation == 0) == (share <= 1 + 1e-9)


def test_rounding_is_no_miss_and_0_can_be_kept():
    of = objective(constraints=[{"task": "topic", "at_least": 0.95, "of": "base"}])
    assert of.judge({"add": 0.0, "topic": 0.475 - 1e-12}).violation == 0.0
    references = {**REFERENCES, "control:base": {"add": 0.0, "topic": 0.5}}
    of = objective(references, constraints=[{"task": "add", "at_least": 0.95, "of": "base"}])
    assert of.judge({"add": 0.0, "topic": 0.0}).violation == 0.0
    assert of.judge({"add": -0.25, "topic": 0.0}).violation == 0.25


def test_constraints_compare_on_the_same_items_where_they_can():
    """The select items are harder for the base too; what is known there goes before what is known of search."""
    of = objective(constraints=[{"task": "all", "at_least": 0.95, "of": "base"}])
    scores = {"add": 0.15, "topic": 0.5}
    assert of.judge(scores).violation > 0
    on_select = {"control:base": {"add": 0.15, "topic": 0.5}, "control:average": {"add": 1.0, "topic": 1.0}}
    assert of.references_in(on_select) == {"control:base": {"add": 0.15, "topic": 0.5}}
    assert of.judge(scores, of.references_in(on_select)).violation == 0
    # but what a relative score is relative to stays that of search
    relative = objective(of="add", normalize="expert")
    elsewhere = {"control:expert:add": {"add": 0.1, "topic": 0.1}}
    assert relative.judge(scores, elsewhere).score == relative.judge(scores).score


# What is refused


class Experiment(Strict):
    objective: Annotated[ObjectiveSpec, BeforeValidator(read_objective)]


@pytest.mark.parametrize(
    ("keys", "key", "words"),
    [
        ({"of": "meen"}, "objective.of", ["'meen'", "'mean'", "add"]),
        ({"of": ["add", "spam"]}, "objective.of", ["'spam'", "topic"]),
        ({"normalize": "expert"}, "objective.experts", ["'topic'", "experts: {topic:", "topics"]),
        ({"normalize": "expert", "experts": {"topic": "none"}}, "objective.experts.topic", ["'none'", "topics"]),
        ({"normalize": "expert", "experts": {"tropic": "add"}}, "objective.experts.tropic", ["'tropic'", "topic"]),
        ({"experts": {"topic": "topics"}}, "objective.experts.topic", ["normalize: expert"]),
        ({"constraints": [{"task": "ad", "at_least": 1}]}, "constraints[0].task", ["'ad'", "'add'", "all"]),
        (
            {"constraints": [{"task": "topic", "at_least": 0.9, "of": "expert"}]},
            "objective.experts",
            ["'topic'", "experts: {topic:"],
        ),
    ],
    ids=str,
)
def test_what_is_not_there_is_refused_by_key(keys, key, words):
    with pytest.raises(SpecError) as refused:
        objective(**keys)
    for word in [key, *words]:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("max", ["'max'", "mean, min", "of: TASK"]),
        (["add", "topic"], ["mapping"]),
        ({"of": []}, ["objective.of", "list"]),
        ({"of": ["add", "add"]}, ["objective.of", "twice"]),
        ({"of": 3}, ["objective.of", "list"]),
        ({"off": "mean"}, ["'off'", "of"]),
        ({"normalize": "base"}, ["objective.normalize", "none, expert"]),
        ({"constraints": [{"task": "add"}]}, ["at_least", "missing"]),
        ({"constraints": [{"task": "add", "at_least": 95, "of": "base"}]}, ["constraints[0]", "0.95"]),
        ({"constraints": [{"task": "add", "at_least": -1, "of": "base"}]}, ["constraints[0]", "above 0"]),
        ({"constraints": [{"task": "add", "at_least": math.nan}]}, ["at_least", "finite"]),
        ({"constraints": [{"task": "add", "at_least": 0.5, "of": "expert0"}]}, ["of", "base, expert, best_expert"]),
        ({"constraints": {"task": "add", "at_least": 0.5}}, ["constraints", "list"]),
        ({"penalty": 0.05}, ["objective.penalty"]),
        ({"penalty": {}}, ["objective.penalty.l1", "missing"]),
        ({"penalty": {"l1": 0}}, ["objective.penalty.l1", "l1 > 0.0 must hold"]),
        ({"penalty": {"l1": math.inf}}, ["objective.penalty.l1", "finite"]),
        ({"penalty": {"l2": 0.1}}, ["'l2'", "l1"]),
    ],
    ids=str,
)
def test_what_is_wrong_as_written_is_refused_by_key(written, words):
    with pytest.raises(SpecError) as refused:
        validate(Experiment, {"objective": written}, where="file.yaml")
    for word in ["objective", *words]:
        assert word in str(refused.value)


def test_a_reference_of_0_is_refused_before_the_search():
    references = {**REFERENCES, "control:expert:add": {"add": 0.0, "topic": 0.3}}
    with pytest.raises(StudyError, match=r"expert of task 'add', scores 0[\s\S]*another name"):
        objective(references, of="add", normalize="expert")
    with pytest.raises(StudyError, match="'topic'"):
        objective(
            {**REFERENCES, "control:base": {"add": 0.2}}, constraints=[{"task": "all", "at_least": 1, "of": "base"}]
        )


def test_penalty_is_the_l1_norm_of_the_weights():
    """LoraHub, section 3.3: the loss + alpha sum |w_i|, alpha 0.05."""
    penalty = Penalty(0.05)
    assert penalty.of({"groups": [{"weights": {"a": 1.5, "b": -0.5, "c": 0.0}}]}) == pytest.approx(0.1)
    # By parts: |a| is 1 and 0 in the two, |b| 0.5 and 0.5.
    by_part = {"groups": [{"weights": {"a": 1.0, "b": -0.5}}, {"weights": {"a": 0.0, "b": 0.5}}]}
    assert penalty.of(by_part) == pytest.approx(0.05 * (0.5 + 0.5))
    made = objective(penalty={"l1": 0.05})
    assert made.penalty == penalty
    assert not made.word and objective().word
    assert "0.05 less for each unit of sum |weight|" in made.text()[0]
    scores = {"add": 0.5, "topic": 0.5}
    assert made.judge(scores) == objective().judge(scores)  # scores are as they are


def test_what_says_no_more_than_a_word_is_that_word():
    """So that a study made with `objective: mean` is the same study as one made with `objective: {of: mean}`."""
    assert ObjectiveSpec.model_validate({"of": "mean", "normalize": "none", "constraints": []}).short() == "mean"
    assert ObjectiveSpec.model_validate(read_objective("min")).short() == "min"
    long = {"of": ["add", "topic"], "constraints": [{"task": "all", "at_least": 0.9, "of": "base"}]}
    assert ObjectiveSpec.model_validate(long).short() == long
    assert ObjectiveSpec.model_validate(ObjectiveSpec.model_validate(long).short()).short() == long


def test_records_of_studies_made_before_there_was_more_are_read():
    record = {"spec": {"objective": "min", "evaluate": {"tasks": {"add": {"weight": 2.0}, "topic": None}}}}
    assert Objective.of_record(record).judge({"add": 0.5, "topic": 0.25}).score == 0.25
    assert Objective.of_record({}, ["add"]).judge({"add": 0.5}).score == 0.5
