"""Bayesian optimisation with a Gaussian process: Optuna's.

A Matern 5/2 kernel with a length scale for each dimension; log expected improvement (Ament et al. 2023, "Unexpected
Improvements to Expected Improvement for Bayesian Optimization", arXiv:2310.20708), over the open trials as well.
Several objectives: log expected hypervolume improvement. Each constraint's margin has a model of its own.
"""

from __future__ import annotations

from typing import Any

from evomerge.dimensions import Point
from evomerge.errors import SpecError
from evomerge.searchers.optuna_study import OptunaSearcher


class GPSearcher(OptunaSearcher):
    """Optuna's GPSampler by ask and tell. A proposal takes longer the more trials there are: their number cubed."""

    name = "gp"
    summary = "Bayesian optimisation with a Gaussian process (Optuna's); few dimensions, costly candidates"
    objectives = "many"

    def __init__(self, space: Any, *, seed: int = 0, **options: Any):
        super().__init__(space, seed=seed, **options)
        if self.conditional:
            raise SpecError(
                "searcher gp moves the same dimensions in every candidate, but here some belong to one method only",
                remedy="Use search.method tpe or random, or fix the method.",
            )

    def sampler(self, seed: int) -> Any:
        return self._optuna.samplers.GPSampler(seed=seed, n_startup_trials=self.options["n_startup"])

    def note(self, budget: int) -> str | None:
        """Measured: 0.5 to 1.5 s of CPU a proposal at 100 trials in 5 to 100 dimensions, 3.5 s at 800 in 5 and 25."""
        if budget <= 1000 and len(self.space.dimensions) <= 100:
            return None
        return (
            f"searcher gp, {budget} trials, {len(self.space.dimensions)} dimensions: a proposal takes seconds of the "
            "driver at 1,000 trials and minutes at some thousands, and workers wait for it. cma takes a millisecond."
        )

    def ask(self, n: int) -> Point:
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # so that the last bits are the same on every machine with these libraries
        try:
            return super().ask(n)
        finally:
            torch.set_num_threads(threads)
