"""AdaRank, columns and concrete: the contract of searchers, with an oracle that differentiates a known function, and
their steps against torch's automatic differentiation and Adam."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import scipy.stats
import torch

from evomerge.errors import SpecError
from evomerge.learned import Layout
from evomerge.pools import BatchGradient
from evomerge.searchers.adarank import AdaRankSearcher, StraightThrough
from evomerge.searchers.base import Point
from evomerge.searchers.columns import ColumnsSearcher
from evomerge.searchers.concrete import ConcreteMask, ConcreteSearcher, logistic
from evomerge.searchers.learned import LearnedSearcher
from evomerge.space import Space
from evomerge.testing.searchers import KnownOracle, SearcherContract, make_space

LAYOUT = Layout("columns", ({"a": 3, "b": 2}, {"a": 3}))


class NumbersOracle(KnownOracle):
    """Adds half the squared distance of the numbers from a place that the item draws."""

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
        assert numbers is not None and numbers.shape == (LAYOUT.size,)
        found = []
        weighted = super().gradients(step, point, batches, shares=shares, learn=learn)
        for one, (_, items), share in zip(weighted, batches, shares, strict=True):
            away = numbers - np.mean([number_places(item) for item in items], axis=0)
            slope = (share * away).astype(numbers.dtype).tobytes()
            found.append(BatchGradient(one.task, one.loss + float(away @ away) / 2, one.gradient, slope))
        return found


def number_places(item: str) -> np.ndarray:
    return 0.3 + 0.8 * np.random.default_rng(1000 + int(item[1:])).random(LAYOUT.size)


class ReadyAdaRank(AdaRankSearcher):
    def __init__(self, space: Any, **options: Any):
        super().__init__(space, **options)
        self.oracle = self.known = NumbersOracle(space)
        self.lay_out(LAYOUT)


class ReadyColumns(ColumnsSearcher):
    def __init__(self, space: Any, **options: Any):
        super().__init__(space, **options)
        self.oracle = self.known = NumbersOracle(space)
        self.lay_out(LAYOUT)


class ReadyConcrete(ConcreteSearcher):
    def __init__(self, space: Any, **options: Any):
        super().__init__(space, **options)
        self.oracle = self.known = NumbersOracle(space)
        self.lay_out(LAYOUT)


class _Contract(SearcherContract):
    options: ClassVar = {"steps": 120, "every": 2, "lr": 0.03, "batch": 4, "weights": "learned"}
    scores = False
    budget = 24
    kill_budget = 8

    def make(self, space: Space | None = None, seed: int = 0, **settings: Any) -> Any:
        searcher = super().make(space, seed, **settings)
        searcher.oracle = NumbersOracle(searcher.space)
        return searcher


class TestAdaRank(_Contract):
    searcher = ReadyAdaRank


class TestColumns(_Contract):
    searcher = ReadyColumns


class TestConcrete(_Contract):
    searcher = ReadyConcrete


def ready(kind: type[LearnedSearcher], space: Space, **options: Any) -> Any:
    return kind(space, seed=0, **{"steps": 40, "every": 10, "lr": 0.05, "batch": 4} | options)


@pytest.mark.parametrize("weights", ["learned", "fixed"])
@pytest.mark.parametrize("kind", [ReadyAdaRank, ReadyColumns])
def test_it_is_adam_on_weights_and_numbers_together(kind: type[LearnedSearcher], weights: str):
    """Masks go through a straight-through estimator: forwards 0 or 1, backwards the sigmoid of x / temperature."""
    space = make_space(experts=2, groups=2, initial=0.3)
    masks = kind is ReadyAdaRank
    options = {"rank_share": 0.5, "temperature": 3.0} if masks else {"low": -10.0, "high": 10.0}
    searcher = ready(kind, space, weights=weights, **options)
    x = torch.full((4,), 0.3, dtype=torch.float64, requires_grad=weights == "learned")
    # ones of the first half of each tensor: 1 of 3, 1 of 2, 1 of 3
    at_first = [0.1, -0.1, -0.1, 0.1, -0.1, 0.1, -0.1, -0.1] if masks else [1.0] * 8
    logits = torch.nn.Parameter(torch.tensor(at_first, dtype=torch.float64))
    adam = torch.optim.Adam([x, logits] if weights == "learned" else [logits], lr=0.05)
    asked = [(searcher.ask(n), searcher.numbers()) for n in range(5)]
    for n, (point, numbers_then) in enumerate(asked):
        np.testing.assert_allclose(list(point.values()), x.detach().numpy(), rtol=1e-12)
        expected = (logits > 0).double() if masks else logits
        np.testing.assert_allclose(numbers_then, expected.detach().numpy(), rtol=1e-12)
        for step in range(10 * n, 10 * n + 10) if n < 4 else ():
            soft = torch.sigmoid(logits / 3.0)
            numbers = soft + ((soft > 0.5).double() - soft).detach() if masks else logits
            drawn = x.reshape(2, 2).T.reshape(-1)  # decode's order: region by region
            loss = torch.zeros((), dtype=torch.float64)
            for _, items in searcher.known.calls[step][1]:
                for item in items:
                    place = torch.tensor(0.6 + 0.1 * np.random.default_rng(int(item[1:])).normal(size=4))
                    loss = loss + ((drawn - place) ** 2).sum() / (4 * len(items))
                center = torch.tensor(np.mean([number_places(item) for item in items], axis=0))
                loss = loss + ((numbers - center) ** 2).sum() / 4
            adam.zero_grad()
            loss.backward()
            adam.step()
    assert len({tuple(numbers.tolist()) for _, numbers in asked}) > 1


def test_masks_are_bits_with_the_slope_of_a_sigmoid():
    through = StraightThrough(2.0)
    x = np.array([-3.0, -1e-9, 0.0, 1e-9, 0.5, 800.0, -800.0])
    assert through.values(x).tolist() == [0, 0, 0, 1, 1, 1, 0]
    leaf = torch.tensor(x, requires_grad=True)
    torch.sigmoid(leaf / 2.0).sum().backward()
    np.testing.assert_allclose(through.pull_back(x, np.ones(7)), leaf.grad, rtol=1e-12, atol=1e-15)
    masks = np.array([1.0, 0.0, 1.0])
    assert through.values(through.coordinates(masks)).tolist() == masks.tolist()


def test_columns_stay_in_their_range():
    searcher = ready(ReadyColumns, make_space(), low=0.9, high=1.05, lr=0.3)
    searcher.ask(4)
    assert searcher.numbers().min() == 0.9 and searcher.numbers().max() <= 1.05


@pytest.mark.parametrize("options", [{"low": 1.2}, {"high": 0.5}, {"low": 1.0, "high": 1.0}], ids=str)
def test_a_range_without_the_start_is_refused(options: dict[str, float]):
    with pytest.raises(SpecError, match="low <= 1 <= high"):
        ready(ReadyColumns, make_space(), **options)


@pytest.mark.parametrize("kind", [ReadyAdaRank, ReadyConcrete])
def test_a_state_goes_on_with_the_same_bits(kind: type[LearnedSearcher]):
    space = make_space(experts=2, groups=2, initial=0.3)
    whole, broken = (ready(kind, space) for _ in range(2))
    whole.ask(4)
    broken.ask(2)
    again = ready(kind, space)
    again.restore(broken.state(), broken.curve)
    assert again.numbers().tolist() == broken.numbers().tolist()
    again.ask(4)
    mine, theirs = again.state(), whole.state()
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        assert mine[key].tobytes() == value.tobytes() if isinstance(value, np.ndarray) else mine[key] == value


# --- concrete masks


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("weights", ["learned", "fixed"])
def test_concrete_is_adam_on_weights_and_logits_together(weights: str, noise: bool, rescale: bool):
    """Steps see a mask with noise, candidates one without; in float32, as torch's Adam."""
    space = make_space(experts=2, groups=2, initial=0.3)
    options: dict[str, Any] = {"weights": weights, "noise": noise, "rescale": rescale, "start": 0.4, "temperature": 0.7}
    soft, hard = (ready(ReadyConcrete, space, mask=mask, **options) for mask in ("soft", "hard"))
    x = torch.full((4,), 0.3, dtype=torch.float64, requires_grad=weights == "learned")
    logits = torch.nn.Parameter(torch.full((8,), 0.4))
    adam = torch.optim.Adam([x, logits] if weights == "learned" else [logits], lr=0.05)

    def rescaled(mask: torch.Tensor) -> torch.Tensor:
        return torch.cat([part / part.mean() for part in mask.split([3, 2, 3])]) if rescale else mask

    for n in range(5):
        np.testing.assert_allclose(list(soft.ask(n).values()), x.detach().numpy(), rtol=1e-5)
        assert soft.numbers().dtype == np.float32
        expected = rescaled(torch.sigmoid(logits / 0.7)).detach().numpy()
        np.testing.assert_allclose(soft.numbers(), expected, rtol=1e-4)
        assert hard.ask(n) == soft.ask(n)  # they are trained alike
        np.testing.assert_allclose(hard.numbers(), rescaled((logits >= 0).float()).detach().numpy(), rtol=1e-6)
        for step in range(10 * n, 10 * n + 10) if n < 4 else ():
            if len(soft.known.calls) <= step:
                soft.ask(n + 1)
            drawn_noise = torch.tensor(logistic(8, seed=0, step=step)) if noise else 0.0
            numbers = rescaled(torch.sigmoid((logits + drawn_noise) / 0.7))
            drawn = x.reshape(2, 2).T.reshape(-1)  # decode's order: region by region
            loss = torch.zeros((), dtype=torch.float64)
            for _, items in soft.known.calls[step][1]:
                for item in items:
                    place = torch.tensor(0.6 + 0.1 * np.random.default_rng(int(item[1:])).normal(size=4))
                    loss = loss + ((drawn - place) ** 2).sum() / (4 * len(items))
                center = torch.tensor(np.mean([number_places(item) for item in items], axis=0))
                loss = loss + ((numbers - center) ** 2).sum() / 4
            adam.zero_grad()
            loss.backward()
            adam.step()
    assert soft.numbers().std() > 0.01


def test_masks_by_hand():
    """Logits 0 and log 3 have the sigmoids 1/2 and 3/4; at temperature 1/2 log 3 has 9/10."""
    x = np.array([0.0, np.log(3), -np.log(3), np.log(3)])
    plain = ConcreteMask((2, 2), 1.0, rescale=False)
    np.testing.assert_allclose(plain.values(x), [1 / 2, 3 / 4, 1 / 4, 3 / 4], rtol=1e-14)
    np.testing.assert_allclose(replace(plain, temperature=0.5).values(x), [1 / 2, 9 / 10, 1 / 10, 9 / 10], rtol=1e-14)
    np.testing.assert_allclose(replace(plain, rescale=True).values(x), [4 / 5, 6 / 5, 1 / 2, 3 / 2], rtol=1e-14)
    noisy = replace(plain, noise=np.array([np.log(3), 0.0, np.log(9), -np.log(9)]))
    np.testing.assert_allclose(noisy.values(x), [3 / 4, 3 / 4, 3 / 4, 1 / 4], rtol=1e-14)
    hard = replace(plain, hard=True)
    assert hard.values(x).tolist() == [1, 1, 0, 1]
    assert replace(hard, rescale=True).values(x).tolist() == [1, 1, 0, 2]
    assert replace(hard, rescale=True).values(np.array([-1.0, -2.0, 0.0, -0.0])).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_slope_of_masks_is_torchs(rescale: bool, dtype: Any):
    draw = np.random.default_rng(0)
    x, noise, gradient = (draw.normal(size=300).astype(dtype) * 3 for _ in range(3))
    leaf = torch.tensor(x.astype(np.float64), requires_grad=True)
    soft = torch.sigmoid((leaf + torch.tensor(noise.astype(np.float64))) / 0.5)
    masks = torch.cat([part / part.mean() for part in soft.split([100, 1, 199])]) if rescale else soft
    masks.backward(torch.tensor(gradient.astype(np.float64)))
    ours = ConcreteMask((100, 1, 199), 0.5, rescale, noise)
    tolerance = {"rtol": 1e-11, "atol": 1e-13} if dtype == np.float64 else {"rtol": 1e-3, "atol": 1e-5}
    np.testing.assert_allclose(ours.values(x), masks.detach().numpy(), **tolerance)
    back = ours.pull_back(x, gradient)
    assert back.dtype == dtype
    np.testing.assert_allclose(back, leaf.grad, **tolerance)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("rescale", [True, False])
def test_coordinates_stand_for_their_masks(rescale: bool):
    x, noise = np.random.default_rng(0).normal(size=(2, 9))
    masks = ConcreteMask((4, 5), 0.5, rescale, noise)
    np.testing.assert_allclose(masks.values(masks.coordinates(masks.values(x))), masks.values(x), rtol=1e-12)


def test_far_logits_are_0_and_1_and_no_warning():
    x = np.array([-1e6, 1e6, -np.inf, np.inf, -60.0], dtype=np.float32)
    for rescale, most in ((False, 1.0), (True, 2.5)):
        masks = ConcreteMask((5,), 0.5, rescale)
        assert masks.values(x).tolist()[:4] == [0, most, 0, most]
        assert np.isfinite(masks.pull_back(x, np.ones_like(x))).all()
    assert ConcreteMask((5,), 0.5, True).values(np.full(5, -np.inf, np.float32)).tolist() == [0] * 5


def test_noise_is_logistic_and_belongs_to_its_step():
    noise = logistic(100_000, seed=3, step=7)
    assert noise.dtype == np.float32 and np.isfinite(noise).all()
    assert scipy.stats.kstest(noise, "logistic").pvalue > 0.01
    assert np.array_equal(noise, logistic(100_000, seed=3, step=7))
    for other in (logistic(100_000, seed=3, step=8), logistic(100_000, seed=4, step=7)):
        assert abs(np.corrcoef(noise, other)[0, 1]) < 0.02


@pytest.mark.parametrize("options", [{"mask": "firm"}, {"temperature": 0}, {"noise": "sometimes"}, {"start": "high"}])
def test_options_of_concrete_that_are_none(options: dict[str, Any]):
    with pytest.raises(SpecError, match=next(iter(options))):
        ready(ReadyConcrete, make_space(), **options)


def test_all_masks_start_as_task_arithmetic_if_they_are_rescaled():
    for start in (0.0, -1.3, 4.0):
        searcher = ready(ReadyConcrete, make_space(), start=start)
        searcher.ask(0)
        assert set(searcher.numbers().tolist()) == {1.0}
