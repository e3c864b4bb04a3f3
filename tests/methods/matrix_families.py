"""Random matrices for the methods on whole matrices: tall, wide and square, of full rank and of less."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from .families import Family


@st.composite
def matrix_families(draw, *, fewest: int = 1, most: int = 4, full_rank: bool = False) -> Family:
    """Task vectors are differences of float64 numbers. Those of less than full rank, and zero ones, are so exactly:
    they are products of small integers, like the base that they are added to."""
    m, n = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    count = draw(st.integers(fewest, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    if full_rank or draw(st.booleans()):
        base = rng.standard_normal((m, n))
        experts = [base + rng.standard_normal((m, n)) * rng.choice([0.01, 1.0]) for _ in range(count)]
    else:
        base = rng.integers(-3, 4, (m, n)).astype(np.float64)
        ranks = [draw(st.integers(0, 3)) for _ in range(count)]
        taus = [rng.integers(-9, 10, (m, r)) @ rng.integers(-9, 10, (r, n)) for r in ranks]
        experts = [base + tau for tau in taus]
    weight = st.floats(0.05, 2.0) | st.floats(-2.0, -0.05) | st.just(0.0)
    weights = draw(st.lists(weight, min_size=count, max_size=count))
    return Family(base, experts, weights)


def kept(family: Family) -> list[tuple[float, np.ndarray]]:
    """(w_t, tau_t) of the experts that the weights leave in."""
    return [(w, tau) for w, tau in zip(family.weights, family.taus, strict=True) if w != 0]
