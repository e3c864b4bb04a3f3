"""AdaRank and columns: the contract of searchers with an oracle that differentiates a known function, and their steps
against torch's automatic differentiation and Adam."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from evomerge.errors import SpecError
from evomerge.learned import Layout
from evomerge.pools import BatchGradient
from evomerge.searchers.adarank import AdaRankSearcher, StraightThrough
from evomerge.searchers.base import Point
from evomerge.searchers.columns import ColumnsSearcher
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
            found.append(
                BatchGradient(one.task, one.loss + float(away @ away) / 2, one.gradient, (share * away).tobytes())
            )
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


def test_a_state_goes_on_with_the_same_bits():
    space = make_space(experts=2, groups=2, initial=0.3)
    whole, broken = (ready(ReadyAdaRank, space) for _ in range(2))
    whole.ask(4)
    broken.ask(2)
    again = ready(ReadyAdaRank, space)
    again.restore(broken.state(), broken.curve)
    assert again.numbers().tolist() == broken.numbers().tolist()
    again.ask(4)
    mine, theirs = again.state(), whole.state()
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        assert mine[key].tobytes() == value.tobytes() if isinstance(value, np.ndarray) else mine[key] == value
