"""Bases and experts on disk, opened without reading tensor data; and the sources of a merge, side by side.

Names are checkpoint names: what the safetensors files hold, not what the module calls its parameters.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evomerge.alignment import Rows
from evomerge.errors import CheckpointError
from evomerge.folders import find_folder, inside, optional_files, read_json, refuse_pickles, some, tokenizer_files
from evomerge.hashing import cache_folder, content_hash
from evomerge.methods.base import ANY_EXPERTS, LowRank, TensorInfo, arithmetic_dtype
from evomerge.methods.chunks import CHUNK
from evomerge.safetensor_files import Entry, read_header
from evomerge.vocabulary import check_tokenizers

if TYPE_CHECKING:
    from evomerge.adapters import Adapter
    from evomerge.aligned import Alignment
    from evomerge.vocabulary import Vocabulary

__all__ = [
    "Checkpoint", "Sources", "cache_folder", "check_tokenizers", "content_hash", "open_checkpoint", "open_expert",
]  # fmt: skip

LONGER = 4  # times CHUNK are the slices that nothing is copied for
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Buffers that some versions of a library saved and others did not; they are computed, not trained.
COMPUTED = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids|attn\.masked_bias)$")
HEADS = ("lm_head.weight", "cls.predictions.decoder.weight", "embed_out.weight")
TYING = re.compile(r"CausalLM|LMHead|ConditionalGeneration|MaskedLM|PreTraining")

LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
KIND_PATTERNS = (
    ("norm", re.compile(r"norm|\bln_|\bln\d", re.I)),
    ("attention", re.compile(r"attn|attention|[qkvo]_proj|\bquery|\bkey|\bvalue", re.I)),
    (
        "mlp",
        re.compile(r"mlp|ffn|feed_forward|moe|experts|intermediate|(gate|up|down)_proj|fc\d|dense|\bwi|\bwo\b", re.I),
    ),
)
EMBEDDING = re.compile(r"embed|\bwte\b|\bwpe\b|^shared\.|cls_token|mask_token", re.I)
HEAD = re.compile(r"lm_head|embed_out|classifier|\bscore\b|\bhead\b|qa_outputs|cls\.|pooler", re.I)


def tensor_kind(name: str) -> tuple[str, int | None]:
    """(kind, layer) of a checkpoint name; the layer is None outside the numbered layers."""
    match = LAYER.search(name)
    if match is None:
        for kind, pattern in (("head", HEAD), ("embedding", EMBEDDING), KIND_PATTERNS[0]):
            if pattern.search(name):
                return kind, None
        return "other", None
    rest = name[match.end() :]
    kind = next((kind for kind, pattern in KIND_PATTERNS if pattern.search(rest)), "other")
    return kind, int(match.group(1))


class Checkpoint:
    """A Hugging Face folder with dense weights. Made by ``open_checkpoint``.

    Attributes:
        path: the folder.
        config: its config.json.
        names: checkpoint names in the order of the files.
        vocabulary: what its tokens are, where that is not what its tokenizer's files say; None: they say it.
    """

    vocabulary: Vocabulary | None = None

    def __init__(self, path: Path, config: dict[str, Any], places: dict[str, tuple[Path, Entry]], extra: list[Path]):
        self.path, self.config = path, config
        self.names = list(places)
        self._places, self._extra = places, extra
        self._storages: dict[Path, torch.UntypedStorage] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name][1].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._places[name][1].dtype

    def numel(self, name: str) -> int:
        entry = self._places[name][1]
        return (entry.end - entry.begin) // entry.dtype.itemsize

    def tensor(self, name: str) -> Tensor:
        """The tensor on the CPU in its storage dtype: pages of the file, mapped privately. Never write into it."""
        path, entry = self._places[name]
        return map_tensor(self._storages, path, entry)

    def rows(self, name: str) -> Tensor | Rows:
        """The tensor, or the rows that it is gathered from where it is read."""
        return self.tensor(name)

    @cached_property
    def num_layers(self) -> int:
        return 1 + max((layer for _, layer in map(tensor_kind, self.names) if layer is not None), default=-1)

    def info(self, name: str) -> TensorInfo:
        kind, layer = tensor_kind(name)
        return TensorInfo(name, kind, layer, self.num_layers, self.shape(name))

    @property
    def total_bytes(self) -> int:
        return sum(entry.end - entry.begin for _, entry in self._places.values())

    def files(self) -> list[Path]:
        """What its content is: weights (and their index), config, generation config, tokenizer and chat template."""
        weights = dict.fromkeys(path for path, _ in self._places.values())
        return [*weights, *self._extra]


class Unbuilt(Checkpoint):
    """A checkpoint that is still to be made: names and shapes of ``model``, floats in ``dtype``, and no numbers.

    Stands for a stage where checking is all that is done.
    """

    def __init__(self, model: Checkpoint, dtype: torch.dtype):
        super().__init__(model.path, model.config, model._places, model._extra)
        self._dtype, self.vocabulary = dtype, model.vocabulary

    def dtype(self, name: str) -> torch.dtype:
        stored = super().dtype(name)
        return self._dtype if stored.is_floating_point else stored

    def tensor(self, name: str) -> Tensor:
        raise CheckpointError(
            f"{name} is asked for of a stage that has not been built", remedy="Build it first: evomerge.stages.built."
        )

    @property
    def total_bytes(self) -> int:
        return sum(self.numel(name) * self.dtype(name).itemsize for name in self.names)


def map_tensor(storages: dict[Path, torch.UntypedStorage], path: Path, entry: Entry) -> Tensor:
    """A view of a file's bytes. ``storages`` keeps one private mapping a file, so that nothing is read twice."""
    if path not in storages:
        size = path.stat().st_size
        if entry.end > size:
            raise CheckpointError(
                f"{path} has become shorter since it was opened", remedy="Restore it and start again."
            )
        storages[path] = torch.UntypedStorage.from_file(str(path), False, size)  # pyright: ignore[reportArgumentType]
    raw = torch.empty(0, dtype=torch.uint8)
    raw.set_(storages[path], entry.begin, (entry.end - entry.begin,))  # pyright: ignore[reportCallIssue]
    if entry.begin % entry.dtype.itemsize:
        raw = raw.clone()  # an old writer did not align its data; a view of another type must be aligned
    return raw.view(entry.dtype).reshape(entry.shape)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a Hugging Face folder; reads config.json and the headers of its safetensors files, no tensor data.

    Raises CheckpointError: no such folder, no config, pickled weights, a truncated file, an index that is corrupted or
    names files outside the folder, links out of the folder, quantised weights, code of the model's own.
    """
    folder = find_folder(path)
    config = read_json(folder / "config.json")
    _refuse_foreign(folder, config)
    shards, extra = _weight_files(folder)
    places: dict[str, tuple[Path, Entry]] = {}
    for shard in shards:
        for name, entry in read_header(shard).items():
            if name in places:
                raise CheckpointError(f"{folder}: tensor {name} is in {places[name][0].name} and in {shard.name}")
            places[name] = (shard, entry)
    if extra:
        _check_index(folder, extra[0], places)
    if not places:
        raise CheckpointError(f"{folder} holds no tensors")
    if any(head in places for head in HEADS) and ties_embeddings(folder, config, places):
        _drop_tied_copy(places)
    generation = optional_files(folder, ("generation_config.json",))
    extra += [folder / "config.json", *generation, *tokenizer_files(folder)]
    return Checkpoint(folder, config, places, extra)


def open_expert(path: str | Path, base: Checkpoint, vocabulary: Collection[str] = ()) -> Checkpoint | Adapter:
    """Open a fine-tuned checkpoint of ``base``: a dense folder or a PEFT LoRA adapter. Reads no tensor data.

    Args:
        vocabulary: the tensors that may have another number of rows than the base's, since tokens were added.

    Raises CheckpointError for what ``open_checkpoint`` refuses, and, by name, for another architecture or vocabulary,
    a tensor that is missing, extra or of another shape, and adapters that are not plain LoRA on this base.
    """
    folder = find_folder(path)
    if (folder / "adapter_config.json").exists():
        from evomerge.adapters import open_adapter

        return open_adapter(folder, base, vocabulary)
    expert = open_checkpoint(folder)
    check_family(expert, base, vocabulary)
    return expert


def check_family(expert: Checkpoint, base: Checkpoint, vocabulary: Collection[str] = ()) -> None:
    """CheckpointError, naming the tensor, if ``expert`` cannot have been fine-tuned from ``base``.

    Args:
        vocabulary: the tensors that may have another number of rows.
    """
    remedy = f"Experts must be fine-tuned from {base.path}."
    for key, what in (("model_type", "architecture"), ("vocab_size", "vocabulary size")):
        if key == "vocab_size" and vocabulary:
            continue
        mine, its = (text_config(c.config).get(key, c.config.get(key)) for c in (expert, base))
        if mine != its:
            more = f" {OTHER_TOKENS}" if key == "vocab_size" else ""
            raise CheckpointError(f"{expert.path} has the {what} {mine}, but the base has {its}", remedy=remedy + more)
    missing = [name for name in base.names if name not in expert and not COMPUTED.search(name)]
    if missing:
        raise CheckpointError(f"{expert.path} lacks the tensor {some(missing)}, which the base has", remedy=remedy)
    extra = [name for name in expert.names if name not in base and not COMPUTED.search(name)]
    if extra:
        raise CheckpointError(f"{expert.path} has the tensor {some(extra)}, which the base lacks", remedy=remedy)
    for name in base.names:
        skipped = 1 if name in vocabulary else 0
        if name in expert and expert.shape(name)[skipped:] != base.shape(name)[skipped:]:
            raise CheckpointError(
                f"{expert.path}: tensor {name} has the shape {expert.shape(name)}, in the base {base.shape(name)}",
                remedy=remedy,
            )
        if name in expert and expert.dtype(name).is_floating_point != base.dtype(name).is_floating_point:
            raise CheckpointError(
                f"{expert.path}: tensor {name} is {expert.dtype(name)}, but the base's is {base.dtype(name)}",
                remedy=remedy,
            )


OTHER_TOKENS = "If it added tokens, say so in the recipe or experiment: tokenizer: {source: union}."


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a configuration."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def _refuse_foreign(folder: Path, config: dict[str, Any]) -> None:
    if "quantization_config" in config:
        raise CheckpointError(
            f"{folder} is quantised, and quantised weights cannot be merged",
            remedy="Give the checkpoint in bfloat16, float16 or float32.",
        )
    if "auto_map" in config:
        from transformers import CONFIG_MAPPING

        if config.get("model_type") not in CONFIG_MAPPING:
            raise CheckpointError(
                f"{folder} needs Python code of its own (auto_map in config.json), which is not run",
                remedy="Use an architecture that transformers itself contains.",
            )


def _weight_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """(safetensors files, [the index, if it is sharded]); the same choice that transformers makes."""
    if (folder / WEIGHTS).exists():
        return [inside(folder / WEIGHTS)], []
    if not (folder / INDEX).exists():
        refuse_pickles(folder, WEIGHTS)
        raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {INDEX}", remedy="Is it a Hugging Face checkpoint?")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX} has no valid weight_map", remedy="Copy or download it again.")
    shards = []
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{folder / INDEX} names {file!r}, which is not a safetensors file of this folder")
        if not (folder / file).exists():
            raise CheckpointError(f"{folder / INDEX} names {file}, but there is no such file", remedy="Copy it again.")
        shards.append(inside(folder / file))
    return shards, [inside(folder / INDEX)]


def _check_index(folder: Path, index: Path, places: Mapping[str, tuple[Path, Entry]]) -> None:
    weight_map = read_json(index)["weight_map"]
    for name, file in weight_map.items():
        if name not in places or places[name][0].name != file:
            raise CheckpointError(
                f"{index} says that {name} is in {file}, but it is not", remedy="Copy or download the folder again."
            )
    unlisted = [name for name in places if name not in weight_map]
    if unlisted:
        raise CheckpointError(f"{index} does not list {some(unlisted)}", remedy="Copy or download the folder again.")


def ties_embeddings(folder: Path, config: Mapping[str, Any], names: Mapping[str, Any]) -> bool:
    """True if the model uses its input embedding as the output head, too."""
    if not any(TYING.search(name) for name in config.get("architectures") or []):
        return False
    if not any(head in names for head in HEADS):
        return True
    tied = config.get("tie_word_embeddings", text_config(config).get("tie_word_embeddings"))
    if tied is None:  # old files leave out what was the default of their architecture
        from transformers import AutoConfig

        tied = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).tie_word_embeddings
    return bool(tied)


def _drop_tied_copy(places: dict[str, tuple[Path, Entry]]) -> None:
    """Some files of tied models hold the one tensor under both names: the head's is left out, as transformers does."""
    head = next(head for head in HEADS if head in places)
    twins = [
        name for name, (_, entry) in places.items()
        if tensor_kind(name)[0] == "embedding" and entry.shape == places[head][1].shape and name.endswith(".weight")
    ]  # fmt: skip
    if not twins:
        return
    storages: dict[Path, torch.UntypedStorage] = {}
    first, second = (map_tensor(storages, *places[name]) for name in (twins[0], head))
    if torch.equal(first, second):
        del places[head]
        return
    raise CheckpointError(
        f"{places[head][0]}: {head} and {twins[0]} differ, but config.json ties them (tie_word_embeddings)",
        remedy="Set tie_word_embeddings to false in config.json, in the base and in every expert.",
    )


class Sources:
    """A base and its experts, read side by side under the base's names.

    Without a base (methods that need none) the first expert, which must be dense, gives names, shapes and the rest.

    Attributes:
        kept: copies of dense tensors, by expert (-1 for the base) and name, that merges read instead of the files: see
            ``evomerge.keeping``.
        alignment: how they were brought to one vocabulary; None if they have the base's (``evomerge.aligned``).
    """

    def __init__(
        self,
        base: Checkpoint | None,
        experts: Sequence[Checkpoint | Adapter],
        alignment: Alignment | None = None,
    ):
        self.base, self.experts, self.alignment = base, list(experts), alignment
        self.kept: dict[tuple[int, str], Tensor] = {}
        reference = base if base is not None else self.experts[0]
        if not isinstance(reference, Checkpoint):
            raise CheckpointError(f"{reference.path} is an adapter and cannot be used without its base")
        self.reference = reference
        self.names = list(reference.names)

    def info(self, name: str) -> TensorInfo:
        return self.reference.info(name)

    def is_float(self, name: str) -> bool:
        return self.reference.dtype(name).is_floating_point

    def touched(self, name: str) -> bool:
        """True if an expert may differ from the base here: it is dense, or an adapter that has this name."""
        return self.is_float(name) and any(name in expert for expert in self.experts)

    def has_factors(self, name: str) -> bool:
        """True if an expert comes as LowRank here when ``load`` is asked for factors."""
        return any(not isinstance(e, Checkpoint) and e.low_rank(name) and e.full(name) is None for e in self.experts)

    def require_factors(self, method: str, used: Sequence[bool] | None = None) -> None:
        """CheckpointError unless all experts are LoRA adapters, of one rank in each tensor, as ``method`` needs them.

        Args:
            used: which experts are merged at all; by default all.
        """
        chosen = [e for t, e in enumerate(self.experts) if used is None or used[t]]
        for expert in chosen:
            dense = isinstance(expert, Checkpoint)
            whole = [] if dense else [n for n in expert.names if expert.full(n) is not None]
            if dense or whole:
                raise CheckpointError(
                    f"method {method} works on the factors of LoRA experts, but {expert.path} "
                    + ("is a whole checkpoint" if dense else f"replaces {some(whole)} as a whole (modules_to_save)"),
                    remedy=ANY_EXPERTS,
                )
        for name in self.names:
            ranks = {found.A.shape[0] for e in chosen if not isinstance(e, Checkpoint) and (found := e.low_rank(name))}
            if len(ranks) > 1:
                raise CheckpointError(
                    f"method {method} needs LoRA experts of one rank, but on {name} theirs are "
                    f"{', '.join(map(str, sorted(ranks)))}",
                    remedy=ANY_EXPERTS,
                )

    def load(
        self, name: str, factors: bool = False, *, kept: bool = False
    ) -> tuple[TensorInfo, Tensor | None, list[Tensor | LowRank]]:
        """(info, base, experts) of one whole tensor.

        Base and dense experts come in their storage dtype, mapped, or with ``kept`` from where they are kept. A LoRA
        expert comes as base + tau in the arithmetic dtype, or as LowRank with ``factors``. An expert that leaves the
        tensor alone is the very base object.
        """
        base = None if self.base is None else self.base.tensor(name)
        views = [self._view(expert, name, base) for expert in self.experts]
        dtype = arithmetic_dtype(base, *(view.full for view in views))
        loaded: list[Tensor | LowRank] = []
        for view in views:
            if view.low_rank is None:
                loaded.append(view.full)
            elif factors and view.full is base:
                loaded.append(view.low_rank)
            else:
                whole, scratch = torch.empty(view.full.shape, dtype=dtype), _Scratch(dtype)
                for start, stop in grid(whole.numel()):  # as in chunks: the same bits
                    whole.view(-1)[start:stop] = view.slice(start, stop, dtype, scratch)
                loaded.append(whole)
        if kept:
            copy = base if base is None else self.kept.get((-1, name), base)
            experts: list[Any] = [
                copy if full is base else self.kept.get((t, name), full) if view.low_rank is None else full
                for t, (view, full) in enumerate(zip(views, loaded, strict=True))
            ]
            return self.info(name), copy, experts
        return self.info(name), base, loaded

    def chunks(
        self, name: str, *, device: str = "cpu", skip: Sequence[bool] = (), widen: bool = True
    ) -> Iterator[tuple[TensorInfo, Tensor | None, list[Tensor]]]:
        """(info with its start, base, experts): flat slices of one tensor, in order, in the arithmetic dtype.

        The slices depend on the tensor's shape and ``widen`` alone. Their memory is used again for the next ones.

        Args:
            device: where the slices are wanted.
            skip: the experts to leave at the base, if there is one.
            widen: False to get what is not low-rank in its storage dtype, on the CPU where it lies. Slices are LONGER
                then: nothing is copied that would have to stay in a cache, and Python's time for each is what counts.
        """
        base = None if self.base is None else View(self.base.rows(name), kept=self.kept.get((-1, name)))
        views = [
            self._view(expert, name, base and base.full, self.kept.get((t, name)), gather=True)
            for t, expert in enumerate(self.experts)
        ]
        dtype = arithmetic_dtype(base and base.full, *(view.full for view in views))
        leave = [skipped and base is not None for skipped in skip] or [False] * len(views)
        info = self.info(name)

        def wanted(view: View) -> torch.dtype:
            return dtype if widen or view.low_rank is not None else view.full.dtype

        on_cpu = [view.low_rank is not None for view in views]
        scratch = [_Scratch(dtype, "cpu" if here else device) for here in [*on_cpu, False]]
        for start, stop in grid(self.reference.numel(name), CHUNK if widen else LONGER * CHUNK):
            piece = None if base is None else base.slice(start, stop, wanted(base), scratch[-1]).to(device)
            experts = [
                piece
                if piece is not None and (leave[t] or view.is_plain(base and base.full))
                else view.slice(start, stop, wanted(view), scratch[t]).to(device)
                for t, view in enumerate(views)
            ]
            yield replace(info, start=start), piece, experts

    @staticmethod
    def _view(
        expert: Checkpoint | Adapter, name: str, base: Any, kept: Tensor | None = None, *, gather: bool = False
    ) -> View:
        """``gather``: rows of another vocabulary are gathered slice by slice, not all at once."""
        if isinstance(expert, Checkpoint):
            if name in expert or base is None:
                return View(expert.rows(name) if gather else expert.tensor(name), kept=kept)
            return View(base)  # a computed buffer that this expert's file leaves out
        if base is None:
            raise CheckpointError(f"{expert.path} is an adapter and cannot be used without its base")
        full = expert.rows(name) if gather else expert.full(name)
        return View(base if full is None else full, expert.low_rank(name), kept=kept)

    def __iter__(self) -> Iterator[tuple[TensorInfo, Tensor | None, list[Any]]]:
        """All float tensors, whole, as ``load`` gives them; may be iterated again and again.

        Each list of experts is emptied when the next tensor is asked for: two tensors of T experts are never in memory
        together.
        """
        return iter(self.part(self.names))

    def part(self, names: Collection[str]) -> Iterable[tuple[TensorInfo, Tensor | None, list[Any]]]:
        """The same of some tensors only, in the same order."""
        return _Part(self, names)


class _Part:
    """Some tensors of ``sources``, again and again."""

    def __init__(self, sources: Sources, names: Collection[str]):
        self.sources, self.names = sources, frozenset(names)

    def __iter__(self) -> Iterator[tuple[TensorInfo, Tensor | None, list[Any]]]:
        for name in self.sources.names:
            if name in self.names and self.sources.is_float(name):
                loaded = self.sources.load(name)
                yield loaded
                loaded[2].clear()


def grid(numel: int, size: int = CHUNK) -> Iterator[tuple[int, int]]:
    """[start, stop) of the flat slices that a tensor of ``numel`` entries is merged in."""
    for start in range(0, numel, size):
        yield start, min(start + size, numel)


class _Scratch:
    """Memory that slice after slice is written to: it stays in the core's cache, and no page is touched anew."""

    def __init__(self, dtype: torch.dtype, device: str = "cpu"):
        self.device = device
        self._memory = torch.empty(0, dtype=dtype, device=device)

    def take(self, numel: int) -> Tensor:
        if self._memory.numel() < numel:
            self._memory = torch.empty(numel, dtype=self._memory.dtype, device=self.device)
        return self._memory[:numel]


class View:
    """One expert's tensor: ``full``, plus scaling B A if it is low-rank. ``kept``: a copy to read ``full`` from."""

    def __init__(self, full: Any, low_rank: LowRank | None = None, *, kept: Tensor | None = None):
        self.full, self.low_rank = full, low_rank
        whole = full if kept is None else kept
        self._flat = whole if isinstance(whole, Rows) else whole.reshape(-1)
        self._factors: tuple[Tensor, Tensor] | None = None

    def is_plain(self, base: Any) -> bool:
        """True if this is nothing but ``base``."""
        return self.full is base and self.low_rank is None

    def slice(self, start: int, stop: int, dtype: torch.dtype, scratch: _Scratch) -> Tensor:
        """Entries [start, stop) of the flat tensor in ``dtype``; only to be read, and only until the next slice.

        They come on the device of ``scratch``, which must be the CPU for a low-rank expert: B A is multiplied there,
        for the rows that they lie in, in ``dtype``, and never rounded further.
        """
        if self.low_rank is None:
            flat = self._flat
            part = flat.flat(start, stop) if isinstance(flat, Rows) else flat[start:stop]
            part = part.to(scratch.device, non_blocking=True)  # narrow first, then cast: less to move
            return part if part.dtype == dtype else scratch.take(stop - start).copy_(part)
        if self._factors is None:
            # Copies, because a product's last bits may depend on the alignment of what it reads.
            self._factors = self.low_rank.B.to(dtype, copy=True), self.low_rank.A.to(dtype, copy=True)
        B, A = self._factors
        columns = A.shape[1]
        first, last = start // columns, -(-stop // columns)
        flat = scratch.take((last - first) * columns)
        rows = flat.view(last - first, columns)
        rows.copy_(self.full.take(first, last) if isinstance(self.full, Rows) else self.full[first:last])
        rows.addmm_(B[first:last], A, alpha=self.low_rank.scaling)
        return flat[start - first * columns : stop - first * columns]
