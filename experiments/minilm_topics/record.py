"""Records outcomes of many merges of this experiment, once, so that searchers can be compared without a model.

    python record.py run [--seconds 150]    cache/recording/<n>.npz, one a family of merges; goes on where it stopped
    python record.py pack                   recording.npz, which is in the repository

A merge's record is the margin of each item (its right class's logit less the best wrong one's: right if above 0), for
30 search, 30 select and 40 held-out items a task. All of them come from the experiment's search and select items; its
test items are not read. A merge has a weight for each of 5 experts in each of 3 groups of 2 layers (the embeddings with
the first). Merges come in families of 6 that share their lower layers, whose activations are computed once: half of the
work. The first of a family has the same weights in all layers.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import surrogate

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parent))  # building.py, which encoder.py imports
RECORDS, RECORDING = FOLDER / "cache" / "recording", FOLDER / "recording.npz"
SPLIT = {"search": 30, "select": 70, "test": 300}  # of the select items, 30 a task are select and 40 held-out here
SELECT = 30
EXPERTS, GROUPS, HIGH = 5, 3, surrogate.HIGH
FAMILIES = 24
TOP = ((0, 1, 2), (3, 4, 5))  # by weights of the middle group: which members of a family have them


def family(n: int) -> np.ndarray:
    """The weights of family n: (6, EXPERTS, GROUPS).

    The first member is a point of a Sobol sequence, in two families of three drawn towards 0.6 by half, where good
    merges are. The other members move away from it, by a normal step of 0.35 for each weight of a higher group.
    """
    from scipy.stats import qmc

    sequence = qmc.Sobol(EXPERTS, scramble=True, rng=np.random.default_rng(EXPERTS))
    sequence.fast_forward(n + 1)
    first = sequence.random(1)[0] * HIGH
    if n % 3:
        first = (first + 0.6) / 2
    generator = np.random.default_rng([n, 1])
    members = np.repeat(first[:, None], GROUPS, axis=1)[None].repeat(6, axis=0)
    middle = np.clip(first + 0.35 * generator.standard_normal(EXPERTS), 0, HIGH)
    members[list(TOP[1]), :, 1] = middle
    for member in range(1, 6):
        members[member, :, 2] = np.clip(first + 0.35 * generator.standard_normal(EXPERTS), 0, HIGH)
    return members


class Recorder:
    """The base, the task vectors by group, and the items, tokenised and batched by length: nothing is padded."""

    def __init__(self) -> None:
        import encoder
        import torch
        from safetensors.torch import load_file

        from evomerge.planning import build_plan
        from evomerge.progress import Progress
        from evomerge.spec import load_spec

        torch.set_num_threads(1)
        spec = load_spec(FOLDER / "experiment.yaml")
        spec = spec.model_copy(update={"evaluate": spec.evaluate.model_copy(update={"split": SPLIT})})
        plan = build_plan(spec, Progress())
        self.tasks = list(plan.tasks)
        self.items: list[Any] = []
        self.parts: list[str] = []
        for task in self.tasks:
            select = [i for i in plan.items if (i.task, i.split) == (task, "select")]
            search = [i for i in plan.items if (i.task, i.split) == (task, "search")]
            self.items += search + select
            self.parts += ["search"] * len(search) + ["select"] * SELECT + ["held"] * (len(select) - SELECT)
        self.model, tokenizer = encoder.load(FOLDER / "cache" / "base")
        self.heads = {t: load_file(FOLDER / "cache" / "heads" / f"{t}.safetensors")["weight"] for t in self.tasks}
        experts = [load_file(path / "model.safetensors") for path in spec.expert_paths.values()]
        self.groups: list[list[tuple[Any, Any, list[Any]]]] = [[] for _ in range(GROUPS)]
        for name, parameter in self.model.named_parameters():
            parts = name.split(".")
            group = int(parts[parts.index("layer") + 1]) // 2 if "layer" in parts else 0
            start = parameter.detach().clone()
            taus = [expert[name] - start for expert in experts]
            if any(tau.any() for tau in taus):
                self.groups[group].append((parameter, start, taus))
        lengths: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
        for n, item in enumerate(self.items):
            ids = tokenizer(item.text, truncation=True, max_length=encoder.MAX_TOKENS).input_ids
            lengths[len(ids)].append((n, ids))
        self.batches = [
            (np.array([n for n, _ in rows]), torch.tensor([ids for _, ids in rows])) for rows in lengths.values()
        ]

    def set_group(self, group: int, weights: np.ndarray) -> None:
        """Merge one group of layers. ``weights``: (EXPERTS,)."""
        for parameter, start, taus in self.groups[group]:
            merged = start.clone()
            for weight, tau in zip(weights, taus, strict=True):
                merged.add_(tau, alpha=float(weight))
            parameter.data.copy_(merged)

    def layers(self, group: int, states: list[Any]) -> list[Any]:
        """The states of all batches after the layers of ``group``."""
        for layer in self.model.encoder.layer[2 * group : 2 * group + 2]:
            outputs = [layer(state) for state in states]
            states = [output[0] if isinstance(output, tuple) else output for output in outputs]
        return states

    def margins(self, members: np.ndarray) -> np.ndarray:
        """(6, items) of a family (6, EXPERTS, GROUPS)."""
        import torch

        answer = np.empty((len(members), len(self.items)))
        with torch.no_grad():
            self.set_group(0, members[0, :, 0])
            lower = self.layers(0, [self.model.embeddings(input_ids=ids) for _, ids in self.batches])
            for top in TOP:
                self.set_group(1, members[top[0], :, 1])
                middle = self.layers(1, lower)
                for member in top:
                    self.set_group(2, members[member, :, 2])
                    for (numbers, _), state in zip(self.batches, self.layers(2, middle), strict=True):
                        features = torch.nn.functional.normalize(state.mean(1), dim=-1)
                        for n, feature in zip(numbers, features, strict=True):
                            logits = self.heads[self.items[n].task] @ feature
                            label = self.items[n].data["label"]
                            right = float(logits[label])
                            logits[label] = -torch.inf
                            answer[member, n] = right - float(logits.max())
        return answer


def read_records() -> tuple[np.ndarray, np.ndarray]:
    """Points (merges, EXPERTS * GROUPS), expert by expert, and margins (merges, items) of the records 0, 1, ..."""
    rows: list[Any] = []
    while (path := RECORDS / f"{len(rows):04}.npz").is_file():
        with np.load(path) as file:
            rows.append((file["members"].reshape(-1, EXPERTS * GROUPS), file["margins"]))
    if not rows:
        return np.zeros((0, EXPERTS * GROUPS)), np.zeros((0, 0))
    points, margins = zip(*rows, strict=True)
    return np.vstack(points), np.vstack(margins)


def run(families: int, seconds: float, make: Callable[[], Any] = Recorder) -> None:
    """Record families until there are so many, or the time is over; ``make`` gives what has ``margins``."""
    began = time.monotonic()
    todo = [n for n in range(families) if not (RECORDS / f"{n:04}.npz").is_file()]
    RECORDS.mkdir(parents=True, exist_ok=True)
    recorder = make() if todo else None
    for n in todo:
        if time.monotonic() - began > seconds:
            raise SystemExit(f"stopped before family {n} of {families}. Run this again to go on.")
        members = family(n).astype(np.float32)
        margins = recorder.margins(members).astype(np.float16)  # type: ignore[union-attr]
        temporary = RECORDS / f".{n}.{os.getpid()}.npz"
        np.savez(temporary, members=members, margins=margins)
        temporary.rename(RECORDS / f"{n:04}.npz")
        scores = ", ".join(f"{s:.3f}" for s in (margins > 0).mean(axis=1))
        print(f"{n + 1}/{families}  accuracies {scores}  {time.monotonic() - began:.0f} s", flush=True)


def pack() -> None:
    """Fit the surrogate and write all records to one file, as a whole or not at all."""
    points, margins = read_records()
    recorder = Recorder()
    tasks = np.array([item.task for item in recorder.items])
    names = np.array([f"{task}[{layers}]" for task in recorder.tasks for layers in ("0-1", "2-3", "4-5")])
    scales, bend, ridge = surrogate.fit(points / HIGH, margins.astype(np.float64))
    temporary = RECORDING.with_name(f".{os.getpid()}.npz")
    np.savez_compressed(
        temporary, points=points.astype(np.float32), margins=margins, tasks=tasks, parts=np.array(recorder.parts),
        dimensions=names, scales=scales, bend=bend, ridge=ridge,
    )  # fmt: skip
    temporary.rename(RECORDING)
    print(f"{RECORDING} written: {len(points)} merges, {margins.shape[1]} items, {RECORDING.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["run", "pack"])
    parser.add_argument("--families", type=int, default=FAMILIES, help="how many to record in all")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this long; run again to go on")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    run(arguments.families, arguments.seconds) if arguments.step == "run" else pack()


if __name__ == "__main__":
    main()
