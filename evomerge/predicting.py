"""What a causal language model predicts on texts, as a differentiable function of its parameters: one padded batch.

What evaluators' ``predictions`` are made of. Tokenised and cut as in ``questions.py``; run by ``scoring.positions``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evomerge.evaluation import Predictions
from evomerge.questions import Pair, encode, encode_pair, max_length, prefix_token, rolling_windows
from evomerge.scoring import Positions, positions


def answer_predictions(
    model: Any,
    tokenizer: Any,
    items: Sequence[Sequence[tuple[str, str]]],
    right: Sequence[int] | None = None,
    *,
    hidden: bool = False,
) -> Predictions:
    """Each item's choice among its possible answers: a row an item, whose logits are the answers' log-likelihoods.

    Args:
        items: the (context, answer) pairs of each.
        right: which answer is right, for each item; None: not said.
        hidden: the states at all positions that predict a token of an answer, each answer's by themselves.

    Raises:
        EvaluatorError: an answer is empty or longer than the model's context.
    """
    length = max_length(model, tokenizer)
    pairs = [[encode_pair(tokenizer, *pair, length) for pair in item] for item in items]
    every = [pair for item in pairs for pair in item]
    found = _of_pairs(model, every, hidden=hidden)
    at = torch.cat(found.of)
    targets = torch.tensor([token for _, answer in every for token in answer], device=at.device)
    logs = found.logits[at, targets] - found.logits.logsumexp(1)[at]
    answers = torch.stack([part.sum() for part in logs.split([len(answer) for _, answer in every])])
    most = max(len(item) for item in pairs)
    rows = [
        torch.nn.functional.pad(part, (0, most - len(part)), value=-torch.inf)
        for part in answers.split([len(item) for item in pairs])
    ]
    counts = [sum(len(answer) for _, answer in item) for item in pairs]
    return Predictions(
        torch.stack(rows),
        torch.ones(len(rows), dtype=logs.dtype, device=logs.device),
        None if right is None else torch.tensor(right, device=logs.device),
        None if found.hidden is None else found.hidden[at],
        None if found.hidden is None else _shares(counts, logs),
    )


def token_predictions(
    model: Any,
    tokenizer: Any,
    texts: Sequence[tuple[str | None, str]],
    *,
    labels: bool = False,
    hidden: bool = False,
) -> Predictions:
    """The next token at each position that predicts a token of an answer: a row a token, over the vocabulary.

    Args:
        texts: context and answer of each item; a context of None: the whole text, in windows of the model's context.
        labels: say which tokens come.

    Raises:
        EvaluatorError: an answer is empty or longer than the model's context.
    """
    length, prefix = max_length(model, tokenizer), prefix_token(tokenizer)
    items = [
        rolling_windows(encode(tokenizer, text), prefix, length)
        if context is None
        else [encode_pair(tokenizer, context, text, length)]
        for context, text in texts
    ]
    every = [pair for item in items for pair in item]
    found = _of_pairs(model, every, hidden=hidden)
    counts = [sum(len(answer) for _, answer in item) for item in items]
    targets = [token for _, answer in every for token in answer]
    return _rows(found, counts, targets if labels else None)


def prompt_predictions(
    model: Any, tokenizer: Any, items: Sequence[Sequence[str]], *, spare: int = 0, hidden: bool = False
) -> Predictions:
    """The first token after a prompt: a row a prompt, over the vocabulary. What is right is not said.

    Args:
        items: the prompts of each, cut from the left where they are too long.
        spare: how many tokens of the model's context to leave free, for an answer.
    """
    room = max_length(model, tokenizer) - spare
    prompts = [tuple(encode(tokenizer, text)[-room:] or [prefix_token(tokenizer)]) for item in items for text in item]
    found = positions(model, [(prompt, 1) for prompt in prompts], hidden=hidden)
    return _rows(found, [len(item) for item in items], None)


def _of_pairs(model: Any, pairs: Sequence[Pair], *, hidden: bool) -> Positions:
    """The positions that predict each token of each pair's continuation."""
    return positions(model, [((*left, *right[:-1]), len(right)) for left, right in pairs], hidden=hidden)


def _rows(found: Positions, counts: Sequence[int], right: Sequence[int] | None) -> Predictions:
    """Every requested position as a row; ``counts``: how many rows each item has."""
    at = torch.cat(found.of)
    shares = _shares(counts, found.logits)
    return Predictions(
        found.logits[at],
        shares,
        None if right is None else torch.tensor(right, device=at.device),
        None if found.hidden is None else found.hidden[at],
        None if found.hidden is None else shares,
    )


def _shares(counts: Sequence[int], like: Tensor) -> Tensor:
    """(sum of counts,): 1 / n for each of an item's n rows."""
    values = [1 / count for count in counts for _ in range(count)]
    return torch.tensor(values, dtype=like.dtype, device=like.device)
