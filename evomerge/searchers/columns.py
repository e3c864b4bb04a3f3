"""A coefficient for each expert and output column of a matrix, learned as AdaMerging learns those of tensors.

Descent and losses are those of AdaMerging (Yang et al. 2024, arXiv:2310.02575), at a finer granularity than its layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from evomerge import descent
from evomerge.errors import SpecError
from evomerge.params import Param
from evomerge.searchers.learned import WEIGHTS, LearnedSearcher

if TYPE_CHECKING:
    from evomerge.learned import Layout


class ColumnsSearcher(LearnedSearcher):
    """Learns what multiplies each output column of each task vector, from 1 on; the weights stay unless asked for.

    Raises:
        SpecError: ``low`` <= 1 <= ``high`` does not hold.
    """

    name = "columns"
    summary = "a coefficient for each expert and output column (method columns) by gradient descent; as adamerging"
    learns = "columns"
    params: ClassVar[Mapping[str, Param]] = {
        **LearnedSearcher.params,
        "weights": Param(str, "fixed", WEIGHTS.meaning, choices=WEIGHTS.choices),
        "low": Param(float, 0.0, "the least that a column's coefficient may be; it multiplies the expert's weight"),
        "high": Param(float, 4.0, "the most"),
    }

    def __init__(self, space: Any, **options: Any):
        super().__init__(space, **options)
        low, high = self.options["low"], self.options["high"]
        if not low <= 1 <= high or low == high:
            raise SpecError(
                f"low <= 1 <= high must hold for searcher columns, but low={low:g} and high={high:g}",
                remedy="All columns start at 1: choose a range around it, such as low: 0, high: 4.",
            )

    def begin_numbers(self, layout: Layout) -> tuple[np.ndarray, descent.Constraint]:
        bounds = np.full(layout.size, self.options["low"]), np.full(layout.size, self.options["high"])
        return np.ones(layout.size), descent.Box(*bounds)
