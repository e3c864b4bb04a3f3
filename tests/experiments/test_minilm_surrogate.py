"""The surrogate of minilm_topics: what the committed recording is worth, and the regression on made data."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import spearmanr

from evomerge.planning import build_plan
from evomerge.pools import Job
from evomerge.progress import Progress
from evomerge.spec import load_spec
from evomerge.testing import tiny
from evomerge.worker import Worker

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "minilm_topics"
sys.path.insert(0, str(FOLDER))

import record  # noqa: E402
import surrogate as made_of  # noqa: E402
from surrogate import Surrogate  # noqa: E402


@pytest.fixture(scope="module")
def surrogate() -> Surrogate:
    return Surrogate.load()


# --- the committed recording ------------------------------------------------------------------------------------------


def test_the_recording_is_small_and_has_the_items_it_says(surrogate: Surrogate):
    assert made_of.RECORDING.stat().st_size < 2e6
    assert surrogate.points.min() >= 0
    assert surrogate.points.max() <= 1
    assert np.isfinite(surrogate.margins).all()
    for part, items in {"search": 30, "select": 30, "held": 40}.items():
        for task in ("news", "groups", "wire", "comments", "tweets"):
            assert ((surrogate.parts == part) & (surrogate.tasks == task)).sum() == items


def test_recorded_merges_have_their_recorded_outcomes(surrogate: Surrogate):
    predicted = surrogate.predict(surrogate.points)
    assert ((predicted > 0) == (surrogate.margins > 0)).mean() > 0.99
    for part, scores in surrogate.scores(surrogate.points).items():
        recorded = (surrogate.margins[:, surrogate.parts == part] > 0).mean(axis=1)
        assert np.abs(scores - recorded).max() < 0.02


def test_unseen_merges_are_predicted_well(surrogate: Surrogate):
    """Each merge from a regression on the others: the bounds that docs/searchers.md states."""
    predicted, true = surrogate.held_out()
    assert ((predicted > 0) == (true > 0)).mean() > 0.96
    for part in made_of.PARTS:
        guess, score = ((m[:, surrogate.parts == part] > 0).mean(axis=1) for m in (predicted, true))
        assert np.sqrt(((guess - score) ** 2).mean()) < 0.02
        assert spearmanr(guess, score).statistic > 0.9
        best = np.argsort(-score)[: len(score) // 4]
        assert abs((guess - score)[best].mean()) < 0.01


def test_loading_twice_gives_the_same_numbers(surrogate: Surrogate):
    points = np.random.default_rng(0).random((20, len(surrogate.dimensions)))
    assert np.array_equal(surrogate.predict(points), Surrogate.load().predict(points))


@pytest.mark.parametrize(("granularity", "dimensions"), [("task", 5), ("layer_groups", 15)])
def test_points_of_both_spaces_have_a_score(surrogate: Surrogate, granularity: str, dimensions: int):
    space = made_of.make_space(surrogate.dimensions, granularity)
    assert len(space.dimensions) == dimensions
    values = np.linspace(0, 1, dimensions)
    point = space.at(values.tolist())
    expected = np.repeat(values, 3) if granularity == "task" else values
    assert surrogate.shares(point) == pytest.approx(expected)
    right = surrogate.predict(expected[None])[0] > 0
    assert surrogate.score(point) == pytest.approx(
        {part: right[surrogate.parts == part].mean() for part in ("search", "select", "held")}
    )


# --- the regression ---------------------------------------------------------------------------------------------------


def test_the_kernel_is_its_formula():
    generator = np.random.default_rng(1)
    a, b, scales = generator.random((3, 4)), generator.random((2, 4)), generator.random(4)
    values = made_of.kernel(a, b, scales, 0.3)
    for i in range(3):
        for j in range(2):
            near = np.exp(-0.5 * sum((scales[k] * (a[i, k] - b[j, k])) ** 2 for k in range(4)))
            bent = (1 + sum((a[i, k] - 0.5) * (b[j, k] - 0.5) for k in range(4))) ** 2
            assert values[i, j] == pytest.approx(near + 0.3 * bent)


def test_leave_one_out_is_what_leaving_one_out_gives():
    generator = np.random.default_rng(2)
    x, y = generator.random((12, 3)), generator.standard_normal((12, 2))
    gram = made_of.kernel(x, x, np.ones(3), 0.1) + 0.05 * np.eye(12)
    residuals = made_of.leave_one_out(torch.tensor(gram), torch.tensor(y)).numpy()
    for i in range(12):
        rest = np.arange(12) != i
        guess = gram[i, rest] @ np.linalg.solve(gram[np.ix_(rest, rest)], y[rest])
        assert residuals[i] == pytest.approx(y[i] - guess)


def test_fitting_finds_which_dimension_matters_and_predicts_what_it_has_not_seen():
    generator = np.random.default_rng(3)

    def truth(x: np.ndarray) -> np.ndarray:
        return np.stack([np.sin(5 * x[:, 0]), x[:, 0] ** 2 - 0.3], axis=1)

    x, new = generator.random((60, 3)), generator.random((40, 3))
    scales, bend, ridge = made_of.fit(x, truth(x))
    assert scales[0] > 2 * max(scales[1:])
    ones = np.array(["held", "held"])
    learned = Surrogate(x, truth(x), ones, ones, ("a", "b", "c"), scales, bend, ridge)
    assert np.abs(learned.predict(new) - truth(new)).max() < 0.05


# --- recording --------------------------------------------------------------------------------------------------------


class Stub:
    """Margins of 20 items from a formula, in place of models."""

    def margins(self, members: np.ndarray) -> np.ndarray:
        return 1 - 3 * ((members - 0.7) ** 2).mean(axis=(1, 2))[:, None] - np.linspace(0, 1, 20)


def test_families_share_their_lower_groups():
    for n in range(6):
        members = record.family(n)
        assert members.shape == (6, 5, 3)
        assert members.min() >= 0
        assert members.max() <= 1.5
        assert np.array_equal(members, record.family(n))
        assert (members[0] == members[0][:, :1]).all(), "the first has the same weights in all layers"
        assert (members[:, :, 0] == members[0, :, 0]).all()
        for top in record.TOP:
            assert (members[list(top), :, 1] == members[top[0], :, 1]).all()
        assert len({tuple(member.ravel()) for member in members}) == 6


def test_recording_goes_on_where_it_stopped(tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    monkeypatch.setattr(record, "RECORDS", whole)
    record.run(6, float("inf"), Stub)
    once = record.read_records()
    monkeypatch.setattr(record, "RECORDS", parts)
    with pytest.raises(SystemExit, match="before family 0 of 6"):
        record.run(6, -1, Stub)
    assert len(record.read_records()[0]) == 0
    for families in (2, 5, 6, 6):
        record.run(families, float("inf"), Stub)
    (parts / "0003.npz").unlink()
    assert len(record.read_records()[0]) == 3 * 6
    record.run(6, float("inf"), Stub)
    for one, other in zip(once, record.read_records(), strict=True):
        assert np.array_equal(one, other)
    assert once[0].shape == (36, 15)
    assert once[1].shape == (36, 20)


@pytest.mark.slow
def test_recorded_margins_are_the_evaluators(tmp_path, monkeypatch):
    """Shared activations without padding, against a merge by evomerge, scored by evaluators/classification.py."""
    family = tiny_experiment(tmp_path)
    monkeypatch.setattr(record, "FOLDER", tmp_path)
    monkeypatch.setattr(record, "SPLIT", {"search": 4, "select": 6, "test": 4})
    monkeypatch.setattr(record, "SELECT", 3)
    recorder = record.Recorder()
    margins = recorder.margins(family)
    spec = load_spec(tmp_path / "experiment.yaml")
    space = {"method": "task_arithmetic", "weights": {"granularity": "layer_groups", "groups": 3, "range": [0.0, 1.5]}}
    split = spec.evaluate.model_copy(update={"split": record.SPLIT})
    plan = build_plan(spec.model_copy(update={"space": space, "evaluate": split}), Progress())
    worker = Worker(plan.worker)
    names = [d.name for d in plan.space.dimensions]
    for member, row in zip(family, margins, strict=True):
        recipe = plan.space.decode(dict(zip(names, map(float, member.ravel()), strict=True)))
        result = worker.evaluate(Job("one", 1, recipe.to_dict(), tuple(item.id for item in recorder.items)))
        assert row == pytest.approx([o.values["margin"] for o in result.outcomes], abs=1e-3)
    assert np.ptp(margins, axis=0).max() > 0.01, "merges differ"
    assert recorder.parts.count("search") == 4 * 5
    assert recorder.parts.count("held") == 3 * 5


def tiny_experiment(folder: Path) -> np.ndarray:
    """The experiment's file with a tiny encoder of six layers and made texts; returns a family of merges."""
    from transformers import BertConfig, BertModel

    shutil.copy(FOLDER / "experiment.yaml", folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tiny.tokenizer()), hidden_size=32, num_hidden_layers=6, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=128, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False)
    names = ("news", "groups", "wire", "comments", "tweets")
    for name in ("base", *(f"experts/{name}" for name in names)):
        model.save_pretrained(folder / "cache" / name)
        tiny.tokenizer().save_pretrained(folder / "cache" / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    generator = np.random.default_rng(0)
    for name in names:
        data = folder / "cache" / "data" / name / "eval.jsonl"
        data.parent.mkdir(parents=True)
        texts = ["".join(generator.choice(list("abcdefgh "), size=generator.integers(3, 40))) for _ in range(40)]
        data.write_text("".join(json.dumps({"text": t, "label": n % 3}) + "\n" for n, t in enumerate(texts)))
        (folder / "cache" / "heads").mkdir(exist_ok=True)
        save_file({"weight": torch.randn(3, 32)}, folder / "cache" / "heads" / f"{name}.safetensors")
    return record.family(1)
