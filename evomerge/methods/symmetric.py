"""Gram matrices and their eigenvalues, in float64: on a processor by what torch has no function for.

torch multiplies both halves of a Gram matrix, and finds all eigenvectors where a few are wanted. SciPy's LAPACK does
not. Its threads are held at torch's number meanwhile, because results depend on it in their last bits.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

LinAlgError = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]

BLOCK = 2**19  # about so many entries of a matrix are in float64 at one time, in whole rows
FEW = 1 / 3  # of the eigenvectors: for up to so many the subset is the cheaper way


def gram(tall: Tensor) -> Tensor:
    """matrix' matrix: (n, n), float64, of (m, n) numbers of any type."""
    n = tall.shape[1]
    if tall.device.type != "cpu" or 0 in tall.shape:
        total = torch.zeros(n, n, dtype=torch.float64, device=tall.device)
        for rows in tall.split(rows_of_block(tall)):
            wide = rows.to(torch.float64)
            total.addmm_(wide.T, wide)
        return total
    from scipy.linalg import get_blas_funcs  # here, because few merges need it, and it takes a while to load

    half = np.zeros((n, n), order="F")
    (syrk,) = get_blas_funcs(("syrk",), (half,))
    with _threads():
        for rows in tall.split(rows_of_block(tall)):
            # A copy in torch's memory, whose alignment is always the same.
            wide = rows.to(torch.float64, copy=True, memory_format=torch.contiguous_format).numpy().T
            half = syrk(1.0, wide, beta=1.0, c=half, overwrite_c=1, lower=0)
    total = torch.from_numpy(half).T.tril()
    return total + total.tril(-1).T


def eigh(matrix: Tensor, top: int | None = None) -> tuple[Tensor, Tensor]:
    """(values: (k,), vectors: (n, k)) of a symmetric (n, n) matrix, from the largest eigenvalue on; float64.

    Args:
        matrix: float64.
        top: k, if not all n are wanted; where there are fewer, those.

    Raises torch's LinAlgError if the matrix holds NaN or infinity.
    """
    n = len(matrix)
    k = n if top is None else min(top, n)
    if matrix.device.type == "cpu" and n:
        if not matrix.isfinite().all():
            raise LinAlgError("the input matrix contained non-finite values")
        if k == 0:
            return matrix.new_zeros(0), matrix.new_zeros(n, 0)
        with _threads():
            found = _some(matrix.numpy(), k) if k <= FEW * n else _all(matrix.numpy())
        if found is not None:
            values, vectors = (torch.from_numpy(part).flip(-1) for part in found)  # copies, in torch's memory
            return values[:k], vectors[:, :k]
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0)[:k], vectors.flip(1)[:, :k]


def rows_of_block(matrix: Tensor) -> int:
    """How many rows make a block."""
    return max(64, BLOCK // max(1, matrix.shape[1]))


def _all(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """All values, in rising order, and vectors, by divide and conquer; None where LAPACK gives up."""
    from scipy.linalg import get_lapack_funcs

    (syevd,) = get_lapack_funcs(("syevd",), (matrix,))
    values, vectors, info = syevd(matrix.T, lower=1)
    return None if info else (values, vectors)


def _some(matrix: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The largest k, in rising order; None where LAPACK gives up.

    A tridiagonal matrix first, whose vectors are found by relatively robust representations (Dhillon and Parlett 2004).
    (LAPACK's own function for this, dsyevr, finds a subset by bisection and inverse iteration, which takes longer.)
    """
    from scipy.linalg import eigh_tridiagonal, get_lapack_funcs

    n = len(matrix)
    sytrd, sytrd_lwork, ormqr = get_lapack_funcs(("sytrd", "sytrd_lwork", "ormqr"), (matrix,))
    size = int(sytrd_lwork(n, lower=1)[0])
    reflectors, diagonal, beside, factors, info = sytrd(matrix.T, lower=1, lwork=size)
    if info:
        return None
    try:
        values, vectors = eigh_tridiagonal(
            diagonal, beside, select="i", select_range=(n - k, n - 1), check_finite=False, lapack_driver="stemr"
        )
    except np.linalg.LinAlgError:
        return None
    # Back to the matrix's own coordinates: the reflectors are those of a QR decomposition, all but the first row.
    below = np.asfortranarray(reflectors[1:, :-1])
    vectors[1:], _, info = ormqr("L", "N", below, factors, vectors[1:], lwork=64 * n)
    return None if info else (values, vectors)


def _threads() -> Any:
    """While this is open, SciPy's BLAS has torch's number of threads."""
    return _libraries().limit(limits=torch.get_num_threads(), user_api="blas")


@cache
def _libraries() -> Any:
    import scipy.linalg  # noqa: F401  # so that its library is among those that are found
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
