"""Which items are for search, select and test: disjoint, de-duplicated, exact."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from evomerge.errors import EvaluatorError, nearest

if TYPE_CHECKING:
    from evomerge.evaluation import Item

SPLITS = ("search", "select", "test")


def normalise_text(text: str) -> str:
    """What counts as the same text: Unicode NFKC, no case, every run of white space one space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def assign_splits(items: Sequence[Item], split_spec: Mapping[str, Any], *, seed: int) -> list[Item]:
    """The items of search, select and test, disjoint, task by task; items in no split are left out.

    ``split_spec`` gives for each split either a number of items a task ({search: 48, select: 100, test: 150}), a share
    of the task's items ({search: 0.2, select: 0.3, test: 0.5}), or one of the task's own splits ({search: validation,
    test: test}). Splits that name the same own split divide it evenly; without ``select``, it goes halves with
    ``search``. First, items of a task with the same normalised text are reduced to one: with own splits, the one in
    ``test`` before ``select`` before ``search``. Who goes where is decided by the order of hash(seed, item id);
    ``test`` and ``select`` are filled first, so that they stay the same when more search items are asked for.

    Raises:
        EvaluatorError: the spec is malformed, a split is empty, or a task has too few items (with the counts found).
    """
    kind, spec = _check_split_spec(split_spec)
    by_task: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        by_task[item.task].append(item)
    result, problems = [], []
    for task, all_items in by_task.items():
        rank = {own: r for r, split in enumerate(SPLITS) for own in [spec[split]]} if kind == "own" else {}
        kept = _without_duplicates(all_items, rank, seed)
        counts, pools = _split_sizes(kind, spec, kept)
        found = f"task {task}: {len(kept)} items ({len(all_items) - len(kept)} duplicates aside)"
        if short := [split for split in SPLITS if counts[split] < 1]:
            own = sorted({str(item.own_split) for item in all_items})
            hint = f"; its own splits are {', '.join(own)}" if kind == "own" else ""
            problems.append(f"{found} leave {', '.join(short)} empty{hint}")
            continue
        if kind == "counts" and sum(counts.values()) > len(kept):
            asked = " + ".join(f"{counts[split]} {split}" for split in SPLITS)
            problems.append(f"{found}, but {asked} = {sum(counts.values())} are asked for")
            continue
        taken = {}
        for split in reversed(SPLITS):
            taken[split], pools[split][:] = pools[split][: counts[split]], pools[split][counts[split] :]
        result += [replace(item, split=split) for split in SPLITS for item in taken[split]]
    if problems:
        raise EvaluatorError(
            "the splits do not fit the data:\n  " + "\n  ".join(problems),
            where="evaluate.split",
            remedy="Ask for fewer items, give shares instead of numbers, or give the task more data.",
        )
    return result


def _check_split_spec(split_spec: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    where = "evaluate.split"
    for key in split_spec:
        if key not in SPLITS:
            raise EvaluatorError(f"there is no split {key!r}", where=where, remedy=nearest(str(key), SPLITS))
    spec = dict(split_spec)
    kinds = {int: "counts", float: "shares", str: "own"}
    found = {kinds.get(type(value), "other") for value in spec.values()}
    if found == {"own"} and "search" in spec:
        spec.setdefault("select", spec["search"])
    if missing := [split for split in SPLITS if split not in spec]:
        raise EvaluatorError(f"{', '.join(missing)} is missing", where=where, remedy="Give search, select and test.")
    if len(found) != 1 or "other" in found:
        raise EvaluatorError(
            f"all splits must be numbers of items, or all shares, or all names, but are {spec}", where=where
        )
    kind = found.pop()
    if kind == "counts" and min(spec.values()) < 1:
        raise EvaluatorError(f"each split needs at least one item a task, but is asked for {spec}", where=where)
    if kind == "shares" and not (min(spec.values()) > 0 and sum(spec.values()) <= 1 + 1e-9):
        raise EvaluatorError(f"shares must be above 0 and add up to at most 1, but are {spec}", where=where)
    return kind, spec


def _without_duplicates(items: Sequence[Item], rank: Mapping[str, int], seed: int) -> list[Item]:
    """One item of each text, in the order of hash(seed, id); of several, the one of highest rank, then the first."""
    order = {item.id: hashlib.sha256(f"{seed}:{item.id}".encode()).hexdigest() for item in items}
    best: dict[str, Item] = {}
    for item in sorted(items, key=lambda item: (-rank.get(str(item.own_split), -1), order[item.id])):
        best.setdefault(normalise_text(item.text) or f"id {item.id}", item)
    return sorted(best.values(), key=lambda item: order[item.id])


def _split_sizes(
    kind: str, spec: Mapping[str, Any], kept: Sequence[Item]
) -> tuple[dict[str, int], dict[str, list[Item]]]:
    """How many items each split takes, and from which list (splits may share one; test takes first, search last)."""
    if kind == "own":
        lists = {own: [item for item in kept if item.own_split == own] for own in set(spec.values())}
        sharing = {split: [s for s in reversed(SPLITS) if spec[s] == spec[split]] for split in SPLITS}
        counts = {}
        for split in SPLITS:
            n, parts, turn = len(lists[spec[split]]), len(sharing[split]), sharing[split].index(split)
            counts[split] = n * (turn + 1) // parts - n * turn // parts
        return counts, {split: lists[spec[split]] for split in SPLITS}
    everything = list(kept)
    if kind == "shares":
        ends, total = {}, 0.0
        for split in reversed(SPLITS):
            start, total = total, total + spec[split]
            ends[split] = int(total * len(kept) + 0.5) - int(start * len(kept) + 0.5)
        return ends, dict.fromkeys(SPLITS, everything)
    return dict(spec), dict.fromkeys(SPLITS, everything)
