"""Every searcher and every kind of space: it searches it, or says why not and names one that does."""

from __future__ import annotations

import re
from typing import Any

import pytest

from evomerge.errors import SpecError
from evomerge.searchers import SEARCHERS, make
from evomerge.searchers.base import GradientSearcher, Told
from evomerge.space import Space
from evomerge.testing.searchers import make_space

TASK = {"granularity": "task", "range": [0.0, 1.0]}
SPACES: dict[str, dict[str, Any]] = {
    "a weight an expert": {"method": "linear", "weights": TASK},
    "one weight": {"method": "task_arithmetic", "weights": {"granularity": "global", "range": [0.0, 1.0]}},
    "many weights": {"method": "task_arithmetic", "weights": {"granularity": "layer", "range": [0.0, 1.0]}},
    "weights by factors": {"method": "task_arithmetic", "weights": {**TASK, "range": [0.1, 1.0], "log": True}},
    "a parameter": {"method": "ties", "params": {"density": {"range": [0.1, 0.9]}}, "weights": {**TASK}},
    "a choice": {"method": "ties", "params": {"mode": {"choices": ["mean", "sum"]}}, "weights": {**TASK}},
    "a truth value": {"method": "ties", "params": {"normalize": {"choices": [True, False]}}, "weights": {**TASK}},
    "methods": {"method": {"choices": ["task_arithmetic", "dare_linear"]}, "weights": {**TASK}},
    "methods with parameters": {
        "method": {"choices": ["ties", "task_arithmetic"]},
        "params": {"ties": {"density": {"range": [0.1, 0.9]}}},
        "weights": {**TASK},
    },
    "fixed and tied weights": {
        "method": "task_arithmetic",
        "weights": {**TASK, "fixed": {"e0": 0.5}, "tied": [["e1", "e2"]]},
    },
}
REFUSED = {
    "cma": {"a choice": "mode", "a truth value": "normalize", "methods": "method", "methods with parameters": "method"},
    "gp": {"methods with parameters": "one method only"},
    "soup": {
        "one weight": "share their weights",
        "weights by factors": "excludes 0",
        "a parameter": "density",
        "a choice": "mode",
        "a truth value": "normalize",
        "methods": "the method is a dimension",
        "methods with parameters": "the method is a dimension",
        "fixed and tied weights": "fixed",
    },
}
REFUSED["adamerging"] = {
    "a parameter": "density",
    "a choice": "mode",
    "a truth value": "normalize",
    "methods": "method would have to move",
    "methods with parameters": "ties.density",
}
REFUSED |= dict.fromkeys(("hybrid", "adarank", "columns", "concrete"), REFUSED["adamerging"])


def space_of(kind: str) -> Space:
    return Space.from_dict(SPACES[kind], template=make_space(experts=3).template, num_layers=8)


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("name", SEARCHERS)
def test_takes_the_space_or_says_why_not_and_who_does(name: str, kind: str):
    space = space_of(kind)
    why = REFUSED.get(name, {}).get(kind)
    if why is None:
        small: dict[str, Any] = {
            key: 1 for key in ("n_startup", "window") if key in SEARCHERS[name].params
        }  # so that it uses its model
        searcher = make(name, space, **small)
        for n in range(1 if isinstance(searcher, GradientSearcher) else 3):  # further points need a model
            point = searcher.ask(n)
            assert space.encode(space.decode(point)) == point
            searcher.tell(Told(n, point, "complete", 0.5))
        return
    with pytest.raises(SpecError, match=why) as caught:
        make(name, space)
    assert name in caught.value.problem and caught.value.remedy
    able = [other for other in SEARCHERS if re.search(rf"\b{other}\b", caught.value.remedy)]
    assert able
    for other in able:
        make(other, space)


def test_sobol_names_one_that_takes_more_dimensions():
    from evomerge.searchers.sobol import MOST_DIMENSIONS

    many = make_space(experts=MOST_DIMENSIONS // 8 + 1, groups=8)
    with pytest.raises(SpecError, match=str(MOST_DIMENSIONS)) as caught:
        make("sobol", many)
    assert "random" in str(caught.value)
