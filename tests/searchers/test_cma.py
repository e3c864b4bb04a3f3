"""CMA-ES: the contract, that it is pycma's algorithm, and what it does about bounds, failures and restarts."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from evomerge.errors import SpecError
from evomerge.searchers import make
from evomerge.searchers.base import Point, Told, keyed_generator
from evomerge.searchers.cma import DIAGONAL_FROM, MARGIN, CMASearcher, default_sigma, squash, unsquash
from evomerge.searchers.restarts import Run
from evomerge.testing.searchers import MemoryStudy, SearcherContract, make_space, smooth


class TestCMA(SearcherContract):
    searcher = CMASearcher


class TestCMASmallPopulation(SearcherContract):
    searcher = CMASearcher
    options = {"population": 4, "sigma": 0.2}  # noqa: RUF012
    kill_budget = 10


class TestCMAThatRestarts(SearcherContract):
    """Steps so small that every generation counts as converged: populations 4, 8, then 16 to the end."""

    searcher = CMASearcher
    options = {"population": 4, "sigma": 1e-7, "restarts": 2}  # noqa: RUF012
    budget = 40
    improves_within = None


class TestDiagonalCMA(SearcherContract):
    searcher = CMASearcher
    options = {"covariance": "diagonal"}  # noqa: RUF012


class TestCMAWithTwoRegimes(SearcherContract):
    """Every generation counts as converged: populations 4, 8, then small and large ones by turns."""

    searcher = CMASearcher
    options = {"population": 4, "sigma": 1e-7, "restart": "bipop"}  # noqa: RUF012
    budget = 40
    improves_within = None


def study(score=smooth, *, space=None, seed: int = 0, **options) -> MemoryStudy:
    space = space or make_space()
    return MemoryStudy(lambda: make("cma", space, seed=seed, **options), score)


def test_is_pycma_generation_by_generation():
    """Whole generations told to pycma itself, with the same noise and true function values, give the same points."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import cma

    space = make_space(low=-10.0, high=10.0, initial=1.0)  # so wide that no sample leaves it
    ours = study(space=space, sigma=0.02, population=8, seed=7).run(80).points
    rows: list[np.ndarray] = []
    es = cma.CMAEvolutionStrategy(
        [1.0] * 6,
        0.02 * 20.0,
        {"popsize": 8, "randn": lambda *_: np.stack(rows), "seed": np.nan, "verbose": -10, "verb_log": 0},
    )
    theirs: list[list[float]] = []
    for generation in range(10):
        rows[:] = [keyed_generator(7, n).standard_normal((1, 6))[0] for n in range(8 * generation, 8 * generation + 8)]
        samples = es.ask()
        if generation == 0:
            samples[0] = np.array([1.0] * 6)
        theirs += [list(x) for x in samples]
        es.tell(samples, [-smooth({str(i): v for i, v in enumerate(x)}) for x in samples])
    assert np.allclose([list(p.values()) for p in ours], theirs, rtol=0, atol=1e-8)


def test_generations_need_all_earlier_ones():
    searcher = make("cma", make_space(), population=5)
    assert [searcher.needs(n) for n in range(12)] == [0] * 5 + [5] * 5 + [10] * 2
    run = study(population=5).run(15)
    assert [run.searcher.needs(n) for n in range(15)] == [0] * 5 + [5] * 5 + [10] * 5


def test_default_population_and_sigma_follow_the_dimension():
    for groups, dimensions in ((None, 1), (1, 3), (8, 24)):
        searcher = make("cma", make_space(groups=groups))
        assert isinstance(searcher, CMASearcher)
        assert searcher.population == 4 + math.floor(3 * math.log(dimensions))
    steps = [default_sigma(d) for d in (1, 3, 18, 96, 300)]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] == 0.25
    assert steps[3] <= 0.05  # 1/6 was far too large in 96 dimensions, 0.05 was not


def test_sigma_is_a_share_of_the_range():
    narrow, wide = (
        study(lambda _: 0.0, space=make_space(low=1 - h, high=1 + h, initial=1.0), sigma=0.1, population=200).run(200)
        for h in (1.0, 100.0)
    )
    for run, width in ((narrow, 2.0), (wide, 200.0)):
        spread = np.std([list(p.values()) for p in run.points[1:]])
        assert spread == pytest.approx(0.1 * width, rel=0.05)


def test_the_map_onto_the_bounds_is_monotone_and_folds_nothing():
    x = np.linspace(-MARGIN, 1 + MARGIN, 2001)
    u = squash(x)
    assert u[0] == 0.0
    assert u[-1] == 1.0
    assert (np.diff(u) > 0).all()
    assert np.abs(np.diff(u, 2)).max() < 1e-5  # no kinks
    inner = (x >= MARGIN) & (x <= 1 - MARGIN)
    assert (u[inner] == x[inner]).all()
    assert np.allclose(unsquash(u), x, atol=1e-8)


@pytest.mark.parametrize("groups", [None, 2, 6], ids=lambda g: f"{g} groups")
def test_optimum_in_the_corner(groups: int | None):
    """The mean cannot leave the box, and the search gets to its corner."""
    run = study(lambda p: sum(p.values()), space=make_space(groups=groups)).run(600).tell_all()
    recommended = run.searcher.recommend()
    assert recommended is not None
    assert all(1.8 < value <= 2.0 for value in recommended.values())


def test_start_on_the_border():
    space = make_space(initial=0.0)
    run = study(space=space).run(200).tell_all()
    recommended = run.searcher.recommend()
    assert recommended is not None
    assert smooth(recommended) > 0.02 * smooth(space.initial())


def test_three_hundred_dimensions():
    """pycma would change its step-size control there. Five generations on a slope: the mean score rises."""
    space = make_space(experts=40, groups=8)
    run = study(lambda p: sum(p.values()), space=space)
    run.run(5 * run.searcher.population)
    assert len(space.dimensions) == 320
    scores = [run.results[n].score for n in range(len(run.points))]
    size = run.searcher.population
    assert np.mean(scores[-size:]) > np.mean(scores[:size])


def test_a_failure_ranks_below_the_worst_score():
    """Failed, pruned and NaN trials lead to the same next generation as scores below all others do."""

    def last_generation(ending) -> list[Point]:
        run = study(population=8)
        run.run(8)
        for n in (2, 5):
            state, score = ending(n)
            run.results[n] = Told(n, run.points[n], state, score)
        return run.run(16).points[8:]

    worst = last_generation(lambda n: ("complete", -100.0 - n))
    assert last_generation(lambda n: ("complete", -1e300 - n * 1e299)) == worst
    assert last_generation(lambda _: ("fail", None)) == worst
    assert last_generation(lambda _: ("pruned", None)) == worst
    assert last_generation(lambda _: ("complete", math.nan)) == worst
    assert last_generation(lambda _: ("complete", math.inf)) == worst
    assert last_generation(lambda _: ("complete", 100.0)) != worst


def test_only_ranks_count():
    scores = {"plain": smooth, "scaled": lambda p: 1e-9 * smooth(p) + 3, "cubed": lambda p: smooth(p) ** 3}
    points = [study(score).run(40).points for score in scores.values()]
    assert points[0] == points[1] == points[2]


def test_equal_scores_neither_stop_nor_drift():
    """A generation of equal scores says nothing: the distribution stays where it is, and so does the population."""
    space = make_space(groups=1)
    run = study(lambda _: 0.25, space=space, population=10).run(1000)
    assert isinstance(run.searcher, CMASearcher)
    assert run.searcher.population == 10
    late = np.array([list(p.values()) for p in run.points[-500:]])
    assert np.allclose(late.mean(axis=0), 1.0, atol=0.1)
    assert late.std() == pytest.approx(2.0 * default_sigma(3), rel=0.15)  # a few samples are cut off at the bounds


def test_restarts_double_the_population_and_end():
    run = study(population=4, sigma=1e-7, restarts=2).run(60).tell_all()
    assert isinstance(run.searcher, CMASearcher)
    assert run.searcher.population == 16
    assert [run.searcher.needs(n) for n in (3, 4, 11, 12, 27, 28, 43, 44)] == [0, 4, 4, 12, 12, 28, 28, 44]
    centres = [np.mean([list(p.values()) for p in run.points[a:b]], axis=0) for a, b in ((0, 4), (4, 12), (12, 28))]
    assert np.allclose(centres[0], 1.0, atol=1e-5)
    assert np.abs(centres[1] - centres[0]).max() > 0.1
    assert np.abs(centres[2] - centres[1]).max() > 0.1


def test_two_regimes_take_turns_and_share_the_trials():
    run = study(population=4, sigma=1e-7, restart="bipop").run(400).tell_all()
    assert isinstance(run.searcher, CMASearcher)
    runs = run.searcher._runs
    doublings = [r.population for r, _ in runs if r.large]
    assert doublings == [4 * 2**k for k in range(1, 1 + len(doublings))]
    large, small = (sum(n for r, n in runs if r.large == kind) for kind in (True, False))
    assert len(doublings) >= 4 and 0.5 <= small / large <= 2


def test_a_small_run_ends_when_its_trials_are_spent():
    """A slope with the optimum in a corner far away: nothing converges, and a restart comes from the budget alone."""
    run = study(lambda p: sum(p.values()), population=4, restart="bipop").run(20)
    assert isinstance(run.searcher, CMASearcher)
    run.searcher._current = Run(4, 0.1, most=8)
    run.searcher._trials = 0
    run.searcher._runs = [(Run(4, 0.1), 100), (Run(8, 0.1, large=True), 200)]
    first = run.searcher._es
    run.run(24)
    run.tell_all()
    assert run.searcher._es is first
    run.run(32)
    run.tell_all()
    assert run.searcher._es is not first


def test_diagonal_learns_scales_and_no_interactions():
    """Curvatures from 1 to 10^4 in 12 dimensions: diagonal is better where they lie along the axes, full where not."""
    space = make_space(experts=3, groups=4, low=-1.0, high=1.0, initial=0.5)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 12)))[0]

    def left(rotation: np.ndarray, covariance: str) -> float:
        def score(p: Point) -> float:
            return -float(np.sum(10.0 ** np.linspace(0, 4, 12) * (rotation @ np.array(list(p.values()))) ** 2))

        run = study(score, space=space, covariance=covariance, restarts=0).run(1500).tell_all()
        recommended = run.searcher.recommend()
        assert recommended is not None
        return -score(recommended)

    assert left(np.eye(12), "diagonal") < 0.01 * left(np.eye(12), "full")
    assert left(turn, "full") < 0.2 * left(turn, "diagonal")


def test_auto_is_diagonal_in_many_dimensions():
    few, many = (make("cma", make_space(experts=4, groups=groups)) for groups in (8, None))
    assert isinstance(few, CMASearcher) and not few.diagonal
    wide = make("cma", make_space(experts=DIAGONAL_FROM // 8, groups=8))
    assert isinstance(wide, CMASearcher) and wide.diagonal
    assert isinstance(many, CMASearcher) and not many.diagonal


def test_without_restarts_it_goes_on_sampling():
    run = study(population=4, sigma=1e-7, restarts=0).run(40)
    assert isinstance(run.searcher, CMASearcher)
    assert run.searcher.population == 4
    assert np.allclose([list(p.values()) for p in run.points], 1.0, atol=1e-3)


def test_recommendation_is_the_mean_and_better_than_one_noisy_pick():
    """On a smooth function with noise, the mean beats the trial with the best noisy score (over ten seeds)."""
    assert make("cma", make_space()).recommend() is None
    wins = 0
    for seed in range(10):
        noise = np.random.default_rng(seed)
        run = study(lambda p, noise=noise: smooth(p) + float(noise.normal(0, 0.3)), seed=seed).run(90).tell_all()
        picked = max(run.results.values(), key=lambda told: told.score or -math.inf).point
        recommended = run.searcher.recommend()
        assert recommended is not None
        wins += smooth(recommended) > smooth(picked)
    assert wins >= 7


def test_late_results_of_an_old_generation_are_used():
    """Told in order of arrival: a straggler counts in the generation in which it arrives."""
    space = make_space(groups=1)
    searcher = make("cma", space, population=4)
    points = [searcher.ask(n) for n in range(6)]  # beyond the population: further samples
    for n in (1, 2, 3, 4):
        searcher.tell(Told(n, points[n], "complete", smooth(points[n])))
    points += [searcher.ask(n) for n in (6, 7)]
    for n in (0, 5, 6, 7):  # two of the first generation among them
        searcher.tell(Told(n, points[n], "complete", smooth(points[n])))
    space.decode(searcher.ask(8))
    assert searcher.needs(8) == 8


@pytest.mark.parametrize(
    "options",
    [
        {"sigma": 0},
        {"sigma": 1.5},
        {"population": 3},
        {"restarts": -1},
        {"popsize": 8},
        {"sigma": "0.1"},
        {"restart": "x"},
    ],
    ids=str,
)
def test_bad_options(options: dict):
    with pytest.raises(SpecError, match=next(iter(options))):
        make("cma", make_space(), **options)


def test_nothing_is_written_or_printed(tmp_path, monkeypatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study(space=make_space(groups=None)).run(30)
    captured = capfd.readouterr()
    assert not captured.out
    assert not captured.err
    assert not list(tmp_path.iterdir())
