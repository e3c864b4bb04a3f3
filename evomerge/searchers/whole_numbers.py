"""Whole numbers in CMA-ES: a lower bound on their steps, so that they never freeze, and centring.

Marty, Hansen, Auger, Semet and Heron, "LB+IC-CMA-ES: Two simple modifications of CMA-ES to handle mixed-integer
problems" (PPSN 2024). pycma has both, but for numbers that are one apart in its own coordinates, and its centring draws
from numpy's global generator; ours are in shares of a range, and whole numbers by factors are not equally far apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from evomerge.dimensions import Dimension, Value

Map = Callable[[Any], np.ndarray]  # of a number or an array


class WholeNumbers:
    """Those dimensions of a space that are whole numbers.

    Args:
        to_share: from pycma's coordinates to shares of the range; ``from_share`` back. Both monotone, by element.
    """

    def __init__(self, dimensions: Sequence[Dimension], to_share: Map, from_share: Map):
        self.places = [(i, d) for i, d in enumerate(dimensions) if d.integer]
        self._num, self._to, self._from = len(dimensions), to_share, from_share

    def values(self, x: np.ndarray) -> list[Value]:
        """The whole numbers that x: (dimensions,) stands for."""
        return [d.at(float(self._to(x[i]))) for i, d in self.places]

    def smallest_steps(self, mean: np.ndarray, mueff: float) -> np.ndarray:
        """(dimensions,): the least standard deviation of each coordinate; 0 for numbers with decimals.

        min(0.2, mueff / dimensions, ...) of the distance between neighbours where the mean is: one sample in about
        2 * dimensions differs from the mean's whole number, even if that lies in the middle.
        """
        from cma.options_parameters import integer_std_lower_bound

        steps = np.zeros(self._num)
        if self.places:
            bound = integer_std_lower_bound(self._num, mueff, len(self.places))
            for i, d in self.places:
                low, high = self._from(np.array(d.part(d.at(float(self._to(mean[i]))))))
                steps[i] = bound * (high - low)
        return steps

    def centred(self, best: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """best: (mu, dimensions), the samples that pull the mean, with their whole numbers moved to the middle.

        A number that is not the mean's goes to the middle of its part of the axis; the others move towards the middle
        of theirs as far as undoes the sum of these moves. So what a sample gains by another number counts in full,
        and not by how little it crossed the border. No number changes by this.
        """
        moved = best.copy()
        for i, d in self.places:
            x = best[:, i]
            middles = np.array([self._middle(d, value) for value in x])
            here = self._middle(d, mean[i])
            away = middles != here
            moved[away, i] = middles[away]
            bias = float(np.sum((middles - x)[away]))
            back = np.where(away, 0.0, here - x)
            back[back * bias >= 0] = 0.0
            if bias and np.any(back):
                moved[:, i] += back * min(1.0, -bias / float(np.sum(back)))
        return moved

    def _middle(self, d: Dimension, x: float) -> float:
        return float(self._from(d.share(d.at(float(self._to(x))))))
