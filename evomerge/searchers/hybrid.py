"""Descent, then CMA-ES from where it came to and in the shape of the loss there, then descent from what that found.

A gradient goes far in many dimensions, but on a loss; CMA-ES follows the score itself, but needs candidates by the
number of dimensions. The first gives the second where to begin and which directions matter: near its minimum the loss
is about 1/2 (x - x0)' H (x - x0), and a distribution whose covariance is the inverse of H makes the same change of the
loss in every direction (Hansen, "The CMA Evolution Strategy: A Tutorial", arXiv:1604.00772: the optimal covariance is
the inverse Hessian up to a factor). The score has another minimum than the loss, but what a weight does to the model it
does to both.

H comes from products with it, each the difference of two gradients on the same items, by the inner products of all
other steps: of every dimension where there are no more of them than products, else its diagonal, estimated from random
signs (Bekas, Kokiopoulou and Saad 2007, "An estimator for the diagonal of a matrix", Applied Numerical Mathematics 57).
What has no curvature, or a negative one (the loss is not convex, the sample small), counts by its size, as in
saddle-free Newton (Dauphin et al. 2014, arXiv:1406.2572), and no direction for less than 1/100 of the most curved one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from evomerge import descent
from evomerge.errors import CandidateError
from evomerge.params import Param
from evomerge.searchers.adamerging import AdaMergingSearcher, reason_of
from evomerge.searchers.base import Point, Searcher, Told, keyed_generator
from evomerge.searchers.cma import CMASearcher, default_population, default_sigma

REACH = 0.02  # of a range: how far apart from the centre the two gradients of a difference are
CONDITION = 100.0  # the most that variances may differ by
PROBE_STREAM = 2  # keys the signs of products


def signs_or_axes(seed: int, dims: int, products: int) -> np.ndarray:
    """(products, dims) the vectors of the products: the axes, if there are no more of them; else random signs."""
    if dims <= products:
        return np.eye(dims)
    return keyed_generator(seed, PROBE_STREAM).integers(0, 2, (products, dims)) * 2.0 - 1.0


def shape_of(vectors: np.ndarray, products: np.ndarray) -> np.ndarray | None:
    """The covariance that the curvature asks for, its variances of geometric mean 1; None if there is no curvature.

    Args:
        vectors: (k, dims), of ``signs_or_axes``.
        products: (k, dims) H times each.

    Returns:
        (dims, dims) where the vectors are the axes, else (dims,) variances.
    """
    dims = vectors.shape[1]
    if len(vectors) == dims:
        curvature, turned = np.linalg.eigh((products + products.T) / 2)
    else:
        curvature, turned = (vectors * products).mean(axis=0), None
    curvature = np.abs(curvature)
    if not curvature.max() > 0:
        return None
    variances = 1 / np.maximum(curvature, curvature.max() / CONDITION)
    variances /= np.exp(np.log(variances).mean())
    return variances if turned is None else (turned * variances) @ turned.T


class HybridSearcher(AdaMergingSearcher):
    """Candidates 0 ... are those of ``adamerging``; then ``candidates`` of CMA-ES; then those of a second descent.

    CMA-ES begins at the best of the first descent's candidates by score. The others of them, from the last on, are
    samples of its first generation, up to half of it; none of these is evaluated again. The second descent begins at
    the best of all by score. Where the first descent ends early or fails, the search goes on from what there is.
    """

    name = "hybrid"
    summary = "coefficients by gradient, then CMA-ES from there in the shape of the loss, then by gradient again"
    objectives = "one"
    params: ClassVar[Mapping[str, Param]] = {
        key: param for key, param in AdaMergingSearcher.params.items() if key != "constraint"
    } | {
        "steps": Param(int, 200, "steps of the first descent", low=1),
        "candidates": Param(int, 40, "candidates of CMA-ES", low=1),
        "refine": Param(int, 100, "steps of the second descent; 0: none", low=0),
        "products": Param(
            int,
            16,
            "products with the Hessian of the loss, two gradients each, for the covariance that CMA-ES begins with: "
            "all of it up to so many dimensions, else its diagonal; 0: it begins round",
            low=0,
        ),
        "product_batch": Param(int, 64, "items of a task in a product", low=1),
        "sigma": Param(
            float,
            None,
            "first step size of CMA-ES as a share of each dimension's range; by default half of what cma begins with",
            low=0,
            high=1,
            low_open=True,
        ),
        **{key: CMASearcher.params[key] for key in ("population", "covariance")},
    }

    def __init__(self, space: Any, *, seed: int = 0, starts: Any = (), **options: Any):
        super().__init__(space, seed=seed, starts=starts, **options)
        self._low = np.array([d.low for d in space.dimensions])
        self._high = np.array([d.high for d in space.dimensions])
        self._told: dict[int, Told] = {}
        self._cma: CMASearcher | None = None
        self._given = 0  # how many trials of the first descent CMA-ES was told of
        self._products: list[list[float]] = []
        self._no_shape: str | None = None  # why there are not all products
        self._second: descent.Descent | None = None
        self._refined: descent.State | None = None
        self._refine_failure: str | None = None

    # --- which trial is whose

    @property
    def _descended(self) -> int:
        """How many trials the first descent has, as far as is known."""
        return next((n for n in range(super().size) if super(HybridSearcher, self).ended(n)), super().size)

    @property
    def _searched(self) -> int:
        """The number of the first trial of the second descent."""
        return self._descended + self.options["candidates"]

    @property
    def _population(self) -> int:
        return self.options["population"] or default_population(len(self._names))

    @property
    def size(self) -> int:
        return super().size + self.options["candidates"] + self.options["refine"] // self.options["every"]

    @property
    def progress(self) -> tuple[int, int]:
        done, first = super().progress
        every = self.options["every"]
        count = self.options["products"] and min(self.options["products"], len(self._names))
        second = self.options["refine"] // every * every
        refined = 0 if self._refined is None else self._refined.step
        return done + 2 * len(self._products) + refined, first + 2 * count + second

    def ended(self, n: int) -> str | None:
        first = super().size
        if self._descended < first and n >= self._searched + self.options["refine"] // self.options["every"]:
            return f"the first descent had {self._descended} of {first} candidates"
        if n > self._searched and (failed := self.failure(n - 1)) is not None:
            return f"the second descent failed ({failed})"
        return None

    def needs(self, n: int) -> int:
        first, last = self._descended, self._searched
        if n < first:
            return 0
        if n >= last:
            return last
        if self._cma is None:
            return first
        return first + max(0, self._cma.needs(n - first + self._given) - self._given)

    def at_once(self, budget: int) -> int:
        return min(self._population, self.options["candidates"])

    def failure(self, n: int) -> str | None:
        if n < self._descended:
            return self._unreached(n)
        if n < self._searched or (self._refined is not None and self._goal(n) <= self._refined.step):
            return None
        return self._refine_failure

    # --- ask and tell

    def tell(self, trial: Told) -> None:
        self._told[trial.n] = trial
        if self._cma is not None and self._descended <= trial.n < self._searched:
            self._cma.tell(replace(trial, n=trial.n - self._descended + self._given))

    def ask(self, n: int) -> Point:
        """Trains up to trial ``n``, or to where the training fails. Raises ValueError beyond ``size``."""
        if n >= self.size:
            raise ValueError(f"the search is done after {self.size} proposals")
        if n < self._descended:
            return super().ask(n)
        if n < self._searched:
            if self._cma is None:
                self._cma = self._begin_cma()
            return self._cma.ask(n - self._descended + self._given)
        return self._refine(self._goal(n))

    def replay(self, n: int, point: Point) -> None:
        if self._descended <= n < self._searched:  # CMA-ES has no state but what it was asked and told
            Searcher.replay(self, n, point)
        else:
            super().replay(n, point)

    def recommend(self) -> Point | None:
        """The mean of CMA-ES's distribution."""
        return None if self._cma is None else self._cma.recommend()

    def state(self) -> dict[str, Any]:
        return super().state() | {
            "products": [list(row) for row in self._products],
            "no_shape": self._no_shape,
            "refined": None if self._refined is None else self._refined.to_dict(),
            "refine_failure": self._refine_failure,
        }

    def restore(self, state: Mapping[str, Any], curve: Sequence[Mapping[str, Any]]) -> None:
        super().restore(state, curve)
        self._products = [list(row) for row in state["products"]]
        self._no_shape = state["no_shape"]
        self._refined = None if state["refined"] is None else descent.State.from_dict(state["refined"])
        self._refine_failure = state["refine_failure"]

    # --- CMA-ES

    def _begin_cma(self) -> CMASearcher:
        """A search around the best trial so far, which has heard of it and of some others."""
        if self._refined is None:  # else this is a replay, and the curve that of the second descent
            self.curve = []
        order = sorted(self._told.values(), key=lambda trial: (trial.merit, -trial.n), reverse=True)
        best = dict(order[0].point) if order and order[0].usable else dict(self.starts[0])
        known: dict[tuple[float, ...], Told] = {}
        for trial in [*order[:1], *sorted(order[1:], key=lambda trial: -trial.n)]:
            if trial.usable:
                known.setdefault(tuple(map(float, trial.point.values())), trial)
        told = list(known.values())[: max(1, self._population // 2)]
        cma = CMASearcher(
            self.space,
            seed=self.seed,
            starts=[dict(trial.point) for trial in told] or [best],
            shape=self._shape(np.array([best[name] for name in self._names])),
            sigma=self.options["sigma"] or default_sigma(len(self._names)) / 2,
            population=self._population,
            covariance=self.options["covariance"],
        )
        for n, trial in enumerate(told):
            cma.ask(n)
            cma.tell(replace(trial, n=n))
        self._given = len(told)
        return cma

    def _shape(self, values: np.ndarray) -> np.ndarray | None:
        """See ``shape_of``; in shares of the ranges, around ``values`` (dims,)."""
        if not self.options["products"]:
            return None
        vectors = signs_or_axes(self.seed, len(values), self.options["products"])
        width = self._high - self._low
        centre = np.clip(values, self._low + REACH * width, self._high - REACH * width)
        try:
            while len(self._products) < len(vectors) and self._no_shape is None:
                away = REACH * width * vectors[len(self._products)]
                items = self._items(0, self.options["product_batch"])
                step = self.progress[0]
                ahead, behind = (self.gradient(step, centre + d, items)[1] for d in (away, -away))
                self._products.append((width * (ahead - behind) / (2 * REACH)).tolist())
        except CandidateError as error:
            self._no_shape = reason_of(error)
        return None if self._no_shape is not None else shape_of(vectors, np.array(self._products))

    # --- the second descent

    def _goal(self, n: int) -> int:
        """The step of the second descent that trial ``n`` is after."""
        return (n - self._searched + 1) * self.options["every"]

    def _refine(self, goal: int) -> Point:
        if self._second is None:
            best = max(self._told.values(), key=lambda trial: (trial.merit, -trial.n))
            start = np.array([float(best.point[name]) for name in self._names])
            self._second = replace(self._descent, start=start)
            self._refined = self._refined or self._second.begin()
        assert self._refined is not None
        try:
            while self._refined.step < goal and self._refine_failure is None:
                self._refined = self._step(self._second, self._refined, self._state.step)
        except CandidateError as error:
            self._refine_failure = reason_of(error)
        return self.named(self._second.values(self._refined))
