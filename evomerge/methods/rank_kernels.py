"""Compiled loops for methods that go by ranks within rows, to the same bits as their plain torch code.

Used where ``fused.kernels`` says so.
"""

# pyright: reportCallIssue=false
# (It takes an intrinsic's typing context for an argument.)

from __future__ import annotations

import numpy as np
from numba import carray  # pyright: ignore[reportPrivateImportUsage]

from evomerge.methods.kernels import SIZE, _add, _add_votes, _draw, _write_elected, compiled, pointer, widened

OCTAVES = 16  # below the largest magnitude of a row, which 16 bits tell apart; what is smaller is one to them
MANTISSA = 12  # bits of an octave: 2**12 steps
MOST_MOVES = 16  # an entry, while a row is mended; then it is sorted anew


@compiled
def pack_rows(base, expert, n, magnitudes, packed):
    """The magnitudes of tau_t, and each in 16 bits above its place in its row in 16.

    Sorted, rows of ``packed`` are in the order of the magnitudes, up to those that 16 bits do not tell apart.

    Args:
        base, expert: (rows * n,) of one type: uint16 for bfloat16, or float32; n < 65536.
        magnitudes: (rows * n,) uint32, the bits of |tau_t|, which order like the numbers.
        packed: (rows * n,) uint32.
    """
    tau = np.empty(n, np.float32)
    bits, shift = tau.view(np.uint32), np.uint32(23 - MANTISSA)
    for start in range(0, len(packed), n):
        for i in range(n):
            tau[i] = widened(expert[start + i]) - widened(base[start + i])
        row, found = magnitudes[start : start + n], packed[start : start + n]
        largest = np.uint32(0)
        for i in range(n):
            row[i] = bits[i] & np.uint32(0x7FFFFFFF)
            largest = max(largest, row[i])
        lowest = np.int32(largest >> shift) - np.int32((OCTAVES << MANTISSA) - 1)
        for i in range(n):
            step = max(np.int32(row[i] >> shift) - lowest, 0)
            found[i] = np.uint32(step) << np.uint32(16) | np.uint32(i)


@compiled
def rank_rows(magnitudes, packed, n, ranks):
    """ranks = where each entry stands in its row by magnitude, from 0; equal ones by their place.

    Args:
        magnitudes, packed: what ``pack_rows`` made, with each row of ``packed`` sorted; that is changed.
        ranks: (rows * n,) uint16.
    """
    place = np.uint32(0xFFFF)
    for start in range(0, len(packed), n):
        row, found, exact = packed[start : start + n], ranks[start : start + n], magnitudes[start : start + n]
        before, moves = np.uint32(0), 0
        for k in range(n):
            this = row[k] & place
            magnitude = exact[this]
            found[this] = k
            if magnitude >= before:
                before = magnitude
                continue
            j = k  # 16 bits did not tell it from the one before
            while j > 0 and exact[row[j - 1] & place] > magnitude:
                row[j] = row[j - 1]
                found[row[j] & place] = j
                j -= 1
            row[j] = this
            found[this] = j
            moves += k - j
            if moves > MOST_MOVES * n:
                _rank_row(exact, found)
                break


@compiled
def _rank_row(magnitudes, ranks):
    """The same for one row by a sort of all bits: where one number lies far above the others."""
    keys = np.empty(len(ranks), np.int64)
    for i in range(len(ranks)):
        keys[i] = np.int64(magnitudes[i]) << 16 | i
    keys.sort()
    for k in range(len(ranks)):
        ranks[keys[k] & 0xFFFF] = k


@compiled
def drop_rows(state, skipped, ranks, limits, out):
    """out = the ranks of the entries that stay, and n for those that are dropped.

    Args:
        state: of the stream that decides, as in ``kernels.draw_uniform``; it is moved on.
        skipped: how many numbers of the stream come before the first entry's.
        ranks: (count,) uint16.
        limits: (n,) uint32, 2**24 x the probability to stay of the smallest to the largest entry of a row, rounded up.
        out: (count,) uint16.
    """
    dropped = np.uint16(len(limits))
    words = np.empty(SIZE // 2, np.uint64)
    halves = words.view(np.uint32)
    for start in range(-skipped, len(ranks), SIZE):
        n = min(SIZE, len(ranks) - start)
        _draw(state, words[: (n + 1) // 2])
        first = max(0, -start)
        if first >= n:
            continue
        numbers, rank, found = halves[first:n], ranks[start + first : start + n], out[start + first : start + n]
        for i in range(len(found)):
            found[i] = rank[i] if numbers[i] >> np.uint32(8) < limits[rank[i]] else dropped


@compiled
def merge_ranked(base, experts, ranks, ladder, weights, elect, mean, normalize, scale, out):
    """out = theta_0 + scale x what tau_t / p merge to, where p is the ladder's number at the entry's rank.

    Args:
        base: (rows * n,) uint16 for bfloat16, or float32.
        experts: (T,) addresses of as many entries of base's type, contiguous.
        ranks: (T,) addresses of as many uint16; n for an entry that was dropped.
        ladder: (n + 1,) float32, infinity the last: there tau_t / p is the zero (or NaN) that 0 x tau_t is.
        out: (rows * n,) float32.
        The others as in ``kernels.merge_thinned``.
    """
    a_rank = np.empty(0, np.uint16)
    rows, chances = np.empty(6 * SIZE, np.float32), np.empty(SIZE, np.float32)
    for start in range(0, len(base), SIZE):
        n = min(SIZE, len(base) - start)
        theta_0, merged = base[start : start + n], out[start : start + n]
        for i in range(n):
            rows[i] = widened(theta_0[i])
        rows[SIZE : 5 * SIZE] = 0
        for t in range(len(experts)):
            expert = carray(pointer(experts[t] + start * base.itemsize, base), n)
            rank = carray(pointer(ranks[t] + start * a_rank.itemsize, a_rank), n)
            for i in range(n):
                chances[i] = ladder[rank[i]]
            for i in range(n):
                rows[5 * SIZE + i] = (widened(expert[i]) - rows[i]) / chances[i]
            if elect:
                _add_votes(n, weights[t], weights[t] if normalize else np.float32(1), rows)
            else:
                _add(n, t == 0, weights[t], rows)
        if elect:
            _write_elected(n, mean, normalize, scale, rows, merged)
        else:
            for i in range(n):
                merged[i] = rows[SIZE + i] * scale + rows[i]
