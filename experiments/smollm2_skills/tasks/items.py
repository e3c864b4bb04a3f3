"""Where the lm-eval tasks of this folder get their items: the files that build.py's step `data` has written."""

import json
from pathlib import Path

import datasets

DATA = Path(__file__).resolve().parent.parent / "cache" / "data"


def load(skill: str, **_unused) -> datasets.DatasetDict:
    """The splits `eval` and `fewshot` of one skill (lm-eval's `custom_dataset`; metadata comes along, unused).

    No data set cache and no working directory are involved, so the folder may be moved, and many workers may load at
    once.
    """
    splits = {}
    for split in ("eval", "fewshot"):
        path = DATA / skill / f"{split}.jsonl"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there. Run: python {DATA.parent.parent / 'build.py'} data")
        with path.open(encoding="utf-8") as lines:
            splits[split] = datasets.Dataset.from_list([json.loads(line) for line in lines])
    return datasets.DatasetDict(splits)
