"""TPE: the contract, its window, and that open trials count."""

from __future__ import annotations

import optuna
import pytest

from evomerge.errors import SpecError
from evomerge.searchers import make
from evomerge.searchers.base import Told, keyed_generator
from evomerge.searchers.tpe import TPESearcher
from evomerge.testing.searchers import MemoryStudy, SearcherContract, make_space, smooth


class TestTPE(SearcherContract):
    searcher = TPESearcher
    budget = 24


class TestTPEWithAWiderWindow(SearcherContract):
    searcher = TPESearcher
    options = {"window": 8, "n_startup": 4}  # noqa: RUF012
    budget = 20
    kill_budget = 12


@pytest.mark.parametrize("window", [1, 4, 7])
def test_at_most_window_trials_are_open(window: int):
    searcher = make("tpe", make_space(), window=window)
    assert [searcher.needs(n) for n in range(10)] == [max(0, n - (window - 1)) for n in range(10)]
    study = MemoryStudy(lambda: make("tpe", make_space(), window=window), smooth, workers=100)
    study.run(12, steps=window)
    assert len(study.points) == window  # all of them open
    assert not study.may_ask(12)


def test_one_worker_and_many_are_the_same_search_only_for_the_same_window():
    narrow, wide = (
        MemoryStudy(lambda w=w: make("tpe", make_space(), window=w, n_startup=3), smooth).run(15).points for w in (1, 8)
    )
    assert narrow[:3] == wide[:3]
    assert narrow != wide


def test_startup_is_what_random_proposes():
    """Before the model there is nothing to learn from: the same points, whatever was told."""
    told, untold = make("tpe", make_space(), seed=3), make("random", make_space(), seed=3)
    for n in range(10):
        point = told.ask(n)
        assert point == untold.ask(n)
        told.tell(Told(n, point, "complete", smooth(point)))
    assert told.ask(10) != untold.ask(10)


def test_open_trials_count():
    """Two searchers know the same ten scores, but only one of them has an eleventh proposal open."""
    space = make_space(experts=1, groups=1)

    def informed() -> TPESearcher:
        searcher = TPESearcher(space, seed=1)
        for n in range(10):
            point = searcher.ask(n)
            searcher.tell(Told(n, point, "complete", smooth(point)))
        return searcher

    alone, crowded = informed(), informed()
    next_point = alone.ask(10)
    far = dict.fromkeys(next_point, 2.0)
    alone.tell(Told(10, next_point, "fail", None))  # forgotten
    crowded.replay(10, far)  # open, at the other end
    assert alone.ask(11) != crowded.ask(11)


def test_failed_trials_are_failures_to_optuna():
    searcher = TPESearcher(make_space())
    for n, state in enumerate(["complete", "fail", "pruned"]):
        point = searcher.ask(n)
        searcher.tell(Told(n, point, state, 0.5 if state == "complete" else None))  # type: ignore[arg-type]
    states = optuna.trial.TrialState
    assert [t.state for t in searcher._study.trials] == [states.COMPLETE, states.FAIL, states.PRUNED]


def test_optuna_stays_quiet_and_its_verbosity_is_left_alone(capfd: pytest.CaptureFixture[str]):
    before = optuna.logging.get_verbosity()
    MemoryStudy(lambda: make("tpe", make_space()), smooth).run(12)
    captured = capfd.readouterr()
    assert not captured.out
    assert not captured.err
    assert optuna.logging.get_verbosity() == before


@pytest.mark.parametrize("options", [{"window": 0}, {"n_startup": 0}, {"window": 2.5}, {"windw": 4}], ids=str)
def test_bad_options(options: dict):
    with pytest.raises(SpecError, match=next(iter(options))):
        make("tpe", make_space(), **options)


@pytest.mark.parametrize("failing", [False, True], ids=["all complete", "some fail"])
def test_is_optunas_sampler(failing: bool):
    """The same proposals as Optuna's own sampler gives, which looks for the dimensions in the trials themselves."""
    space = make_space()
    ours = TPESearcher(space, seed=4, n_startup=3, window=1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    theirs = optuna.create_study(direction="maximize")
    distributions = {d.name: d.distribution() for d in space.dimensions}
    for n in range(15):
        point = ours.ask(n)
        if n < 3:
            trial_point = point
            theirs.add_trial(
                optuna.trial.create_trial(
                    state=optuna.trial.TrialState.RUNNING, params=point, distributions=distributions
                )
            )
        else:
            seed = int(keyed_generator(4, n).integers(2**32))
            theirs.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=3)
            trial_point = theirs.ask(fixed_distributions=distributions).params
        assert point == trial_point
        state = "fail" if failing and n % 3 == 1 else "complete"
        ours.tell(Told(n, point, state, None if state == "fail" else smooth(point)))
        if state == "fail":
            theirs.tell(n, state=optuna.trial.TrialState.FAIL)
        else:
            theirs.tell(n, smooth(point))


def test_a_search_whose_proposals_become_slow_says_so():
    assert make("tpe", make_space()).note(5000) is None
    wide = make("tpe", make_space(experts=40, groups=8)).note(5000)
    assert wide is not None and "320 dimensions" in wide and "3 s" in wide
    assert make("gp", make_space()).note(300) is None
    assert "minutes" in str(make("gp", make_space()).note(3000))
    assert make("cma", make_space(experts=40, groups=8)).note(5000) is None
