"""Compiled loops over gradients: inner products with task vectors.

Used where ``fused.kernels`` says so.
"""

# pyright: reportCallIssue=false
# (It takes an intrinsic's typing context for an argument.)

from __future__ import annotations

import numpy as np
from numba import carray  # pyright: ignore[reportPrivateImportUsage]

from evomerge.methods.kernels import SIZE, compiled, pointer, widened


@compiled
def task_products(gradients, bases, experts, counts, slope, stored, out):
    """out[k, t] += <g_k, theta_kt - theta_k0>, of K tensors and T experts; each source is read once.

    The difference is one in the arithmetic type, product and sum are in float64. What is added to a number of ``out``
    depends on its own gradient and tensors alone.

    Args:
        gradients: (K,) addresses of contiguous entries of the type of ``slope``.
        bases: (K,) addresses of entries of the type of ``stored``.
        experts: (K, T) as the bases; 0 where an expert leaves the tensor alone.
        counts: (K,) how many entries.
        slope, stored: arrays whose types count: uint16 for bfloat16, float32 or float64.
        out: (K, T) float64.
    """
    row, tau = np.empty(SIZE), np.empty(SIZE)
    for k in range(len(bases)):
        for start in range(0, counts[k], SIZE):
            n = min(SIZE, counts[k] - start)
            theta_0 = carray(pointer(bases[k] + start * stored.itemsize, stored), n)
            if not _widen(carray(pointer(gradients[k] + start * slope.itemsize, slope), n), row):
                continue  # sources are not read for a row of an embedding that no item has
            for t in range(experts.shape[1]):
                if experts[k, t] != 0:
                    _subtract(carray(pointer(experts[k, t] + start * stored.itemsize, stored), n), theta_0, tau)
                    out[k, t] += _dot(row, tau, n)


@compiled
def _widen(values, out):
    """Are there others than zero?"""
    others = False
    for i in range(len(values)):
        out[i] = np.float64(widened(values[i]))
        others |= out[i] != 0
    return others


@compiled
def _subtract(expert, base, out):
    for i in range(len(expert)):
        out[i] = np.float64(widened(expert[i]) - widened(base[i]))


@compiled(fastmath={"reassoc", "contract"})
def _dot(a, b, n):
    """Its sums run side by side, as many as suit the processor: so they stay in its registers."""
    total = 0.0
    for i in range(n):
        total += a[i] * b[i]
    return total
