"""What methods that are weighted by data, or by what a search has learned, are given: one mapping an expert.

``evomerge collect`` measures the kinds of STATISTICS:

fisher: tensor name -> mean squared gradients, of the tensor's shape.
gram:   tensor name -> X'X / rows of the linear layer's inputs X (rows, in): (in, in). Only weights of linear layers.
gram_merged: the same, with the inputs that the layer gets from the layers before it as they have been merged; and
        "rho", the parameter that those were merged with, a scalar.
loss:   task name -> the expert's mean loss on that task's examples, a scalar.

A search by gradient learns those of LEARNED, of the tensors that its method takes:

columns:    tensor name -> what multiplies each output column of the task vector, that is each row of the stored matrix
            (out, in): (out,).
components: tensor name -> what multiplies each singular component of the task vector, from the largest on: (rank,).
entries:    tensor name -> what multiplies each entry of the task vectors, row by row: (out * in,). The same mapping for
            all experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evomerge.errors import MethodError

if TYPE_CHECKING:
    from evomerge.methods.base import Method

STATISTICS = ("fisher", "gram", "gram_merged", "loss")
LEARNED = ("columns", "components", "entries")
SHARED = ("entries",)  # all experts have the same mapping

Statistics = Sequence[Mapping[str, Tensor]]

LEARNERS = {"columns": ("columns",), "components": ("adarank",), "entries": ("concrete",)}  # the searchers


def how_to_collect(kind: str, experiment: str = "EXPERIMENT") -> str:
    """The remedy where statistics are missing."""
    if kind in LEARNED:
        return (
            f"They are learned: search by the searcher that does ({', '.join(LEARNERS[kind])}), or name a folder that "
            "such a search has left as `statistics` (statistics=[...] in Python)."
        )
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
        elif kind in LEARNED:
            matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
            size = {"columns": lambda shape: shape[0], "components": min, "entries": math.prod}[kind]
            sizes = {name: size(shape) for name, shape in matrices.items()}
            uniform = {name: torch.rand(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
            made.append({name: u.round() if kind == "components" else 2 * u for name, u in uniform.items()})
            if kind in SHARED:
                return made * num_experts
        elif kind == "loss":
            made.append({task: torch.rand((), generator=generator) for task in ("one", "two")})
        else:
            raise MethodError(f"statistics are of the kinds {', '.join((*STATISTICS, *LEARNED))}, not {kind!r}")
    return made
