"""A Sobol sequence: points that fill the space more evenly than random ones.

Sobol 1967; scrambled as in Owen 1998, "Scrambling Sobol' and Niederreiter-Xing points", by scipy.
"""

from __future__ import annotations

from typing import Any

from evomerge.errors import SpecError
from evomerge.searchers.base import Point, Searcher, Told, keyed_generator

MOST_DIMENSIONS = 21201  # that direction numbers are known for


class SobolSearcher(Searcher):
    """The first proposals are the starts, the others the sequence in order, whatever is told."""

    name = "sobol"
    summary = "an even cover of the space (scrambled Sobol sequence); waits for nothing"
    objectives = "many"

    def __init__(self, space: Any, *, seed: int = 0, **options: Any):
        super().__init__(space, seed=seed, **options)
        if len(space.dimensions) > MOST_DIMENSIONS:
            raise SpecError(
                f"searcher sobol takes {MOST_DIMENSIONS} dimensions, but there are {len(space.dimensions)}",
                remedy="Use search.method random.",
            )
        from scipy.stats import qmc

        self._sequence = qmc.Sobol(len(space.dimensions), scramble=True, rng=keyed_generator(seed))

    def needs(self, n: int) -> int:
        return 0

    def ask(self, n: int) -> Point:
        place = n - len(self.starts)
        if place < 0:
            return dict(self.starts[n])
        if place < self._sequence.num_generated:
            self._sequence.reset()
        skipped = place - self._sequence.num_generated
        if skipped:  # scipy cannot skip nothing
            self._sequence.fast_forward(skipped)
        return self.space.at(self._sequence.random(1)[0].tolist())

    def tell(self, trial: Told) -> None:
        """Nothing is learned."""
