"""The contract suites catch plug-ins that break a rule: each one here breaks one, and a named test of a suite fails."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evomerge import (
    Evaluator,
    EvaluatorContext,
    Item,
    Likelihoods,
    Method,
    Outcome,
    Param,
    Predictions,
    Searcher,
    Target,
    TaskSpec,
)
from evomerge.errors import MethodError
from evomerge.methods.base import TensorInfo
from evomerge.searchers.base import keyed_generator
from evomerge.testing.evaluators import EvaluatorCase, EvaluatorContract
from evomerge.testing.methods import MethodContract
from evomerge.testing.searchers import SearcherContract


@pytest.fixture(autouse=True)
def no_diffs(monkeypatch: pytest.MonkeyPatch):
    """Where CI is set, pytest writes the whole difference of two studies, which here is wanted by nobody: 10 s each."""
    for name in ("CI", "BUILD_NUMBER"):
        monkeypatch.delenv(name, raising=False)


def fails(test: Callable[[], Any], *errors: type[BaseException]) -> bool:
    try:
        test()
    except (AssertionError, *errors):
        return True
    return False


# --- methods ----------------------------------------------------------------------------------------------------------


class Sum(Method):
    """theta_0 + sum w tau, and nothing wrong with it."""

    name, summary, reference = "sum", "for tests", "none"
    params = {"scale": Param(float, 1.0, "of the sum")}  # noqa: RUF012

    def taus(self, base, experts, weights, dtype):
        return [w * (e.to(dtype) - base.to(dtype)) for w, e in zip(weights, experts, strict=True) if w != 0]

    def combine(self, base, experts, *, weights, dtype, scale, **_: Any):
        taus = self.taus(base, experts, weights, dtype)
        return base.to(dtype) + scale * sum(taus) if taus else base.to(dtype, copy=True)


class Narrow(Sum):
    """Computes in bfloat16."""

    def combine(self, base, experts, *, weights, dtype, scale, **_: Any):
        taus = self.taus(base, experts, weights, torch.bfloat16)
        return (base.bfloat16() + scale * sum(taus)).to(dtype) if taus else base.to(dtype, copy=True)


class ChangesInputs(Sum):
    """Subtracts in place."""

    def combine(self, base, experts, *, weights, dtype, scale, **_: Any):
        taus = [expert.sub_(base).to(dtype) for expert in experts]
        return base.to(dtype) + scale * sum(w * tau for w, tau in zip(weights, taus, strict=True))


class GivesAnInput(Sum):
    """The very memory of the base where nothing is to be added."""

    def combine(self, base, experts, *, weights, dtype, scale, **_: Any):
        taus = self.taus(base, experts, weights, dtype)
        return base.to(dtype) + scale * sum(taus) if taus else base.to(dtype)


class GlobalRandom(Sum):
    def combine(self, base, experts, *, weights, dtype, scale, **_: Any):
        taus = [tau * (torch.rand(tau.shape) < 0.5) for tau in self.taus(base, experts, weights, dtype)]
        return base.to(dtype) + scale * sum(taus) if taus else base.to(dtype, copy=True)


class NumpyRandom(Sum):
    """Seeds the global generator, so that it is at least the same every time."""

    def combine(self, base, experts, *, weights, dtype, scale, seed, **_: Any):
        np.random.seed(seed)
        taus = [tau * float(np.random.rand()) for tau in self.taus(base, experts, weights, dtype)]
        return base.to(dtype) + scale * sum(taus) if taus else base.to(dtype, copy=True)


class DependsOnSlices(Sum):
    """Divides by a norm of whatever it is given."""

    def combine(self, base, experts, *, weights, dtype, scale, **_: Any):
        taus = self.taus(base, experts, weights, dtype)
        norm = 1.0 + float(sum(tau.norm() for tau in taus)) if taus else 1.0
        return base.to(dtype) + scale * sum(taus) / norm if taus else base.to(dtype, copy=True)


class ZeroCounts(Sum):
    """A mean over all experts, those of weight zero included."""

    def combine(self, base, experts, *, weights, dtype, scale, **_: Any):
        taus = self.taus(base, experts, weights, dtype)
        return base.to(dtype) + scale * sum(taus) / len(experts) if taus else base.to(dtype, copy=True)


class NotLinear(Sum):
    """Says that it is affine in its weights."""

    def is_linear(self, **params: Any) -> bool:
        return True

    def combine(self, base, experts, *, weights, dtype, scale, **_: Any):
        return super().combine(base, experts, weights=[w * w for w in weights], dtype=dtype, scale=scale)


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (Narrow, "test_arithmetic_is_in_the_wider_of_float32_and_storage"),
        (ChangesInputs, "test_inputs_are_neither_changed_nor_returned"),
        (GivesAnInput, "test_inputs_are_neither_changed_nor_returned"),
        (GlobalRandom, "test_same_call_same_bits_and_no_global_random_state"),
        (NumpyRandom, "test_same_call_same_bits_and_no_global_random_state"),
        (DependsOnSlices, "test_slices_equal_the_whole"),
        (DependsOnSlices, "test_merge_chunks_gives_the_whole"),
        (ZeroCounts, "test_a_weight_of_zero_leaves_an_expert_out"),
        (NotLinear, "test_is_linear_is_true"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_broken_method_is_caught(broken: type[Method], test: str):
    def run(method: Method) -> bool:
        suite = MethodContract()
        suite.method = method
        arguments = [torch.float32] if "arithmetic" in test else []
        with torch.random.fork_rng(devices=[]):
            before = np.random.get_state()
            try:
                return fails(lambda: getattr(suite, test)(*arguments), MethodError)
            finally:
                np.random.set_state(before)

    assert run(broken())
    assert not run(Sum())


# --- searchers --------------------------------------------------------------------------------------------------------


class Climb(Searcher):
    """Steps from the best point so far, and nothing wrong with it."""

    name = "climb"

    def __init__(self, space, **options):
        super().__init__(space, **options)
        self.best = None

    def needs(self, n):
        return max(0, n - 3)

    def normal(self, n):
        return keyed_generator(self.seed, n).standard_normal(len(self.space.dimensions))

    def center(self):
        return self.best.point if self.best else self.starts[0]

    def ask(self, n):
        if n < len(self.starts):
            return dict(self.starts[n])
        pairs = zip(self.space.dimensions, 0.1 * self.normal(n), strict=True)
        here = self.center()
        return self.space.at([min(1.0, max(0.0, d.share(here.get(d.name, d.initial)) + s)) for d, s in pairs])

    def better(self, trial):
        return trial.merit > self.best.merit

    def tell(self, trial):
        if self.best is None or self.better(trial):
            self.best = trial


class GlobalGenerator(Climb):
    def normal(self, n):
        return np.random.standard_normal(len(self.space.dimensions))


class GeneratorThatGoesOn(Climb):
    """One generator for all proposals, which a resume that does not ask again leaves behind."""

    def __init__(self, space, **options):
        super().__init__(space, **options)
        self.generator = keyed_generator(self.seed)

    def normal(self, n):
        return self.generator.standard_normal(len(self.space.dimensions))

    def replay(self, n, point):
        """Trusts the store."""


class NaNLeads(Climb):
    """Replaces its best by all that is not worse: no comparison with NaN or None says that it is."""

    def better(self, trial):
        a, b = trial.score, self.best.score
        return not (a is not None and b is not None and a <= b)


class NoScoreIsZero(Climb):
    """Scores here are negative, so that a failure is the best there is."""

    def better(self, trial):
        return (trial.score or 0.0) > (self.best.score or 0.0)


class Folds(Climb):
    """Leaves the space."""

    def ask(self, n):
        point = super().ask(n)
        return point if n < len(self.starts) else {name: value + 2.0 for name, value in point.items()}


class KnowsTheFuture(Climb):
    def needs(self, n):
        return n + 1


class Asks(Climb):
    """Its proposals depend on how often it was asked what it needs."""

    def __init__(self, space, **options):
        super().__init__(space, **options)
        self.count = 0

    def needs(self, n):
        self.count += 1
        return super().needs(n)

    def normal(self, n):
        return keyed_generator(self.seed, n, self.count).standard_normal(len(self.space.dimensions))


@pytest.mark.parametrize(
    ("broken", "test", "arguments"),
    [
        (GlobalGenerator, "test_global_generators_do_not_matter", ()),
        (GlobalGenerator, "test_same_seed_same_points", ()),
        (GeneratorThatGoesOn, "test_killed_anywhere_it_goes_on_as_if_not", ("reproducible",)),
        (NaNLeads, "test_failures_do_not_attract", (math.nan, 1)),
        (NaNLeads, "test_failures_do_not_attract", (None, 0)),
        (NoScoreIsZero, "test_failures_do_not_attract", (None, 0)),
        (Folds, "test_points_lie_in_the_space", (2, 1.0)),
        (KnowsTheFuture, "test_needs_is_about_earlier_trials", ()),
        (Asks, "test_workers_and_their_order_do_not_matter", (8,)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_broken_searcher_is_caught(broken: type[Searcher], test: str, arguments: tuple):
    from evomerge.errors import UserError

    def run(searcher: type[Searcher]) -> bool:
        suite = SearcherContract()
        suite.searcher = searcher
        before = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=[]):
                return fails(lambda: getattr(suite, test)(*arguments), UserError, KeyError, IndexError)
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])

    assert run(broken)
    assert not run(Climb)


# --- evaluators -------------------------------------------------------------------------------------------------------


class Lengths(Evaluator):
    """The length of each text; nothing wrong with it."""

    def load(self):
        return [Item(f"i{n}", "one", "x" * n) for n in range(1, 31)]

    def prepare(self, target, items):
        self.texts = {item.id: item.text for item in items}

    def evaluate(self, target, item_ids):
        return [Outcome(i, {"score": self.one(i, item_ids)}) for i in item_ids]

    def one(self, item_id, item_ids):
        return float(len(self.texts[item_id]))


class ByPlace(Lengths):
    """Depends on where an item stands in the call, as batches that are laid out anew do."""

    def one(self, item_id, item_ids):
        return len(self.texts[item_id]) + 1e-6 * list(item_ids).index(item_id)


class ByHistory(Lengths):
    calls = 0

    def one(self, item_id, item_ids):
        self.calls += 1
        return len(self.texts[item_id]) + 1e-6 * self.calls


class ByDice(Lengths):
    def one(self, item_id, item_ids):
        return len(self.texts[item_id]) + random.random()


class ByObject(Lengths):
    """Differs between workers."""

    made = 0

    def __init__(self, context):
        super().__init__(context)
        type(self).made += 1
        self.number = type(self).made

    def one(self, item_id, item_ids):
        return float(self.number)


class Sorted(Lengths):
    """Answers in an order of its own."""

    def evaluate(self, target, item_ids):
        return super().evaluate(target, sorted(item_ids))


class NaN(Lengths):
    def one(self, item_id, item_ids):
        return math.nan if item_id == "i7" else 1.0


class NewItems(Lengths):
    def load(self):
        return [Item(f"{random.random()}", "one", "x" * n) for n in range(1, 31)]


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (ByPlace, "test_an_outcome_does_not_depend_on_what_else_is_asked_for"),
        (ByHistory, "test_evaluating_again_is_the_same_bit_for_bit"),
        (ByDice, "test_global_random_state_has_no_effect"),
        (ByObject, "test_another_worker_gives_the_same_bit_for_bit"),
        (Sorted, "test_outcomes_are_finite_and_in_the_order_asked_for"),
        (NaN, "test_outcomes_are_finite_and_in_the_order_asked_for"),
        (NewItems, "test_loading_twice_gives_the_same_items"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_broken_evaluator_is_caught(broken: type[Evaluator], test: str):
    from evomerge.errors import CandidateError

    context = EvaluatorContext(Path(__file__).parent, {"one": TaskSpec("one")})

    def run(evaluator: type[Evaluator]) -> bool:
        case = EvaluatorCase(lambda: evaluator(context), Target(None, None), {"search": 10, "select": 10, "test": 10})
        before = random.getstate()
        try:
            return fails(lambda: getattr(EvaluatorContract(), test)(case), CandidateError)
        finally:
            random.setstate(before)

    assert run(broken)
    assert not run(Lengths)


class Letters(Evaluator):
    """Which of 3 classes a text of letters is of, by a model that sums embeddings; nothing wrong with it."""

    padding = 0  # a token that adds nothing

    def load(self):
        texts = ["".join(random.Random(n).choices("bcdefgh", k=n % 5 + 1)) + f"{n:02}" for n in range(30)]
        return [Item(text, "one", text, {"label": len(text) % 3}) for text in texts]

    def prepare(self, target, items):
        self.items = {item.id: item for item in items}

    def evaluate(self, target, item_ids):
        return [Outcome(p, {"loglikelihood": float(v.logs[v.right])}) for p, v in self.pairs(target, item_ids)]

    def pairs(self, target, item_ids):
        return zip(item_ids, self.likelihoods(target, item_ids), strict=True)

    def likelihoods(self, target, item_ids, *, alternatives=True):
        for item_id in item_ids:
            ids = torch.tensor([[ord(c) for c in item_id]])
            yield Likelihoods(target.model(ids)[0].log_softmax(0), len(item_id) % 3)

    def predicts(self, task):
        return frozenset(("answers", "labels", "hidden"))

    def predictions(self, target, item_ids, *, over="answers", labels=False, hidden=False):
        items = [self.items[i] for i in item_ids]
        self.check_predictable(items, over, labels=labels, hidden=hidden)
        width = max(map(len, item_ids))
        ids = torch.tensor([[ord(c) for c in i] + [self.padding] * (width - len(i)) for i in item_ids])
        logits, ones = self.predict(target, ids), torch.ones(len(items))
        right = torch.tensor([item.data["label"] for item in items]) if labels else None
        states = target.model[0](ids) if hidden else None
        return Predictions(logits, ones, right, states, ones if hidden else None)

    def predict(self, target, ids):
        return target.model(ids)


class SeesPadding(Letters):
    padding = 1


class OwnOrder(Letters):
    def predictions(self, target, item_ids, **options):
        return super().predictions(target, sorted(item_ids), **options)


class Shares(Letters):
    """Weights that sum to 1 over the batch instead of over each item."""

    def predictions(self, target, item_ids, **options):
        found = super().predictions(target, item_ids, **options)
        return replace(found, weights=found.weights / (1 + len(item_ids)))


class Detached(Letters):
    def predict(self, target, ids):
        return target.model(ids).detach().requires_grad_(True)


class Peeks(Letters):
    def predictions(self, target, item_ids, *, labels=False, **options):
        found = super().predictions(target, item_ids, labels=True, **options)
        return found if labels else replace(found, right=None)


class TellsAlways(Letters):
    def predictions(self, target, item_ids, *, labels=False, **options):
        return super().predictions(target, item_ids, labels=True, **options)


class OneByTheOther(Letters):
    """Depends on the rest of the batch, as batch normalisation does."""

    def predict(self, target, ids):
        logits = target.model(ids)
        return logits + (logits - logits.mean(0)).square().sum() * torch.tensor([1.0, 0, 0])


class WrongRight(Letters):
    def predictions(self, target, item_ids, **options):
        found = super().predictions(target, item_ids, **options)
        return replace(found, right=None if found.right is None else (found.right + 1) % 3)


class Answers(Letters):
    """Says nothing where it is asked for what it does not predict."""

    def predictions(self, target, item_ids, *, over="answers", labels=False, hidden=False):
        return super().predictions(target, item_ids, labels=labels, hidden=hidden)


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (SeesPadding, "test_predictions_are_those_of_likelihoods"),
        (OwnOrder, "test_a_batch_of_predictions_is_its_items_one_after_the_other"),
        (Shares, "test_a_batch_of_predictions_is_its_items_one_after_the_other"),
        (OneByTheOther, "test_a_batch_of_predictions_is_its_items_one_after_the_other"),
        (WrongRight, "test_predictions_are_those_of_likelihoods"),
        (Detached, "test_predictions_have_finite_gradients"),
        (Peeks, "test_predictions_without_labels_read_none"),
        (TellsAlways, "test_predictions_without_labels_read_none"),
        (Answers, "test_what_it_does_not_predict_is_refused"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.parametrize("wide", [True, False])
def test_broken_predictions_are_caught(broken: type[Evaluator], test: str, wide: bool):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.EmbeddingBag(128, 4, mode="sum", padding_idx=0), torch.nn.Linear(4, 3))
    target = Target(model.requires_grad_(False))
    context = EvaluatorContext(Path(__file__).parent, {"one": TaskSpec("one")})
    both = "wide" in inspect.signature(getattr(EvaluatorContract, test)).parameters

    def run(evaluator: type[Evaluator]) -> bool:
        case = EvaluatorCase(lambda: evaluator(context), target, {"search": 10, "select": 10, "test": 10})
        errors = (KeyError, RuntimeError, pytest.fail.Exception)
        return fails(lambda: getattr(EvaluatorContract(), test)(case, *([wide] if both else [])), *errors)

    assert run(broken)
    assert not run(Letters)


class Adapted(Letters):
    """Takes adapters, and does nothing wrong."""

    def adapts(self, task):
        return True

    def head(self, target, states):
        return target.model[1](target.adapted("one", states))

    def likelihoods(self, target, item_ids, *, alternatives=True):
        for item_id in item_ids:
            states = target.model[0](torch.tensor([[ord(c) for c in item_id]]))
            yield Likelihoods(self.head(target, states)[0].log_softmax(0), len(item_id) % 3)

    def predict(self, target, ids):
        return self.head(target, target.model[0](ids))


class ForgetsToScore(Adapted):
    """Predicts with adapters, and scores without."""

    def evaluate(self, target, item_ids):
        return super().evaluate(replace(target, adapters={}), item_ids)


class TooEarly(Adapted):
    """What an adapter is given is not what the head looks at."""

    def head(self, target, states):
        return target.model[1](target.adapted("one", states / 2))


class GivesTheAdapted(Adapted):
    def predictions(self, target, item_ids, **options):
        found = super().predictions(target, item_ids, **options)
        return replace(found, hidden=None if found.hidden is None else target.adapted("one", found.hidden))


class AlwaysAdapts(Adapted):
    """Does something of its own where adapters are given."""

    def head(self, target, states):
        return super().head(target, states + len(target.adapters))


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (ForgetsToScore, "test_an_adapter_counts_wherever_its_own_task_is_scored_and_nowhere_else"),
        (TooEarly, "test_an_adapter_is_given_what_predictions_call_hidden"),
        (GivesTheAdapted, "test_an_adapter_is_given_what_predictions_call_hidden"),
        (AlwaysAdapts, "test_adapters_that_change_nothing_change_no_outcome"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_broken_ways_with_adapters_are_caught(broken: type[Evaluator], test: str):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.EmbeddingBag(128, 4, mode="sum", padding_idx=0), torch.nn.Linear(4, 3))
    context = EvaluatorContext(Path(__file__).parent, {"one": TaskSpec("one")})

    def run(evaluator: type[Evaluator]) -> bool:
        case = EvaluatorCase(lambda: evaluator(context), Target(model), {"search": 10, "select": 10, "test": 10})
        return fails(lambda: getattr(EvaluatorContract(), test)(case))

    assert run(broken)
    assert not run(Adapted)


def test_what_merge_checks_is_no_matter_of_the_suites():
    """A method that writes into its inputs is stopped wherever it is used."""
    base, expert = torch.zeros(3), torch.ones(3)
    with pytest.raises(MethodError, match="wrote into"):
        ChangesInputs().merge(base, [expert], weights=[1.0], info=TensorInfo("w", shape=(3,)))
