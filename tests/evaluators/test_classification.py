"""evaluators/classification.py on a tiny text encoder and a tiny vision transformer, against plain transformers."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from sklearn import metrics

from evomerge.errors import EvaluatorError
from evomerge.evaluation import EvaluatorContext, Target, TaskSpec, load_evaluator, task_scores
from evomerge.plugins import load_module
from evomerge.testing import tiny
from evomerge.testing.evaluators import EvaluatorCase, EvaluatorContract

CLASSIFICATION = Path(__file__).parents[2] / "evaluators" / "classification.py"
SPLIT = {"search": 10, "select": 10, "test": 10}
WIDTH = 32
CLASSES = ["sport", "politics", "tech"]


@pytest.fixture(scope="module")
def texts() -> Target:
    from transformers import BertConfig, BertModel

    tokenizer = tiny.tokenizer()
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=128, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return Target(BertModel(config).eval(), tokenizer)


@pytest.fixture(scope="module")
def images() -> Target:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(2)
    config = ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=8, patch_size=4,
        num_channels=1, initializer_range=0.3,
    )  # fmt: skip
    return Target(ViTModel(config, add_pooling_layer=False).eval(), None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw, generator = random.Random(4), np.random.default_rng(4)
    rows = [
        {"text": "".join(draw.choices("abcdefgh ", k=draw.randint(3, 40))), "label": draw.choice(CLASSES)}
        for _ in range(40)
    ]
    (tmp_path / "topic.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    numbered = [{**row, "label": CLASSES.index(row["label"])} for row in rows]
    (tmp_path / "numbered.jsonl").write_text("\n".join(json.dumps(row) for row in numbered))
    pixels = generator.integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "digits.npz", images=pixels, labels=generator.integers(0, 3, 40))
    torch.manual_seed(3)
    save_file({"weight": torch.randn(3, WIDTH), "bias": torch.randn(3)}, tmp_path / "head.safetensors")
    save_file({"weight": torch.randn(3, WIDTH)}, tmp_path / "plain.safetensors")
    return tmp_path


TOPIC = {"file": "topic.jsonl", "head": "head.safetensors", "labels": CLASSES}
DIGITS = {"file": "digits.npz", "head": "plain.safetensors", "mean": [0.5], "std": [0.25]}


def make(folder: Path, metric: str | None = None, **tasks: dict):
    specs = {name: TaskSpec(name, metric=metric, options=options) for name, options in tasks.items()}
    return load_evaluator(str(CLASSIFICATION), EvaluatorContext(folder, specs, batch_size=4))


class TestTexts(EvaluatorContract):
    @pytest.fixture
    def case(self, folder: Path, texts: Target) -> EvaluatorCase:
        other = {"file": "numbered.jsonl", "head": "plain.safetensors", "normalize": True, "pooling": "first"}
        return EvaluatorCase(lambda: make(folder, topic=TOPIC, other=other), texts, SPLIT)


class TestImages(EvaluatorContract):
    @pytest.fixture
    def case(self, folder: Path, images: Target) -> EvaluatorCase:
        return EvaluatorCase(lambda: make(folder, digits=DIGITS), images, SPLIT)


def outcomes_of(evaluator, target: Target):
    items = evaluator.load()
    evaluator.prepare(target, items)
    return items, evaluator.evaluate(target, [item.id for item in items])


def check(outcome, logits: torch.Tensor, label: int) -> None:
    """An outcome against logits (classes,) that were computed for that item alone."""
    probabilities = logits.double().softmax(0)
    wrong = max(float(value) for k, value in enumerate(logits) if k != label)
    expected = {
        "acc": float(int(logits.argmax()) == label),
        "loglikelihood": float(probabilities[label].log()),
        "margin": float(logits[label]) - wrong,
        "neg_entropy": float((probabilities * probabilities.log()).sum()),
        "label": label,
        "prediction": int(logits.argmax()),
    }
    assert outcome.values == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("pooling", "normalize"), [("mean", False), ("first", True), ("pooler", False)])
def test_texts_one_by_one_without_padding(folder: Path, texts: Target, pooling: str, normalize: bool):
    evaluator = make(folder, topic={**TOPIC, "pooling": pooling, "normalize": normalize})
    from safetensors.torch import load_file

    tensors = load_file(folder / "head.safetensors")
    for item, outcome in zip(*outcomes_of(evaluator, texts), strict=True):
        with torch.no_grad():
            output = texts.model(**texts.tokenizer(item.text, return_tensors="pt"))
        features = {
            "mean": output.last_hidden_state[0].mean(0),
            "first": output.last_hidden_state[0, 0],
            "pooler": output.pooler_output[0],
        }[pooling]
        if normalize:
            features = features / features.norm()
        check(outcome, tensors["weight"] @ features + tensors["bias"], item.data["label"])


@pytest.mark.parametrize(("pooling", "normalize"), [("mean", False), ("first", True), ("pooler", False)])
def test_predictions_of_a_padded_batch(folder: Path, texts: Target, pooling: str, normalize: bool):
    """Logits and pooled features against plain transformers, a text at a time."""
    evaluator = make(folder, topic={**TOPIC, "pooling": pooling, "normalize": normalize})
    from safetensors.torch import load_file

    head = load_file(folder / "head.safetensors")
    items = evaluator.load()[:7]
    evaluator.prepare(texts, items)
    with torch.no_grad():
        found = evaluator.predictions(texts, [item.id for item in items], labels=True, hidden=True)
    assert found.hidden is not None and found.right is not None and found.hidden_weights is not None
    assert found.right.tolist() == [item.data["label"] for item in items]
    assert found.weights.tolist() == found.hidden_weights.tolist() == [1] * 7
    for n, item in enumerate(items):
        with torch.no_grad():
            output = texts.model(**texts.tokenizer(item.text, return_tensors="pt"))
        features = {
            "mean": output.last_hidden_state[0].mean(0),
            "first": output.last_hidden_state[0, 0],
            "pooler": output.pooler_output[0],
        }[pooling]
        torch.testing.assert_close(found.hidden[n], features, rtol=1e-4, atol=1e-5)
        features = features / features.norm() if normalize else features
        torch.testing.assert_close(found.logits[n], head["weight"] @ features + head["bias"], rtol=1e-4, atol=1e-4)


def test_images_one_by_one(folder: Path, images: Target):
    from safetensors.torch import load_file

    weight = load_file(folder / "plain.safetensors")["weight"]
    pixels = np.load(folder / "digits.npz")["images"]
    for item, outcome in zip(*outcomes_of(make(folder, digits=DIGITS), images), strict=True):
        image = (torch.from_numpy(pixels[item.data["image"]]).float() / 255 - 0.5) / 0.25
        with torch.no_grad():
            features = images.model(image[None]).last_hidden_state[0, 0]
        check(outcome, weight @ features, item.data["label"])


def test_words_and_numbers_are_the_same_labels(folder: Path, texts: Target):
    words = outcomes_of(make(folder, topic=TOPIC), texts)[1]
    numbers = outcomes_of(make(folder, topic={**TOPIC, "file": "numbered.jsonl"}), texts)[1]
    assert [o.values for o in words] == [o.values for o in numbers]


def test_a_head_may_name_its_classes(folder: Path, texts: Target):
    from safetensors.torch import load_file

    tensors = load_file(folder / "head.safetensors")
    save_file(tensors, folder / "named.safetensors", metadata={"labels": json.dumps(CLASSES)})
    by_task = outcomes_of(make(folder, topic=TOPIC), texts)[1]
    alone = {"file": "topic.jsonl", "head": "named.safetensors"}
    assert [o.values for o in outcomes_of(make(folder, topic=alone), texts)[1]] == [o.values for o in by_task]
    make(folder, topic={**alone, "labels": CLASSES}).load()
    with pytest.raises(EvaluatorError, match="but its head"):
        make(folder, topic={**alone, "labels": CLASSES[::-1]}).load()
    for wrong in ("sport", json.dumps(CLASSES[:2])):
        save_file(tensors, folder / "wrong.safetensors", metadata={"labels": wrong})
        with pytest.raises(EvaluatorError, match="a name a class"):
            make(folder, topic={**alone, "head": "wrong.safetensors"}).load()


@pytest.mark.parametrize("metric", ["acc", "macro_f1", "mcc", "margin"])
def test_scores(folder: Path, texts: Target, metric: str):
    evaluator = make(folder, metric, topic=TOPIC)
    items, outcomes = outcomes_of(evaluator, texts)
    labels, guesses = ([o.values[key] for o in outcomes] for key in ("label", "prediction"))
    assert len(set(guesses)) > 1  # a head that says one thing only would make all of this empty
    expected = {
        "acc": metrics.accuracy_score(labels, guesses),
        "macro_f1": np.mean([metrics.f1_score(labels, guesses, labels=[k], average="macro") for k in range(3)]),
        "mcc": metrics.matthews_corrcoef(labels, guesses),
        "margin": np.mean([o.values["margin"] for o in outcomes]),
    }
    assert task_scores(evaluator, items, outcomes)["topic"] == pytest.approx(expected[metric])
    assert evaluator.is_item_mean("topic") == (metric in ("acc", "margin"))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30))
def test_f1_and_correlation_are_scikit_learns(pairs: list[tuple[int, int]]):
    module = load_module(CLASSIFICATION)
    labels, guesses = zip(*pairs, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        f1 = metrics.f1_score(labels, guesses, average="macro", zero_division=0)
        correlation = metrics.matthews_corrcoef(labels, guesses)
    assert module.macro_f1(np.array(pairs)) == pytest.approx(f1, abs=1e-12)
    assert module.matthews(np.array(pairs)) == pytest.approx(correlation, abs=1e-12)


def test_only_the_first_items_within_the_limit(folder: Path):
    assert len(make(folder, topic={**TOPIC, "limit": 12}).load()) == 12


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head": "topic.jsonl"}, "is no head"),
        ({"head": "none.safetensors"}, "none.safetensors"),
        ({"file": "none.jsonl"}, "none.jsonl"),
        ({"labels": ["sport", "politics"]}, "'tech' is not among"),
        ({"labels": None}, "whole number"),
        ({"labels": ["none", *CLASSES]}, "0 to 2"),
        ({"pooling": "max"}, "mean, first, pooler"),
        ({"heads": "x"}, "'heads'"),
        ({"file": "broken.jsonl"}, "line 2"),
        ({"file": "flat.npz"}, "channels"),
    ],
    ids=str,
)
def test_what_is_refused(folder: Path, options: dict, words: str):
    (folder / "broken.jsonl").write_text('{"text": "a", "label": "tech"}\n{"text": "b"}\n')
    np.savez(folder / "flat.npz", images=np.zeros((4, 8, 8)), labels=np.zeros(4, dtype=int))
    with pytest.raises(EvaluatorError, match=words):
        make(folder, topic={**TOPIC, **options}).load()


def test_a_head_of_another_width_is_refused(folder: Path, texts: Target):
    save_file({"weight": torch.zeros(3, WIDTH + 1)}, folder / "wide.safetensors")
    with pytest.raises(EvaluatorError, match="33 features"):
        outcomes_of(make(folder, topic={**TOPIC, "head": "wide.safetensors"}), texts)


def test_changed_data_and_heads_are_noticed(folder: Path):
    before = make(folder, topic=TOPIC).fingerprint()
    for name in ("topic.jsonl", "head.safetensors"):
        path = folder / name
        path.write_bytes(path.read_bytes() + b" ")
        after = make(folder, topic=TOPIC).fingerprint()
        assert [key for key in before if before[key] != after[key]] == [name]
        before = after
