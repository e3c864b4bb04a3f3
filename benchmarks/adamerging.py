"""What a step of merging by gradient costs: inner products beside autograd through the merge, and fusion-bench.

    python benchmarks/adamerging.py [--rounds 3] [--settings 4x2x16,...] [--peers FOLDER | --no-peers] [--out FILE]

A random 6-layer BERT (13.7M parameters, float32), T experts close to it, a coefficient for each expert and tensor, the
entropy of frozen heads on a batch of each task, Adam; one thread. Settings are T x items x tokens. Each contender runs
in a process of its own, in turns within a round: CPU milliseconds a step (the first step, which warms up, aside) and
the most anonymous memory, in all and above what there was before the first step. Tables show medians over the rounds,
and of ratios the median of the rounds' own, with the smallest and the largest. All must find the same losses, but for
the first row, which is what no way of training can do without: a forward and a backward pass for each task of a model
that holds a merge already, each parameter's gradient dropped as it comes.

fusion-bench runs as it is, in a virtual environment of its own, as for merge_methods.py. Rows go to a .jsonl file and
tables to a .md file of the same name (benchmarks/adamerging.*) after every one. It goes on where it stopped: delete the
rows that are to be measured anew.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from merging.peers import Peers, cache_folder, run_script

HERE = Path(__file__).parent
SCRIPT = HERE / "gradient" / "contender.py"
SETTINGS = {"4x16x64": 2, "8x16x64": 2, "4x2x16": 6, "8x2x16": 6}  # T x items x tokens -> steps that are timed
CONTENDERS = {
    "passes": "the model's passes alone",
    "keep": "inner products, gradients kept",
    "one": "the same in one part, for one worker",
    "free": "inner products, gradients freed",
    "autograd": "autograd through the merge",
    "authors": "autograd, merged anew for each task",
    "fusion_bench": "fusion-bench",
}
VOCABULARY, MOST_EXPERTS = 8000, 8
TOLERANCE = 1e-3  # between contenders' losses at the first step, relative: float32, summed in other orders


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--settings", default=",".join(SETTINGS), help="T x items x tokens, such as 4x2x16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--peers", type=Path, help="a virtual environment that has fusion-bench")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="for the random checkpoints and the peers")
    parser.add_argument("--out", type=Path, default=HERE / "adamerging.md")
    args = parser.parse_args()
    peers = None if args.no_peers else Peers(args.peers or args.cache / "peers", args.threads)
    folders = write_family(args.cache / ("bert-tiny" if args.tiny else "bert"), tiny=args.tiny)
    kept = args.out.with_suffix(".jsonl")
    rows: list[dict[str, Any]] = [json.loads(line) for line in kept.open()][1:] if kept.exists() else []
    problems: dict[str, str] = {} if peers is None else peers.problems
    for number in range(args.rounds):
        for setting in args.settings.split(","):
            count, items, tokens = map(int, setting.split("x"))
            task = {
                "base": str(folders[0]),
                "experts": [str(folder) for folder in folders[1 : count + 1]],
                "batch": items,
                "tokens": tokens,
                "steps": SETTINGS.get(setting, 4),
                "vocabulary": VOCABULARY,
                "threads": args.threads,
            }
            for what in CONTENDERS:
                if any((row["round"], row["setting"], row["what"]) == (number, setting, what) for row in rows):
                    continue
                if what == "fusion_bench":
                    if peers is None:
                        continue
                    cost = run_script(peers.python, SCRIPT, {**task, "what": what}, problems)
                else:
                    cost = run_script(sys.executable, SCRIPT, {**task, "what": what}, problems)
                if cost is not None:
                    rows.append({"round": number, "setting": setting, "what": what, **cost})
                    ms = 1000 * statistics.median(cost["seconds"])
                    print(f"  {setting:10} {what:14} {ms:8.0f} ms", file=sys.stderr, flush=True)
                facts = about(args, number + 1, problems)
                kept.write_text("".join(json.dumps(row) + "\n" for row in [facts, *rows]))
                args.out.write_text(page(facts, rows))
            check_losses([row for row in rows if (row["round"], row["setting"]) == (number, setting)])
    print(args.out.read_text())
    return 0


def write_family(folder: Path, *, tiny: bool) -> list[Path]:
    """A random base and experts, written once."""
    from transformers import BertConfig, BertModel

    folders = [folder / "base", *(folder / f"expert{t}" for t in range(MOST_EXPERTS))]
    width = 32 if tiny else 384
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=2 if tiny else 6, num_attention_heads=width // 32,
        intermediate_size=4 * width, max_position_embeddings=128,
    )  # fmt: skip
    base: dict[str, torch.Tensor] = {}
    for number, place in enumerate(folders):
        if (place / "model.safetensors").is_file():
            continue
        torch.manual_seed(0)
        model = BertModel(config, add_pooling_layer=False)
        base = base or {name: p.detach().clone() for name, p in model.named_parameters()}
        draws = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if number:
                    parameter.copy_(base[name] + torch.randn(parameter.shape, generator=draws) * 0.01)
        model.save_pretrained(place)
    return folders


def check_losses(rows: Sequence[Mapping[str, Any]]) -> None:
    """SystemExit where contenders do not agree at the first step: they would not do the same work."""
    first = {row["what"]: row["losses"][0] for row in rows if row["what"] != "passes"}
    low, high = min(first.values()), max(first.values())
    if high - low > TOLERANCE * abs(high):
        raise SystemExit(f"the contenders' losses differ at the first step: {first}")


def about(args: argparse.Namespace, rounds: int, problems: Mapping[str, str]) -> dict[str, Any]:
    return {
        "about": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "rounds": rounds,
        "threads": args.threads,
        "load": round(os.getloadavg()[0], 1),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "problems": "fusion-bench was not asked for" if args.no_peers else dict(problems),
    }


def page(facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "# What a step of merging by gradient costs",
        "",
        "Measured by `python benchmarks/adamerging.py`, which says what and how.",
        "",
        "| T x items x tokens | | ms a step | / kept | most memory, MB | above the start, MB | / kept |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    for setting in settings:
        for what, title in CONTENDERS.items():
            own = [row for row in rows if (row["setting"], row["what"]) == (setting, what)]
            if not own:
                continue
            kept = {row["round"]: row for row in rows if (row["setting"], row["what"]) == (setting, "keep")}
            times = [(ms(row) / ms(kept[row["round"]])) for row in own if row["round"] in kept]
            growths = [(row["growth"] / kept[row["round"]]["growth"]) for row in own if row["round"] in kept]
            lines.append(
                f"| {setting} | {title} | {statistics.median(map(ms, own)):.0f} | {ratio(times)} | "
                f"{median_mb(own, 'peak_bytes')} | {median_mb(own, 'growth')} | {ratio(growths)} |"
            )
    counts = {setting: len({row["round"] for row in rows if row["setting"] == setting}) for setting in settings}
    rounds = "rounds: " + ", ".join(f"{count} of {setting}" for setting, count in counts.items())
    lines += [
        "",
        f"- {facts['about']}, {rounds} (medians; in brackets the smallest and largest ratios), CPU milliseconds, "
        f"threads: {facts['threads']}, load of the machine at the end {facts['load']} on {facts['cores']} cores, "
        f"Python {facts['python']}, torch {facts['torch']}.",
    ]
    if facts["problems"]:
        problems = facts["problems"]
        text = problems if isinstance(problems, str) else "; ".join(f"{k}: {v.strip()}" for k, v in problems.items())
        lines.append(f"- Not run: {text}.")
    return "\n".join(lines) + "\n"


def ms(row: Mapping[str, Any]) -> float:
    return 1000 * statistics.median(row["seconds"])


def median_mb(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    return f"{statistics.median(row[key] for row in rows) / 1e6:.0f}"


def ratio(values: Sequence[float]) -> str:
    if not values:
        return "-"
    middle = f"{statistics.median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    sys.exit(main())
