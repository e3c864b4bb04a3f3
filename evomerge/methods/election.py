"""TIES' election: which sign an entry gets, and what the experts that agree with it make of it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from evomerge.params import Param

MODE = Param(
    str,
    "mean",
    "mean: divide by the number of experts that agree with the elected sign; sum: by nothing",
    choices=("mean", "sum"),
)
NORMALIZE = Param(bool, False, "divide by the sum of the weights that agree with the elected sign, instead of by mode")


def elect_and_merge(vectors: Iterable[tuple[float, Tensor]], *, mode: str, normalize: bool) -> Tensor | None:
    """TIES' second and third step: elect a sign for every entry, then merge the entries that agree with it.

    The sign of an entry is that of its weighted sum (zero counts as +). Sums of the positive and of the negative parts
    are all that is kept, so memory does not grow with T.

    Args:
        vectors: (w_t, trimmed tau_t); the memory of tau_t is reused.
        mode: ``mean`` divides by the number of entries that agree, ``sum`` by nothing.
        normalize: divide by the sum of their weights instead. (Below 1e-8 in magnitude it counts as 1.)

    Returns:
        The merged task vector, or None if there are no vectors.
    """
    # Operations with a boolean mask are many times slower on a CPU than those used here, which stay in one dtype.
    total = positive = share = positive_share = None
    for weight, vector in vectors:
        scaled = vector.mul_(weight)
        if total is None or positive is None or share is None or positive_share is None:
            total, positive, share, positive_share = (torch.zeros_like(scaled) for _ in range(4))
        up = scaled.clamp(min=0)
        total.add_(scaled)
        positive.add_(up)
        if normalize or mode == "mean":
            share.add_(scaled.sign_(), alpha=weight if normalize else 1)
            positive_share.add_(up.sign_(), alpha=weight if normalize else 1)
    if total is None or positive is None or share is None or positive_share is None:
        return None
    elected = torch.ge(total, 0, out=torch.empty_like(total))  # 1 for +, 0 for -
    merged = torch.lerp(total - positive, positive, elected)
    if mode == "sum" and not normalize:
        return merged
    divisor = torch.lerp(positive_share - share, positive_share, elected)
    if normalize:
        divisor.masked_fill_(divisor.abs() < 1e-8, 1)
    else:
        divisor.clamp_(min=1)  # where nothing agrees, the sum is zero anyway
    return merged.div_(divisor)
