"""What language models predict on texts: against one plain forward pass an answer, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.errors import EvaluatorError
from evomerge.predicting import answer_predictions, prompt_predictions, token_predictions

CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(scope="module")
def llama(lora_family: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(lora_family / "base", dtype=torch.float64).eval()
    return model.requires_grad_(False), AutoTokenizer.from_pretrained(lora_family / "base")


def plain(model: Any, tokenizer: Any, text: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of one text alone: token ids (n,), log-probabilities (n, vocabulary) after each token, last hidden states."""
    ids = torch.tensor(tokenizer.encode(text))
    output = model(input_ids=ids[None], output_hidden_states=True)
    return ids, output.logits[0].log_softmax(-1), output.hidden_states[-1][0]


def test_answers_are_log_likelihoods_and_items_may_have_different_numbers_of_them(llama):
    model, tokenizer = llama
    items = [[("what?", " yes"), ("what?", " no"), ("what?", " a")], [("Say it:", "b"), ("Say it:", "cd")]]
    found = answer_predictions(model, tokenizer, items, [2, 0], hidden=True)
    assert found.logits.shape == (2, 3) and found.logits[1, 2] == -torch.inf
    assert found.weights.tolist() == [1, 1]
    assert found.right is not None and found.right.tolist() == [2, 0] and found.right.dtype == torch.int64
    states, shares = [], []
    for n, item in enumerate(items):
        count = sum(len(tokenizer.encode(answer)) for _, answer in item)
        for k, (context, answer) in enumerate(item):
            ids, logs, hidden = plain(model, tokenizer, context + answer)
            first = len(tokenizer.encode(context))
            expected = sum(logs[j - 1, ids[j]] for j in range(first, len(ids)))
            torch.testing.assert_close(found.logits[n, k], expected, **CLOSE)
            states.append(hidden[first - 1 : -1])
            shares += [1 / count] * len(states[-1])
    assert found.hidden is not None and found.hidden_weights is not None
    torch.testing.assert_close(found.hidden, torch.cat(states), **CLOSE)
    assert found.hidden_weights.tolist() == pytest.approx(shares)
    bare = answer_predictions(model, tokenizer, items)
    assert (bare.right, bare.hidden, bare.hidden_weights) == (None, None, None)
    assert torch.equal(bare.logits, found.logits)


def test_tokens_of_answers_and_of_whole_texts(llama):
    model, tokenizer = llama
    texts = [("what?", " yes"), ("Say it: ", "ab"), (None, "hello")]
    found = token_predictions(model, tokenizer, texts, labels=True, hidden=True)
    assert found.right is not None and found.hidden is not None and found.hidden_weights is not None
    rows = [4, 3, 5]  # the space at the end of a context is the answer's
    logs, rights, hidden = (list(t.split(rows)) for t in (found.logits.log_softmax(1), found.right, found.hidden))
    for n, (whole, begin) in enumerate([("what? yes", 5), ("Say it: ab", 7)]):
        ids, expected, states = plain(model, tokenizer, whole)
        torch.testing.assert_close(logs[n], expected[begin - 1 : -1], **CLOSE)
        torch.testing.assert_close(hidden[n], states[begin - 1 : -1], **CLOSE)
        assert torch.equal(rights[n], ids[begin:])
    ids, expected, _ = plain(model, tokenizer, "<eos>hello")
    torch.testing.assert_close(logs[2], expected[:-1], **CLOSE)
    assert torch.equal(rights[2], ids[1:])
    assert found.weights.tolist() == pytest.approx([1 / n for n in rows for _ in range(n)])
    assert torch.equal(found.hidden_weights, found.weights)
    bare = token_predictions(model, tokenizer, texts)
    assert bare.right is None and torch.equal(bare.logits, found.logits)


def test_a_text_longer_than_the_models_context_is_predicted_in_windows(llama):
    model, tokenizer = llama
    length = model.config.max_position_embeddings
    text = "abcde fghij " * (2 * length // 12 + 3)
    found = token_predictions(model, tokenizer, [(None, "ab"), (None, text)], labels=True)
    ids = torch.tensor(tokenizer.encode(text))
    assert found.right is not None and torch.equal(found.right[2:], ids)
    expected = [model(input_ids=torch.cat([torch.tensor([1]), ids[: length - 1]])[None]).logits[0]]
    expected.append(model(input_ids=ids[length - 1 : 2 * length - 1][None]).logits[0])
    last = ids[-length - 1 : -1]  # the last window looks back as far as it can
    expected.append(model(input_ids=last[None]).logits[0, 2 * length - len(ids) :])
    torch.testing.assert_close(found.logits[2:].log_softmax(1), torch.cat(expected).log_softmax(1), **CLOSE)
    assert found.weights.tolist() == pytest.approx([0.5, 0.5] + [1 / len(ids)] * len(ids))


def test_prompts_are_predicted_at_their_end(llama):
    model, tokenizer = llama
    length = model.config.max_position_embeddings
    long = "xyz " * length
    found = prompt_predictions(model, tokenizer, [["what? "], ["a", "bc", ""], [long]], spare=6, hidden=True)
    texts = ["what? ", "a", "bc", "<eos>", long[-(length - 6) :]]
    assert found.hidden is not None and found.right is None
    for n, text in enumerate(texts):
        _, logs, hidden = plain(model, tokenizer, text)
        torch.testing.assert_close(found.logits[n].log_softmax(0), logs[-1], **CLOSE)
        torch.testing.assert_close(found.hidden[n], hidden[-1], **CLOSE)
    assert found.weights.tolist() == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3, 1])


def test_answers_without_tokens_are_refused(llama):
    with pytest.raises(EvaluatorError, match="no tokens of its own"):
        answer_predictions(*llama, [[("a", "b"), ("a", "")]])
