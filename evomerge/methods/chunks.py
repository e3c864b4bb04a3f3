"""A tensor merged piece by piece, each small enough to stay in the processor's cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from evomerge.methods.base import LowRank, Method, State, TensorInfo, arithmetic_dtype
from evomerge.methods.random import BLOCK

CHUNK = 2 * BLOCK  # entries a piece: 512 KiB of float32, so that a few of them fit into a core's cache


def merge_chunks(
    method: Method,
    base: Tensor | None,
    experts: Sequence[Tensor | LowRank],
    *,
    weights: Sequence[float],
    info: TensorInfo,
    state: State | None = None,
    seed: int = 0,
    params: Mapping[str, Any],
    out: Tensor | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield (start, piece): the merged tensor as flat pieces in row-major order, in the arithmetic dtype.

    The grid is a function of the tensor's shape alone (and goes by whole rows where experts are low-rank).
    Where ``state`` does not hold what ``params`` ask for (a density that varies from candidate to candidate), it is
    computed from this tensor first; where slices cannot do at all, the one piece is the whole tensor.

    Args:
        base: theta_0, or None for methods that need none. Any shape and strides.
        experts: T tensors of the base's shape, or LowRank for a method that takes ``factors``; one that *is* ``base``
            has no task vector here.
        info: ``shape`` is the tensor's.
        params: all parameters of the method, as ``check_params`` returns them.
        out: where the caller puts the pieces: flat, contiguous, of the merged tensor's size, and no part of the inputs'
            memory. With a method that ``fills`` pieces are longer then, and where it has the arithmetic dtype they are
            its own parts.

    Raises:
        MethodError: the call breaks a rule of the method.
    """
    piece_size = CHUNK
    if out is not None and (_has_factors(experts) or not method.fills):
        out = None
    elif out is not None:
        # In one pass without temporaries: Python's time for each piece is what counts.
        dense = [tensor for tensor in (base, *experts) if isinstance(tensor, Tensor)]
        in_place = out.dtype == arithmetic_dtype(*dense)
        out, piece_size = (out, 16 * CHUNK) if in_place else (None, 4 * CHUNK)
    for piece, part, parts, ready in slices(method, base, experts, info, state, params, size=piece_size):
        into = None if out is None else out[piece.start : piece.start + piece_size]
        call = {"weights": weights, "info": piece, "state": ready, "seed": seed, "out": into}
        yield piece.start, method.merge(part, parts, **call, **params).reshape(-1)


def slices(
    method: Method,
    base: Tensor | None,
    experts: Sequence[Tensor | LowRank],
    info: TensorInfo,
    state: State | None,
    params: Mapping[str, Any],
    *,
    size: int = CHUNK,
) -> Iterator[tuple[TensorInfo, Tensor | None, list[Tensor | LowRank], State | None]]:
    """What ``method`` is to be called with: (info with its start, base, experts, state), one slice after another.

    As for ``merge_chunks``, with the state that it computes where ``state`` does not do.
    """
    if not method.chunked_with(state, **params) and (state is None or method.statistics is None):
        own = method.prepare([(info, base, experts)], **params)
        if state is None or method.chunked_with(own, **params):
            state = own
    if not method.chunked_with(state, **params):
        yield info, base, list(experts), state
        return
    # By identity: an expert that is the base stays it.
    distinct = {id(tensor): tensor for tensor in ([*experts] if base is None else [base, *experts])}
    for start, part in _row_parts(distinct) if _has_factors(experts) else _flat_parts(distinct, size):
        slice_of_base = None if base is None else part[id(base)]
        yield replace(info, start=start), slice_of_base, [part[id(expert)] for expert in experts], state


def merge_into(
    out: Tensor, method: Method, base: Tensor | None, experts: Sequence[Tensor | LowRank], **call: Any
) -> None:
    """``out`` = the merged tensor, rounded to its dtype.

    Args:
        out: contiguous, of the tensor's shape, and no part of the inputs' memory.
        call: as for ``merge_chunks``.
    """
    flat = out.view(-1)
    for start, piece in merge_chunks(method, base, experts, out=flat, **call):
        place = flat[start : start + piece.numel()]
        if piece.data_ptr() != place.data_ptr():
            place.copy_(piece)


def _has_factors(experts: Sequence[Tensor | LowRank]) -> bool:
    return any(isinstance(expert, LowRank) for expert in experts)


def _flat_parts(tensors: Mapping[int, Any], size: int) -> Iterator[tuple[int, dict[int, Any]]]:
    """(start, parts): the same slice of every tensor."""
    flat = {key: tensor.reshape(-1) for key, tensor in tensors.items()}
    for start in range(0, max(tensor.numel() for tensor in flat.values()), size):
        yield start, {key: tensor[start : start + size] for key, tensor in flat.items()}


def _row_parts(tensors: Mapping[int, Any]) -> Iterator[tuple[int, dict[int, Any]]]:
    """(start, parts): the same rows of every matrix, dense or low-rank."""
    rows, columns = next((len(t.B), t.A.shape[1]) for t in tensors.values() if isinstance(t, LowRank))
    step = max(1, CHUNK // columns)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        yield (
            first * columns,
            {key: t.rows(first, last) if isinstance(t, LowRank) else t[first:last] for key, t in tensors.items()},
        )
