"""Uniform random points: the searcher that every other one has to beat."""

from __future__ import annotations

from evomerge.searchers.base import Point, Searcher, Told, keyed_generator, uniform_point


class RandomSearcher(Searcher):
    """Points drawn uniformly from the space's box, each keyed by (seed, n), after the starts."""

    name = "random"
    summary = "uniform points, the first one the initial point; waits for nothing"
    objectives = "many"

    def needs(self, n: int) -> int:
        return 0

    def ask(self, n: int) -> Point:
        if n < len(self.starts):
            return dict(self.starts[n])
        return uniform_point(self.space, keyed_generator(self.seed, n))

    def tell(self, trial: Told) -> None:
        """Nothing is learned."""
