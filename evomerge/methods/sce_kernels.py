"""Compiled loops of SCE, to the same bits as its plain torch code. Used where ``fused.kernels`` says so."""

# pyright: reportCallIssue=false
# (It takes an intrinsic's typing context for an argument.)

from __future__ import annotations

import numpy as np
from numba import carray  # pyright: ignore[reportPrivateImportUsage]

from evomerge.methods.kernels import SIZE, compiled, fma, pointer, widened


@compiled
def variation(experts, like, out):
    """out = T sum d^2 - (sum d)^2 over T experts, d the differences from the first.

    Args:
        experts: (T,) addresses of as many numbers of the type of ``like`` as ``out`` has.
        like: an array of the experts' type (bfloat16 as uint16).
        out: float32 or float64.
    """
    rows = np.empty(2 * SIZE, out.dtype)  # first expert; sum d
    for start in range(0, len(out), SIZE):
        n = min(SIZE, len(out) - start)
        _vary(start, n, experts, like, rows, out[start : start + n])


@compiled
def _vary(start, n, experts, like, rows, out):
    """``variation`` of one block."""
    zero, count = out.dtype.type(0), out.dtype.type(len(experts))
    first = carray(pointer(experts[0] + start * like.itemsize, like), n)
    for i in range(n):
        rows[i] = widened(first[i])
        rows[SIZE + i] = zero
        out[i] = zero
    for t in range(1, len(experts)):
        if experts[t] != experts[0]:
            expert = carray(pointer(experts[t] + start * like.itemsize, like), n)
            for i in range(n):
                difference = widened(expert[i]) - rows[i]
                rows[SIZE + i] += difference
                out[i] += difference * difference
    for i in range(n):
        out[i] = out[i] * count - rows[SIZE + i] * rows[SIZE + i]


@compiled
def erase(base, experts, threshold, shares, weights, scale, out):
    """out = theta_0 + scale sum w e s tau / sum e s, where the experts vary by ``threshold`` or more; else theta_0.

    Args:
        base: (n,) of the experts' type (bfloat16 as uint16).
        experts: (T,) addresses of as many numbers.
        threshold: 0 for no threshold.
        shares: (T,) e_t in the type of ``out``.
        weights: (T,) w_t e_t in the type of ``out``.
        out: (n,) float32 or float64.
    """
    zero, one = out.dtype.type(0), out.dtype.type(1)
    rows = np.empty(4 * SIZE, out.dtype)  # theta_0, sign, divisor; for ``_vary``
    spread = np.empty(SIZE, out.dtype)
    for start in range(0, len(base), SIZE):
        n = min(SIZE, len(base) - start)
        theta_0, merged = base[start : start + n], out[start : start + n]
        if threshold > zero:
            _vary(start, n, experts, base, rows[2 * SIZE :], spread)
        for i in range(n):
            rows[i] = widened(theta_0[i])
            rows[SIZE + i] = zero
            rows[2 * SIZE + i] = zero
            merged[i] = zero
        for t in range(len(experts)):
            expert = carray(pointer(experts[t] + start * base.itemsize, base), n)
            for i in range(n):
                rows[SIZE + i] += widened(expert[i]) - rows[i]
        for i in range(n):
            rows[SIZE + i] = one if rows[SIZE + i] >= zero else -one
        for t in range(len(experts)):
            expert = carray(pointer(experts[t] + start * base.itemsize, base), n)
            weight, share = weights[t], shares[t]
            for i in range(n):
                tau = (widened(expert[i]) - rows[i]) * rows[SIZE + i]
                agreeing = zero if tau < zero else tau
                merged[i] = fma(agreeing, weight, merged[i])
                rows[2 * SIZE + i] += share if agreeing > zero else zero
        if threshold > zero:
            for i in range(n):
                merged[i] *= one if spread[i] >= threshold else zero
        for i in range(n):
            divisor = rows[2 * SIZE + i]
            merged[i] = merged[i] * rows[SIZE + i] / (one if divisor == zero else divisor) * scale + rows[i]
