"""Singular value decompositions of task vectors: dense ones through a Gram matrix, low-rank ones through their factors.

Float32 matrices are decomposed by the eigenvalues of the Gram matrix of their smaller side, made and solved in float64
(``symmetric``), and no more of the eigenvectors found than are asked for.
That squares the singular values, but what float64 loses by it lies below what a float32 matrix determines: a singular
value at the float32 rounding level (1e-6 of the largest) still has four digits. Float64 matrices go to LAPACK's
decomposition.

What a decomposition leaves undetermined (signs, bases of equal singular values) cancels in the products that methods
make of it. Singular values at the rounding level have arbitrary vectors and are left out, so that methods that raise
small singular values raise no noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from evomerge.errors import MethodError
from evomerge.methods.base import LowRank
from evomerge.methods.masks import Kept
from evomerge.methods.symmetric import LinAlgError, eigh, gram, rows_of_block


class SVD(NamedTuple):
    """matrix = U diag(S) V', the singular values from the largest on, none of them zero."""

    U: Tensor  # (m, k), in the arithmetic dtype
    S: Tensor  # (k,), float64
    V: Tensor  # (n, k), in the arithmetic dtype

    def first(self, count: int | None) -> SVD:
        return self if count is None else SVD(self.U[:, :count], self.S[:count], self.V[:, :count])


class Decompositions(Kept):
    """Those of task vectors, by tensor and expert."""

    def of(self, name: str, t: int, find: Callable[[], SVD]) -> SVD:
        return self._find((name, t), find, lambda triples: sum(part.nbytes for part in triples))


def svd(matrix: Tensor | LowRank, dtype: torch.dtype, top: int | None = None, *, reference: float | None = None) -> SVD:
    """The ``top`` largest singular triples of (m, n) ``matrix``, or all; fewer where its rank is less.

    Args:
        matrix: dense, or low-rank (then the cost is that of QR decompositions of the factors).
        dtype: the arithmetic dtype that the matrix comes from. Singular values at its rounding level count as zero.
        reference: the size of the numbers that were rounded, if it is not the largest singular value.

    Raises MethodError if the matrix holds NaN or infinity.
    """
    if isinstance(matrix, LowRank):
        return _svd_of_factors(matrix, dtype, reference).first(top)
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    left, S, right = _decomposed(tall, dtype, top, reference)
    left = times(tall, right / S, dtype) if left is None else left
    right = right.to(dtype)
    return SVD(left, S, right) if tall is matrix else SVD(right, S, left)


def left_basis(matrices: Sequence[Tensor | LowRank], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(U: (m, k), S: (k,)) of (m, n_t) matrices side by side, from the largest singular value on; float64.

    Low-rank ones enter as B L with A = L Q', Q' having orthonormal rows, so that nothing as wide as they are is made.
    No matrices, or zeros only, give k = 0. Raises as ``svd``.
    """
    columns = [_narrow(matrix) if isinstance(matrix, LowRank) else matrix for matrix in matrices]
    columns = [matrix for matrix in columns if matrix.any()]  # an embedding that was not tuned has no directions
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
    factor = times(tall, (right / S) @ right.T, dtype) if left is None else left @ right.T
    return (factor if tall is matrix else factor.T), S


def recombine(parts: list[SVD], dtype: torch.dtype, *, flat: float | None = None) -> Tensor | None:
    """sum_i s_i p_i q_i' over all triples, p and q being their vectors made orthogonal; in ``dtype``. None if empty.

    The left vectors side by side are replaced by the nearest matrix with orthonormal columns (their polar factor), the
    right ones likewise. Vectors that parts have in common count once: the factor's singular values are 1 and 0.

    Args:
        parts: decompositions of matrices of one shape. The list is emptied, so that its memory can go.
        flat: the value that all s_i get instead of their own.
    """
    U, S, V = (torch.cat(side, dim=-1) for side in zip(*parts, strict=True))
    parts.clear()
    if not len(S):
        return None
    values = S if flat is None else torch.full_like(S, flat)
    U = times(U, _inverse_root(U) * values @ _inverse_root(V), dtype)
    return U @ V.T


def norm(matrix: Tensor | LowRank) -> float:
    """The Frobenius norm, summed in float64."""
    rows = row_factor(matrix) if isinstance(matrix, LowRank) else matrix
    blocks = rows.split(rows_of_block(rows))  # because the whole would be copied in float64
    return math.hypot(*(float(torch.linalg.vector_norm(block, dtype=torch.float64)) for block in blocks))


def row_factor(matrix: LowRank) -> Tensor:
    """(at most rank, n), float64: R with R'R = matrix' matrix. From B = Q upper: R = scaling upper A."""
    return matrix.scaling * (torch.linalg.qr(matrix.B.to(torch.float64)).R @ matrix.A.to(torch.float64))


def times(matrix: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``matrix`` @ ``right`` (float64), computed in float64 by blocks of rows and rounded to ``dtype``."""
    out, step = torch.empty(matrix.shape[0], right.shape[1], dtype=dtype, device=matrix.device), rows_of_block(matrix)
    for start in range(0, matrix.shape[0], step):
        out[start : start + step] = matrix[start : start + step].to(torch.float64) @ right
    return out


def _decomposed(
    tall: Tensor, dtype: torch.dtype, top: int | None = None, reference: float | None = None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(U, S, V) in float64, of a matrix with no fewer rows than columns. None for a U still to be made: tall V / S."""
    U = None
    with _finite():
        if dtype == torch.float64:
            U, S, rows = torch.linalg.svd(tall, full_matrices=False)
            V = rows.T
        else:
            squares, V = eigh(gram(tall), top)
            S = squares.clamp(min=0).sqrt()
    rank = _rank(S, dtype, tall.shape, reference)
    rank = rank if top is None else min(rank, top)
    return None if U is None else U[:, :rank], S[:rank], V[:, :rank].contiguous()


def _svd_of_factors(matrix: LowRank, dtype: torch.dtype, reference: float | None) -> SVD:
    left, upper = torch.linalg.qr(matrix.B.to(torch.float64))
    right, lower = torch.linalg.qr(matrix.A.to(torch.float64).T)
    with _finite():
        U, S, rows = torch.linalg.svd(matrix.scaling * (upper @ lower.T), full_matrices=False)
    rank = _rank(S, dtype, (len(left), len(right)), reference)
    return SVD((left @ U).to(dtype), S, (right @ rows.T).to(dtype)).first(rank)


def _inverse_root(columns: Tensor) -> Tensor:
    """R with columns @ R the polar factor: (columns' columns)^(-1/2) on their span, 0 beside it; symmetric, float64.

    Columns are unit vectors. Singular values at their rounding level are directions that count as one.
    """
    alike = max(16 * torch.finfo(columns.dtype).eps, 1e-10)
    if columns.dtype == torch.float64:
        _, S, rows = torch.linalg.svd(columns, full_matrices=False)
        Q = rows.T
    else:
        squares, Q = eigh(gram(columns))
        S = squares.clamp(min=0).sqrt()
    keep = alike * S.max() < S
    return (Q[:, keep] / S[keep]) @ Q[:, keep].T


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
