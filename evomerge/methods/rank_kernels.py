"""Compiled loops for methods that go by ranks within rows, to the same bits as their plain torch code.

Used where ``fused.kernels`` says so.
"""

# pyright: reportCallIssue=false
# (It takes an intrinsic's typing context for an argument.)

from __future__ import annotations

import numpy as np
from numba import carray  # pyright: ignore[reportPrivateImportUsage]

from evomerge.methods.kernels import SIZE, _add, _add_votes, _write_elected, compiled, pointer, widened

BYTE = 256  # values of a digit of the radix sort
FEW = 48  # in rows up to this length ranks are counted one by one, which is faster there


@compiled
def thin_rows(base, expert, ladder, drawn, out):
    """out = DELLA's thinned tau_t of whole rows: 0 or tau / p, where p is the ladder's number at the entry's rank.

    Args:
        base, expert: (rows * n,) of one type: uint16 for bfloat16, or float32.
        ladder: (n,) float32, the probability to stay of the smallest to the largest entry of a row.
        drawn: (rows * n,) float32; what is below p stays.
        out: (rows * n,) float32.
    """
    n = len(ladder)
    magnitudes, chances = np.empty(n, np.uint32), np.empty(n, np.float32)
    keys, places = np.empty((2, n), np.uint32), np.empty((2, n), np.uint32)
    counts = np.empty((4, BYTE), np.uint32)
    for start in range(0, len(out), n):
        tau, draws = out[start : start + n], drawn[start : start + n]
        for i in range(n):
            tau[i] = widened(expert[start + i]) - widened(base[start + i])
        bits = tau.view(np.uint32)
        for i in range(n):
            magnitudes[i] = bits[i] & np.uint32(0x7FFFFFFF)
        if n <= FEW:
            _by_count(magnitudes, ladder, chances)
        else:
            _by_rank(magnitudes, ladder, chances, keys, places, counts)
        for i in range(n):
            tau[i] = tau[i] * (np.float32(1) if draws[i] < chances[i] else np.float32(0)) / chances[i]


@compiled
def _by_count(values, ladder, out):
    """out[i] = ladder[rank of values[i]], equal values by their place."""
    for i in range(len(values)):
        rank = 0
        for j in range(len(values)):
            rank += values[j] < values[i] or (values[j] == values[i] and j < i)
        out[i] = ladder[rank]


@compiled
def _by_rank(values, ladder, out, keys, places, counts):
    """The same by a radix sort, whose last round writes out.

    Args:
        values: (n,) uint32. The others: room for two copies of the values and of their places, and (4, 256) counts.
    """
    n, byte = len(values), np.uint32(BYTE - 1)
    counts[:] = 0
    for i in range(n):
        for digit in range(4):
            counts[digit, values[i] >> np.uint32(8 * digit) & byte] += np.uint32(1)
    last = -1  # the highest digit that is not the same in all values; only such are sorted by
    for digit in range(4):
        if counts[digit, values[0] >> np.uint32(8 * digit) & byte] != n:
            last = digit
    if last < 0:
        out[:] = ladder
        return
    now = -1  # which of the two copies holds the values; at first they are where they came from
    for digit in range(last + 1):
        shift, count = np.uint32(8 * digit), counts[digit]
        if count[values[0] >> shift & byte] == n:
            continue
        _to_starts(count)
        then = 1 - now if now >= 0 else 0
        for i in range(n):
            value = values[i] if now < 0 else keys[now, i]
            place = np.uint32(i) if now < 0 else places[now, i]
            at = count[value >> shift & byte]
            count[value >> shift & byte] = at + np.uint32(1)
            if digit == last:
                out[place] = ladder[at]
            else:
                keys[then, at] = value
                places[then, at] = place
        now = then


@compiled
def _to_starts(count):
    """How often each digit occurs -> where the first number that has it goes."""
    below = np.uint32(0)
    for digit in range(BYTE):
        here = count[digit]
        count[digit] = below
        below += here


@compiled
def merge_vectors(base, vectors, weights, elect, mean, normalize, scale, out):
    """out = theta_0 + scale x what task vectors merge to: their weighted sum, or with ``elect`` TIES' election.

    Args:
        base: (n,) uint16 for bfloat16, or float32.
        vectors: (T,) addresses of as many numbers of the type of ``out``.
        The others as in ``kernels.merge_thinned``.
    """
    rows = np.empty(6 * SIZE, out.dtype)
    for start in range(0, len(base), SIZE):
        n = min(SIZE, len(base) - start)
        theta_0, merged = base[start : start + n], out[start : start + n]
        for i in range(n):
            rows[i] = widened(theta_0[i])
        rows[SIZE : 5 * SIZE] = 0
        for t in range(len(vectors)):
            vector = carray(pointer(vectors[t] + start * out.itemsize, out), n)
            rows[5 * SIZE : 5 * SIZE + n] = vector
            if elect:
                _add_votes(n, weights[t], weights[t] if normalize else out.dtype.type(1), rows)
            else:
                _add(n, t == 0, weights[t], rows)
        if elect:
            _write_elected(n, mean, normalize, scale, rows, merged)
        else:
            for i in range(n):
                merged[i] = rows[SIZE + i] * scale + rows[i]
