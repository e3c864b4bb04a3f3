"""A merge of LoRA adapters written as one LoRA adapter: their factors side by side, with the ranks added up; or the
factors that the method itself makes of theirs (lorahub, knots).

With coefficients c_t and scalings s_t, sum_t c_t s_t B_t A_t = [c_1 s_1 B_1, ..., c_T s_T B_T] [A_1; ...; A_T]:
the very task vector of the merge, where the merge is a weighted sum of task vectors. It is not what a merged checkpoint
holds, since that is rounded to export_dtype once the base has been added.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evomerge.adapters import CONFIG, PREFIX, WEIGHTS, Adapter, Factors, same_as_base
from evomerge.checkpoints import Checkpoint, Sources
from evomerge.companions import BASE_ONLY, Companions
from evomerge.errors import CheckpointError, MethodError
from evomerge.exporting import CARD_FILE, RECIPE_FILE, check_room, write_manifest
from evomerge.hub import hub_id
from evomerge.merging import Report, check_finite, open_sources
from evomerge.methods.base import LowRank, check_params
from evomerge.methods.lookup import method_of
from evomerge.modelcard import adapter_card
from evomerge.recipe import Group, Recipe
from evomerge.safetensor_files import ShardWriter
from evomerge.writing import check_out, whole_folder

DENSE = "Export a checkpoint instead: leave out --as adapter."


@dataclass(frozen=True)
class Module:
    """One module of the merged adapter: which factors go into it, and by what each expert's B is multiplied.

    ``made`` are the method's own factors, if the merge is no weighted sum of the experts' task vectors.
    """

    name: str  # in the base checkpoint, such as model.layers.0.self_attn.q_proj.weight
    parts: tuple[tuple[Adapter, float], ...]  # adapter, coefficient (not zero)
    made: LowRank | None = None

    @property
    def factors(self) -> Factors:
        found = self.parts[0][0].factors(self.name)
        assert found is not None
        return found

    def _low_rank(self) -> Iterator[tuple[LowRank, float]]:
        if self.made is not None:
            yield self.made, 1.0
            return
        for adapter, coefficient in self.parts:
            low_rank = adapter.low_rank(self.name)
            assert low_rank is not None
            yield low_rank, coefficient

    def entry(self, factor: str, base: Checkpoint) -> tuple[torch.dtype, tuple[int, int]]:
        """(type, shape) of one factor as it will be stored, without multiplying anything."""
        dtype, rank = torch.float32, 0
        for low_rank, _ in self._low_rank():
            dtype = torch.promote_types(dtype, torch.promote_types(low_rank.A.dtype, low_rank.B.dtype))
            rank += low_rank.A.shape[0]
        out, inner = base.shape(self.name)
        if self.factors.transposed:
            out, inner = inner, out
        return dtype, ((rank, inner) if factor == "A" else (out, rank))

    def merged(self) -> tuple[Tensor, Tensor]:
        """A: (rank, in) and B: (out, rank) as PEFT stores them, for a scaling of 1; in float32 or wider."""
        ups, downs = [], []
        for low_rank, coefficient in self._low_rank():
            A, B = (low_rank.B.T, low_rank.A.T) if self.factors.transposed else (low_rank.A, low_rank.B)
            dtype = torch.promote_types(torch.float32, torch.promote_types(A.dtype, B.dtype))
            downs.append(A.to(dtype))
            ups.append(B.double().mul_(coefficient * low_rank.scaling).to(dtype))
        return torch.cat(downs), torch.cat(ups, dim=1)


def export_adapter(
    recipe: Recipe,
    out: Path,
    *,
    card: Mapping[str, Any] | None = None,
    companions: Companions = BASE_ONLY,
    progress: Report | None = None,
) -> Path:
    """Write ``recipe`` as a PEFT LoRA adapter of its base: factors, config, recipe, model card. Whole or not there.

    Args:
        out: a folder that does not exist yet, or is empty.
        card: what a study knows of the merge, for the model card.
        companions: a tokenizer and chat templates to put beside it. The base's own are left with the base.
        progress: called with (bytes written, bytes in all).

    Returns ``out``. Raises MethodError for a merge that is neither a weighted sum of task vectors nor low-rank by the
    method's own word, CheckpointError for an expert that is not low-rank where its coefficient is not zero, and as
    ``exporting.export`` does.
    """
    out = Path(out).absolute()
    check_out(out)
    sources = open_sources(recipe)
    modules = adapter_modules(recipe, sources)
    base = sources.reference
    assert isinstance(base, Checkpoint)
    tensors = {f"{PREFIX}{m.factors.module}.lora_{_key(m, f)}": (m, f) for m in modules for f in "AB"}
    entries = {key: module.entry(factor, base) for key, (module, factor) in tensors.items()}
    total = sum(dtype.itemsize * rows * columns for dtype, (rows, columns) in entries.values())
    check_room(out, total)
    with whole_folder(out) as folder:
        done = 0
        with ShardWriter(folder / WEIGHTS, entries) as writer:
            for key, (module, factor) in tensors.items():
                tensor = module.merged()["AB".index(factor)]
                check_finite(key, tensor)
                writer.write(tensor)
                done += tensor.numel() * tensor.element_size()
                if progress is not None:
                    progress(done, total)
        companions.write(folder, default=None)
        _write_json(folder / CONFIG, _config(recipe, modules, base))
        (folder / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
        text = adapter_card(recipe, base.config, {**(card or {}), **companions.facts()})
        (folder / CARD_FILE).write_text(text, encoding="utf-8")
        write_manifest(folder, recipe, {WEIGHTS: writer.sha256}, companions.facts())
    return out


def adapter_modules(recipe: Recipe, sources: Sources) -> list[Module]:
    """The modules of the merged adapter, in the base's order; raises as ``export_adapter`` does."""
    if recipe.base is None or sources.base is None:
        raise CheckpointError("an adapter needs a base, and the recipe has none", remedy=DENSE)
    if recipe.base.recipe is not None:
        raise CheckpointError(
            "an adapter belongs to a base that others have, but the recipe's base is a stage",
            remedy="Export the stage as a checkpoint first, and give that folder as the base.",
        )
    if sources.alignment is not None:
        raise CheckpointError(
            f"an adapter has its base's vocabulary, and the merge has another ({sources.alignment.summary})",
            where="recipe: tokenizer",
            remedy=DENSE,
        )
    modules = []
    for name in sources.names:
        if not sources.touched(name):
            continue
        group = recipe.group_for(sources.info(name))
        coefficients = _coefficients(recipe, group)
        parts = []
        chosen = group.weights if coefficients is None else coefficients
        for source, expert, coefficient in zip(recipe.experts, sources.experts, chosen, strict=True):
            if coefficient == 0 or name not in expert:
                continue
            if not isinstance(expert, Adapter):
                raise CheckpointError(
                    f"the expert is a whole checkpoint with a weight that is not zero ({name}), and no adapter",
                    where=f"expert {source.name}",
                    remedy=DENSE,
                )
            if expert.full(name) is not None and not same_as_base(expert, sources.base, name):
                raise CheckpointError(
                    f"the adapter replaces {name} as a whole (modules_to_save), which is not low-rank",
                    where=f"expert {source.name}",
                    remedy=DENSE,
                )
            if expert.factors(name) is not None:
                parts.append((expert, coefficient))
        if parts:
            made = _made(recipe, group, sources, name) if coefficients is None else None
            modules.append(Module(name, tuple(parts), made))
            _check_alike(modules[-1])
    if not modules:
        raise CheckpointError("all weights are zero, so that the merge is its base", remedy="Use the base itself.")
    return modules


def _coefficients(recipe: Recipe, group: Group) -> list[float] | None:
    """What each expert's task vector is multiplied by; None where the merge is no weighted sum of them."""
    method = method_of(recipe, group)
    params = check_params(recipe.method_of(group)[0], method, recipe.params_of(group))
    return method.task_coefficients(group.weights, **params)


def _made(recipe: Recipe, group: Group, sources: Sources, name: str) -> LowRank:
    """The method's own factors of a tensor's merged task vector; MethodError if it has none."""
    (called, _), method = recipe.method_of(group), method_of(recipe, group)
    params = check_params(called, method, recipe.params_of(group))
    experts = [expert.low_rank(name) if isinstance(expert, Adapter) else None for expert in sources.experts]
    kinds = [factor.dtype for found in experts if found is not None for factor in (found.A, found.B)]
    dtype = reduce(torch.promote_types, [torch.float32, sources.reference.dtype(name), *kinds])
    made = method.merged_factors(
        experts, weights=group.weights, dtype=dtype, info=sources.info(name), seed=recipe.seed, **params
    )
    if made is None:
        shown = ", ".join(f"{key} {value}" for key, value in params.items())
        raise MethodError(
            f"method {called} ({shown}, weights {list(group.weights)}) makes of {name} no weighted sum of task "
            "vectors and no low-rank one, which alone an adapter can hold",
            remedy=DENSE,
        )
    return made


def _check_alike(module: Module) -> None:
    """All adapters must call the module by one name and store it one way round, or one of them is another class's."""
    kinds = {(f.module, f.embedding, f.transposed) for a, _ in module.parts if (f := a.factors(module.name))}
    if len(kinds) > 1:
        first, second = sorted(kinds)[:2]
        raise CheckpointError(
            f"the adapters disagree on {module.name}: {first[0]} and {second[0]}"
            + (", one of them transposed (fan_in_fan_out)" if first[0] == second[0] else ""),
            remedy=f"They were trained on different classes of model, which one adapter cannot hold. {DENSE}",
        )


def _key(module: Module, factor: str) -> str:
    return f"embedding_{factor}" if module.factors.embedding else f"{factor}.weight"


def _config(recipe: Recipe, modules: list[Module], base: Checkpoint) -> dict[str, Any]:
    """PEFT's adapter_config.json, with alpha = rank everywhere: a scaling of 1."""
    from peft import LoraConfig

    ranks = {m.factors.module: m.entry("A", base)[1][0] for m in modules}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    unusual = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != usual}
    configs = [adapter.config for module in modules for adapter, _ in module.parts]
    tasks = {config.get("task_type") for config in configs}
    assert recipe.base is not None
    on_hub = None if Path(recipe.base.path).is_dir() else hub_id(recipe.base.path)
    config = LoraConfig(
        r=usual,
        lora_alpha=usual,
        rank_pattern=dict(unusual),
        alpha_pattern=dict(unusual),
        target_modules=_targets([m.factors.module for m in modules], base),
        task_type=tasks.pop() if len(tasks) == 1 else None,
        base_model_name_or_path=on_hub.repo if on_hub else recipe.base.path,
        revision=on_hub.revision if on_hub else None,
        fan_in_fan_out=any(m.factors.transposed and not m.factors.embedding for m in modules),
        inference_mode=True,
    ).to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(config.items())}


def _targets(modules: list[str], base: Checkpoint) -> list[str]:
    """Names that PEFT finds these modules by and no others: the last parts where they are clear, else whole names."""
    stems = [name.removesuffix(".weight") for name in base.names]
    found = set()
    for module in modules:
        leaf = module.rpartition(".")[2]
        everywhere = sum(stem.rpartition(".")[2] == leaf for stem in stems)
        clear = everywhere == sum(other.rpartition(".")[2] == leaf for other in modules)
        found.add(leaf if clear else module)
    return sorted(found)


def _write_json(file: Path, data: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
