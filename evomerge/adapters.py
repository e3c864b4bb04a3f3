"""PEFT LoRA adapters as experts: their factors under the base's checkpoint names, refused by name where they are more.

A plain LoRA adapter changes a weight W by scaling B A with scaling = alpha / r (alpha / sqrt(r) with rslora; Hu et al.
2021, section 4.1; Kalajdzievski 2023, eq. 5), or replaces whole modules (modules_to_save).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evomerge.checkpoints import HEADS, OTHER_TOKENS, Checkpoint, map_tensor, tensor_kind, ties_embeddings
from evomerge.errors import CheckpointError
from evomerge.folders import inside, read_json, refuse_pickles, some, tokenizer_files
from evomerge.methods.base import LowRank
from evomerge.safetensor_files import Entry, read_header

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(\.weight)?$")

# Settings under which an adapter is more, or other, than scaling B A on some weights of the base.
REFUSED = {
    "use_dora": "DoRA (use_dora)",
    "lora_bias": "biases in its factors (lora_bias)",
    "trainable_token_indices": "trainable tokens (trainable_token_indices)",
    "target_parameters": "target_parameters",
    "layer_replication": "layer replication (layer_replication)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "use_qalora": "QALoRA (use_qalora)",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "arrow_config": "Arrow routing (arrow_config)",
    "kasa_config": "KaSA (kasa_config)",
    "monteclora_config": "MonteCLoRA (monteclora_config)",
}
# Initialisations that change the base's own weights: the saved factors do not stand on the base as it is.
REBASING = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Adapter:
    """A LoRA adapter, opened on its base. Made by ``evomerge.checkpoints.open_expert``.

    Attributes:
        path: the folder.
        config: its adapter_config.json.
        names: the base checkpoint names it changes.
    """

    def __init__(self, path: Path, config: dict[str, Any], file: Path, header: dict[str, Entry]):
        self.path, self.config = path, config
        self._file, self._header = file, header
        self._storages: dict[Path, torch.UntypedStorage] = {}
        self._factors: dict[str, Factors] = {}
        self._full: dict[str, str] = {}  # checkpoint name -> the adapter's key

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys([*self._factors, *self._full]))

    def __contains__(self, name: object) -> bool:
        return name in self._factors or name in self._full

    @property
    def total_bytes(self) -> int:
        return sum(entry.end - entry.begin for entry in self._header.values())

    def files(self) -> list[Path]:
        return adapter_files(self.path)

    def factors(self, name: str) -> Factors | None:
        """How the file holds the LoRA on the base's tensor ``name``, if it has one."""
        return self._factors.get(name)

    def low_rank(self, name: str) -> LowRank | None:
        """scaling, B: (out, rank) and A: (rank, in) for the base's tensor ``name``: (out, in), if it has a LoRA."""
        found = self._factors.get(name)
        if found is None:
            return None
        A, B = self._tensor(found.keys["A"]), self._tensor(found.keys["B"])
        if found.transposed:
            A, B = B.T, A.T
        return LowRank(B, A, found.scaling)

    def full(self, name: str) -> Tensor | None:
        """The whole tensor that replaces the base's ``name`` (modules_to_save), if there is one."""
        key = self._full.get(name)
        return None if key is None else self._tensor(key)

    def rows(self, name: str) -> Any:
        """``full``, or the rows that it is gathered from where it is read."""
        return self.full(name)

    def _tensor(self, key: str) -> Tensor:
        return map_tensor(self._storages, self._file, self._header[key])


class Factors:
    """One module's A and B in the file: keys, scaling and orientation.

    Attributes:
        module: its name in the model that the adapter was trained on.
        embedding: it is an embedding's, whose keys are called otherwise.
        transposed: the file has the factors of the transposed weight.
    """

    def __init__(self, module: str, embedding: bool):
        self.module = module
        self.keys: dict[str, str] = {}
        self.embedding = embedding
        self.scaling = 0.0
        self.transposed = False


def adapter_files(folder: Path) -> list[Path]:
    """What an adapter's content is: its weights, its config, and tokenizer files that came with it."""
    return [_weights(folder), inside(folder / CONFIG), *tokenizer_files(folder)]


def _weights(folder: Path) -> Path:
    if not (folder / WEIGHTS).is_file():
        refuse_pickles(folder, WEIGHTS)
        raise CheckpointError(f"{folder} has {CONFIG}, but no {WEIGHTS}", remedy="Save the adapter again with PEFT.")
    return inside(folder / WEIGHTS)


def open_adapter(folder: Path, base: Checkpoint, vocabulary: Collection[str] = ()) -> Adapter:
    """Open a PEFT adapter as an expert of ``base``; reads its config and header, and compares copies of embeddings.

    Args:
        vocabulary: the tensors that may have another number of rows than the base's, since tokens were added.

    Raises CheckpointError, by name, for anything but plain LoRA, and for an adapter that does not fit the base.
    """
    config = read_json(folder / CONFIG)
    _refuse(folder, config)
    file = _weights(folder)
    header = read_header(file)
    adapter = Adapter(folder, config, file, header)
    targets = _Targets(folder, base)
    modules: dict[str, Factors] = {}
    tied = ties_embeddings(base.path, base.config, dict.fromkeys(base.names))
    heads: list[str] = []
    for key, entry in header.items():
        if not entry.dtype.is_floating_point:
            raise CheckpointError(f"{file}: {key} is {entry.dtype}, not a floating-point tensor")
        plain = key.removeprefix(PREFIX)
        match = FACTOR.match(plain)
        if match is not None:
            found = modules.setdefault(match["module"], Factors(match["module"], bool(match["embedding"])))
            found.keys[match["factor"]] = key
        elif _is_copy(adapter, plain, key):
            continue
        elif re.search(r"\.(lora_|modules_to_save\.|original_module\.)", plain):
            raise CheckpointError(f"{file}: {key} is not part of a plain LoRA adapter", remedy=MERGE_FIRST)
        elif tied and plain.endswith(HEADS):
            heads.append(key)
        else:
            name = targets.checkpoint_name(plain.replace(".base_layer.", "."))
            skipped = 1 if name in vocabulary else 0
            if entry.shape[skipped:] != base.shape(name)[skipped:]:
                what = f"has the shape {entry.shape}, but {name} in the base has {base.shape(name)}"
                misfit = _misfit(file, key, what)
                if tensor_kind(name)[0] in ("embedding", "head"):
                    misfit = CheckpointError(misfit.problem, remedy=f"{misfit.remedy} {OTHER_TOKENS}")
                raise misfit
            adapter._full[name] = key
    if not modules and not adapter._full:
        raise CheckpointError(f"{file} holds no tensors", remedy="Save the adapter again with PEFT.")
    for module, found in modules.items():
        name = targets.checkpoint_name(f"{module}.weight")
        whole = adapter._full.get(name)
        _fit(adapter, module, found, name, base.shape(name) if whole is None else header[whole].shape)
        adapter._factors[name] = found
    if tied:
        _refuse_untying(adapter, base, heads)
    return adapter


def _is_copy(adapter: Adapter, plain: str, key: str) -> bool:
    """Is this a second copy of a tensor, as PEFT writes it beside an embedding that it saves because it was resized?

    ``X.modules_to_save.weight`` then equals ``X.weight``; ``X.original_module.weight`` is what was before training.
    """
    for part in (".modules_to_save.", ".original_module."):
        twin = PREFIX + plain.replace(part, ".")
        if part in plain and twin in adapter._header:
            return part == ".original_module." or torch.equal(adapter._tensor(key), adapter._tensor(twin))
    return False


MERGE_FIRST = "Merge it into the base with PEFT's merge_and_unload, and give the result as a dense expert."


def _refuse(folder: Path, config: Mapping[str, Any]) -> None:
    where = folder / CONFIG
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{where}: the adapter is {kind}; only LORA can be an expert", remedy=MERGE_FIRST)
    for key, what in REFUSED.items():
        if config.get(key):
            raise CheckpointError(
                f"{where}: the adapter uses {what}, which evomerge does not merge", remedy=MERGE_FIRST
            )
    if config.get("bias", "none") != "none":
        raise CheckpointError(
            f"{where}: the adapter trains biases (bias={config['bias']!r}), which evomerge does not merge",
            remedy=MERGE_FIRST,
        )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(REBASING):
        raise CheckpointError(
            f"{where}: init_lora_weights={init!r} changes the base's own weights; the factors do not stand on the base",
            remedy="Save it again with path_initial_model_for_weight_conversion, which makes a plain LoRA of it.",
        )


class _Targets:
    """Finds the checkpoint name of a module's parameter as PEFT names it."""

    def __init__(self, folder: Path, base: Checkpoint):
        self.folder, self.base = folder, base
        self._renamed: dict[str, str] | None = None

    def checkpoint_name(self, parameter: str) -> str:
        if parameter in self.base:
            return parameter
        if self._renamed is None:
            from evomerge.placement import parameter_names

            self._renamed = parameter_names(self.base)
        if parameter not in self._renamed:
            raise CheckpointError(
                f"{self.folder} changes {parameter}, which the base {self.base.path} does not have",
                remedy="Is it an adapter of another base? An expert must be trained on the base that is merged.",
            )
        return self._renamed[parameter]


def _fit(adapter: Adapter, module: str, found: Factors, name: str, shape: tuple[int, ...]) -> None:
    """Check the shapes of one module's factors, and set scaling and orientation."""
    file, config = adapter._file, adapter.config
    for factor in ("A", "B"):
        if factor not in found.keys:
            raise _misfit(file, module, f"has no lora_{factor}")
    a, b = (adapter._header[found.keys[factor]].shape for factor in ("A", "B"))
    if len(a) != 2 or len(b) != 2 or len(shape) != 2:
        raise CheckpointError(
            f"{file}: the LoRA on {module} is not on a matrix (B {b}, A {a}, base {shape})", remedy=MERGE_FIRST
        )
    rank = _pattern(config.get("rank_pattern"), module, config.get("r"))
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise CheckpointError(f"{adapter.path / CONFIG}: lora_alpha of {module} is {alpha!r}, not a number")
    if type(rank) is not int or rank < 1 or a[0] != rank or b[1] != rank:
        raise _misfit(file, module, f"has B {b} and A {a}, but {CONFIG} gives it the rank {rank}")
    found.scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    # Embeddings (rank, tokens) and Conv1D layers (fan_in_fan_out) keep the transposed weight.
    found.transposed = found.embedding or bool(config.get("fan_in_fan_out"))
    expected = (a[1], b[0]) if found.transposed else (b[0], a[1])
    if expected != shape:
        raise _misfit(file, module, f"changes a weight of shape {expected}, but {name} in the base has {shape}")


def _pattern(patterns: object, module: str, otherwise: Any) -> Any:
    """The value of the first key that matches the end of the module's name as a regular expression (PEFT's rule)."""
    for key, value in (patterns if isinstance(patterns, dict) else {}).items():
        try:
            found = re.match(rf"(.*\.)?({key})$", module)
        except re.error as error:
            raise CheckpointError(f"the adapter's pattern {key!r} is not a regular expression: {error}") from None
        if found:
            return value
    return otherwise


def _misfit(file: Path, key: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: {key} {what}",
        remedy="Is it an adapter of another base? An expert must be trained on the base that is merged.",
    )


def _refuse_untying(adapter: Adapter, base: Checkpoint, heads: list[str]) -> None:
    """PEFT trains a copy of a tied embedding, so that input and output part; a tied base cannot hold both.

    Args:
        heads: keys of output heads. Where they equal the embedding beside them, the two were trained as one.
    """
    full = {name: adapter._tensor(key) for name, key in adapter._full.items() if tensor_kind(name)[0] == "embedding"}
    for key in heads:
        if not any(torch.equal(adapter._tensor(key), tensor) for tensor in full.values()):
            raise _untied(adapter, key.removeprefix(PREFIX))
    tied = [name for name in adapter.names if tensor_kind(name)[0] in ("embedding", "head")]
    # save_embedding_layers puts an unchanged copy of the embedding into the file: no change.
    copies = [name for name in tied if name not in adapter._factors and same_as_base(adapter, base, name)]
    changed = [name for name in tied if name not in copies and (name in adapter._factors or not heads)]
    if changed:
        raise _untied(adapter, some(changed))
    for name in copies:
        del adapter._full[name]


def _untied(adapter: Adapter, what: str) -> CheckpointError:
    return CheckpointError(
        f"{adapter.path} changes {what}, which the base ties to its output head; the adapter unties them",
        remedy="Untie the base (tie_word_embeddings: false, both tensors in its files), or train without them.",
    )


def same_as_base(adapter: Adapter, base: Checkpoint, name: str) -> bool:
    """True if what replaces the tensor ``name`` is a copy of the base's own."""
    full = adapter.full(name)
    return full is not None and torch.equal(full.to(base.dtype(name)), base.tensor(name))
