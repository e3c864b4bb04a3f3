"""Token scoring and greedy generation for causal language models: the engine under the evaluators.

A question is one context and its continuations. A batch runs its contexts once, left-padded, and scores every
continuation on top of their key/value cache; a continuation of one token needs no second pass at all.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import CandidateError

LOGIT_BUDGET = 2**26  # logits held at a time: 256 MiB in float32
CACHE_SLOTS = 2**15  # key/value slots (rows x tokens) that copies of the context's cache may fill


@dataclass(frozen=True)
class Question:
    """A context and its continuations, as token ids. No sequence is empty."""

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """How many tokens its widest row holds: what batches are sorted by."""
        return len(self.context) + (len(self.continuations[0]) - 1 if len(self.continuations) == 1 else 0)


@dataclass(frozen=True)
class Scored:
    """One continuation: its natural-log likelihood given the context, and whether greedy decoding would give it."""

    loglikelihood: float
    is_greedy: bool


@functools.lru_cache(maxsize=16)
def _accepted(forward: Any) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def _keeps_plain_cache(model: Any) -> bool:
    """True if all that the model remembers of a context is keys and values by position, which rows can share."""
    if "past_key_values" not in _accepted(type(model).forward) or getattr(model, "_is_stateful", False):
        return False
    config = model.config.get_text_config()
    return set(getattr(config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Positions:
    """What a model predicts at some positions of some sequences, differentiable.

    Attributes:
        logits: (positions, vocabulary) in float32 or wider.
        hidden: (positions, width) what the head makes them from; None where not asked for.
        of: for each request, which positions are its own, in order.
    """

    logits: Tensor
    hidden: Tensor | None
    of: tuple[Tensor, ...]


def _left_pad(rows: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor]:
    """ids: (rows, longest), mask: (rows, longest), 1 where there is a token."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _logits(model: Any, ids: Tensor, mask: Tensor, *, cache: Any, keep: int) -> Tensor:
    """Logits (rows, keep, vocabulary) of the last ``keep`` positions of ``ids`` (rows, new tokens).

    ``mask`` (rows, cached + new tokens) covers what is in ``cache`` too. The head is applied to kept positions only,
    where the architecture can: with a vocabulary of 49,152 it costs as much as a quarter of a 135M-parameter model.
    """
    accepted = _accepted(type(model).forward)
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": cache is not None}
    if "position_ids" in accepted:
        arguments["position_ids"] = (mask.cumsum(1) - 1).clamp_(min=0)[:, -ids.shape[1] :]
    if cache is not None:
        arguments["past_key_values"] = cache
    if "logits_to_keep" in accepted:
        arguments["logits_to_keep"] = keep
    return model(**arguments).logits[:, -keep:]


def _new_cache(model: Any) -> Any:
    """A cache that keeps every position. One made from the config would drop what leaves a sliding window, and with it
    what left-padded rows still need; the mask keeps the window."""
    from transformers import DynamicCache

    return DynamicCache() if _keeps_plain_cache(model) else None


def _cache_rows(cache: Any, rows: Tensor) -> Any:
    """A copy of ``cache`` with its rows picked (and repeated) by ``rows``."""
    copy = type(cache)()
    for i, layer in enumerate(cache.layers):
        copy.update(layer.keys.index_select(0, rows), layer.values.index_select(0, rows), i)
    return copy


def _token_scores(logits: Tensor, targets: Tensor) -> tuple[list[float], list[bool]]:
    """Log-probability and greediness of ``targets`` (n,) under ``logits`` (n, vocabulary), in float32."""
    logits = logits.float()
    chosen = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)
    return chosen.tolist(), (logits.argmax(1) == targets).tolist()


def _rows_at_a_time(logits_a_row: int, slots_a_row: int = 0, least: int = 1) -> int:
    fit = max(1, LOGIT_BUDGET // logits_a_row)
    return min(fit, max(least, CACHE_SLOTS // slots_a_row)) if slots_a_row else fit


@torch.no_grad()
def loglikelihoods(model: Any, batch: Sequence[Question]) -> list[list[Scored]]:
    """The continuations of each question in ``batch``, scored; one batch of a layout, run as it stands.

    Questions with one continuation run as whole sequences; the others run their context once and share its cache.
    Bit-for-bit repeatable for the same batch on the same device with the same number of threads.

    Raises:
        CandidateError: a log-likelihood is not finite (kind ``nan``).
    """
    results: dict[int, list[Scored]] = {}
    plain = _keeps_plain_cache(model)
    alone = [i for i, q in enumerate(batch) if len(q.continuations) == 1 or not plain]
    shared = [i for i, q in enumerate(batch) if len(q.continuations) > 1 and plain]
    if alone:
        pairs = [(batch[i].context, continuation) for i in alone for continuation in batch[i].continuations]
        scored = iter(_score_whole(model, pairs))
        for i in alone:
            results[i] = [next(scored) for _ in batch[i].continuations]
    if shared:
        for i, scores in zip(shared, _score_shared(model, [batch[i] for i in shared]), strict=True):
            results[i] = scores
    for scores in results.values():
        for score in scores:
            if not math.isfinite(score.loglikelihood):
                raise CandidateError("nan", f"the model's log-likelihood of a continuation is {score.loglikelihood}")
    return [results[i] for i in range(len(batch))]


def loglikelihood(model: Any, context: Sequence[int], continuation: Sequence[int]) -> Tensor:
    """The natural-log likelihood of one continuation given its context (token ids), a scalar that can be
    differentiated: one row of its own, without padding and cache."""
    logits = positions(model, [((*context, *continuation[:-1]), len(continuation))]).logits
    targets = torch.tensor(continuation, device=logits.device)
    return logits.log_softmax(1).gather(1, targets[:, None]).sum()


def positions(model: Any, requests: Sequence[tuple[tuple[int, ...], int]], *, hidden: bool = False) -> Positions:
    """The next-token logits at the last positions of some sequences: one padded pass that can be differentiated.

    A sequence with which another one begins, whose positions are among the other's, gets no row of its own: answers
    of one token to one question cost one row. All graphs are alive together, so that memory grows with the batch.

    Args:
        requests: token ids of each sequence, not empty, and how many of its last positions are wanted, at least 1.
    """
    rows: list[int] = []  # the requests that get one
    row_of: dict[int, int] = {}
    for i in sorted(range(len(requests)), key=lambda i: -len(requests[i][0])):
        tokens, keep = requests[i]
        for row, host in enumerate(rows):
            longer, kept = requests[host]
            if longer[: len(tokens)] == tokens and len(longer) - kept <= len(tokens) - keep:
                row_of[i] = row
                break
        else:
            row_of[i] = len(rows)
            rows.append(i)
    ids, mask = _left_pad([requests[i][0] for i in rows], model.device)
    kept = [requests[i][1] for i in rows]
    keep = max(kept)
    with _head_inputs(model) if hidden else contextlib.nullcontext([]) as inputs:
        logits = _logits(model, ids, mask, cache=None, keep=keep)
    wanted = [row * keep + column for row, count in enumerate(kept) for column in range(keep - count, keep)]
    index = torch.tensor(wanted, device=logits.device)

    def flat(tensor: Tensor) -> Tensor:  # (rows, keep, n) -> (positions, n)
        tensor = tensor.flatten(0, 1)
        return tensor if len(wanted) == len(tensor) else tensor[index.to(tensor.device)]

    starts = [0, *itertools.accumulate(kept)]
    of = []
    for i, (tokens, count) in enumerate(requests):
        row = row_of[i]
        start = starts[row + 1] - (len(requests[rows[row]][0]) - len(tokens)) - count
        of.append(torch.arange(start, start + count, device=logits.device))
    logits = flat(logits)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return Positions(logits, flat(inputs[0][:, -keep:]) if hidden else None, tuple(of))


@contextlib.contextmanager
def _head_inputs(model: Any) -> Iterator[list[Tensor]]:
    """A list that gets what the model's head is applied to, (rows, positions, width), a tensor a forward pass.

    ``output_hidden_states`` would give it as well, but with every other layer's, none of which could be freed."""
    inputs: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _head, given: inputs.append(given[0]))
    try:
        yield inputs
    finally:
        hook.remove()


def _score_whole(model: Any, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[Scored]:
    """Each (context, continuation) pair as one row of its own."""
    results: list[Scored] = []
    keep = max(len(right) for _, right in pairs)
    step = _rows_at_a_time(keep * model.config.get_text_config().vocab_size)
    for start in range(0, len(pairs), step):
        part = pairs[start : start + step]
        keep = max(len(right) for _, right in part)
        ids, mask = _left_pad([left + right[:-1] for left, right in part], model.device)
        logits = _logits(model, ids, mask, cache=None, keep=keep)
        for row, (_, right) in enumerate(part):
            values, greedy = _token_scores(logits[row, -len(right) :], torch.tensor(right, device=logits.device))
            results.append(Scored(math.fsum(values), all(greedy)))
    return results


def _score_shared(model: Any, batch: Sequence[Question]) -> list[list[Scored]]:
    """Contexts once; then, on their cache, every distinct continuation without its last token."""
    ids, mask = _left_pad([q.context for q in batch], model.device)
    cache = _new_cache(model)
    logits = _logits(model, ids, mask, cache=cache, keep=1)[:, 0].float()
    first = [(q, c) for q in range(len(batch)) for c in batch[q].continuations]
    rows = torch.tensor([q for q, _ in first], device=logits.device)
    targets = torch.tensor([c[0] for _, c in first], device=logits.device)
    values = (logits[rows, targets] - logits.logsumexp(1)[rows]).tolist()
    greedy = (logits.argmax(1)[rows] == targets).tolist()
    sums = {key: [value] for key, value in zip(first, values, strict=True)}
    best = dict(zip(first, greedy, strict=True))

    tails: dict[tuple[int, tuple[int, ...]], list[tuple[int, ...]]] = {}  # row of the second pass -> continuations
    for q, continuation in sums:
        if len(continuation) > 1:
            tails.setdefault((q, continuation[:-1]), []).append(continuation)
    todo = sorted(tails, key=lambda key: (-len(key[1]), key[0], key[1]))
    while todo:
        width = len(todo[0][1])
        step = _rows_at_a_time(width * logits.shape[1], mask.shape[1] + width, least=len(batch))
        part, todo = todo[:step], todo[step:]
        for (q, prefix), tail_logits in zip(part, _tail_logits(model, cache, mask, part), strict=True):
            for continuation in tails[q, prefix]:
                target = torch.tensor(continuation[1:], device=logits.device)
                values, greedy = _token_scores(tail_logits[: len(target)], target)
                sums[q, continuation] += values
                best[q, continuation] &= all(greedy)
    return [[Scored(math.fsum(sums[i, c]), best[i, c]) for c in q.continuations] for i, q in enumerate(batch)]


def _tail_logits(model: Any, cache: Any, mask: Tensor, part: Sequence[tuple[int, tuple[int, ...]]]) -> Tensor:
    """Logits (rows, width, vocabulary) after each token of each (question, tokens) row, on copies of the cache.

    Rows are padded on the right, where no token that counts can see the padding.
    """
    width = len(part[0][1])
    rows = torch.tensor([q for q, _ in part], device=mask.device)
    ids = torch.tensor([list(tokens) + [0] * (width - len(tokens)) for _, tokens in part], device=mask.device)
    return _logits(
        model, ids, torch.cat([mask[rows], torch.ones_like(ids)], 1), cache=_cache_rows(cache, rows), keep=width
    )


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, contexts: Sequence[Sequence[int]], *, max_tokens: int, stop: Sequence[str] = ()
) -> list[str]:
    """Greedy continuations of ``contexts`` (token ids) as text, each cut before its first stop string.

    A row ends at an end-of-text token, at a stop string or after ``max_tokens``; the batch ends with its last row.
    The model's generation_config is used for its end-of-text tokens only: no sampling, no penalties.

    Raises:
        CandidateError: the logits are not finite (kind ``nan``).
    """
    ends = _end_tokens(model, tokenizer)
    stop = [text for text in stop if text]
    tail = max((len(text) for text in stop), default=0) + 8  # tokens that can hold a stop string, and some to spare
    new: list[list[int]] = [[] for _ in contexts]
    running = [True] * len(contexts)
    ids, mask = _left_pad(contexts, model.device)
    cache = _new_cache(model)
    feed = ids
    for _ in range(max_tokens):
        values, tokens = _logits(model, feed, mask, cache=cache, keep=1)[:, 0].max(1)
        for row, (value, token) in enumerate(zip(values.tolist(), tokens.tolist(), strict=True)):
            if not running[row]:
                continue
            if not math.isfinite(value):
                raise CandidateError("nan", f"the model's largest logit while generating is {value}")
            new[row].append(token)
            ended = token in ends
            if not ended and stop:
                written = tokenizer.decode(new[row][-tail:], skip_special_tokens=True)
                ended = any(text in written for text in stop)
            running[row] = not ended
        if not any(running):
            break
        mask = torch.cat([mask, torch.ones_like(tokens)[:, None]], 1)
        ids = torch.cat([ids, tokens[:, None]], 1)
        feed = ids if cache is None else tokens[:, None]
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in new]
    for text in stop:
        texts = [written.split(text)[0] for written in texts]
    return texts


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = set(configured) if isinstance(configured, list | tuple) else {configured}
    return {int(token) for token in ends | {tokenizer.eos_token_id} if token is not None}
