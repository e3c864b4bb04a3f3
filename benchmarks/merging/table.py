"""Rows of measurements as Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

Rows = list[dict[str, Any]]
EXPERTS = 3
RANDOM = ("dare_ties", "della")
NO_BASE = ("linear", "slerp")
METHODS = ("linear", "task_arithmetic", "slerp", "ties", "dare_ties", "della", "breadcrumbs", "sce")  # as shown


def median_ratio(times: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """(median, smallest, largest) of the rounds' own ratios; a list of one is every round's."""
    pairs = zip(times, others if len(others) == len(times) else list(others) * len(times), strict=True)
    ratios = [a / b for a, b in pairs]
    return statistics.median(ratios), min(ratios), max(ratios)


class _Part:
    """The rows of one part and size: seconds of each round by (what, quantity)."""

    def __init__(self, rows: Rows, size: str, part: str):
        self.name = part.rsplit(maxsplit=1)[-1]  # of the method, where it is one method's
        mine = [row for row in rows if (row["size"], row["part"]) == (size, part)]
        self.about: dict[str, Any] = next(row["about"] for row in mine if "about" in row)
        self.rows = {(row["what"], row["quantity"]): row for row in mine if "what" in row}

    def whats(self, quantity: str) -> list[str]:
        return [what for what, its in self.rows if its == quantity]

    def has(self, what: str, quantity: str) -> bool:
        return (what, quantity) in self.rows

    def seconds(self, what: str, quantity: str) -> list[float]:
        return self.rows[what, quantity]["seconds"]

    def shown(self, what: str, quantity: str) -> str:
        return f"{statistics.median(self.seconds(what, quantity)):.3g}" if self.has(what, quantity) else "-"

    def times(self, one: tuple[str, str], other: tuple[str, str]) -> str:
        """How many times ``other`` is of ``one``, as text; "-" where one of them was not measured."""
        if one not in self.rows or other not in self.rows:
            return "-"
        return ratio_text(self.seconds(*one), self.seconds(*other))


def ratio_text(one: Sequence[float], other: Sequence[float]) -> str:
    middle, low, high = median_ratio(one, other)
    return f"{middle:.3g}" if len(one) == 1 else f"{middle:.3g} ({low:.3g} to {high:.3g})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _merge(parts: Sequence[_Part]) -> str:
    files, candidates = [], []
    for part in sorted(parts, key=lambda part: METHODS.index(part.name) if part.name in METHODS else len(METHODS)):
        name = part.name
        read = EXPERTS if name not in NO_BASE else 2 if name == "slerp" else EXPERTS
        read += name not in NO_BASE
        experts = 2 if name == "slerp" else EXPERTS
        reads, writes = part.seconds("floor", "read"), part.seconds("floor", "write")
        copies, draws = part.seconds("floor", "copy"), part.seconds("floor", "draws")
        drawn = [experts * seconds * (name in RANDOM) for seconds in draws]
        on_disk = [read * r + w + d for r, w, d in zip(reads, writes, drawn, strict=True)]
        moved = [(read + 1) / 2 * seconds for seconds in copies]  # copying one checkpoint reads one and writes one
        key, peer = (name, "stream"), (name, "mergekit")
        files.append(
            [
                name,
                part.shown(*key),
                part.shown(name, "stream, synced and hashed"),
                part.shown(*peer),
                part.times(peer, key),
                f"{statistics.median(on_disk):.3g}",
                ratio_text(part.seconds(*key), on_disk),
            ]
        )
        first, after = (name, "first candidate"), (name, "next candidate")
        candidates.append(
            [
                name,
                part.shown(*first),
                part.shown(*after),
                part.times(peer, first),
                part.times(peer, after),
                f"{statistics.median(moved):.3g}",
                ratio_text(part.seconds(*after), moved),
            ]
        )
    return "\n\n".join(
        [
            "From folders to a written checkpoint (floor: the files read and one written, plain, and the draws):",
            _table(
                [
                    "method",
                    "ours, s",
                    "synced and hashed, s",
                    "mergekit, s",
                    "mergekit / ours",
                    "floor, s",
                    "ours / floor",
                ],
                files,
            ),
            "Candidates of a search, into a resident bfloat16 model (floor: the bytes at copy bandwidth):",
            _table(
                ["method", "first, s", "next, s", "mergekit / first", "mergekit / next", "floor, s", "next / floor"],
                candidates,
            ),
        ]
    )


def _copy(parts: Sequence[_Part]) -> str:
    (part,) = parts
    rows = []
    for what in part.whats("merge"):
        method, dtype = what.split()
        tensors = EXPERTS + 1 + (method != "linear")  # read and written
        floor = [tensors / 2 * seconds for seconds in part.seconds(dtype, "copy")]
        bandwidth = 2 * part.rows[dtype, "copy"]["bytes"] / statistics.median(part.seconds(dtype, "copy")) / 1e9
        share = median_ratio(floor, part.seconds(what, "merge"))
        rows.append(
            [
                method,
                dtype,
                part.shown(what, "merge"),
                f"{statistics.median(floor):.3g}",
                f"{share[0]:.0%} ({share[1]:.0%} to {share[2]:.0%})",
                f"{bandwidth:.3g}",
            ]
        )
    head = ["method", "stored as", "ours, s", "floor, s", "share of copy bandwidth", "copy, GB/s"]
    return "State dicts in memory, beside copying as many bytes:\n\n" + _table(head, rows)


def _matrices(parts: Sequence[_Part]) -> str:
    (part,) = parts
    rows = [
        [
            _with_steps(what.split()[0], part.rows[what, "ours"].get("steps")),
            what.split(maxsplit=1)[1],
            part.shown(what, "ours"),
            part.shown(what, "fusion-bench"),
            part.times((what, "fusion-bench"), (what, "ours")),
        ]
        for what in part.whats("ours")
    ]
    head = ["method", "matrix", "ours, s", "fusion-bench, s", "fusion-bench / ours"]
    return "Single matrices, four experts in float32:\n\n" + _table(head, rows)


def _with_steps(method: str, steps: int | None) -> str:
    return method if steps is None else f"{method}, {steps} steps in both"


def _many(parts: Sequence[_Part]) -> str:
    (part,) = parts
    rows = []
    for what in part.whats("ours"):
        name, count = what.split()
        seconds = statistics.median(part.seconds(what, "ours"))
        rows.append(
            [
                name,
                count,
                part.shown(what, "ours"),
                f"{seconds / int(count) * 1e6:.0f}",
                f"{part.rows[what, 'ours']['anonymous'] / 1e6:.0f}",
            ]
        )
    head = ["method", "tensors", "ours, s", "microseconds a tensor", "most memory, MB"]
    return "Many small tensors (64 entries, two experts), from folders to a written checkpoint:\n\n" + _table(
        head, rows
    )


def _memory(parts: Sequence[_Part]) -> str:
    (part,) = parts
    layers = sorted({row["layers"] for row in part.rows.values()})
    names = list(dict.fromkeys(what.split()[0] for what in part.whats("memory")))
    rows = []
    for name in names:
        cells = [(f"{name} {n}", "memory") for n in layers]
        rows.append([name, *(f"{part.rows[c]['anonymous'] / 1e6:.0f}" if c in part.rows else "-" for c in cells)])
    head = ["method", *(f"{n} layers, MB" for n in layers)]
    return "The most memory of a merge to disk, the whole process, by the number of layers:\n\n" + _table(head, rows)


SHOWN: dict[str, Callable[[Sequence[_Part]], str]] = {
    "merge": _merge,
    "copy": _copy,
    "matrices": _matrices,
    "many": _many,
    "memory": _memory,
}


def tables(rows: Rows) -> str:
    """All that was measured, a section a size."""
    text = [
        "# What merging costs",
        "Measured by `python benchmarks/merge_methods.py`, which says what and how; each part says when.",
    ]
    for size in dict.fromkeys(row["size"] for row in rows):
        text.append(f"## {size}")
        for name, show in SHOWN.items():
            known = dict.fromkeys(row["part"] for row in rows if row["size"] == size and row["part"].split()[0] == name)
            parts = [_Part(rows, size, part) for part in known]
            if not parts:
                continue
            text.append(show(parts))
            text += ["\n".join(f"- {part.name}: {_about(part.about)}" for part in parts)]
    return "\n\n".join(text) + "\n"


def _about(about: dict[str, Any]) -> str:
    rounds = "one round"
    if about["rounds"] > 1:
        rounds = f"medians of {about['rounds']} rounds (in brackets the smallest and largest of the rounds' own ratios)"
    words = (
        f"{about['date']}, {rounds}, CPU seconds, threads: {about['threads']}, load of the machine at the end "
        f"{about['load']} on {about['cores']} cores, "
        f"Python {about['python']}, torch {about['torch']}."
    )
    words += f" {about['note']}" if "note" in about else ""
    problems = about["problems"]
    if isinstance(problems, str):
        return f"{words} Peers: {problems}."
    return words + "".join(f" Could not be run: {what} ({why})." for what, why in problems.items())
