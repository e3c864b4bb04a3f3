"""What methods that are weighted by data are given: one mapping an expert, of one of four kinds.

fisher: tensor name -> mean squared gradients, of the tensor's shape.
gram:   tensor name -> X'X / rows of the linear layer's inputs X (rows, in): (in, in). Only weights of linear layers.
gram_merged: the same, with the inputs that the layer gets from the layers before it as they have been merged; and
        "rho", the parameter that those were merged with, a scalar.
loss:   task name -> the expert's mean loss on that task's examples, a scalar.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evomerge.errors import MethodError

if TYPE_CHECKING:
    from evomerge.methods.base import Method

STATISTICS = ("fisher", "gram", "gram_merged", "loss")

Statistics = Sequence[Mapping[str, Tensor]]


def how_to_collect(kind: str, experiment: str = "EXPERIMENT") -> str:
    """The remedy where statistics are missing."""
    return (
        f"Collect them with `evomerge collect {experiment} --what {kind} --out statistics`, and say "
        "`statistics: statistics` in the experiment file or recipe (statistics=[...] in Python)."
    )


def check_statistics(method: Method, statistics: Statistics | None, num_experts: int) -> None:
    """MethodError if ``method`` needs statistics and does not have one mapping an expert."""
    if method.statistics is None:
        return
    if statistics is None:
        raise MethodError(
            f"method {method.name} needs statistics of each expert ({method.statistics}), but there are none",
            remedy=how_to_collect(method.statistics),
        )
    if len(statistics) != num_experts:
        raise MethodError(
            f"method {method.name} takes one mapping of statistics an expert, but {num_experts} experts have "
            f"{len(statistics)}"
        )


def example_statistics(
    kind: str | None, shapes: Mapping[str, Sequence[int]], num_experts: int, *, seed: int = 0
) -> list[dict[str, Tensor]] | None:
    """Random statistics such as a method of this ``kind`` may be given: for probes and contract tests."""
    if kind is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    made: list[dict[str, Tensor]] = []
    for _ in range(num_experts):
        if kind == "fisher":
            made.append({name: torch.rand(tuple(shape), generator=generator) for name, shape in shapes.items()})
        elif kind in ("gram", "gram_merged"):
            layers = {name: shape[1] for name, shape in shapes.items() if len(shape) == 2 and 0 < shape[1] <= 4096}
            rows = {name: torch.randn(2 * width + 1, width, generator=generator) for name, width in layers.items()}
            made.append({name: x.T @ x / len(x) for name, x in rows.items()})
        elif kind == "loss":
            made.append({task: torch.rand((), generator=generator) for task in ("one", "two")})
        else:
            raise MethodError(f"statistics are of the kinds {', '.join(STATISTICS)}, not {kind!r}")
    return made
