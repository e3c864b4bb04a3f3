"""What a study maximises, under which constraints, and which of two trials is better."""

from __future__ import annotations

import math
from collections.abc import Iterable

Merit = tuple[int, float, float]


def merit(score: float | None, violation: float = 0.0) -> Merit:
    """How good a trial is, as something to compare; higher is better. The one owner of that order.

    Trials that miss no constraint come first, by ``score``; then those that do, by ``violation`` (how far they miss
    them; the score breaks ties); then those without a finite score, all alike (Deb 2000, "An efficient constraint
    handling method for genetic algorithms", section 3).
    """
    if score is None or not math.isfinite(score) or not math.isfinite(violation):
        return (0, 0.0, 0.0)
    return (1, -violation, score) if violation > 0 else (2, score, 0.0)


def violation(margins: Iterable[float]) -> float:
    """How far constraints are missed, in sum. ``margins``: above 0 by how far one is missed, 0 or below: it holds."""
    return math.fsum(max(margin, 0.0) for margin in margins)
