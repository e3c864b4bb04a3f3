"""Where a checkpoint's tensors lie in a transformers model.

Files and modules do not always agree on names: transformers renames, stacks and joins tensors while it loads (a Mixtral
file's ``block_sparse_moe.experts.0.w1.weight`` is a part of the module's ``mlp.experts.gate_up_proj``). This module
follows transformers' own conversion (``transformers.core_model_loading``) once, so that a merge can afterwards be
written straight into the parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from evomerge.checkpoints import Checkpoint
from evomerge.errors import CheckpointError, ResourceError
from evomerge.folders import some


@dataclass
class Conversion:
    """Tensors that only transformers' own operations turn into parameters: gathered whole, then converted."""

    first_target: str
    converter: Any  # transformers WeightConverter, without tensors
    sources: list[tuple[str, str]]  # (source pattern, checkpoint name), in the order transformers collects them

    def run(self, tensor: Callable[[str], Tensor], model: Any) -> dict[str, Tensor]:
        """Module name -> converted tensor, from ``tensor(checkpoint name)``."""
        converter = copy.deepcopy(self.converter)
        for pattern, name in self.sources:
            converter.add_tensor(self.first_target, name, pattern, tensor(name))
        converted = converter.convert(self.first_target, model=model, config=model.config)
        return {k: v[0] if isinstance(v, list) else v for k, v in converted.items()}


@dataclass
class Placement:
    """Destinations of checkpoint names in one model.

    Attributes:
        views: checkpoint name -> the part of a parameter that holds it, with its shape.
        conversions: groups of names that have no such part.
        unused: names the model has no place for (a head that this model class leaves out).
    """

    views: dict[str, Tensor] = field(default_factory=dict)
    conversions: list[Conversion] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def place(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> Placement:
    """Find the place of every checkpoint name in ``model``, as ``from_pretrained`` would.

    Raises ValueError if a tensor does not fit its place, ResourceError if the model is offloaded.
    """
    refuse_offloaded(model)
    state = {**dict(model.named_buffers()), **model.state_dict(keep_vars=True)}
    placement = Placement()
    groups: dict[str, Conversion] = {}
    for name, target, pattern, converter in _targets(model, shapes):
        if target not in state:
            placement.unused.append(name)
        elif converter is None:
            if tuple(state[target].shape) != tuple(shapes[name]):
                raise ValueError(f"{name} {tuple(shapes[name])} does not fit {target} {tuple(state[target].shape)}")
            placement.views[name] = state[target].detach()
        else:
            group = groups.setdefault(target, Conversion(target, copy.deepcopy(converter), []))
            group.sources.append((str(pattern), name))
    checked: dict[tuple, bool] = {}
    for group in groups.values():
        views = _views(group, state[group.first_target].detach(), shapes)
        if views is not None:
            kind = (tuple(group.converter.source_patterns), tuple(shapes[name] for _, name in group.sources))
            if kind not in checked:
                checked[kind] = _holds(group, shapes, model)
            if checked[kind]:
                placement.views.update(views)
                continue
        placement.conversions.append(group)
    return placement


def owners(placement: Placement, parameters: Iterable[Tensor]) -> dict[str, Tensor]:
    """Checkpoint name -> the one of ``parameters`` whose memory holds it, for the names that one of them holds."""
    by_memory = {parameter.untyped_storage().data_ptr(): parameter for parameter in parameters}
    held = {name: by_memory.get(view.untyped_storage().data_ptr()) for name, view in placement.views.items()}
    return {name: parameter for name, parameter in held.items() if parameter is not None}


def part_of(values: Tensor, parameter: Tensor, view: Tensor) -> Tensor:
    """The part of ``values``, one for each number of ``parameter``, that belongs to a ``view`` into the parameter.

    Args:
        values: of the parameter's shape, such as its gradient.
        view: one of ``Placement.views`` that the parameter owns.
    """
    if values.stride() != parameter.stride():
        same = torch.empty_strided(parameter.shape, parameter.stride(), dtype=values.dtype, device=values.device)
        values = same.copy_(values)
    start = values.storage_offset() + view.storage_offset() - parameter.storage_offset()
    return values.as_strided(view.shape, view.stride(), start)


def refuse_offloaded(model: Any) -> None:
    """ResourceError if the model's weights are not, or not always, where its modules hold them.

    accelerate's hooks bring offloaded weights in from RAM or disk for each forward pass. What is written into the
    module meanwhile goes nowhere (a meta tensor takes any number and keeps none) or is replaced: every candidate would
    silently score as the base.
    """
    state = {**dict(model.named_buffers()), **model.state_dict(keep_vars=True)}
    absent = [name for name, tensor in state.items() if tensor.device.type == "meta"]
    moved = [name or "the model" for name, module in model.named_modules() if _moves_weights(module)]
    if absent or moved:
        what = f"{some(absent)} of its tensors without memory (meta)" if absent else f"a hook that moves {moved[0]}"
        raise ResourceError(
            f"a merge is written into a model's own memory, but this {type(model).__name__} has {what}: it is "
            "offloaded to RAM or disk (a device map, or accelerate's cpu_offload)",
            remedy="Load it without offloading: on a larger device, on several GPUs, or with compute_dtype bfloat16. "
            'An evaluator that loads models its own way can ask for checkpoints on disk (needs = "checkpoint").',
        )


def _moves_weights(module: Any) -> bool:
    """Does an accelerate hook take this module's weights away between forward passes?"""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    return any(getattr(h, "offload", False) or type(h).__name__ == "CpuOffload" for h in hooks)


def _targets(model: Any, shapes: Mapping[str, Any]):
    """(checkpoint name, module name, source pattern, converter or None), in transformers' order of loading.

    Mirrors the first half of transformers.core_model_loading.convert_and_load_state_dict_in_model.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    for name in sorted(shapes, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=state)
        yield name, target, pattern, None if pattern is None else by_pattern[pattern]


def _views(group: Conversion, target: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor] | None:
    """The part of ``target`` that each source becomes, for conversions that only stack and join; None for others."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    converter = group.converter
    operations = list(converter.operations)
    kinds = [type(operation) for operation in operations]
    if len(converter.target_patterns) != 1 or kinds not in (
        [MergeModulelist], [Concatenate], [MergeModulelist, Concatenate],
    ):  # fmt: skip
        return None
    members = {pattern: [n for p, n in group.sources if p == pattern] for pattern in converter.source_patterns}
    members = {pattern: names for pattern, names in members.items() if names}
    stack = operations[0].dim if kinds[0] is MergeModulelist else None
    join = operations[-1].dim if kinds[-1] is Concatenate else None
    views: dict[str, Tensor] = {}
    start = 0
    for names in members.values():
        shape = list(shapes[names[0]])
        if stack is not None:
            shape.insert(stack, len(names))
        elif len(names) != 1:
            return None
        part = target
        if join is not None:
            if start + shape[join] > target.shape[join]:
                return None
            part = target.narrow(join, start, shape[join])
            start += shape[join]
        if list(part.shape) != shape:
            return None
        views.update((name, part if stack is None else part.select(stack, i)) for i, name in enumerate(names))
    if join is not None and start != target.shape[join]:
        return None
    return views


def _holds(group: Conversion, shapes: Mapping[str, tuple[int, ...]], model: Any) -> bool:
    """True if transformers' own conversion of random tensors agrees with our views of its result."""
    generator = torch.Generator().manual_seed(0)
    probes = {
        name: torch.randint(-(2**15), 2**15, shapes[name], generator=generator, dtype=torch.int16)
        for _, name in group.sources
    }
    try:
        converted = group.run(probes.__getitem__, model)
    except Exception:  # an operation that takes no integers: let it do the work itself
        return False
    if list(converted) != [group.first_target]:
        return False
    views = _views(group, converted[group.first_target], shapes)
    return views is not None and all(torch.equal(views[name], probe) for name, probe in probes.items())


def parameter_names(base: Checkpoint) -> dict[str, str]:
    """Module parameter name -> checkpoint name, for all parameters that are one whole checkpoint tensor."""
    model = _without_memory(base, _config(base))
    shapes = {name: base.shape(name) for name in base.names}
    state = model.state_dict()
    return {
        target: name for name, target, _, converter in _targets(model, shapes) if converter is None and target in state
    }


def vocabulary_axes(base: Checkpoint) -> dict[str, int]:
    """Checkpoint name -> the axis that token ids run along, for the tensors that have one: embeddings, heads, biases.

    They are those whose shape changes with the configuration's vocab_size. Raises CheckpointError if a model keeps
    tokens in another way.
    """
    config = _config(base)
    larger = copy.deepcopy(config)
    text = larger.get_text_config()
    if getattr(text, "vocab_size_per_layer_input", None) is not None or not isinstance(
        getattr(text, "vocab_size", None), int
    ):
        raise CheckpointError(
            f"{base.path}: a {config.model_type} model's tensors for tokens are not found by vocab_size alone",
            remedy="Leave tokenizer out: such models merge with the base's vocabulary only.",
        )
    text.vocab_size += 64
    model = _without_memory(base, config)
    shapes = {name: tuple(tensor.shape) for name, tensor in _without_memory(base, larger).state_dict().items()}
    axes: dict[str, int] = {}
    for target, tensor in model.state_dict().items():
        grown = [axis for axis, (a, b) in enumerate(zip(tensor.shape, shapes[target], strict=True)) if a != b]
        if grown:
            axes[target] = grown[0]
    found: dict[str, int] = {}
    for name, target, _, converter in _targets(model, {name: base.shape(name) for name in base.names}):
        if target in axes and converter is not None:
            raise CheckpointError(f"{base.path}: {name} is put together from parts, which cannot be matched by token")
        if target in axes:
            found[name] = axes[target]
    return found


def _config(base: Checkpoint) -> Any:
    import transformers

    return transformers.AutoConfig.from_pretrained(base.path, local_files_only=True, trust_remote_code=False)


def _without_memory(base: Checkpoint, config: Any) -> Any:
    """A model of the class that the base's config names, built from ``config`` without memory or weights."""
    import transformers

    architecture = next(iter(base.config.get("architectures") or []), "")
    model_class: Any = getattr(transformers, architecture, None)
    with torch.device("meta"):
        return transformers.AutoModel.from_config(config) if model_class is None else model_class(config)
