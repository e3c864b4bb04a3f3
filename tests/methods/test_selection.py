"""The streamed thresholds are the very numbers that sorting gives."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomerge.methods.selection import magnitude_thresholds, order_statistics

magnitudes32 = st.floats(0, width=32, allow_nan=False, allow_infinity=True)
magnitudes64 = st.floats(0, allow_nan=False, allow_infinity=True)
coarse = st.integers(0, 3).map(float)
densities = st.floats(0, 1, exclude_min=True)


def by_sorting(values: list[float], density: float) -> float:
    keep = max(1, round(density * len(values)))
    return sorted(values, reverse=True)[keep - 1] if values else 0.0


def pieces(vectors: list[list[float]], dtype: torch.dtype, size: int):
    def stream():
        for index, vector in enumerate(vectors):
            for piece in torch.tensor(vector, dtype=dtype).split(size):
                yield index, piece

    return stream


@given(st.lists(st.lists(magnitudes32 | coarse, max_size=40), max_size=3), densities, st.integers(1, 7))
def test_float32(vectors, density, size):
    found = magnitude_thresholds(pieces(vectors, torch.float32, size), len(vectors), density)
    assert found == [by_sorting(vector, density) for vector in vectors]


@given(st.lists(st.lists(magnitudes64 | coarse, max_size=40), max_size=3), densities, st.integers(1, 7))
def test_float64(vectors, density, size):
    found = magnitude_thresholds(pieces(vectors, torch.float64, size), len(vectors), density)
    assert found == [by_sorting(vector, density) for vector in vectors]


@given(st.lists(magnitudes32, min_size=1, max_size=20), st.lists(magnitudes64, min_size=1, max_size=20), densities)
def test_a_vector_of_both_types(narrow, wide, density):
    def stream():
        yield 0, torch.tensor(narrow, dtype=torch.float32)
        yield 0, torch.tensor(wide, dtype=torch.float64)

    assert magnitude_thresholds(stream, 1, density) == [by_sorting(narrow + wide, density)]


def test_a_million_normals():
    values = np.abs(np.random.default_rng(0).standard_normal(1_000_000).astype(np.float32))
    tensor = torch.from_numpy(values)
    for density in (1e-6, 0.001, 0.2, 0.5, 0.999):
        keep = max(1, round(density * len(values)))
        (found,) = magnitude_thresholds(lambda: ((0, piece) for piece in tensor.split(131072)), 1, density)
        assert found == float(np.sort(values)[-keep])
        assert (values >= np.float32(found)).sum() >= keep


@given(st.lists(st.lists(st.floats(width=32, allow_nan=False) | coarse, max_size=40), max_size=3), st.data())
def test_several_ranks_of_signed_numbers_at_once(vectors, data):
    shares = data.draw(st.lists(st.floats(0, 1), min_size=1, max_size=4))

    def ranks(n: int) -> list[int]:
        return [max(1, round(share * n)) for share in shares]

    for dtype in (torch.float32, torch.float64):
        found = order_statistics(pieces(vectors, dtype, 7), len(vectors), ranks, signed=True)
        ordered = [sorted(vector, reverse=True) for vector in vectors]
        assert found == [[v[rank - 1] if v else 0.0 for rank in ranks(len(v))] for v in ordered]
