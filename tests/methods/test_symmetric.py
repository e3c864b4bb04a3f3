"""Gram matrices and eigenvectors against NumPy's, on spectra that are easy and on those that are not."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg  # noqa: F401  # so that its BLAS is loaded
import torch
from threadpoolctl import threadpool_info

from evomerge.methods import symmetric
from evomerge.methods.symmetric import LinAlgError, eigh, gram

SPECTRA = {
    "random": lambda n: np.random.default_rng(0).random(n),
    "equal": np.ones,
    "zero": np.zeros,
    "two values": lambda n: np.arange(n) % 2 + 1.0,
    "rank two": lambda n: (np.arange(n) < 2) * 3.0,
    "falling": lambda n: 10.0 ** -np.linspace(0, 16, n),
}


def with_spectrum(values: np.ndarray) -> torch.Tensor:
    Q = np.linalg.qr(np.random.default_rng(1).standard_normal((len(values), len(values))))[0]
    half = Q * values @ Q.T
    return torch.from_numpy((half + half.T) / 2)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (1, 1), (0, 4), (4, 0), (9000, 70), (70, 9000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_gram(shape: tuple[int, int], dtype: torch.dtype, transposed: bool):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator).to(dtype)
    matrix = matrix.T if transposed else matrix
    if matrix.shape[1] > 1000:
        matrix = matrix[:, :1000]
    numbers = matrix.double().numpy()
    found = gram(matrix)
    assert found.dtype == torch.float64
    assert torch.equal(found, found.T)
    np.testing.assert_allclose(found.numpy(), numbers.T @ numbers, rtol=1e-12, atol=1e-12 * max(1, len(numbers)))


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("n", [1, 2, 3, 10, 130])
@pytest.mark.parametrize("top", [None, 0, 1, 7, 40, 200])
def test_eigenvectors(spectrum: str, n: int, top: int | None):
    """Orthonormal vectors that the matrix only stretches, by its largest eigenvalues."""
    matrix = with_spectrum(np.asarray(SPECTRA[spectrum](n)))
    values, vectors = eigh(matrix, top)
    k = n if top is None else min(n, top)
    expected = np.linalg.eigvalsh(matrix.numpy())[::-1][:k]
    assert vectors.shape == (n, k)
    np.testing.assert_allclose(values.numpy(), expected, rtol=0, atol=1e-13 * n)
    np.testing.assert_allclose((matrix @ vectors).numpy(), (vectors * values).numpy(), rtol=0, atol=1e-13 * n)
    np.testing.assert_allclose((vectors.T @ vectors).numpy(), np.eye(k), rtol=0, atol=1e-12 * n)


def test_where_lapack_gives_up_torch_takes_over(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(symmetric, "_all", lambda matrix: None)
    monkeypatch.setattr(symmetric, "_some", lambda matrix, k: None)
    test_eigenvectors("random", 10, None)
    test_eigenvectors("random", 10, 1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("top", [None, 1])
def test_what_is_not_finite_is_refused(value: float, top: int | None):
    matrix = torch.full((4, 4), value, dtype=torch.float64)
    with pytest.raises(LinAlgError, match="finite"):
        eigh(matrix, top)


def test_other_libraries_keep_their_threads():
    before = threadpool_info()
    eigh(gram(torch.randn(40, 20, generator=torch.Generator().manual_seed(0))), 3)
    assert threadpool_info() == before


def test_the_bits_do_not_depend_on_the_threads_of_the_environment():
    """But on torch's, which a study records."""
    code = """
import hashlib, torch
from evomerge.methods.symmetric import eigh, gram
torch.set_num_threads(1)
square = gram(torch.randn(500, 300, generator=torch.Generator().manual_seed(0)))
for top in (None, 50):
    print(hashlib.sha256(b"".join(part.contiguous().numpy().tobytes() for part in eigh(square, top))).hexdigest())
"""
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2")
    }
    assert len(printed) == 1
