"""Searchers behind ask and tell, one a file, and the table of them. Importing this imports neither optuna nor pycma."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evomerge.errors import SpecError, nearest
from evomerge.searchers.adamerging import AdaMergingSearcher
from evomerge.searchers.adarank import AdaRankSearcher
from evomerge.searchers.base import Point, Searcher, Told
from evomerge.searchers.cma import CMASearcher
from evomerge.searchers.columns import ColumnsSearcher
from evomerge.searchers.concrete import ConcreteSearcher
from evomerge.searchers.coordinate import CoordinateSearcher
from evomerge.searchers.gp import GPSearcher
from evomerge.searchers.grid import GridSearcher
from evomerge.searchers.hybrid import HybridSearcher
from evomerge.searchers.nsga2 import NSGA2Searcher
from evomerge.searchers.random import RandomSearcher
from evomerge.searchers.sobol import SobolSearcher
from evomerge.searchers.soup import SoupSearcher
from evomerge.searchers.tpe import TPESearcher

if TYPE_CHECKING:
    from evomerge.space import Space

__all__ = ["SEARCHERS", "Point", "Searcher", "Told", "make"]

SEARCHERS: Mapping[str, type[Searcher]] = {
    searcher.name: searcher
    for searcher in (
        CMASearcher,
        TPESearcher,
        GPSearcher,
        NSGA2Searcher,
        CoordinateSearcher,
        SoupSearcher,
        RandomSearcher,
        SobolSearcher,
        GridSearcher,
        AdaMergingSearcher,
        HybridSearcher,
        AdaRankSearcher,
        ColumnsSearcher,
        ConcreteSearcher,
    )
}


def make(
    name: str | type[Searcher], space: Space, seed: int = 0, starts: Sequence[Point] = (), **options: Any
) -> Searcher:
    """The searcher called ``name`` (one of SEARCHERS), or of that class, on ``space``.

    Args:
        options: the searcher's own, and ``num_objectives``.

    Raises:
        SpecError: no such searcher, an unknown option, a value outside its legal range, or more objectives than it
            takes.
    """
    if isinstance(name, str) and name not in SEARCHERS:
        raise SpecError(f"there is no searcher {name!r}", remedy=nearest(name, SEARCHERS))
    return (SEARCHERS[name] if isinstance(name, str) else name)(space, seed=seed, starts=starts, **options)
