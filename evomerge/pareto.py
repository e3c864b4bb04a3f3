"""Several objectives at once: domination, fronts, crowding. Higher is better throughout.

Deb, Pratap, Agarwal and Meyarivan, "A fast and elitist multiobjective genetic algorithm: NSGA-II", IEEE Trans. Evol.
Comput. 6 (2002), sections III (fronts, crowding) and VI (constraints).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def dominates(a: Array, b: Array) -> NDArray[np.bool_]:
    """Is ``a`` nowhere worse than ``b`` and somewhere better? Over the last axis: (..., objectives) -> (...)."""
    return np.all(a >= b, axis=-1) & np.any(a > b, axis=-1)


def front(values: Array) -> list[int]:
    """The rows of ``values`` (n, objectives) that no other row dominates, in order; equal rows all or none."""
    if not len(values):
        return []
    kept: list[int] = []
    members = np.empty_like(values)  # the first len(kept) rows are the front so far
    # From the highest first objective down (then the second, ...): what comes later cannot dominate what came before.
    for row in np.lexsort(-values.T[::-1]):
        if not dominates(members[: len(kept)], values[row]).any():
            members[len(kept)] = values[row]
            kept.append(int(row))
    return sorted(kept)


def fronts(values: Array, violations: Sequence[float]) -> Iterator[list[int]]:
    """Rows in groups, best first: the fronts of what misses no constraint, then the others by how much they miss.

    Args:
        values: (n, objectives), finite.
        violations: of each row, 0 if it misses nothing.
    """
    missed = np.asarray(violations, dtype=float)
    left = np.flatnonzero(missed <= 0)
    while len(left):
        here = left[front(values[left])]
        yield here.tolist()
        left = np.setdiff1d(left, here)
    for violation in np.unique(missed[missed > 0]):
        yield np.flatnonzero(missed == violation).tolist()


def crowding(values: Array) -> Array:
    """How much room each row of one front has, (n, objectives) -> (n,): infinite at the ends of any objective.

    The sum over objectives of the distance between a row's two neighbours, as a share of the front's range.
    """
    n, objectives = values.shape
    room = np.zeros(n)
    for k in range(objectives):
        order = np.argsort(values[:, k], kind="stable")
        column = values[order, k]
        span = column[-1] - column[0]
        if span > 0:
            room[order[1:-1]] += (column[2:] - column[:-2]) / span
            room[order[[0, -1]]] = np.inf
    return room


def best(values: Array, violations: Sequence[float], count: int) -> list[int]:
    """The best ``count`` rows, best first: by front, in a front by room (the emptiest parts first), then in order."""
    chosen: list[int] = []
    for group in fronts(values, violations):
        if len(chosen) >= count:
            break
        room = crowding(values[group])
        chosen += [group[i] for i in np.argsort(-room, kind="stable")]
    return chosen[:count]
