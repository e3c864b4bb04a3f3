"""What the experiments' build.py share: packages' files, whole folders, heads, training, the table of plain merges."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments"))

import building
from building import Deck, Training


def test_files_of_packages_are_found_and_a_missing_package_names_the_remedy():
    (found,) = building.package_file("scikit-learn", "/digits.csv.gz")
    assert found.is_file()
    with pytest.raises(SystemExit, match=r"pip install --no-deps nothing-of-this-name==1\.0"):
        building.package_file("nothing-of-this-name==1.0", ".txt")


def test_a_missing_step_is_named(tmp_path):
    building.need(tmp_path, "base")
    with pytest.raises(SystemExit, match=r"build\.py base"):
        building.need(tmp_path / "base", "base")


def test_folders_are_replaced_as_a_whole_or_left_as_they_were(tmp_path):
    folder = tmp_path / "made"
    for name in ("old", "new"):
        with building.whole_folder(folder) as temporary:
            (temporary / name).write_text("x")
        assert [f.relative_to(tmp_path).as_posix() for f in sorted(tmp_path.rglob("*"))] == ["made", f"made/{name}"]
    with pytest.raises(ValueError, match="half"), building.whole_folder(folder) as temporary:
        (temporary / "other").write_text("x")
        raise ValueError("half")
    assert [f.name for f in sorted(tmp_path.rglob("*"))] == ["made", "new"]


def test_heads_hold_their_classes_in_the_rows_order(tmp_path):
    path = tmp_path / "heads" / "made.safetensors"
    weight = torch.arange(6.0).reshape(3, 2).T  # not contiguous, which safetensors would refuse
    building.save_head({"weight": weight}, ["b", "a"], path)
    assert [f.name for f in path.parent.iterdir()] == ["made.safetensors"]
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["labels"]) == ["b", "a"]
        assert torch.equal(file.get_tensor("weight"), weight)


def test_a_deck_goes_round_and_depends_on_its_seed_alone():
    one, again, other = Deck(10, 1), Deck(10, 1), Deck(10, 2)
    drawn = [one.take(4) for _ in range(5)]
    assert drawn == [again.take(4) for _ in range(5)] != [other.take(4) for _ in range(5)]
    assert Counter(i for batch in drawn for i in batch) == dict.fromkeys(range(10), 2)
    assert Counter(Deck(3, 0).take(9)) == dict.fromkeys(range(3), 3), "more than there are"


def test_optimising_finds_the_minimum_of_a_parabola_and_reports_on_the_way():
    x = torch.zeros(2, requires_grad=True)
    target = torch.tensor([1.0, -2.0])
    lines: list[str] = []

    def loss() -> torch.Tensor:
        return ((x - target) ** 2).sum()

    building.optimise([x], loss, Training(300, 1, 0.05), lines.append)
    torch.testing.assert_close(x.detach(), target, atol=1e-2, rtol=0)
    assert [line.split()[1] for line in lines] == [f"{step}/300" for step in range(30, 301, 30)]
    losses = [float(line.split()[3]) for line in lines]
    assert losses[-1] < 1e-3 < losses[0]


def test_the_table_has_base_experts_average_and_the_given_coefficients(capsys):
    """Two tasks on one number: an answer is right where the number is at least the item's threshold."""
    model = torch.nn.Linear(1, 1, bias=False)
    model.load_state_dict({"weight": torch.ones(1, 1)})
    experts = {name: {"weight": torch.full((1, 1), value)} for name, value in {"a": 3.0, "b": 7.0}.items()}
    thresholds = {"a": [0, 2, 4, 6], "b": [1, 5, 9, 13]}

    def right(task: str) -> list[bool]:
        return [model.weight.item() >= threshold for threshold in thresholds[task]]

    building.print_accuracies(model, experts, [1.0], right)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["model", "a", "b", "mean"]
    numbers = {row[0]: [float(cell.split()[0]) for cell in row[1:]] for row in rows[2:]}
    assert numbers == {  # base 1, experts 3 and 7: the average is 1 + (2 + 6) / 2 = 5, the sum 1 + 2 + 6 = 9
        "base": [0.25, 0.25, 0.25],
        "expert a": [0.5, 0.25, 0.375],
        "expert b": [1.0, 0.5, 0.75],
        "uniform 0.5": [0.75, 0.5, 0.625],
        "uniform 1": [1.0, 0.75, 0.875],
    }
    assert "0.250 (0.046-0.699)" in rows[2][1], "Wilson's interval for 1 of 4"
