"""The magnitude at which the largest share of a stream of numbers begins: exact, in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

DIGIT = 16  # bits looked at in one pass


def magnitude_thresholds(
    stream: Callable[[], Iterable[tuple[int, Tensor]]], count: int, density: float, dtype: torch.dtype = torch.float32
) -> list[float]:
    """For each of ``count`` vectors, the smallest magnitude among its ``round(density * n)`` largest (at least one).

    A radix selection on the bit patterns, which order like the magnitudes they stand for: one pass over the stream and
    one histogram a vector for every 16 bits. Neither a sort nor a copy of a vector is held in memory.

    Args:
        stream: gives, each time it is called, the same (vector index, 1-D non-negative values) pieces.
        count: number of vectors.
        density: share kept, in (0, 1]. ``round`` is Python's: halves go to the even number.
        dtype: float32 or float64; pieces that are wider make it float64.

    Returns:
        One number a vector, exactly one of its values; 0.0 for an empty vector.
    """
    integer, width = (torch.int32, 32) if dtype == torch.float32 else (torch.int64, 64)
    prefixes = [0] * count
    ranks: list[int] = []
    for shift in range(width - DIGIT, -1, -DIGIT):
        histograms = torch.zeros(count, 1 << DIGIT, dtype=torch.int64)
        for index, values in stream():
            if torch.promote_types(values.dtype, dtype) != dtype:
                return magnitude_thresholds(stream, count, density, torch.float64)
            bits = values.to(dtype).contiguous().view(integer)
            if ranks:  # not the first pass: only what shares the digits found so far
                bits = bits[(bits >> (shift + DIGIT)) == prefixes[index]] & ((1 << DIGIT) - 1 << shift)
            histograms[index] += torch.bincount(bits >> shift, minlength=1 << DIGIT).cpu()
        if not ranks:
            ranks = [max(1, round(density * n)) for n in histograms.sum(1).tolist()]
        for index in range(count):
            reached = histograms[index].flip(0).cumsum(0)  # how many lie at or above each digit, from the top
            place = int(torch.searchsorted(reached, ranks[index]))
            digit = (1 << DIGIT) - 1 - min(place, (1 << DIGIT) - 1)
            ranks[index] -= int(reached[place - 1]) if place else 0
            prefixes[index] = prefixes[index] << DIGIT | digit
    return torch.tensor(prefixes, dtype=integer).view(dtype).tolist()
