"""Inner products of experts (or of their task vectors), of which norms, angles and spherical means are functions.

A few numbers a tensor that no candidate changes: what ``prepare`` keeps, so that the merge itself runs by slices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.errors import MethodError
from evomerge.methods.base import SourceIterable, TensorInfo
from evomerge.methods.chunks import CHUNK
from evomerge.params import Param

VECTORS = Param(
    str,
    "tensor",
    "what a vector is: the tensor laid flat, each of its rows (last dimension), or each of its columns (first one)",
    choices=("tensor", "rows", "columns"),
)
ORIGIN = Param(
    str,
    "zero",
    "where the vectors start: at zero (the experts themselves), or at the base (their task vectors)",
    choices=("zero", "base"),
)


@dataclass(frozen=True)
class InnerProducts:
    """By tensor name, (vectors, T, T) float64: <x_s, x_t> for each of the vectors that a tensor is cut into."""

    vectors: str
    origin: str
    of: Mapping[str, Tensor]

    def fits(self, vectors: str, origin: str) -> bool:
        return (self.vectors, self.origin) == (vectors, origin)

    def for_tensor(self, method: str, name: str) -> Tensor:
        if name not in self.of:
            raise MethodError(f"method {method} was prepared without the tensor {name}")
        return self.of[name]


def prepare_products(method: str, sources: SourceIterable, vectors: str, origin: str) -> InnerProducts:
    """The inner products of all tensors; MethodError where ``origin`` is base and there is none."""
    found = {info.name: inner_products(method, info, base, list(experts), vectors, origin)
             for info, base, experts in sources}  # fmt: skip
    return InnerProducts(vectors, origin, found)


def inner_products(
    method: str, info: TensorInfo, base: Tensor | None, experts: Sequence[Tensor], vectors: str, origin: str
) -> Tensor:
    """(vectors, T, T) float64 of one whole tensor; (1, T, T) where the whole tensor is the vector.

    Each pair is summed by itself, so that its number does not depend on how many experts there are.
    """
    if origin == "base" and base is None:
        raise MethodError(
            f"method {method} with origin base works on task vectors, but there is no base", remedy="Name a base."
        )
    count, rows, columns = len(experts), *_matrix(info.shape, vectors)
    size = {"tensor": 1, "rows": rows, "columns": columns}[vectors]
    products = torch.zeros(size, count, count, dtype=torch.float64, device=experts[0].device)
    for first, parts in _blocks(base if origin == "base" else None, experts, rows, columns):
        last = first + len(parts[0])
        for s in range(count):
            for t in range(s, count):
                if vectors == "tensor":
                    products[0, s, t] += torch.dot(parts[s].reshape(-1), parts[t].reshape(-1))
                elif vectors == "rows":
                    products[first:last, s, t] = (parts[s] * parts[t]).sum(1)
                else:
                    products[:, s, t] += (parts[s] * parts[t]).sum(0)
    lower = products.triu(1).transpose(1, 2)
    return products.triu() + lower


def cosines_of(products: Tensor) -> tuple[Tensor, Tensor]:
    """(norms (vectors, T), cosines (vectors, T, T)); a zero vector is at right angles to everything, itself too."""
    norms = products.diagonal(dim1=1, dim2=2).sqrt()
    unit = torch.where(norms > 0, 1 / norms, 0.0)
    return norms, (products * unit[:, :, None] * unit[:, None, :]).clamp(-1, 1)


def spread(values: Tensor, info: TensorInfo, count: int, vectors: str, dtype: torch.dtype) -> Tensor:
    """(count,) in ``dtype``: for each entry of a slice that starts at ``info.start``, the number of its vector.

    Args:
        values: (vectors,), one number a row or a column.
    """
    columns = _matrix(info.shape, vectors)[1]
    if vectors == "rows":
        first, last = info.start // columns, (info.start + count - 1) // columns + 1
        whole = values[first:last, None].to(dtype).expand(-1, columns).reshape(-1)
        return whole[info.start - first * columns :][:count]
    places = torch.arange(info.start, info.start + count, device=values.device).remainder_(columns)
    return values.to(dtype)[places]


def _matrix(shape: Sequence[int], vectors: str) -> tuple[int, int]:
    """(rows, columns) of the matrix whose rows, or columns, are the vectors. Any will do for the whole tensor."""
    numel = 1
    for size in shape:
        numel *= size
    if numel == 0:
        return 0, 1
    if vectors == "columns":
        rows = shape[0] if shape else 1
        return rows, numel // rows
    columns = shape[-1] if shape and vectors == "rows" else 1
    return numel // columns, columns


def row_blocks(shape: Sequence[int], tensors: Sequence[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
    """(first row, the same whole rows (last dimension) of every tensor, in float64), each about a chunk."""
    yield from _blocks(None, tensors, *_matrix(shape, "rows"))


def _blocks(
    base: Tensor | None, experts: Sequence[Tensor], rows: int, columns: int
) -> Iterator[tuple[int, list[Tensor]]]:
    """(first row, the same rows of every x_t in float64), which is exact for narrower types."""
    step = max(1, CHUNK // columns)
    distinct = {id(t): t.reshape(-1) for t in (*experts, *(() if base is None else (base,)))}
    for first in range(0, rows, step):
        part = slice(first * columns, min(rows, first + step) * columns)
        wide = {key: flat[part].to(torch.float64).view(-1, columns) for key, flat in distinct.items()}
        if base is None:
            yield first, [wide[id(expert)] for expert in experts]
        else:
            yield first, [wide[id(expert)] - wide[id(base)] for expert in experts]
