"""Questions to causal language models: tokenised, in fixed batches.

Which questions share a batch is a function of their sizes and ids alone, and whoever asks for some of them runs the
whole batches that hold them: so an answer never depends on what else was asked for.

Tokenisation and truncation follow lm-evaluation-harness (``lm_eval.models.huggingface.HFLM``, 0.4.13): spaces at the
end of a context move to its continuation, and what is too long is cut from the left.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import EvaluatorError
from evomerge.scoring import Question, generate, loglikelihood, loglikelihoods

Pair = tuple[tuple[int, ...], tuple[int, ...]]  # context and continuation, as token ids


class Questionnaire:
    """All that one task asks a model in one split.

    Ask for every item first (``ask_pairs``, ``ask_text`` or ``ask_prompts``: one kind a questionnaire), then read
    answers as often as candidates come. The tokenizer and the context length are the model's; its weights may change.

    Args:
        batch_size: how many questions (contexts) a batch holds.
        max_tokens, stop: for prompts, how many tokens to generate at most, and the strings to stop before.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int, max_tokens: int = 0, stop: Sequence[str] = ()):
        self._tokenizer, self._length = tokenizer, max_length(model, tokenizer)
        self._batch_size, self._max_tokens, self._stop = batch_size, max_tokens, tuple(stop)
        self._questions: dict[str, Question] = {}
        self._prompts: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[list[tuple[str, int]]]] = {}  # item -> request -> (question, continuation)
        self._rolling: set[str] = set()
        self._layout: tuple[tuple[str, ...], ...] | None = None

    def ask_pairs(self, item_id: str, pairs: Sequence[tuple[str, str]]) -> None:
        """The log-likelihood of each continuation given its context; an item's equal contexts are run once.

        Raises:
            EvaluatorError: a continuation is empty or longer than the model's context.
        """
        self._ask(item_id, [[encode_pair(self._tokenizer, *pair, self._length)] for pair in pairs])

    def ask_text(self, item_id: str, text: str) -> None:
        """The log-likelihood of a whole text, in windows of the model's context length."""
        tokens = encode(self._tokenizer, text)
        self._ask(item_id, [rolling_windows(tokens, prefix_token(self._tokenizer), self._length)])
        self._rolling.add(item_id)

    def ask_prompts(self, item_id: str, prompts: Sequence[str]) -> None:
        """The greedy continuation of each prompt.

        Raises:
            EvaluatorError: ``max_tokens`` leaves no room for a prompt in the model's context.
        """
        room = self._length - self._max_tokens
        if room < 1:
            raise EvaluatorError(
                f"generating up to {self._max_tokens} tokens leaves no room in the model's {self._length}",
                remedy="Lower the number of tokens to generate (max_gen_toks).",
            )
        for n, prompt in enumerate(prompts):
            tokens = encode(self._tokenizer, prompt)[-room:] or [prefix_token(self._tokenizer)]
            self._prompts[f"{item_id}/{n}"] = tuple(tokens)
        self._pieces[item_id] = [[(f"{item_id}/{n}", 0)] for n in range(len(prompts))]

    def _ask(self, item_id: str, requests: Sequence[Sequence[Pair]]) -> None:
        by_context: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
        for context, continuation in (pair for request in requests for pair in request):
            continuations = by_context.setdefault(context, {})
            continuations.setdefault(continuation, len(continuations))
        keys = {context: f"{item_id}/{n}" for n, context in enumerate(by_context)}
        for context, continuations in by_context.items():
            self._questions[keys[context]] = Question(context, tuple(continuations))
        self._pieces[item_id] = [
            [(keys[context], by_context[context][continuation]) for context, continuation in request]
            for request in requests
        ]

    def num_tokens(self, item_id: str) -> int:
        """How many tokens of an item are predicted: those of its continuations, over all its requests."""
        pieces = [piece for request in self._pieces[item_id] for piece in request]
        return sum(len(self._questions[key].continuations[index]) for key, index in pieces)

    def answers(self, model: Any, item_ids: Iterable[str]) -> dict[str, list[Any]]:
        """The answers to each item's requests, in order, as lm-eval's models give them.

        (log-likelihood, is greedy) for a pair, a log-likelihood for a text, a string for a prompt.

        Raises:
            CandidateError: the model's numbers are not finite (kind ``nan``).
        """
        if self._layout is None:
            sizes = {key: question.size for key, question in self._questions.items()}
            sizes |= {key: len(prompt) for key, prompt in self._prompts.items()}
            self._layout = batch_layout(sizes, self._batch_size)
        pieces = {item_id: self._pieces[item_id] for item_id in item_ids}
        found: dict[str, list[Any]] = {}
        needed = {key for requests in pieces.values() for request in requests for key, _ in request}
        for batch in covering(self._layout, needed):
            found.update(zip(batch, self._run(model, batch), strict=True))

        def answer(item_id: str, request: Sequence[tuple[str, int]]) -> Any:
            parts = [found[key][index] for key, index in request]
            if item_id in self._rolling:
                return math.fsum(part.loglikelihood for part in parts)
            return parts[0] if self._prompts else (parts[0].loglikelihood, parts[0].is_greedy)

        return {i: [answer(i, request) for request in requests] for i, requests in pieces.items()}

    def _run(self, model: Any, batch: Sequence[str]) -> list[list[Any]]:
        if not self._prompts:
            return list(loglikelihoods(model, [self._questions[key] for key in batch]))
        prompts = [self._prompts[key] for key in batch]
        texts = generate(model, self._tokenizer, prompts, max_tokens=self._max_tokens, stop=self._stop)
        return [[text] for text in texts]


def answer_loglikelihood(model: Any, tokenizer: Any, context: str | None, answer: str) -> tuple[Tensor, int]:
    """(log-likelihood, number of tokens) of an answer given its context, or of a whole text (``context`` None).

    The first is a scalar tensor that can be differentiated by the model's parameters. Tokenised and cut as everywhere
    here; run by itself, without padding.

    Raises:
        EvaluatorError: the answer is empty or longer than the model's context.
    """
    length = max_length(model, tokenizer)
    if context is None:
        parts = rolling_windows(encode(tokenizer, answer), prefix_token(tokenizer), length)
    else:
        parts = [encode_pair(tokenizer, context, answer, length)]
    logs = [loglikelihood(model, *part) for part in parts]
    return torch.stack(logs).sum(), sum(len(continuation) for _, continuation in parts)


def batch_layout(sizes: Mapping[str, int], batch_size: int) -> tuple[tuple[str, ...], ...]:
    """Which keys run together: sorted by size (longest first, so that memory runs out early or never), ties by key."""
    keys = sorted(sizes, key=lambda key: (-sizes[key], key))
    return tuple(tuple(keys[i : i + batch_size]) for i in range(0, len(keys), batch_size))


def covering(layout: Iterable[Sequence[str]], wanted: Collection[str]) -> list[Sequence[str]]:
    """The whole batches that hold at least one of ``wanted``, in layout order."""
    return [batch for batch in layout if any(key in wanted for key in batch)]


def prefix_token(tokenizer: Any) -> int:
    """What an empty context is replaced by: the tokenizer's BOS, or its EOS."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def max_length(model: Any, tokenizer: Any) -> int:
    """The model's context length in tokens, by its config, else its tokenizer, else 2048."""
    config = getattr(model.config, "text_config", None) or model.config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if (value := getattr(config, name, None)) is not None:
            return int(value)
    length = getattr(tokenizer, "model_max_length", None)
    return int(length) if length is not None and length < 10**9 else 2048


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids with the tokenizer's own special tokens, unless ``text`` already starts with the prefix token."""
    if text.startswith(tokenizer.decode(prefix_token(tokenizer))):
        return tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.encode(text)


def encode_pair(tokenizer: Any, context: str, continuation: str, length: int) -> Pair:
    """Token ids of a context and its continuation, cut from the left to ``length`` inputs.

    Raises:
        EvaluatorError: the continuation is empty or alone longer than ``length`` tokens.
    """
    if context == "":
        right = tokenizer.encode(continuation, add_special_tokens=False)
        left = [prefix_token(tokenizer)]
        if right[:1] == left:
            right = right[1:]
    else:
        spaces = len(context) - len(context.rstrip())
        if spaces:
            continuation = context[-spaces:] + continuation
            context = context[:-spaces]
        left = encode(tokenizer, context) if context else [prefix_token(tokenizer)]
        right = (
            encode(tokenizer, context + continuation)[len(left) :]
            if context
            else tokenizer.encode(continuation, add_special_tokens=False)
        )
    if not right:
        raise EvaluatorError(f"the continuation {continuation!r} of {context[-40:]!r} has no tokens of its own")
    if len(right) > length:
        raise EvaluatorError(
            f"the continuation {continuation[:40]!r}... has {len(right)} tokens, more than the model's {length}"
        )
    left = left[max(0, len(left) + len(right) - (length + 1)) :]
    return tuple(left), tuple(right)


def rolling_windows(tokens: Sequence[int], prefix: int, length: int) -> list[Pair]:
    """Disjoint (context, continuation) windows that together predict every one of ``tokens`` once.

    Each window has ``length`` inputs at most; the first is conditioned on ``prefix``, later ones on as much of the
    text before them as fits (``lm_eval.utils.get_rolling_token_windows`` with a context of one token).
    """
    windows = []
    for start in range(0, len(tokens), length):
        stop = min(start + length, len(tokens))
        if start == 0:
            windows.append(((prefix,), tuple(tokens[:stop])))
        else:
            windows.append((tuple(tokens[stop - length - 1 : start]), tuple(tokens[start:stop])))
    return windows
