"""What merging costs: against mergekit and fusion-bench, and against what the machine would need at the least.

    python benchmarks/merge_methods.py [--size 134M|1.1B] [--rounds 3] [--parts merge,copy,matrices,many,memory]
                                       [--methods ties,...] [--peers FOLDER | --no-peers] [--out FILE]

A random Llama of SmolLM2's (134M parameters) or TinyLlama's (1.1B) shapes and three experts close to it, in bfloat16,
one thread. Seconds are CPU seconds of the process that does the work, so that a machine that is busy with something
else distorts them least; the imports do not count. All contenders take turns within a round; tables show medians over
the rounds and, for ratios, the median of the rounds' own ratios with the smallest and the largest. Beside each number
stands a floor, measured in the same rounds: what reading and writing the bytes costs that must be read and written, or
what the random draws cost.

The peers run as they are, through their own Python interface, in a virtual environment of their own under the cache
folder, made at the first run (or given by --peers). Rows go to a .jsonl file, tables to a .md file of the same name
(benchmarks/merge_methods.*) when a part is done (of the part merge: a method) and after every round. A run replaces
its own size's and parts' rows there, so that parts and methods can be run one by one. Each says when, and beside which
load, it was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from merging import parts
from merging.family import SIZES
from merging.peers import Peers, cache_folder
from merging.table import tables

HERE = Path(__file__).parent
PARTS = {
    "merge": parts.merge,
    "copy": parts.copy,
    "matrices": parts.matrices,
    "many": parts.many,
    "memory": parts.memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="134M", choices=SIZES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--methods", default=",".join(parts.PARAMS), help="of the part merge")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peers", type=Path, help="a virtual environment that has them")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="for the random checkpoints and the peers")
    parser.add_argument("--out", type=Path, default=HERE / "merge_methods.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    peers = None if args.no_peers else Peers(args.peers or args.cache / "peers", args.threads)
    record = args.out.with_suffix(".jsonl")
    unusable = {} if peers is None else dict(peers.problems)

    def recorded() -> parts.Rows:
        return [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []

    def keep(part: str, found: parts.Rows) -> None:
        """Put what was found in the place of what stands there."""
        head = {"size": args.size, "part": part}
        rows = [row for row in recorded() if (row["size"], row["part"]) != (args.size, part)]
        rows.append({**head, "about": about(args, peers, found)})
        rows.extend({**head, **row} for row in found)
        record.write_text("".join(json.dumps(row) + "\n" for row in rows))
        args.out.write_text(tables(rows))

    for part in args.parts.split(","):
        if peers is not None:
            peers.problems = dict(unusable)
        folder = Path(tempfile.mkdtemp(prefix="merge-methods-"))
        try:
            setting = parts.Setting(
                args.size,
                args.rounds,
                args.threads,
                args.methods.split(","),
                args.cache,
                folder,
                peers,
                keep,
            )
            if found := PARTS[part](setting):
                keep(part, found)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print(tables([row for row in recorded() if row["size"] == args.size]))


def about(args: argparse.Namespace, peers: Peers | None, found: parts.Rows) -> dict[str, Any]:
    """When, where and on what this was measured."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "rounds": max(len(row["seconds"]) for row in found),
        "threads": args.threads,
        "load": round(os.getloadavg()[0], 1),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "problems": "no peers were asked for" if peers is None else dict(peers.problems),
    }


if __name__ == "__main__":
    sys.exit(main())
