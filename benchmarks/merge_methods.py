"""Merge methods side by side: seconds to merge one family in memory, against copying its bytes and a naive expression.

    python benchmarks/merge_methods.py [--entries 25000000] [--experts 3] [--dtype bfloat16] [--rounds 5]

All candidates take turns within a round, so that a busy moment hits them alike; the table shows medians over rounds
and, for ratios, the median of the rounds' own ratios. "x copy" is the time over that of copying as many bytes as must
move: base and experts read once, the result written once. Seconds are CPU seconds of this process, so that a machine
that is busy with something else distorts them least.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from evomerge.methods import METHODS
from evomerge.methods.base import TensorInfo, check_params
from evomerge.methods.chunks import merge_chunks

Family = tuple[Tensor, list[Tensor], list[float]]


def naive_linear(base: Tensor, experts: list[Tensor], weights: list[float]) -> Tensor:
    stacked = torch.stack([expert.float() for expert in experts])
    return (torch.tensor(weights)[:, None] * stacked).sum(0) / sum(weights)


def naive_task_arithmetic(base: Tensor, experts: list[Tensor], weights: list[float]) -> Tensor:
    taus = torch.stack([expert.float() - base.float() for expert in experts])
    return base.float() + (torch.tensor(weights)[:, None] * taus).sum(0)


def naive_ties(base: Tensor, experts: list[Tensor], weights: list[float], density: float = 0.2) -> Tensor:
    taus = torch.stack([expert.float() - base.float() for expert in experts])
    keep = round(density * base.numel())
    thresholds = taus.abs().topk(keep, dim=1, sorted=False).values.amin(1, keepdim=True)
    taus = torch.where(taus.abs() >= thresholds, taus, 0.0) * torch.tensor(weights)[:, None]
    agree = (taus * torch.where(taus.sum(0) >= 0, 1.0, -1.0)) > 0
    return base.float() + (taus * agree).sum(0) / agree.sum(0).clamp(min=1)


def naive_dare_linear(base: Tensor, experts: list[Tensor], weights: list[float], density: float = 0.5) -> Tensor:
    taus = torch.stack([expert.float() - base.float() for expert in experts])
    taus = taus * torch.bernoulli(torch.full_like(taus, density)) / density
    return base.float() + (torch.tensor(weights)[:, None] * taus).sum(0)


NAIVE = {
    "linear": naive_linear,
    "task_arithmetic": naive_task_arithmetic,
    "ties": naive_ties,
    "dare_linear": naive_dare_linear,
}


def make_family(entries: int, num_experts: int, dtype: torch.dtype) -> Family:
    """One tensor of the size of a model: fine-tuned weights lie close to their base."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(entries, generator=generator) * 0.05
    experts = [(base + torch.randn(entries, generator=generator) * 0.002).to(dtype) for _ in range(num_experts)]
    return base.to(dtype), experts, [0.3 + 0.1 * t for t in range(num_experts)]


def make_runs(family: Family) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    base, experts, weights = family
    out, info = torch.empty_like(base), TensorInfo("w", shape=tuple(base.shape))
    runs: dict[str, Callable[[], Any]] = {"copy": lambda: [out.copy_(expert) for expert in experts]}
    for name, method in METHODS.items():
        params = check_params(name, method, {})
        taken = experts[: method.num_experts[1]]
        chosen = weights[: len(taken)]

        def prepare(method=method, taken=taken, params=params) -> Any:
            return method.prepare([(info, base, taken)], **params)

        state = prepare()

        def merge(method=method, taken=taken, params=params, chosen=chosen, state=state) -> None:
            pieces = merge_chunks(method, base, taken, weights=chosen, info=info, state=state, params=params)
            for start, piece in pieces:
                out[start : start + piece.numel()].copy_(piece)

        if state is not None:
            runs[f"{name}: prepare"] = prepare
        runs[name] = merge
        if name in NAIVE:
            runs[f"{name}: naive"] = lambda expression=NAIVE[name]: out.copy_(expression(base, experts, weights))
    return runs


def measure(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each run in each round; a round before them warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            began = time.process_time()
            run()
            if number:
                seconds[name].append(time.process_time() - began)
    return seconds


def median_ratio(times: Iterable[float], others: Iterable[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=25_000_000, help="parameters, in one tensor")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", help="storage dtype of base, experts and result")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    family = make_family(args.entries, args.experts, getattr(torch, args.dtype))
    seconds = measure(make_runs(family), args.rounds)
    tensor_bytes = args.entries * family[0].element_size()
    copied, moved = 2 * args.experts * tensor_bytes, (args.experts + 2) * tensor_bytes
    print(
        f"{args.entries:,} {args.dtype} entries, {args.experts} experts, 1 thread, load {os.getloadavg()[0]:.1f}; "
        f"copy {copied / statistics.median(seconds['copy']) / 1e9:.1f} GB/s; {moved / 1e9:.2f} GB must move"
    )
    print(f"{'':28}{'CPU s':>9}{'x copy':>9}{'naive / ours':>14}")
    for name, times in seconds.items():
        over = median_ratio(times, (copy * moved / copied for copy in seconds["copy"]))
        line = f"{name:28}{statistics.median(times):9.3f}{over:9.1f}"
        if name in NAIVE:
            line += f"{median_ratio(seconds[f'{name}: naive'], times):14.1f}"
        print(line)


if __name__ == "__main__":
    main()
