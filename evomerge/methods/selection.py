"""The numbers at given ranks of a stream of numbers: exact, in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from evomerge.methods import fused

DIGIT = 16  # bits looked at in one pass
BINS = 1 << DIGIT

Stream = Callable[[], Iterable[tuple[int, Tensor]]]


def kept(n: int, density: float) -> int:
    """How many of ``n`` entries a share is: ``round(density * n)`` (halves go to the even number), at least one."""
    return max(1, round(density * n))


def magnitude_thresholds(stream: Stream, count: int, density: float) -> list[float]:
    """For each of ``count`` vectors, the smallest magnitude among its ``kept(n, density)`` largest.

    ``stream`` as for ``order_statistics``, with non-negative values. One number a vector; 0.0 for an empty one.
    """
    return [threshold for (threshold,) in order_statistics(stream, count, lambda n: [kept(n, density)])]


def order_statistics(
    stream: Stream,
    count: int,
    ranks: Callable[[int], Sequence[int]],
    dtype: torch.dtype = torch.float32,
    *,
    signed: bool = False,
) -> list[list[float]]:
    """For each of ``count`` vectors, its values at several ranks, of which 1 is the largest.

    A radix selection on the bit patterns, which order like the numbers they stand for: one pass over the stream for
    every 16 bits, however many ranks are wanted. Neither a sort nor a copy of a vector is held in memory, only
    histograms: one a vector in the first pass, at most one a rank in the others. NaN counts as larger than infinity.

    Args:
        stream: gives, each time it is called, the same (vector index, 1-D values) pieces.
        count: number of vectors.
        ranks: the wanted ranks, in 1..n, of a vector of n > 0 values: as many for every n.
        dtype: float32 or float64; pieces that are wider make it float64.
        signed: the values may be negative.

    Returns:
        A list of numbers a vector, exactly values of it; 0.0 for an empty vector.
    """
    kernels = fused.kernels()
    integer, width = (torch.int32, 32) if dtype == torch.float32 else (torch.int64, 64)
    prefixes = [[0] * len(ranks(1)) for _ in range(count)]  # the digits found so far, read as one number
    places: list[list[int]] = []  # the wanted rank among the values that have that prefix
    for shift in range(width - DIGIT, -1, -DIGIT):
        first = not places
        histograms = [{prefix: torch.zeros(BINS, dtype=torch.int64) for prefix in found} for found in prefixes]
        for index, values in stream():
            if torch.promote_types(values.dtype, dtype) != dtype:
                return order_statistics(stream, count, ranks, torch.float64, signed=signed)
            bits = values.to(dtype).contiguous().view(integer)
            if signed:
                bits = bits ^ (bits >> width - 1).bitwise_and_(torch.iinfo(integer).max)
            for prefix, histogram in histograms[index].items():
                if kernels is not None and fused.on_cpu(bits):
                    offset = BINS // 2 if signed else 0
                    kernels.count_digits(bits.numpy(), shift, first, prefix, offset, histogram.numpy())
                else:
                    histogram.add_(_digits(bits, shift, None if first else prefix, signed).cpu())
        if first:
            sizes = [int(next(iter(histogram.values())).sum()) for histogram in histograms]
            places = [list(ranks(n)) if n else [1] * len(ranks(1)) for n in sizes]
        for index, found in enumerate(prefixes):
            for i, prefix in enumerate(found):
                above, digit = _locate(histograms[index][prefix], places[index][i])
                places[index][i] -= above
                found[i] = prefix << DIGIT | digit if not (first and signed) else digit - BINS // 2
    patterns = torch.tensor(prefixes, dtype=integer)
    if signed:
        patterns ^= patterns >> width - 1 & torch.iinfo(integer).max
    values = patterns.view(dtype).tolist()
    return [row if n else [0.0] * len(row) for row, n in zip(values, sizes, strict=True)]


def _digits(bits: Tensor, shift: int, prefix: int | None, signed: bool) -> Tensor:
    """How often each digit of 16 bits occurs at ``shift``, among the numbers whose higher bits are ``prefix``."""
    if prefix is None:
        digits = bits >> shift
        return torch.bincount(digits.add_(BINS // 2) if signed else digits, minlength=BINS)
    # What is below or above those numbers goes to a bin of its own: cheaper than picking them out by a mask.
    limits = torch.iinfo(bits.dtype)
    low = prefix << shift + DIGIT
    high = low + (BINS << shift)
    digits = bits.clamp(max(low - 1, limits.min), min(high, limits.max)).sub_(low)
    if shift:
        digits >>= shift
    return torch.bincount(digits.add_(1), minlength=BINS + 2)[1:-1]


def _locate(histogram: Tensor, rank: int) -> tuple[int, int]:
    """(how many numbers have a higher digit, the digit) of the number at ``rank``."""
    reached = histogram.flip(0).cumsum(0)  # how many lie at or above each digit, from the top
    place = min(int(torch.searchsorted(reached, rank)), BINS - 1)
    return int(reached[place - 1]) if place else 0, BINS - 1 - place
