"""AdaRank: masks over the singular components of the task vectors, learned by gradient on items without labels or with.

Lee et al. 2025, "AdaRank: adaptive rank pruning for enhanced model merging" (arXiv:2503.22178): a 0/1 mask for each
expert, matrix and singular component, learned by Adam through a straight-through estimator, on the entropy of the
predictions, together with a weight for each expert and tensor. What is not said there is as in the authors' code
(github.com/david3684/AdaRank, vision/src/models/merge_vit/adaptive.py): m = 1 where sigmoid(x / temperature) > 1/2,
the gradient by x being that of the sigmoid; x = 0.1 at the start for components that are kept, and -0.1 for others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from evomerge import descent
from evomerge.params import Param
from evomerge.searchers.learned import LearnedSearcher

if TYPE_CHECKING:
    from evomerge.learned import Layout

MARGIN = 0.1  # how far from the threshold a logit starts


@dataclass(frozen=True)
class StraightThrough:
    """Masks (``descent.Constraint``): 1 where the coordinate is above 0, with the gradient of sigmoid(x / temperature).

    Bengio et al. 2013, arXiv:1308.3432, section 3.1, as AdaRank uses it.
    """

    temperature: float

    def values(self, x: np.ndarray) -> np.ndarray:
        return (x > 0).astype(np.float64)

    def coordinates(self, values: np.ndarray) -> np.ndarray:
        return np.where(values > 0.5, MARGIN, -MARGIN)

    def pull_back(self, x: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        power = np.exp(-np.abs(x) / self.temperature)  # the slope is even
        return gradient * power / (1 + power) ** 2 / self.temperature

    def project(self, x: np.ndarray) -> np.ndarray:
        return x


class AdaRankSearcher(LearnedSearcher):
    """Learns masks over singular components, and the space's weights along with them."""

    name = "adarank"
    summary = "masks over singular components (method adarank) by gradient descent, with the weights; as adamerging"
    learns = "components"
    params: ClassVar[Mapping[str, Param]] = {
        **LearnedSearcher.params,
        "rank_share": Param(
            float, 1.0, "share of each task vector's components, the largest ones, that are kept at the start", 0, 1
        ),
        "temperature": Param(
            float, 10.0, "divides logits before their sigmoid, which the gradient goes through", low=0, low_open=True
        ),
    }

    def begin_numbers(self, layout: Layout) -> tuple[np.ndarray, descent.Constraint]:
        masks = StraightThrough(self.options["temperature"])
        return masks.coordinates(layout.first(self.options["rank_share"])), masks
