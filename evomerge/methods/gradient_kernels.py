"""Compiled loops over gradients: inner products with task vectors, in one pass over the sources.

Used where ``fused.kernels`` says so.
"""

# pyright: reportCallIssue=false
# (It takes an intrinsic's typing context for an argument.)

from __future__ import annotations

import numpy as np
from numba import carray  # pyright: ignore[reportPrivateImportUsage]

from evomerge.methods.kernels import SIZE, compiled, pointer, widened


@compiled
def task_products(gradient, base, experts, out):
    """out[t] += <g, theta_t - theta_0>: the difference in the arithmetic type, product and sum in float64.

    SIZE sums run side by side, so that the compiler can use vector instructions.

    Args:
        gradient: (n,) float32 or float64.
        base: (n,) uint16 for bfloat16, float32 or float64.
        experts: (T,) addresses of as many entries of base's type, contiguous.
        out: (T,) float64.
    """
    sums = np.zeros(len(experts) * SIZE)
    for start in range(0, len(base), SIZE):
        n = min(SIZE, len(base) - start)
        theta_0, slope = base[start : start + n], gradient[start : start + n]
        for t in range(len(experts)):
            expert = carray(pointer(experts[t] + start * base.itemsize, base), n)
            own = sums[t * SIZE : t * SIZE + n]
            for i in range(n):
                own[i] += np.float64(slope[i]) * np.float64(widened(expert[i]) - widened(theta_0[i]))
    for t in range(len(experts)):
        for i in range(SIZE):
            out[t] += sums[t * SIZE + i]
