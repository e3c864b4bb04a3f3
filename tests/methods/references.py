"""TIES' steps written from its paper, for the tests of all methods that share them."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

densities = st.floats(0.01, 1)
modes = st.sampled_from(["mean", "sum"])


def trim(tau: np.ndarray, density: float) -> np.ndarray:
    """TIES-Merging, algorithm 1, step 1: keep_topk_reset_rest_to_zero; equal magnitudes are all kept."""
    keep = max(1, round(density * tau.size))
    smallest = np.sort(np.abs(tau).reshape(-1))[::-1][keep - 1]
    return np.where(np.abs(tau) >= smallest, tau, 0.0)


def elect_and_merge(taus: list[np.ndarray], weights: list[float], mode: str, normalize: bool) -> np.ndarray:
    """Algorithm 1, steps 2 and 3, entry by entry, with weights on the trimmed task vectors."""
    out = np.zeros(taus[0].size)
    flat = [tau.reshape(-1) for tau in taus]
    for p in range(out.size):
        entries = [(weight, weight * tau[p]) for weight, tau in zip(weights, flat, strict=True)]
        elected = 1.0 if sum(value for _, value in entries) >= 0 else -1.0
        agree = [(weight, value) for weight, value in entries if value * elected > 0]
        if agree:
            total = sum(value for _, value in agree)
            share = sum(weight for weight, _ in agree)
            divisor = (share if abs(share) >= 1e-8 else 1) if normalize else len(agree) if mode == "mean" else 1
            out[p] = total / divisor
    return out.reshape(taus[0].shape)
