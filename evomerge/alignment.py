"""Vocabularies side by side: the merge's own, and which row of each source belongs to which of its tokens.

Pure functions of token -> id mappings, and the rows they lead to. Whose files these are is the affair of
``evomerge.aligned``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.methods.base import arithmetic_dtype

Row = tuple[int, int]  # (source, row of its own tensor)
Fill = tuple[Row, ...] | None  # the mean of these rows, zeros for none; None: the mean of all of the host's tokens
PIECE = 4096  # rows of a mean that are summed at a time


def union(host: Mapping[str, int], others: Sequence[Mapping[str, int]], more: Iterable[str] = ()) -> dict[str, int]:
    """token -> id: those of ``host`` with their ids, then the others' own.

    New tokens get the ids from the host's highest on: source after source, each one's by its ids, then ``more`` in
    alphabetical order.
    """
    ids = dict(host)
    place = max(host.values(), default=-1) + 1
    for token in [*(t for other in others for t in sorted(other, key=other.__getitem__)), *sorted(more)]:
        if token not in ids:
            ids[token] = place
            place += 1
    return ids


@dataclass(frozen=True)
class Own:
    """A source's own vocabulary: token -> id, and how many rows its embeddings have."""

    ids: Mapping[str, int]
    rows: int


@dataclass(frozen=True)
class Layout:
    """Where the rows of the merge's vocabulary tensors are in each source.

    Attributes:
        ids: token -> row of the merge.
        index: for each source, (rows,): which of its own rows it is, or -(k + 1) for ``fills[k]``.
        fills: rows for sources that have none of their own; the same for all of them, so that they differ by nothing.
        means: (host, its rows that are tokens): what a fill None is the mean of.
    """

    ids: Mapping[str, int]
    index: tuple[Tensor, ...]
    fills: tuple[Fill, ...]
    means: tuple[int, Tensor]

    @property
    def rows(self) -> int:
        return len(self.index[0])

    def is_identity(self, sources: Sequence[Own]) -> bool:
        """True if every source's rows stay as they are."""
        return all(
            own.rows == self.rows and torch.equal(index, torch.arange(own.rows))
            for own, index in zip(sources, self.index, strict=True)
        )


def lay_out(
    sources: Sequence[Own],
    ids: Mapping[str, int],
    rows: int,
    *,
    host: int,
    base: int | None,
    chosen: Mapping[str, Fill] | None = None,
    forced: Iterable[str] = (),
) -> Layout:
    """Which row of each source is which of the merge's.

    A source that has a token keeps its own row. One that lacks it gets the row that was ``chosen`` for it; else the
    base's, if the base has the token; else the mean of the rows of all that have it. What is ``forced`` comes to all
    from what was chosen. A row that is nobody's token stays, where the host has that row, what it is in each source
    that has no token there, and is the host's in the others; beyond the host's rows it is the mean of the host's
    tokens.

    Args:
        ids: token -> row of the merge.
        host: the source whose vocabulary the merge's begins with.
        base: the source that is the base, if there is one.
    """
    chosen, forced = chosen or {}, set(forced)
    tokens, at = list(ids), torch.tensor(list(ids.values()), dtype=torch.int64)
    is_token = torch.zeros(rows, dtype=torch.bool)
    is_token[at] = True
    free = (~is_token).nonzero().flatten().tolist()
    index: list[Tensor] = []
    for own in sources:
        rows_of = torch.full((rows,), -1, dtype=torch.int64)
        rows_of[at] = torch.tensor([-1 if t in forced else own.ids.get(t, -1) for t in tokens], dtype=torch.int64)
        taken = set(own.ids.values())
        stays = [row for row in free if row < min(own.rows, sources[host].rows) and row not in taken]
        rows_of[stays] = torch.tensor(stays, dtype=torch.int64)
        index.append(rows_of)
    token_at = dict(zip(ids.values(), ids, strict=True))
    fills: list[Fill] = []
    absent = (torch.stack(index) < 0).any(0).nonzero().flatten()
    for row in absent.tolist():
        token = token_at.get(row)
        if token is None:
            fill = ((host, row),) if row < sources[host].rows else None
        elif token in chosen:
            fill = chosen[token]
        elif base is not None and token in sources[base].ids:
            fill = ((base, sources[base].ids[token]),)
        else:
            fill = tuple((s, own.ids[token]) for s, own in enumerate(sources) if token in own.ids)
        fills.append(fill)
    for rows_of in index:
        rows_of[absent] = torch.where(rows_of[absent] < 0, -1 - torch.arange(len(absent)), rows_of[absent])
    held = torch.tensor(sorted(sources[host].ids.values()), dtype=torch.int64)
    return Layout(ids, tuple(index), tuple(fills), (host, held))


class FillRows:
    """The fills of one tensor, computed when they are first asked for.

    Args:
        raws: each source's own tensor: (rows, ...).
        dtypes: their types.
    """

    def __init__(self, layout: Layout, raws: Sequence[Callable[[], Tensor]], dtypes: Sequence[torch.dtype]):
        self._layout, self._raws = layout, raws
        donors = {source for fill in layout.fills for source, _ in fill or ()}
        plain = all(fill is not None and len(fill) < 2 for fill in layout.fills)
        wide = [torch.empty(0, dtype=dtypes[s]) for s in (sorted(donors) if plain else range(len(raws)))]
        self.dtype = arithmetic_dtype(*wide)
        if plain and wide:  # rows that are copied keep their type
            self.dtype = wide[0].dtype
            for other in wide[1:]:
                self.dtype = torch.promote_types(self.dtype, other.dtype)
        self._filled: Tensor | None = None

    def rows(self) -> Tensor:
        """(fills, ...)"""
        if self._filled is None:
            self._filled = self._compute()
        return self._filled

    def _compute(self) -> Tensor:
        fills, raws = self._layout.fills, [raw() for raw in self._raws]
        filled = torch.zeros((len(fills), *raws[0].shape[1:]), dtype=self.dtype)
        for source, raw in enumerate(raws):
            places = [k for k, fill in enumerate(fills) if fill is not None and len(fill) == 1 and fill[0][0] == source]
            filled[places] = raw[[fill[0][1] for k in places if (fill := fills[k])]].to(self.dtype)
        mean: Tensor | None = None
        for k, fill in enumerate(fills):
            if fill is None:
                mean = self._mean(raws) if mean is None else mean
                filled[k] = mean
            elif len(fill) > 1:
                total = sum(raws[source][row].to(torch.float64) for source, row in fill)
                filled[k] = total / len(fill)
        return filled

    def _mean(self, raws: Sequence[Tensor]) -> Tensor:
        source, held = self._layout.means
        total = torch.zeros(raws[source].shape[1:], dtype=torch.float64)
        for piece in held.split(PIECE):
            total += raws[source][piece].sum(0, dtype=torch.float64)
        return total / max(len(held), 1)


class Rows:
    """One source's tensor in the merge's order of rows, gathered where it is read.

    Args:
        raw: the source's own tensor, (rows, ...), in ``own_dtype``.
        index: as in ``Layout``.
    """

    def __init__(
        self, raw: Callable[[], Tensor], own_dtype: torch.dtype, shape: tuple[int, ...], index: Tensor, fill: FillRows
    ):
        self._raw, self._index, self._fill = raw, index, fill
        self._filled = bool((index < 0).any())
        self.dtype = torch.promote_types(own_dtype, fill.dtype) if self._filled else own_dtype
        self.shape = (len(index), *shape[1:])

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def take(self, first: int, last: int) -> Tensor:
        """The rows [first, last); only to be read.

        They have the source's own type where they are all its own, and a stretch that lies together is a view.
        """
        index, raw = self._index[first:last], self._raw()
        start = int(index[0]) if len(index) else 0
        if start >= 0 and torch.equal(index, torch.arange(start, start + len(index))):
            return raw[start : start + len(index)]
        taken = raw[index.clamp(min=0)]
        absent = (index < 0).nonzero().flatten()
        if len(absent):
            taken = taken.to(self.dtype)
            taken[absent] = self._fill.rows()[-index[absent] - 1].to(self.dtype)
        return taken

    def whole(self) -> Tensor:
        """All rows, in ``dtype``."""
        return self.take(0, len(self._index)).to(self.dtype)

    def flat(self, start: int, stop: int) -> Tensor:
        """Entries [start, stop) of the flat (row-major) tensor."""
        columns = torch.Size(self.shape[1:]).numel()
        first, last = start // columns, -(-stop // columns)
        return self.take(first, last).reshape(-1)[start - first * columns : stop - first * columns]
