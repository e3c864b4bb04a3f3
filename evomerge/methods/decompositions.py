"""Singular value decompositions of task vectors: dense ones through a Gram matrix, low-rank ones through their factors.

All of it is in float64, whatever the matrix is stored in. What a decomposition leaves undetermined (signs, bases of
equal singular values) cancels in the products that methods make of it. Singular values that are zero to the accuracy of
the matrix have arbitrary vectors and are left out, so that methods that raise small singular values raise no noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from evomerge.errors import MethodError
from evomerge.methods.base import LowRank

LinAlgError = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]

ROWS = 4096  # rows of a matrix that are in float64 at one time
# An eigenvalue of a Gram matrix is known to about 1e-16 of the largest one. Down to this share of it, its eigenvector
# has 6 digits and more; below, the singular values come from the matrix itself.
RESOLVED = 1e-10
ALIKE = 1e-10  # directions of unit vectors count as one where the singular values of their basis are below this


class SVD(NamedTuple):
    """matrix = U diag(S) V', the singular values from the largest on, none of them zero; all float64."""

    U: Tensor  # (m, k)
    S: Tensor  # (k,)
    V: Tensor  # (n, k)

    def first(self, count: int | None) -> SVD:
        return self if count is None else SVD(self.U[:, :count], self.S[:count], self.V[:, :count])


def svd(matrix: Tensor | LowRank, dtype: torch.dtype, top: int | None = None, *, reference: float | None = None) -> SVD:
    """The ``top`` largest singular triples of (m, n) ``matrix``, or all; fewer where its rank is less.

    Args:
        matrix: dense, or low-rank (then the cost is that of QR decompositions of the factors).
        dtype: the arithmetic dtype that the matrix comes from. Singular values at its rounding level count as zero;
            float32 goes through a float64 Gram matrix, float64 through LAPACK's decomposition of the matrix itself.
        reference: the size of the numbers that were rounded, if it is not the largest singular value.

    Raises MethodError if the matrix holds NaN or infinity.
    """
    if isinstance(matrix, LowRank):
        return _svd_of_factors(matrix, dtype, reference).first(top)
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    left, S, right = _decomposed(tall, dtype, top, reference)
    if left is None:
        left = times(tall, right / S, torch.float64)
    return SVD(left, S, right) if tall is matrix else SVD(right, S, left)


def left_basis(matrices: Sequence[Tensor | LowRank], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(U: (m, k), S: (k,)) of (m, n_t) matrices side by side, from the largest singular value on; float64.

    Low-rank ones enter as B L with A = L Q', Q' having orthonormal rows, so that nothing as wide as they are is made.
    No matrices, or zeros only, give k = 0. Raises as ``svd``.
    """
    columns = [_narrow(matrix) if isinstance(matrix, LowRank) else matrix for matrix in matrices]
    if not columns:
        return torch.empty(0, 0, dtype=torch.float64), torch.empty(0, dtype=torch.float64)
    side = torch.cat(columns, dim=1)
    if side.shape[0] < side.shape[1]:
        _, S, U = _decomposed(side.T, dtype)
        return U, S
    U, S, _ = svd(side, dtype)
    return U, S


def _narrow(matrix: LowRank) -> Tensor:
    """(m, rank), float64: scaling B L, with the same product with its transpose as the matrix itself."""
    upper = torch.linalg.qr(matrix.A.to(torch.float64).T).R
    return matrix.scaling * (matrix.B.to(torch.float64) @ upper.T)


def polar(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(U V' in ``dtype``, S): the matrix with all its singular values at 1, and what they were. Raises as ``svd``."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    left, S, right = _decomposed(tall, dtype)
    factor = times(tall, (right / S) @ right.T, dtype) if left is None else (left @ right.T).to(dtype)
    return (factor if tall is matrix else factor.T), S


def recombine(parts: Sequence[SVD], dtype: torch.dtype, *, flat: float | None = None) -> Tensor | None:
    """sum_i s_i p_i q_i' over all triples, p and q being their vectors made orthogonal; in ``dtype``. None if empty.

    The left vectors side by side are replaced by the nearest matrix with orthonormal columns (their polar factor), the
    right ones likewise. Vectors that parts have in common count once: the factor's singular values are 1 and 0.

    Args:
        parts: their singular values may have any sign.
        flat: the value that all s_i get instead of their own.
    """
    U, S, V = (torch.cat(side, dim=-1) for side in zip(*parts, strict=True))
    if not len(S):
        return None
    values = S if flat is None else torch.full_like(S, flat)
    inner = _inverse_root(U, dtype) * values @ _inverse_root(V, dtype)
    return (U @ inner).to(dtype) @ V.to(dtype).T


def norm(matrix: Tensor | LowRank) -> float:
    """The Frobenius norm, summed in float64."""
    if isinstance(matrix, LowRank):
        matrix = row_factor(matrix)
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


def row_factor(matrix: LowRank) -> Tensor:
    """(at most rank, n), float64: R with R'R = matrix' matrix. From B = Q upper: R = scaling upper A."""
    return matrix.scaling * (torch.linalg.qr(matrix.B.to(torch.float64)).R @ matrix.A.to(torch.float64))


def times(matrix: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``matrix`` @ ``right`` (float64), computed in float64 by blocks of rows and rounded to ``dtype``."""
    out = torch.empty(matrix.shape[0], right.shape[1], dtype=dtype, device=matrix.device)
    for start in range(0, matrix.shape[0], ROWS):
        out[start : start + ROWS] = matrix[start : start + ROWS].to(torch.float64) @ right
    return out


def _decomposed(
    tall: Tensor, dtype: torch.dtype, top: int | None = None, reference: float | None = None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(U, S, V) of a matrix with no fewer rows than columns; None for a U that is still to be made, as tall V / S."""
    top = tall.shape[1] if top is None else min(top, tall.shape[1])
    with _finite():
        if dtype != torch.float64:
            squares, vectors = torch.linalg.eigh(_gram(tall))
            squares, vectors = squares.flip(0)[:top], vectors.flip(1)[:, :top]
            if top and bool(squares[-1] > RESOLVED * squares[0]):
                rank = _rank(squares.sqrt(), dtype, tall.shape, reference)
                return None, squares.sqrt()[:rank], vectors[:, :rank].contiguous()
        U, S, rows = torch.linalg.svd(tall.to(torch.float64), full_matrices=False)
    rank = min(top, _rank(S, dtype, tall.shape, reference))
    return U[:, :rank], S[:rank], rows[:rank].T.contiguous()


def _svd_of_factors(matrix: LowRank, dtype: torch.dtype, reference: float | None) -> SVD:
    left, upper = torch.linalg.qr(matrix.B.to(torch.float64))
    right, lower = torch.linalg.qr(matrix.A.to(torch.float64).T)
    with _finite():
        U, S, rows = torch.linalg.svd(matrix.scaling * (upper @ lower.T), full_matrices=False)
    return SVD(left @ U, S, right @ rows.T).first(_rank(S, dtype, (len(left), len(right)), reference))


def _rank(S: Tensor, dtype: torch.dtype, shape: Sequence[int], reference: float | None) -> int:
    """How many singular values of a matrix of this shape are more than what rounding to ``dtype`` leaves.

    The expected rounding error of Press et al., Numerical Recipes, 3rd edition, section 2.6, and two units for small
    matrices.
    """
    if not len(S):
        return 0
    share = torch.finfo(dtype).eps * (2 + 0.5 * math.sqrt(sum(shape) + 1))
    return int((share * (float(S[0]) if reference is None else reference) < S).sum())


@contextmanager
def _finite() -> Iterator[None]:
    """What LAPACK says of NaN and infinity, as a MethodError."""
    try:
        yield
    except LinAlgError as error:
        raise MethodError(
            f"a task vector cannot be decomposed: {error}", remedy="Look for the expert whose weights are not finite."
        ) from error


def _gram(tall: Tensor) -> Tensor:
    """matrix' matrix in float64."""
    total = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=tall.device)
    for rows in tall.split(ROWS):
        wide = rows.to(torch.float64)
        total.addmm_(wide.T, wide)
    return total


def _inverse_root(columns: Tensor, dtype: torch.dtype) -> Tensor:
    """R with columns @ R the polar factor: (columns' columns)^(-1/2) on their span, 0 beside it; symmetric."""
    if dtype != torch.float64 and columns.shape[1] <= columns.shape[0]:
        squares, Q = torch.linalg.eigh(columns.T @ columns)
        if bool(squares[0] > RESOLVED * squares[-1]):
            return (Q / squares.sqrt()) @ Q.T
    _, S, rows = torch.linalg.svd(columns, full_matrices=False)
    rank = int((S / S[0] > ALIKE).sum())
    return (rows[:rank].T / S[:rank]) @ rows[:rank]
