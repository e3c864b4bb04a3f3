"""The engine: against one plain forward pass a sequence, in float64 where it matters."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomerge import scoring
from evomerge.errors import CandidateError, EvaluatorError
from evomerge.questions import Questionnaire, batch_layout, covering, encode_pair, max_length, rolling_windows
from evomerge.scoring import Question, generate, loglikelihoods
from evomerge.testing import tiny

TOLERANCE = 1e-5  # nats a token, float32 against float64


def load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=["llama", "mixtral", "sliding window", "no cache"])
def model_and_tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    config = {
        "llama": tiny.llama_config,
        "mixtral": tiny.mixtral_config,
        "sliding window": lambda: tiny.mixtral_config(sliding_window=6),  # shorter than the contexts
        "no cache": tiny.llama_config,
    }[request.param]()
    model, tokenizer = load(tiny.save_model(tmp_path_factory.mktemp("model") / "base", config, seed=3))
    if request.param == "no cache":  # as architectures whose memory of a context rows cannot share
        model._is_stateful = True
    return model, tokenizer


@pytest.fixture(scope="module")
def llama(lora_family: Path) -> tuple[Any, Any]:
    return load(lora_family / "base")


def reference(model: Any, context: tuple[int, ...], continuation: tuple[int, ...]) -> tuple[float, bool]:
    """log p(continuation | context) and greediness from one forward pass over the two, without padding or cache."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context + continuation])).logits[0].double()
    logp = torch.log_softmax(logits, -1)[len(context) - 1 : -1]
    target = torch.tensor(continuation)
    return logp.gather(1, target[:, None]).sum().item(), bool((logp.argmax(-1) == target).all())


def random_questions(seed: int, n: int, *, most_choices: int = 5) -> list[Question]:
    draw = random.Random(seed)

    def tokens(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 98) for _ in range(draw.randint(least, most)))

    return [
        Question(tokens(1, 30), tuple(tokens(1, 6) for _ in range(draw.randint(1, most_choices)))) for _ in range(n)
    ]


def test_loglikelihoods_are_those_of_plain_forward_passes(model_and_tokenizer):
    model, _ = model_and_tokenizer
    questions = random_questions(0, 12)
    greedy = Question((5, 6, 7), ((1,), (8, 9)))
    with torch.no_grad():
        best = int(model(input_ids=torch.tensor([greedy.context])).logits[0, -1].argmax())
    questions.append(Question(greedy.context, ((best,), (8, 9), (best, 4), (best, 5))))
    answers = loglikelihoods(model, questions)
    for question, scores in zip(questions, answers, strict=True):
        for continuation, score in zip(question.continuations, scores, strict=True):
            value, is_greedy = reference(model, question.context, continuation)
            assert score.loglikelihood == pytest.approx(value, abs=TOLERANCE * len(continuation))
            assert score.is_greedy == is_greedy
    assert answers[-1][0].is_greedy


def test_choices_of_one_token_need_one_forward_pass(llama):
    model, _ = llama
    widths = []
    hook = model.register_forward_pre_hook(
        lambda _module, _args, given: widths.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    try:
        loglikelihoods(model, [Question((4, 5, 6), ((7,), (8,), (9,))), Question((4, 5), ((7,), (8,)))])
        assert widths == [(2, 3)]
        widths.clear()
        loglikelihoods(model, [Question((4, 5, 6), ((7, 1), (7, 2), (9, 9, 9), (3,)))])
        assert widths == [(1, 3), (2, 2)], "continuations with the same beginning share a row"
    finally:
        hook.remove()


def test_positions_are_those_of_plain_forward_passes(model_and_tokenizer):
    """Logits and last hidden states of padded sequences, some of which begin others, in float64."""
    model = copy.deepcopy(model_and_tokenizer[0]).double()
    model.set_experts_implementation("eager")  # the grouped product knows no float64
    draw = random.Random(4)
    requests = [(tuple(draw.randrange(3, 98) for _ in range(n)), draw.randint(1, n)) for n in (1, 3, 9, 9, 17, 30)]
    whole = requests[4][0]
    requests += [(whole[:-2], 1), (whole, 3), (whole, 5), (whole[:-1], 3)]
    found = scoring.positions(model, requests, hidden=True)
    assert found.hidden is not None
    with torch.no_grad():
        for (tokens, keep), of in zip(requests, found.of, strict=True):
            alone = model(input_ids=torch.tensor([tokens]), output_hidden_states=True)
            torch.testing.assert_close(found.logits[of], alone.logits[0, -keep:], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(found.hidden[of], alone.hidden_states[-1][0, -keep:], rtol=1e-9, atol=1e-9)
    assert scoring.positions(model, requests[:2]).hidden is None


def test_sequences_that_begin_another_need_no_row_and_no_logits_are_wasted(llama):
    """The head, with its large vocabulary, sees as many positions a row as the longest answer has tokens."""
    model, _ = llama
    shapes = []
    hooks = [
        model.register_forward_pre_hook(lambda _m, _a, g: shapes.append(tuple(g["input_ids"].shape)), with_kwargs=True),
        model.lm_head.register_forward_pre_hook(lambda _m, given: shapes.append(tuple(given[0].shape))),
    ]
    context = (4, 5, 6, 7, 8)
    try:
        # the answers 1, 2 and 9 1 to a context: two rows would do for three; 9 1 begins with the context and goes on
        found = scoring.positions(model, [(context, 1), (context, 1), ((*context, 9), 2)])
        assert shapes == [(1, 6), (1, 2, model.config.hidden_size)]
        assert [of.tolist() for of in found.of] == [[0], [0], [0, 1]]
        shapes.clear()
        # a prompt that another prompt happens to begin with, far from its end, is a row of its own
        found = scoring.positions(model, [((4,), 1), (context, 1)])
        assert shapes == [(2, 5), (2, 1, model.config.hidden_size)]
        assert len(found.logits) == 2
    finally:
        for hook in hooks:
            hook.remove()


def test_gradients_through_padding_are_those_of_each_sequence_alone(llama):
    model = copy.deepcopy(llama[0]).double()
    parameters = list(model.parameters())
    requests = [((5, 6, 7, 8), 2), ((9, 4), 1), ((5, 6, 7), 1)]

    def gradients(found):
        return torch.autograd.grad(sum(part.square().sum() for part in found), parameters)

    found = scoring.positions(model, requests)
    together = gradients([found.logits[of] for of in found.of])
    alone = gradients([model(input_ids=torch.tensor([tokens])).logits[0, -keep:] for tokens, keep in requests])
    for ours, theirs in zip(together, alone, strict=True):  # transformers takes RMSNorm's variance in float32
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


def test_a_small_budget_gives_the_same_scores_in_more_passes(llama, monkeypatch):
    model, _ = llama
    questions = random_questions(1, 8)
    whole = loglikelihoods(model, questions)
    monkeypatch.setattr(scoring, "LOGIT_BUDGET", 500)
    monkeypatch.setattr(scoring, "CACHE_SLOTS", 1)
    for ours, theirs in zip(loglikelihoods(model, questions), whole, strict=True):
        assert [s.is_greedy for s in ours] == [s.is_greedy for s in theirs]
        assert [s.loglikelihood for s in ours] == pytest.approx([s.loglikelihood for s in theirs], abs=1e-5)


def test_generation_is_that_of_transformers(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    prompts = [question.context for question in random_questions(2, 9)]
    texts = generate(model, tokenizer, prompts, max_tokens=7, stop=["k", "5"])
    stateful, model._is_stateful = model._is_stateful, False
    try:
        for prompt, text in zip(prompts, texts, strict=True):
            ids = torch.tensor([prompt])
            made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, do_sample=False)
            expected = tokenizer.decode(made[0, len(prompt) :], skip_special_tokens=True)
            assert text == expected.split("k")[0].split("5")[0]
    finally:
        model._is_stateful = stateful


def test_generation_ends_with_its_last_row(llama):
    model, tokenizer = llama
    prompts = [question.context for question in random_questions(3, 4)]
    passes = []
    hook = model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        everything = generate(model, tokenizer, prompts, max_tokens=3)
        assert len(passes) == 3
        passes.clear()
        assert generate(model, tokenizer, prompts, max_tokens=50, stop=sorted(set("".join(everything)))) == [""] * 4
        assert len(passes) == 1
    finally:
        hook.remove()


def test_weights_that_are_not_finite_are_a_nan_candidate(lora_family):
    model, tokenizer = load(lora_family / "base")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    for question in (Question((4, 5), ((6,),)), Question((4, 5), ((6,), (7, 8)))):
        with pytest.raises(CandidateError) as error:
            loglikelihoods(model, [question])
        assert error.value.kind == "nan"
    with pytest.raises(CandidateError) as error:
        generate(model, tokenizer, [(4, 5)], max_tokens=2)
    assert error.value.kind == "nan"


@given(st.dictionaries(st.text(max_size=4), st.integers(0, 30), max_size=40), st.integers(1, 9), st.data())
def test_a_layout_is_a_function_of_sizes_and_ids(sizes, batch_size, data):
    layout = batch_layout(sizes, batch_size)
    shuffled = data.draw(st.permutations(list(sizes)))
    assert batch_layout({key: sizes[key] for key in shuffled}, batch_size) == layout
    flat = [key for batch in layout for key in batch]
    assert sorted(flat) == sorted(sizes)
    assert [sizes[key] for key in flat] == sorted(sizes.values(), reverse=True)
    assert all(len(batch) == batch_size for batch in layout[:-1])
    wanted = set(flat[::3])
    assert [key for batch in covering(layout, wanted) for key in batch if key in wanted] == [
        k for k in flat if k in wanted
    ]


@given(st.lists(st.integers(0, 99), max_size=60), st.integers(1, 17))
def test_rolling_windows_are_lm_evals(tokens, length):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    theirs = map(make_disjoint_window, get_rolling_token_windows(tokens, 7, length, 1))
    assert rolling_windows(tokens, 7, length) == [(tuple(left), tuple(right)) for left, right in theirs]


@given(st.text("ab \n", max_size=12), st.text("ab ", min_size=1, max_size=6), st.integers(7, 20))
def test_pairs_are_encoded_as_lm_eval_encodes_them(context, continuation, length):
    from lm_eval.models.huggingface import HFLM

    tokenizer = tiny.tokenizer()
    lm = HFLM.__new__(HFLM)  # the tokenisation is a function of the tokenizer alone
    lm.tokenizer, lm.backend, lm.add_bos_token, lm.custom_prefix_token_id = tokenizer, "causal", None, None
    if context.strip(" \n") or not context:
        if context:
            left, right = lm._encode_pair(context, continuation)
        else:
            left, right = [lm.prefix_token_id], lm.tok_encode(continuation, add_special_tokens=False)
        if len(right) > length:  # spaces at the end of the context came to it
            with pytest.raises(EvaluatorError, match="more than the model's"):
                encode_pair(tokenizer, context, continuation, length)
            return
        cut = (left + right)[-(length + 1) :]
        assert encode_pair(tokenizer, context, continuation, length) == (tuple(cut[: -len(right)]), tuple(right))
    else:  # lm-eval has no answer for a context of white space alone: ours stands on the prefix token
        left, right = encode_pair(tokenizer, context, continuation, 99)
        assert left == (1,)
        assert tokenizer.decode(right) == context + continuation


def test_continuations_that_cannot_be_scored_are_refused():
    with pytest.raises(EvaluatorError, match="no tokens of its own"):
        encode_pair(tiny.tokenizer(), "a", "", 20)
    with pytest.raises(EvaluatorError, match="more than the model's 3"):
        encode_pair(tiny.tokenizer(), "a", "bbbb", 3)


def test_the_context_length_is_the_models(llama):
    model, tokenizer = llama
    assert max_length(model, tokenizer) == 256


def test_a_questionnaire_runs_equal_contexts_of_an_item_once_and_answers_in_order(llama):
    model, tokenizer = llama
    questions = Questionnaire(model, tokenizer, batch_size=2)
    pairs = {f"item{i}": [(f"what {i}", " a"), (f"what {i}", " bb"), ("", " a"), (f"what {i}", " a")] for i in range(5)}
    for item, asked in pairs.items():
        questions.ask_pairs(item, asked)
    answers = questions.answers(model, pairs)
    assert list(answers) == list(pairs)
    for item, asked in pairs.items():
        for (context, continuation), (value, greedy) in zip(asked, answers[item], strict=True):
            expected = reference(model, *encode_pair(tokenizer, context, continuation, 256))
            assert (value, greedy) == (pytest.approx(expected[0], abs=1e-4), expected[1])
        assert answers[item][0] == answers[item][3]
    assert questions.answers(model, ["item3", "item1"]) == {"item3": answers["item3"], "item1": answers["item1"]}
    assert len(questions._questions) == 10  # of each item's four requests two contexts


def test_prompts_need_room_for_what_is_generated(llama):
    model, tokenizer = llama
    with pytest.raises(EvaluatorError, match="leaves no room"):
        Questionnaire(model, tokenizer, batch_size=2, max_tokens=256).ask_prompts("item", ["abc"])
    questions = Questionnaire(model, tokenizer, batch_size=2, max_tokens=6)
    questions.ask_prompts("item", ["a" * 400])
    ((text,),) = questions.answers(model, ["item"]).values()
    assert text == generate(model, tokenizer, [tokenizer("a" * 250)["input_ids"]], max_tokens=6)[0]
