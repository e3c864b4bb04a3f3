"""Sources with different vocabularies, presented as if they had one: the merge's.

Methods see embeddings and heads whose rows already belong to the same tokens, and know nothing of it.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from evomerge.adapters import Adapter
from evomerge.alignment import Fill, FillRows, Layout, Own, Rows, lay_out, union
from evomerge.checkpoints import Checkpoint, Sources
from evomerge.errors import CheckpointError, SpecError, nearest
from evomerge.folders import PROCESSOR_FILES, optional_files, read_json, some
from evomerge.methods.base import LowRank
from evomerge.placement import vocabulary_axes
from evomerge.safetensor_files import Entry
from evomerge.tokenizer_choice import BASE, UNION, RowSource, TokenizerChoice
from evomerge.vocabulary import Vocabulary, check_cuts_alike, has_tokenizer, open_tokenizer, read_vocabulary

SPECIAL = re.compile(r"_token_ids?$|_token_index$")  # keys of configurations whose values are tokens' ids
LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "sequence_bias")


@dataclass(frozen=True)
class Alignment:
    """The vocabulary that the sources of a merge were brought to.

    Attributes:
        layout: whose rows are whose.
        host: the folder whose tokenizer the merge's is, but for ``added``.
        added: the tokens that are added to it, in the order of their ids.
        vocabulary: the merge's.
        config: its config.json.
        generation: its generation_config.json, where the base has one whose ids are no longer right; else None.
    """

    layout: Layout
    host: Path
    added: tuple[str, ...]
    vocabulary: Vocabulary
    config: Mapping[str, Any]
    generation: Mapping[str, Any] | None

    def tokenizer(self) -> Any:
        """The merge's tokenizer: the host's, with the added tokens added by transformers itself."""
        from tokenizers import AddedToken

        tokenizer = open_tokenizer(self.host)
        for token in self.added:
            entry = self.vocabulary.added[token]
            flags = {key: entry[key] for key in ("single_word", "lstrip", "rstrip", "normalized", "special")}
            tokenizer.add_tokens([AddedToken(token, **flags)], special_tokens=entry["special"])
        have = tokenizer.get_vocab()
        if have != self.layout.ids:
            differing = sorted(t for t in {*have, *self.layout.ids} if have.get(t) != self.layout.ids.get(t))
            raise CheckpointError(
                f"transformers gives {differing[0]!r} the id {have.get(differing[0])} when it is added to the "
                f"tokenizer in {self.host}, and not {self.layout.ids.get(differing[0])}",
                remedy="Its ids have holes. Take the vocabulary of an expert (tokenizer: {source: NAME}).",
            )
        return tokenizer

    @contextmanager
    def written(self, base: Path) -> Iterator[Path]:
        """A folder with the tokenizer's files, and the base's for images and sound, for as long as the block lasts."""
        with TemporaryDirectory(prefix="evomerge-tokenizer-") as name:
            folder = Path(name)
            tokenizer = self.tokenizer()
            for key in ("is_local", "local_files_only"):  # how it was loaded, which transformers would write down
                tokenizer.init_kwargs.pop(key, None)
            tokenizer.save_pretrained(folder)
            for file in optional_files(base, PROCESSOR_FILES):
                (folder / file.name).write_bytes(file.read_bytes())
            yield folder

    def model_config(self) -> Any:
        """The configuration as transformers reads it from an export."""
        from transformers import AutoConfig

        with TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(dict(self.config)), encoding="utf-8")
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    @property
    def summary(self) -> str:
        """One line of what it is."""
        new = f"{len(self.added)} added ({', '.join(self.added[:3])}{', ...' if len(self.added) > 3 else ''})"
        return f"{len(self.layout.ids)} tokens, {new if self.added else 'none added'}; {self.layout.rows} rows"


class AlignedCheckpoint(Checkpoint):
    """A dense checkpoint whose vocabulary tensors have the merge's rows."""

    def __init__(self, source: Checkpoint, rows: Mapping[str, Rows], config: dict[str, Any], vocabulary: Vocabulary):
        places = {}
        for name in source.names:
            shape = rows[name].shape if name in rows else source.shape(name)
            dtype = rows[name].dtype if name in rows else source.dtype(name)
            size = torch.Size(shape).numel() * dtype.itemsize
            places[name] = (source._places[name][0], Entry(dtype, tuple(shape), 0, size))
        super().__init__(source.path, config, places, source._extra)
        self._source, self._rows, self.vocabulary = source, dict(rows), vocabulary

    def tensor(self, name: str) -> Tensor:
        return self._rows[name].whole() if name in self._rows else self._source.tensor(name)

    def rows(self, name: str) -> Any:
        return self._rows[name] if name in self._rows else self._source.tensor(name)


class AlignedAdapter(Adapter):
    """An adapter whose vocabulary tensors, where they are not simply the base's, have the merge's rows.

    Args:
        rows: what replaces the base's tensors.
        index: which of the adapter's rows is which of the merge's (``Layout``), for factors on ``names``.
    """

    def __init__(self, source: Adapter, rows: Mapping[str, Rows], index: Tensor, names: frozenset[str]):
        super().__init__(source.path, source.config, source._file, source._header)
        self._factors, self._full = source._factors, source._full
        self._rows, self._index, self._vocabulary = dict(rows), index, names

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys([*super().names, *self._rows]))

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self._rows

    def full(self, name: str) -> Tensor | None:
        return self._rows[name].whole() if name in self._rows else super().full(name)

    def rows(self, name: str) -> Any:
        return self._rows[name] if name in self._rows else super().full(name)

    def low_rank(self, name: str) -> LowRank | None:
        found = super().low_rank(name)
        if found is None or name not in self._vocabulary:
            return found
        B = found.B[self._index.clamp(min=0)]
        B[self._index < 0] = 0  # a row that is not its own stands there as a whole
        return LowRank(B, found.A, found.scaling)


def vocabulary_names(reference: Checkpoint) -> frozenset[str]:
    """The tensors that have a row for each token; CheckpointError if there are none, or tokens are no rows."""
    axes = vocabulary_axes(reference)
    across = [name for name, axis in axes.items() if axis]
    if across or not axes:
        what = f"tokens are columns of {some(across)}" if across else "no tensor has a row for each token"
        raise CheckpointError(f"{reference.path}: {what}", remedy="Leave tokenizer out.")
    return frozenset(axes)


def align(
    base: Checkpoint | None,
    experts: Sequence[Checkpoint | Adapter],
    names: Sequence[str],
    choice: TokenizerChoice,
    tensors: frozenset[str],
) -> Sources:
    """The sources of a merge with one vocabulary.

    Args:
        names: the experts', in their order.
        tensors: those with a row for each token.

    Raises CheckpointError for a source whose tokenizer is missing, cuts text otherwise, or has more tokens than its
    embeddings have rows; SpecError for a choice of tokens that do not exist.
    """
    sources: list[Any] = [*([base] if base is not None else []), *experts]
    labels = [*([BASE] if base is not None else []), *names]
    raws = [_Raw(source, base) for source in sources]
    vocabularies = _vocabularies(sources, labels, raws, tensors)
    owns = [
        Own(vocabulary.ids, _rows(label, raw, tensors, vocabulary))
        for label, raw, vocabulary in zip(labels, raws, vocabularies, strict=True)
    ]
    host = 0 if choice.source in (UNION, BASE) else labels.index(choice.source)
    for label, vocabulary in zip(labels, vocabularies, strict=True):
        check_cuts_alike(vocabulary, vocabularies[host], label, labels[host])
    chosen = _chosen(choice, labels, owns)
    ids = union(owns[host].ids, [own.ids for own in owns] if choice.source == UNION else [], choice.tokens)
    count = max(owns[host].rows, 1 + max(ids.values(), default=-1))
    multiple = choice.pad_to_multiple_of or 1
    layout = lay_out(
        owns,
        ids,
        -(-count // multiple) * multiple,
        host=host,
        base=None if base is None else 0,
        chosen=chosen,
        forced=[token for token, entry in choice.tokens.items() if entry.force],
    )
    if layout.is_identity(owns) and ids == owns[0].ids:
        return Sources(base, experts)
    _check_donors(layout, sources, labels, tensors)
    added = tuple(sorted(ids.keys() - owns[host].ids.keys(), key=ids.__getitem__))
    at = sources[host].path  # an adapter without a tokenizer has the base's
    at = at if has_tokenizer(at) else sources[0].path
    alignment = _alignment(layout, sources[0], vocabularies, host, added, at)
    aligned = _aligned(sources, raws, layout, tensors, alignment)
    return Sources(aligned[0] if base is not None else None, aligned[len(sources) - len(experts) :], alignment)


class _Raw:
    """A source's own tensors: an adapter's are the base's where it does not replace them."""

    def __init__(self, source: Checkpoint | Adapter, base: Checkpoint | None):
        self.source, self.base = source, base

    def holder(self, name: str) -> Checkpoint | Adapter:
        if isinstance(self.source, Checkpoint) or self.source.full(name) is not None:
            return self.source
        assert self.base is not None
        return self.base

    def tensor(self, name: str) -> Tensor:
        holder = self.holder(name)
        tensor = holder.tensor(name) if isinstance(holder, Checkpoint) else holder.full(name)
        assert tensor is not None
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        holder = self.holder(name)
        return holder.shape(name) if isinstance(holder, Checkpoint) else tuple(self.tensor(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        holder = self.holder(name)
        return holder.dtype(name) if isinstance(holder, Checkpoint) else self.tensor(name).dtype


def _vocabularies(
    sources: Sequence[Any], labels: Sequence[str], raws: Sequence[_Raw], tensors: frozenset[str]
) -> list[Vocabulary]:
    found: list[Vocabulary] = []
    for source, label, raw in zip(sources, labels, raws, strict=True):
        stage = getattr(source, "vocabulary", None)
        if stage is not None:
            found.append(stage)
        elif has_tokenizer(source.path):
            found.append(read_vocabulary(source.path))
        elif found and all(raw.shape(name) == raws[0].shape(name) for name in tensors):
            found.append(found[0])  # an adapter rarely brings a tokenizer: it was trained with the base's
        else:
            what = "whose embeddings have other rows than the base's" if found else "whose tokens others are matched to"
            raise CheckpointError(
                f"{source.path} has no tokenizer, {what}",
                where=label if label == BASE else f"expert {label}",
                remedy="Put the tokenizer that it was trained with into its folder.",
            )
    return found


def _rows(label: str, raw: _Raw, tensors: frozenset[str], vocabulary: Vocabulary) -> int:
    counts = {name: raw.shape(name)[0] for name in sorted(tensors)}
    least, name = min((count, name) for name, count in counts.items())
    where = label if label == BASE else f"expert {label}"
    beyond = [token for token, i in vocabulary.ids.items() if i >= least]
    if beyond:
        raise CheckpointError(
            f"its tokenizer has {some(sorted(beyond))} from id {least} on, but {name} has {least} rows",
            where=where,
            remedy="Resize its embeddings, or take those tokens out of its tokenizer.",
        )
    if len({*counts.values()}) > 1:
        raise CheckpointError(f"its tensors with a row for each token differ in rows: {counts}", where=where)
    return least


def _chosen(choice: TokenizerChoice, labels: Sequence[str], owns: Sequence[Own]) -> dict[str, Fill]:
    """token -> the row that was chosen for it by hand."""

    def error(token: str, problem: str) -> SpecError:
        return SpecError(problem, where=f"tokenizer.tokens.{token}")

    chosen: dict[str, Fill] = {}
    for token, entry in choice.tokens.items():
        source = entry.source
        if source is None:
            if not any(token in own.ids for own in owns):
                raise SpecError(
                    f"no model has the token {token!r}, so that nobody has a row for it",
                    where=f"tokenizer.tokens.{token}",
                    remedy=nearest(token, {t for own in owns for t in own.ids})
                    + " Or give it a source: {kind: zero}, or {kind: model_token, model: ..., token: ...}.",
                )
            continue
        if isinstance(source, RowSource) and source.kind == "zero":
            chosen[token] = ()
            continue
        name = source.model if isinstance(source, RowSource) else source
        wanted = source.token if isinstance(source, RowSource) else token
        if name not in labels:
            raise error(token, f"there is no {name!r} to take a row of: the models are {', '.join(labels)}")
        own = owns[labels.index(str(name))]
        row = source.token_id if isinstance(source, RowSource) and wanted is None else own.ids.get(str(wanted))
        if row is None:
            raise error(token, f"{name} has no token {wanted!r} whose row could be taken")
        if row >= own.rows:
            raise error(token, f"{name} has {own.rows} rows, and none with the number {row}")
        chosen[token] = ((labels.index(str(name)), row),)
    return chosen


def _check_donors(layout: Layout, sources: Sequence[Any], labels: Sequence[str], tensors: frozenset[str]) -> None:
    donors = {source for fill in layout.fills for source, _ in fill or ()}
    for number in donors:
        source = sources[number]
        low = [n for n in tensors if isinstance(source, Adapter) and source.factors(n) is not None]
        if low:
            raise CheckpointError(
                f"the adapter has a LoRA on {some(sorted(low))}, and rows of it would be given to models that lack "
                "the token",
                where=f"expert {labels[number]}",
                remedy="Train added tokens with modules_to_save, or merge the adapter into its base with PEFT's "
                "merge_and_unload, and give the result as a dense expert.",
            )


def _alignment(
    layout: Layout, reference: Checkpoint, vocabularies: Sequence[Vocabulary], host: int, added: Sequence[str], at: Path
) -> Alignment:
    ours = vocabularies[host]
    entries: dict[str, Mapping[str, Any]] = dict(ours.added)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    for token in added:
        known = next((v.added[token] for v in vocabularies if token in v.added), plain)
        entries[token] = {**known, "content": token, "id": layout.ids[token]}
    vocabulary = Vocabulary(layout.ids, entries, ours.kind, ours.merges, ours.pieces)
    config, generation = copy.deepcopy(dict(reference.config)), None
    before = vocabularies[0].ids
    if any(layout.ids.get(token) != i for token, i in before.items()):
        if (reference.path / "generation_config.json").is_file():
            generation = read_json(reference.path / "generation_config.json")
        moved = {i: layout.ids.get(token) for token, i in before.items()}
        tokens = {i: token for token, i in before.items()}
        for data, file in ((config, "config.json"), (generation or {}, "generation_config.json")):
            _move_ids(data, moved, tokens, reference.path / file)
    text = config.get("text_config")
    holders = [t for t in (config, text) if isinstance(t, dict) and "vocab_size" in t]
    for table in holders or [text if isinstance(text, dict) else config]:
        table["vocab_size"] = layout.rows
    return Alignment(layout, at, tuple(added), vocabulary, config, generation)


def _move_ids(data: dict[str, Any], moved: Mapping[int, int | None], tokens: Mapping[int, str], where: Path) -> None:
    """Give the special tokens that a configuration names the ids that they have in the merge."""

    def new(key: str, i: Any) -> Any:
        if isinstance(i, list):
            return [new(key, one) for one in i]
        if type(i) is not int or i not in moved:
            return i
        if moved[i] is None:
            raise CheckpointError(
                f"{where}: {key} is {tokens[i]!r}, which is no token of the merge",
                remedy="Take a vocabulary that has it: tokenizer: {source: union}, or name it under tokens.",
            )
        return moved[i]

    for key, value in data.items():
        if isinstance(value, dict):
            _move_ids(value, moved, tokens, where)
        elif SPECIAL.search(key):
            data[key] = new(key, value)
        elif key in LISTS and value:
            raise CheckpointError(
                f"{where}: {key} names tokens by their ids, which this vocabulary changes",
                remedy="Keep the base's ids: tokenizer: {source: union} or {source: base}.",
            )


def _aligned(
    sources: Sequence[Any], raws: Sequence[_Raw], layout: Layout, tensors: frozenset[str], alignment: Alignment
) -> list[Any]:
    fills = {
        name: FillRows(layout, [_reader(raw, name) for raw in raws], [raw.dtype(name) for raw in raws])
        for name in tensors
    }
    found: list[Any] = []
    for source, raw, index in zip(sources, raws, layout.index, strict=True):

        def rows(name: str, raw: _Raw = raw, index: Tensor = index) -> Rows:
            return Rows(_reader(raw, name), raw.dtype(name), raw.shape(name), index, fills[name])

        if isinstance(source, Checkpoint):
            config = dict(alignment.config) if not found else source.config
            found.append(
                AlignedCheckpoint(source, {name: rows(name) for name in tensors}, config, alignment.vocabulary)
            )
            continue
        same = torch.equal(index, layout.index[0])
        own = {name: rows(name) for name in tensors if not (same and source.full(name) is None)}
        found.append(AlignedAdapter(source, own, index, tensors))
    return found


def _reader(raw: _Raw, name: str):
    return lambda: raw.tensor(name)
