"""What every searcher must hold to. A plug-in inherits the suite in one line::

    class TestMine(SearcherContract):
        searcher = MySearcher

and pytest runs it. ``MemoryStudy`` is the study's loop without models or a database: both schedules, any number of
workers, results in any order, killed and rebuilt anywhere.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch

from evomerge.errors import SpecError
from evomerge.pools import BatchGradient
from evomerge.recipe import Group, Recipe, Source
from evomerge.searchers import SEARCHERS
from evomerge.searchers.base import GradientSearcher, Point, Searcher, Told
from evomerge.space import Space

Score = Callable[[Point], float | None]  # None: the evaluation failed; NaN: the evaluator gave nonsense


def make_space(
    experts: int = 3, groups: int | None = 2, *, low: float = 0.0, high: float = 2.0, initial: float = 1.0
) -> Space:
    """A space of ``experts * groups`` dimensions (one without groups: a single global weight) over a made-up family."""
    names = [f"e{t}" for t in range(experts)]
    template = Recipe(
        base=Source("base", "base", "0"),
        experts=tuple(Source(n, n, n) for n in names),
        method="task_arithmetic",
        groups=(Group((0.0,) * experts),),
    )
    weights: dict[str, Any] = {"granularity": "global", "range": [low, high], "initial": initial}
    if groups is not None:
        weights |= {"granularity": "layer_groups", "groups": groups}
    return Space.from_dict({"method": "task_arithmetic", "weights": weights}, template=template, num_layers=8)


def make_mixed_space(choice: bool = True) -> Space:
    """A space with a number by factors, a truth value, fixed and tied weights; with ``choice`` the method as well."""
    params: dict[str, Any] = {"ties": {"density": {"range": [0.05, 1.0], "log": True}}}
    if choice:
        params["ties"]["normalize"] = {"choices": [True, False]}
        params["dare_ties"] = {"density": {"range": [0.2, 0.9]}}
    methods = {"choices": ["ties", "dare_ties", "task_arithmetic"]} if choice else "ties"
    weights = {"granularity": "task", "range": [0.1, 2.0], "log": True, "tied": [["e0", "e1"]], "fixed": {"e2": 0.5}}
    data = {"method": methods, "params": params if choice else params["ties"], "weights": weights}
    return Space.from_dict(data, template=make_space(experts=4).template, num_layers=8)


def smooth(point: Point) -> float:
    """Higher is better, highest (0) where every coordinate is 0.6; different scales and one interaction."""
    z = [(value - 0.6) * (1 + 0.5 * (i % 3)) for i, value in enumerate(point.values())]
    return -sum(v * v for v in z) - 0.5 * z[0] * z[-1]


def two(point: Point) -> tuple[float, float]:
    """Two objectives in conflict, higher is better: close to 0.4 everywhere, and close to 1.4 everywhere."""
    return tuple(-sum((value - goal) ** 2 for value in point.values()) for goal in (0.4, 1.4))  # type: ignore


class MemoryStudy:
    """A study in memory.

    Args:
        make: builds the searcher; called again after every kill.
        score: of a point.
        values: of a point, where there are several objectives; the score is then their mean.
        margins: of a point, the constraints': above 0 where one is missed.
        workers: how many evaluations run at once.
        schedule: as in an experiment file.
        order: seeds the order in which running evaluations end.
        disturb: called between any two steps, such as to reseed global generators.
    """

    def __init__(
        self,
        make: Callable[[], Searcher],
        score: Score,
        *,
        values: Callable[[Point], Sequence[float]] | None = None,
        margins: Callable[[Point], Sequence[float]] = lambda _: (),
        workers: int = 1,
        schedule: Literal["reproducible", "asynchronous"] = "reproducible",
        order: int = 0,
        disturb: Callable[[], None] = lambda: None,
    ):
        self.make, self.score, self.values, self.margins = make, score, values, margins
        self.workers, self.schedule, self.disturb = workers, schedule, disturb
        self.order = random.Random(order)
        self.searcher = make()
        self.points: list[Point] = []
        self.results: dict[int, Told] = {}  # of trials that have ended, by number
        self.running: list[int] = []
        self.told = 0  # reproducible: the first `told` trials have been told
        self.events: list[tuple[str, int]] = []  # asynchronous: what the searcher saw, in order

    def run(self, budget: int, *, steps: int | None = None) -> MemoryStudy:
        """Go on until ``budget`` trials have ended, or for ``steps`` steps (a proposal or an end is one step)."""
        while steps is None or steps > 0:
            self.disturb()
            if len(self.running) < self.workers and self.may_ask(budget):
                self.ask()
            elif self.running:
                self.end(self.running.pop(self.order.randrange(len(self.running))))
            else:
                break
            steps = None if steps is None else steps - 1
        return self

    def may_ask(self, budget: int) -> bool:
        n = len(self.points)
        if n >= min(budget, self.searcher.size or budget):
            return False
        return self.schedule == "asynchronous" or all(k in self.results for k in range(self.searcher.needs(n)))

    def ask(self) -> None:
        n = len(self.points)
        if self.schedule == "reproducible":
            self.tell_first(self.searcher.needs(n))
        self.points.append(json.loads(json.dumps(self.searcher.ask(n))))  # as a store would keep it
        self.events.append(("ask", n))
        self.running.append(n)

    def end(self, n: int) -> None:
        self.results[n] = self.judge(n, self.points[n])
        if self.schedule == "asynchronous":
            self.events.append(("tell", n))
            self.searcher.tell(self.results[n])

    def judge(self, n: int, point: Point) -> Told:
        score = self.score(point)
        if score is None:
            return Told(n, point, "fail", None)
        values = tuple(self.values(point)) if self.values else ()
        score = sum(values) / len(values) if values else score
        return Told(n, point, "complete", score, values, tuple(self.margins(point)))

    def tell_first(self, count: int) -> None:
        while self.told < count:
            self.searcher.tell(self.results[self.told])
            self.told += 1

    def tell_all(self) -> MemoryStudy:
        """The end of the search: what the reproducible schedule still holds back."""
        if self.schedule == "reproducible":
            self.tell_first(len(self.points))
        return self

    def kill(self) -> MemoryStudy:
        """The driver dies: all that is left is what a store holds. Trials that were running will end again."""
        self.searcher, self.told = self.make(), 0
        if self.schedule == "reproducible":
            for n, point in enumerate(self.points):
                self.tell_first(self.searcher.needs(n))
                self.searcher.replay(n, point)
        else:
            for kind, n in self.events:
                if kind == "ask":
                    self.searcher.replay(n, self.points[n])
                else:
                    self.searcher.tell(self.results[n])
        return self


def reseed_everything() -> None:
    """What a library with bad manners does (lm-eval resets numpy's global generator)."""
    random.seed(1234)
    np.random.seed(1234)
    torch.manual_seed(1234)


def global_states() -> tuple[str, ...]:
    return repr(random.getstate()), repr(np.random.get_state()), repr(torch.get_rng_state().tolist())


def drawn_by_items(weights: Sequence[float], item: str) -> tuple[float, list[float]]:
    """Each item draws the weights to a place of its own, near 0.6: (half the squared distance, its gradient)."""
    places = 0.6 + 0.1 * np.random.default_rng(int(item[1:])).normal(size=len(weights))
    away = np.array(weights) - places
    return float(away @ away) / 2, away.tolist()


class KnownOracle:
    """For a searcher by gradient, in the place of a study's oracle: the mean of ``function`` over a batch, through the
    recipe that the point stands for. ``calls`` are what it was asked."""

    def __init__(
        self,
        space: Space,
        function: Callable[[Sequence[float], str], tuple[float, list[float]]] = drawn_by_items,
        *,
        tasks: Sequence[str] = ("one", "two"),
        piece: int = 100,
        weights: Mapping[str, float] | None = None,
    ):
        self.space, self.function, self.piece = space, function, piece
        self.items = {task: tuple(f"{task[0]}{10 * t + i}" for i in range(10)) for t, task in enumerate(tasks)}
        self.held = {task: tuple(f"{task[0]}{100 + i}" for i in range(3)) for task in tasks}
        self.weights = weights or dict.fromkeys(tasks, 1.0)
        self.calls: list[tuple[int, list[Any], bool]] = []

    def gradients(
        self,
        step: int,
        point: Point,
        batches: Sequence[tuple[str, Sequence[str]]],
        *,
        shares: Sequence[float],
        learn: bool = True,
        numbers: np.ndarray | None = None,
    ) -> list[BatchGradient]:
        self.calls.append((step, list(batches), learn))
        weights = [w for group in self.space.decode(point).groups for w in group.weights]
        found = []
        for (task, items), share in zip(batches, shares, strict=True):
            losses, slopes = zip(*(self.function(weights, item) for item in items), strict=True)
            gradient = tuple((share * np.mean(slopes, axis=0)).tolist()) if learn else ()
            found.append(BatchGradient(task, float(np.mean(losses)), gradient))
        return found


class SearcherContract:
    """Subclasses name ``searcher``; they may set options and how soon the smooth function must be improved on."""

    searcher: type[Searcher]
    options: ClassVar[Mapping[str, Any]] = {}
    draws: ClassVar[bool] = True  # False: the proposals do not depend on the seed
    ranks: ClassVar[bool] = True  # False: what it learns from a score is more than its rank
    scores: ClassVar[bool] = True  # False: it follows gradients only; scores teach it nothing
    improves_within: ClassVar[int | None] = 60  # trials in 6 dimensions; None: the searcher does not learn
    budget: ClassVar[int] = 30
    kill_budget: ClassVar[int] = 18  # trials of the study that is killed after each of its steps
    begins_with_initial: ClassVar[bool] = True  # False: only starts that are given come first

    # -- helpers

    def space(self) -> Space:
        """What most tests search."""
        return make_space()

    def trials(self, budget: int, searcher: Searcher | None = None) -> int:
        """How many of ``budget`` trials there are."""
        return min(budget, (searcher or self.make()).size or budget)

    def takes(self, space: Space) -> bool:
        """False if the searcher refuses ``space``; it must then name another that takes it."""
        try:
            self.make(space)
        except SpecError as error:
            named = [name for name in SEARCHERS if re.search(rf"\b{name}\b", error.remedy or "")]
            assert named, f"names no searcher that can: {error}"
            for name in named:
                SEARCHERS[name](space)
            return False
        return True

    def schedules_taken(self, schedule: str) -> None:
        if schedule == "asynchronous" and not self.searcher.asynchronous:
            pytest.skip("this searcher takes the reproducible schedule only")

    def make(self, space: Space | None = None, seed: int = 0, **settings: Any) -> Searcher:
        space = space or self.space()
        searcher = self.searcher(space, seed=seed, **settings, **self.options)
        if isinstance(searcher, GradientSearcher):  # as a study would
            searcher.oracle = KnownOracle(space)
        return searcher

    def study(
        self, score: Score = smooth, *, space: Space | None = None, seed: int = 0, **settings: Any
    ) -> MemoryStudy:
        return MemoryStudy(lambda: self.make(space, seed), score, **settings)

    # -- points

    @pytest.mark.parametrize("initial", [0.0, 1.0, 2.0], ids=lambda v: f"from {v:g}")
    @pytest.mark.parametrize("groups", [None, 2, 8], ids=lambda g: f"{g} groups" if g else "1 dimension")
    def test_points_lie_in_the_space(self, groups: int | None, initial: float):
        space = make_space(groups=groups, initial=initial)
        if not self.takes(space):
            return
        study = self.study(space=space).run(self.budget)
        for point in study.points:
            assert list(point) == [d.name for d in space.dimensions]
            assert all(type(value) is float for value in point.values())
            assert space.encode(space.decode(point)) == point  # decode refuses a point outside the bounds

    @pytest.mark.parametrize("choice", [False, True], ids=["by factors", "with a choice of methods"])
    def test_mixed_spaces_are_searched_or_refused_with_a_searcher_that_can(self, choice: bool):
        space = make_mixed_space(choice)
        if not self.takes(space):
            return

        def score(point: Point) -> float:
            return -sum((float(v) - 0.6) ** 2 for v in point.values() if type(v) is float) - (
                point.get("method") != "ties"
            )

        whole = self.study(score, space=space, workers=3).run(self.budget)
        for point in whole.points:
            assert space.encode(space.decode(point)) == point
        assert len({json.dumps(p) for p in whole.points}) == self.trials(self.budget, self.make(space))
        for steps in range(0, 2 * self.kill_budget, 3):
            study = self.study(score, space=space, workers=3).run(self.kill_budget, steps=steps).kill()
            study.run(self.kill_budget, steps=5)
            assert study.points == whole.points[: len(study.points)], f"killed after {steps} steps"

    def test_first_point_is_the_initial_one(self):
        if not self.begins_with_initial:
            pytest.skip("this searcher begins with points of its own")
        space = make_space(initial=0.3)
        assert self.make(space).ask(0) == space.initial()

    def test_starts_come_first_and_survive_kills(self):
        if issubclass(self.searcher, GradientSearcher):
            pytest.skip("this searcher begins at one point")
        space = self.space()
        dims = len(space.dimensions)
        starts = [space.at(np.random.default_rng(i).random(dims).tolist()) for i in range(10)]

        def study() -> MemoryStudy:
            return MemoryStudy(lambda: self.searcher(space, starts=starts, **self.options), smooth, workers=3)

        whole = study().run(self.budget).tell_all().points
        assert whole[:10] == starts
        assert len({tuple(p.values()) for p in whole}) == self.trials(self.budget, study().searcher)
        for steps in range(0, 2 * self.kill_budget, 3):
            killed = study().run(self.kill_budget, steps=steps).kill().run(self.kill_budget, steps=5)
            assert killed.points == whole[: len(killed.points)], f"killed after {steps} steps"

    def test_points_differ(self):
        points = self.study().run(self.budget).points
        assert len({tuple(p.values()) for p in points}) == self.trials(self.budget)

    def test_unknown_option_is_refused(self):
        with pytest.raises(SpecError, match="no_such_option"):
            self.searcher(self.space(), seed=0, no_such_option=1)

    # -- seeds and global state

    def test_same_seed_same_points(self):
        first, again, other = (self.study(seed=seed).run(self.budget).points for seed in (0, 0, 1))
        assert first == again
        assert (first[1:] != other[1:]) == self.draws

    def test_global_generators_do_not_matter(self):
        """Truth: nobody relies on global random state, and nobody touches it."""
        disturbed = self.study(disturb=reseed_everything).run(self.budget).points
        states = global_states()
        assert self.study().run(self.budget).points == disturbed
        assert global_states() == states

    # -- schedules

    def test_needs_is_about_earlier_trials(self):
        study = self.study()
        needed = []
        for n in range(self.trials(self.budget)):
            needed.append(study.searcher.needs(n))
            study.run(n + 1)
        assert all(0 <= need <= n for n, need in enumerate(needed))
        assert needed == sorted(needed)

    @pytest.mark.parametrize("workers", [1, 2, 8])
    def test_workers_and_their_order_do_not_matter(self, workers: int):
        """Truth: on the reproducible schedule the study is the same on any number of workers."""
        alone = self.study().run(self.budget)
        for order in range(3):
            many = self.study(workers=workers, order=order).run(self.budget)
            assert many.points == alone.points
            assert many.results == alone.results
            assert many.tell_all().searcher.recommend() == alone.tell_all().searcher.recommend()

    def test_larger_budget_only_adds(self):
        whole = self.study(workers=3).run(self.budget).points
        study = self.study(workers=3)
        for budget in (1, 7, 8, self.budget):
            assert len(study.run(budget).points) == self.trials(budget)
        assert study.points == whole

    @pytest.mark.parametrize("schedule", ["reproducible", "asynchronous"])
    def test_killed_anywhere_it_goes_on_as_if_not(self, schedule: Literal["reproducible", "asynchronous"]):
        """Truth: killed after any step and rebuilt from what is stored, the proposals are the same."""
        self.schedules_taken(schedule)
        settings: dict[str, Any] = {"workers": 3, "schedule": schedule}
        budget = self.trials(self.kill_budget)
        whole = self.study(**settings).run(budget).points
        for steps in range(2 * budget):
            study = self.study(**settings).run(budget, steps=steps).kill().run(budget, steps=5)
            assert study.points == whole[: len(study.points)], f"killed after {steps} steps"
            assert 2 * len(study.points) >= min(steps + 5, 2 * budget)

    @pytest.mark.parametrize("schedule", ["reproducible", "asynchronous"])
    def test_killed_again_and_again(self, schedule: Literal["reproducible", "asynchronous"]):
        self.schedules_taken(schedule)
        whole = self.study(workers=4, schedule=schedule).run(self.budget).points
        study = self.study(workers=4, schedule=schedule)
        while len(study.results) < self.trials(self.budget):
            study.run(self.budget, steps=3).kill()
        assert study.points == whole

    # -- failures

    @pytest.mark.parametrize("schedule", ["reproducible", "asynchronous"])
    @pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf], ids=str)
    def test_all_fail(self, bad: float | None, schedule: Literal["reproducible", "asynchronous"]):
        self.schedules_taken(schedule)
        study = self.study(lambda _: bad, workers=3, schedule=schedule).run(self.budget).tell_all()
        assert len(study.points) == self.trials(self.budget)
        assert study.searcher.recommend() is None

    @pytest.mark.parametrize("bad", [None, math.nan], ids=str)
    def test_failures_never_lead(self, bad: float | None):
        """The score rises towards a wall, and behind the wall every evaluation fails: the search stays before it."""
        if not self.begins_with_initial:
            pytest.skip("the wall is built around the initial point")
        if not self.scores:
            pytest.skip("this searcher does not look at scores")

        def score(point: Point) -> float | None:
            return bad if sum(point.values()) > 6.3 else sum(point.values())

        study = self.study(score, space=make_space(), workers=2).run(self.budget).tell_all()
        assert sum(study.points[0].values()) == 6.0
        recommended = study.searcher.recommend()
        if recommended is not None:
            assert sum(recommended.values()) < 7.5  # of 12; most samples around it would fail further on
            make_space().decode(recommended)

    @pytest.mark.parametrize(("bad", "seed"), [(None, 0), (math.nan, 1)], ids=str)
    def test_failures_do_not_attract(self, bad: float | None, seed: int):
        """Near one end of the space every evaluation fails. (Drawn uniformly, 0.4 of the points would.)"""
        if self.improves_within is None or not self.scores:
            pytest.skip("this searcher does not learn from scores")

        def score(point: Point) -> float | None:
            return bad if sum(point.values()) > 6.3 else smooth(point)

        study = self.study(score, space=make_space(), seed=seed, workers=2).run(min(40, self.improves_within))
        later = [study.results[n] for n in range(len(study.points) // 2, len(study.points))]
        assert sum(not told.usable for told in later) <= 0.2 * len(later)

    def test_pruned_is_told_without_a_score(self):
        searcher = self.make()
        for n in range(self.trials(self.budget)):
            point = searcher.ask(n)
            searcher.tell(Told(n, point, "complete", smooth(point)) if n % 3 else Told(n, point, "pruned", None))

    def test_equal_scores_go_on(self):
        study = self.study(lambda _: 0.5).run(self.budget).tell_all()
        assert len({tuple(p.values()) for p in study.points}) == self.trials(self.budget)

    # -- constraints and objectives

    def test_constraints_lead_the_search(self):
        """The score rises towards a wall, and behind the wall a constraint is missed."""
        if not self.scores:
            pytest.skip("this searcher does not look at scores")

        def margins(point: Point) -> tuple[float]:
            return (sum(point.values()) - 6.3,)

        budget = self.improves_within or self.budget
        study = (
            self.study(lambda p: sum(p.values()), space=make_space(), margins=margins, workers=2).run(budget).tell_all()
        )
        best = max(study.results.values(), key=lambda told: (told.merit, -told.n))
        assert best.violation == 0
        last = [sum(point.values()) for point in study.points[-10:]]
        assert sum(last) / len(last) < 7.5  # of 12
        recommended = study.searcher.recommend()
        if recommended is not None:
            assert sum(recommended.values()) < 7.5

    def test_an_infeasible_trial_never_ranks_above_a_feasible_one(self):
        """However high the scores are of trials that miss a constraint, the proposals stay the same."""
        if not self.ranks:
            pytest.skip("this searcher models scores")

        def margins(point: Point) -> tuple[float]:
            return (point["e0[0-3]"] - 1.05,)

        def points(bonus: float) -> list[Point]:
            study = self.study(lambda p: smooth(p) + bonus * (margins(p)[0] > 0), space=make_space(), margins=margins)
            return study.run(self.budget).points

        assert points(0.0) == points(1000.0)

    @pytest.mark.parametrize("schedule", ["reproducible", "asynchronous"])
    def test_constraints_survive_kills_and_failures(self, schedule: Literal["reproducible", "asynchronous"]):
        def score(point: Point) -> float | None:
            return None if point["e1[0-3]"] > 1.6 else smooth(point)

        self.schedules_taken(schedule)
        settings: dict[str, Any] = {
            "space": make_space(),
            "margins": lambda point: (point["e0[0-3]"] - 1.05, 0.2 - point["e2[0-3]"]),
            "workers": 3,
            "schedule": schedule,
        }
        whole = self.study(score, **settings).run(self.kill_budget).points
        for steps in range(0, 2 * self.kill_budget, 3):
            study = (
                self.study(score, **settings).run(self.kill_budget, steps=steps).kill().run(self.kill_budget, steps=5)
            )
            assert study.points == whole[: len(study.points)], f"killed after {steps} steps"

    def test_several_objectives_are_taken_or_refused_with_a_searcher_that_can(self):
        if self.searcher.objectives == "one":
            with pytest.raises(SpecError, match="one objective") as refused:
                self.make(num_objectives=2)
            assert "random" in str(refused.value)
            return

        def study(**settings: Any) -> MemoryStudy:
            return MemoryStudy(lambda: self.make(num_objectives=2), smooth, values=two, **settings)

        whole = study().run(self.budget).tell_all()
        assert study(workers=5, order=1).run(self.budget).points == whole.points
        for point in whole.points:
            assert make_space().encode(make_space().decode(point)) == point
        for steps in range(0, 2 * self.kill_budget, 7):
            killed = study(workers=3).run(self.kill_budget, steps=steps).kill().run(self.kill_budget, steps=5)
            assert killed.points == whole.points[: len(killed.points)], f"killed after {steps} steps"

    # -- learning

    @pytest.mark.parametrize("seed", range(3))
    def test_improves_over_the_initial_point(self, seed: int):
        if self.improves_within is None:
            pytest.skip("this searcher does not learn")
        study = self.study(space=make_space(), seed=seed).run(self.improves_within).tell_all()
        start = smooth(make_space().initial())
        assert max(told.score or start for told in study.results.values()) > 0.5 * start  # scores are negative
        recommended = study.searcher.recommend()
        if recommended is not None:
            assert smooth(recommended) > 0.5 * start
