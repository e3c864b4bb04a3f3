"""benchmarks/gradient_table.py: what its rows may cost, that they can be run, and that the page says what was found."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from evomerge.spec import Spec

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gradient_table as table  # noqa: E402

FAMILIES = {family.name: family for family in table.FAMILIES}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_every_row_is_an_experiment(family: table.Family, tmp_path: Path):
    for folder in (family.file["base"], *family.file["experts"].values()):  # which its build.py makes
        (tmp_path / folder).mkdir(parents=True)
    names = set()
    for row in table.rows_for(family):
        for seed in table.SEEDS:
            data = table.experiment(family, row, seed)
            names.add(data["name"])
            assert Spec.from_dict(data, tmp_path).seed == seed
    assert len(names) == len(table.SEEDS) * len(table.rows_for(family))  # so that no two share a study


def test_equal_passes_by_hand():
    """4 tasks x 16 items x (1 forward + a backward pass that counts 2) x 300 steps, and 7 candidates on 480 items."""
    family = FAMILIES["vit_images"]
    assert family.passes == 300 * 192 + 7 * 480 == 60_960
    search = table.experiment(family, "cma, an expert, at equal passes", 0)["search"]
    assert search["budget"] == 127  # x 480 items = 60,960


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_a_hybrid_has_no_more_passes_than_a_descent(family: table.Family):
    search = table.experiment(family, "hybrid of cross entropy, a tensor", 0)["search"]
    steps = search["steps"] + search["refine"]
    # A product is the difference of two gradients, each on product_batch items of every task.
    gradients = steps * search["batch"] + 2 * search["products"] * search["product_batch"]
    tasks = len(family.file["evaluate"]["tasks"])
    passes = 3 * gradients * tasks + search["budget"] * family.searched
    assert passes <= family.passes
    assert passes > 0.9 * family.passes - family.searched
    assert search["candidates"] < search["budget"] <= search["candidates"] + steps // search["every"] + 1


def test_the_page_is_what_the_results_say():
    text = table.PAGE.read_text(encoding="utf-8")
    between = text.partition(table.BEGIN)[2].partition(table.END)[0]
    assert between == "\n" + table.page(table.Results(table.RESULTS, keys=("family", "row", "seed")).rows)


def test_seeds_are_counted_and_their_scores_averaged():
    def row(seed: int, score: float, difference: list[float]) -> dict:
        return {"family": "vit_images", "row": "cross entropy, a tensor", "seed": seed, "test": [score, None, None],
                "difference": difference, "dimensions": 280, "trials": 7, "searching": 10.0 * seed}  # fmt: skip

    rows = [
        row(0, 0.7, [0.02, 0.01, 0.03, 0.01]),
        row(1, 0.6, [0.0, -0.01, 0.01, 0.9]),
        row(2, 0.8, [-0.05, -0.1, -0.01, 0.01]),
    ]
    line = next(line for line in table.page(rows).splitlines() if line.startswith("| cross entropy"))
    assert line == "| cross entropy, a tensor | 280 | 7 | 10 | .700 [.600, .800] | -.010 | 1, 1, 1 |"
