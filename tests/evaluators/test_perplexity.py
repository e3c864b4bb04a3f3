"""evaluators/perplexity.py against plain transformers."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch

from evomerge.errors import EvaluatorError
from evomerge.evaluation import EvaluatorContext, Outcome, Target, TaskSpec, load_evaluator, task_scores
from evomerge.testing.evaluators import EvaluatorCase, EvaluatorContract

PERPLEXITY = Path(__file__).parents[2] / "evaluators" / "perplexity.py"
SPLIT = {"search": 6, "select": 6, "test": 6}


@pytest.fixture(scope="module")
def target(lora_family: Path) -> Target:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(lora_family / "base", dtype=torch.float32).eval()
    return Target(model, AutoTokenizer.from_pretrained(lora_family / "base"))


def sentence(draw: random.Random) -> str:
    return " ".join(
        "".join(draw.choices("abcdeghiklmnorstuéß", k=draw.randint(2, 6))) for _ in range(draw.randint(2, 9))
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """20 paragraphs of two lines, the same texts as rows, and one text that is longer than the model's context."""
    draw = random.Random(3)
    paragraphs = [f"{sentence(draw)}\n{sentence(draw)}" for _ in range(20)]
    (tmp_path / "law.txt").write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    (tmp_path / "news.jsonl").write_text("\n".join(json.dumps({"body": p, "n": i}) for i, p in enumerate(paragraphs)))
    (tmp_path / "long.txt").write_text(" ".join(sentence(draw) for _ in range(400)), encoding="utf-8")
    return tmp_path


NEWS = {"dataset": {"path": "json", "data_files": "news.jsonl"}, "column": "body"}


def make(folder: Path, metric: str | None = None, **tasks: dict):
    specs = {name: TaskSpec(name, metric=metric, options=options) for name, options in tasks.items()}
    return load_evaluator(str(PERPLEXITY), EvaluatorContext(folder, specs, batch_size=4))


class TestPerplexity(EvaluatorContract):
    @pytest.fixture
    def case(self, folder: Path, target: Target) -> EvaluatorCase:
        return EvaluatorCase(lambda: make(folder, law={"file": "law.txt"}, news=NEWS), target, SPLIT)


def reference(target: Target, text: str) -> float:
    """Nats, token by token: windows of the context length, the later ones with one token of what came before."""
    length = target.model.config.max_position_embeddings
    tokens = target.tokenizer.encode(text)
    total, previous = 0.0, target.tokenizer.bos_token_id
    if previous is None:
        previous = target.tokenizer.eos_token_id
    for start in range(0, len(tokens), length):
        window = tokens[start : start + length]
        first = [previous] if start == 0 else tokens[start + len(window) - length - 1 : start]
        ids = torch.tensor([first + window])[:, -(length + 1) :]
        with torch.no_grad():
            logits = target.model(ids[:, :-1]).logits[0].double().log_softmax(-1)
        total += sum(float(logits[-len(window) + i, token]) for i, token in enumerate(window))
    return total


@pytest.mark.parametrize("file", ["law.txt", "long.txt"])
def test_a_text_is_predicted_as_plain_transformers_predict_it(folder: Path, target: Target, file: str):
    evaluator = make(folder, law={"file": file})
    items = evaluator.load()
    if file == "long.txt":
        assert len(target.tokenizer.encode(items[0].text)) > 2 * target.model.config.max_position_embeddings
    evaluator.prepare(target, items)
    for item, outcome in zip(items, evaluator.evaluate(target, [i.id for i in items]), strict=True):
        size = len(item.text.encode())
        assert outcome.weight == size
        expected = reference(target, item.text) / math.log(2) / size
        assert outcome.values["neg_bits_per_byte"] == pytest.approx(expected, rel=1e-4)


def test_a_score_is_that_of_all_texts_together(folder: Path, target: Target):
    """However the texts are cut into items, bytes weigh the same (line breaks between items aside)."""
    evaluator = make(folder, law={"file": "law.txt"})
    items = evaluator.load()
    evaluator.prepare(target, items)
    outcomes = evaluator.evaluate(target, [i.id for i in items])
    bits = sum(reference(target, i.text) for i in items) / math.log(2)
    (score,) = task_scores(evaluator, items, outcomes).values()
    assert score == pytest.approx(bits / sum(len(i.text.encode()) for i in items), rel=1e-4)
    assert score < 0


class TestNegatedPerplexity(EvaluatorContract):
    @pytest.fixture
    def case(self, folder: Path, target: Target) -> EvaluatorCase:
        return EvaluatorCase(lambda: make(folder, "neg_perplexity", law={"file": "law.txt"}, news=NEWS), target, SPLIT)


@pytest.mark.parametrize(
    ("metric", "count"),
    [
        ("neg_perplexity", lambda text, tokenizer: len(tokenizer.encode(text))),
        ("neg_word_perplexity", lambda text, _: len(text.split())),  # no text here begins or ends with a space
        ("neg_byte_perplexity", lambda text, _: len(text.encode())),
    ],
)
@pytest.mark.parametrize("file", ["law.txt", "long.txt"])
def test_perplexity_is_exp_of_the_mean_over_all_texts(folder: Path, target: Target, file: str, metric: str, count):
    evaluator = make(folder, metric, law={"file": file, "limit": 7})
    items = evaluator.load()
    evaluator.prepare(target, items)
    outcomes = evaluator.evaluate(target, [i.id for i in items])
    totals = [-reference(target, item.text) for item in items]
    counts = [count(item.text.strip(), target.tokenizer) for item in items]
    for outcome, nats, size in zip(outcomes, totals, counts, strict=True):
        assert outcome.values[metric] == pytest.approx(-math.exp(nats / size), rel=1e-3)
    assert not evaluator.is_item_mean("law")
    (score,) = task_scores(evaluator, items, outcomes).values()
    assert score == pytest.approx(-math.exp(sum(totals) / sum(counts)), rel=1e-3)
    if len(items) > 1:  # by Jensen's inequality the mean of perplexities, weighted by size, is another number
        mean = sum(o.values[metric] * size for o, size in zip(outcomes, counts, strict=True)) / sum(counts)
        assert mean < score - 1e-6


def test_a_lower_perplexity_is_a_higher_score(folder: Path, target: Target):
    """And one beyond all numbers is still the lowest rank, not an error."""
    evaluator = make(folder, "neg_perplexity", law={"file": "law.txt"})
    scores = [
        evaluator.aggregate("law", [Outcome("a", {"loglikelihood": nats, "tokens": 2.0})])
        for nats in (-1.0, -2.0, -1e4, -1e6)
    ]
    assert scores[:2] == [pytest.approx(-math.exp(0.5)), pytest.approx(-math.exp(1.0))]
    assert scores == sorted(scores, reverse=True)
    assert math.isfinite(scores[-1])


@pytest.mark.parametrize(
    ("options", "count"), [({}, 20), ({"unit": "line"}, 40), ({"unit": "file"}, 1), ({"limit": 7}, 7)]
)
def test_units(folder: Path, options: dict, count: int):
    items = make(folder, law={"file": "law.txt", **options}).load()
    assert len(items) == count


def test_several_files_and_rows_of_a_data_set(folder: Path):
    texts = {item.text for item in make(folder, law={"file": ["law.txt"]}).load()}
    rows = {item.text for item in make(folder, news=NEWS).load()}
    assert {text.strip() for text in texts} == rows
    assert len(make(folder, law={"file": ["law.txt", "long.txt"]}).load()) == 21


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "exactly one of file and dataset"),
        ({"file": "law.txt", **NEWS}, "exactly one of file and dataset"),
        ({"file": "none.txt"}, "none.txt"),
        ({"file": "empty.txt"}, "no text"),
        ({"file": "law.txt", "unit": "page"}, "paragraph, line, file"),
        ({"flie": "law.txt"}, "'flie'"),
        ({**NEWS, "column": "boody"}, "'boody'"),
    ],
    ids=str,
)
def test_what_is_refused(folder: Path, options: dict, words: str):
    (folder / "empty.txt").write_text("\n \n\n")
    with pytest.raises(EvaluatorError, match=words):
        make(folder, law=options).load()


def test_changed_texts_are_noticed(folder: Path):
    before = make(folder, law={"file": "law.txt"}).fingerprint()
    (folder / "law.txt").write_text((folder / "law.txt").read_text() + "\n\nAnd more.")
    after = make(folder, law={"file": "law.txt"}).fingerprint()
    assert {key for key in before if before[key] != after[key]} == {"texts"}


def test_another_metric_is_refused(folder: Path):
    with pytest.raises(EvaluatorError, match=r"no metric 'perplexity'[\s\S]*neg_perplexity"):
        make(folder, "perplexity", law={"file": "law.txt"})
