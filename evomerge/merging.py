"""Apply a recipe to sources: into a resident model in place, or streamed to disk. One generator feeds both."""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evomerge.aligned import Alignment, align, vocabulary_names
from evomerge.checkpoints import (
    INDEX,
    WEIGHTS,
    Sources,
    Unbuilt,
    check_family,
    check_tokenizers,
    content_hash,
    grid,
    open_checkpoint,
    open_expert,
)
from evomerge.collected import statistics_for, verify_collected
from evomerge.errors import CheckpointError, EvaluatorError, SpecError, nearest
from evomerge.folders import find_folder, some
from evomerge.hub import pin
from evomerge.methods import fused
from evomerge.methods.base import LowRank, Method, State, TensorInfo, check_experts, check_params, check_weights
from evomerge.methods.chunks import slices
from evomerge.methods.lookup import method_of
from evomerge.parts import check_parts
from evomerge.placement import Placement, place, refuse_offloaded
from evomerge.progress import Progress
from evomerge.recipe import DTYPES, Collected, Group, Recipe, Source
from evomerge.safetensor_files import ShardWriter
from evomerge.surgery import verify as verify_surgery
from evomerge.task_vectors import Place, TaskVectors, merge

Report = Callable[[int, int], None]
SHARD_SIZE = 5_000_000_000  # bytes


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype that a recipe or an experiment file names, such as ``bfloat16``."""
    if name not in DTYPES:
        raise SpecError(f"{name!r} is not a type that weights can have", remedy=nearest(str(name), DTYPES))
    return getattr(torch, name)


class NotFiniteError(CheckpointError):
    """A merged number is NaN or infinite."""


@dataclass
class _Part:
    """All groups of a recipe that one method merges: their checked parameters, and what it prepared for them."""

    method: Method
    params: dict[int, dict[str, Any]] = field(default_factory=dict)  # id of a group -> parameters
    names: set[str] = field(default_factory=set)  # of the tensors in these groups
    state: Any = None


class MergePlan:
    """What is the same for all tensors of one recipe: the methods, checked parameters by group, the prepared states.

    A method is prepared over the tensors that it merges and no others.
    """

    def __init__(self, merger: Merger, recipe: Recipe, *, rounded: bool = True):
        sources = merger.sources
        if len(recipe.experts) != len(sources.experts):
            raise ValueError(f"the recipe has {len(recipe.experts)} experts, the sources have {len(sources.experts)}")
        layers, end = sources.reference.num_layers, recipe.end
        if end is not None and end != layers and (end > layers or all(group.layers for group in recipe.groups)):
            raise SpecError(
                f"the recipe's groups end at layer {end}, but the model has {layers} layers",
                remedy=f"The groups must cover the layers 0 to {layers}, the last one excluded.",
            )
        self._group_of = {name: recipe.group_for(info) for name, info in merger.infos.items()}
        self.recipe, self.dtype = recipe, torch_dtype(recipe.export_dtype) if rounded else None
        parts: dict[str, _Part] = {}
        self._parts: dict[int, _Part] = {}  # by the id of a group
        for group in recipe.groups:
            name, _ = recipe.method_of(group)
            part = self._parts[id(group)] = parts.get(name) or _Part(method_of(recipe, group))
            parts[name] = part
            part.params[id(group)] = check_params(name, part.method, recipe.params_of(group))
        for name, group in self._group_of.items():
            self._parts[id(group)].names.add(name)
        for name, part in parts.items():
            if part.method.needs_factors:
                own = [group for group in recipe.groups if self._parts[id(group)] is part]
                used = [any(group.weights[t] for group in own) for t in range(len(recipe.experts))]
                sources.require_factors(name, used)
            if part.names:
                statistics = merger.statistics(recipe, part.method)
                part.state = merger.state(name, part, recipe.seed, statistics)

    def of(self, name: str) -> tuple[_Part, Group, dict[str, Any]]:
        """How a tensor is merged: (method and state, weights, parameters)."""
        group = self._group_of[name]
        part = self._parts[id(group)]
        return part, group, part.params[id(group)]

    def round(self, piece: Tensor) -> Tensor:
        """To the export_dtype, if this merge is rounded."""
        return piece if self.dtype is None else piece.to(self.dtype)

    def held(self, name: str, is_base: bool) -> _Held:
        """What a model holds of a tensor where this plan has written it; all that its merge depends on."""
        if is_base:
            return self.dtype, None
        part, group, params = self.of(name)
        return self.dtype, (part.method, group.weights, params, self.recipe.seed, self.recipe.statistics)

    def is_base(self, name: str) -> bool:
        """Is the merge of this tensor, whatever the experts hold, its base?"""
        part, group, params = self.of(name)
        coefficients = part.method.task_coefficients(group.weights, **params)
        return coefficients is not None and not any(coefficients)


_Held = tuple[torch.dtype | None, Any]  # what it was rounded to (None: nothing), and how it was merged (None: the base)


@dataclass
class _Resident:
    """What a Merger knows of one model: where tensors lie, and what some of them hold at the moment.

    Known of tensors that hold the base, and of those of a merge that was not rounded.
    """

    placement: Placement
    held: dict[str, _Held] = field(default_factory=dict)


class Merger:
    """Builds candidates from ``sources``, which it never changes, and never from an earlier candidate.

    Args:
        sources: the base and the experts; every recipe's experts are these, in this order.
        device: where the arithmetic is done.
        fixed_params: method -> its parameters that no candidate changes, so that what depends on them is computed once
            (``Method.prepare``). A method that is not there has only fixed ones. None: this is for a single merge, for
            which nothing is worth keeping that is as large as masks are.
    """

    def __init__(
        self, sources: Sources, *, device: str = "cpu", fixed_params: Mapping[str, Mapping[str, Any]] | None = None
    ):
        self.sources, self.device = sources, device
        self.fixed_params = None if fixed_params is None else dict(fixed_params)
        self.infos = {name: sources.info(name) for name in sources.names if sources.is_float(name)}
        # method -> (what was fixed, its tensors, the statistics, its state)
        self._states: dict[Method, tuple[dict[str, Any], set[str], Sequence[Any] | None, Any]] = {}
        self._statistics: dict[str, Sequence[Any]] = {}  # of experts, by where they are
        self._lent: tuple[str, Sequence[Any]] | None = None  # the same of those that are no files
        self.task_vectors = TaskVectors(sources)
        self._residents: weakref.WeakKeyDictionary[Any, _Resident] = weakref.WeakKeyDictionary()

    @torch.no_grad()
    def into(self, model: Any, recipe: Recipe, *, rounded: bool = True) -> None:
        """Write the merge into a resident model of the base, in place.

        Merged numbers are rounded to the recipe's export_dtype first, then cast to the parameter's dtype: what is
        scored is what ``stream`` writes. Tensors that no expert touches are left alone while they hold the base.

        Args:
            rounded: False for training: the parameter's dtype is all that merged numbers are rounded to, and tensors
                that hold this merge already are left alone.

        Raises UserError if the recipe does not fit the sources, ResourceError if the model is offloaded.
        """
        self.write(model, MergePlan(self, recipe, rounded=rounded))

    @torch.no_grad()
    def write(self, model: Any, plan: MergePlan) -> None:
        """As ``into``, for whoever has the plan."""
        resident = self.adopt(model)
        views = resident.placement.views
        names = [name for name in views if self._must_write(resident, plan, name)]
        at_once = self._write_at_once(plan, {name: views[name] for name in names})
        for name in names:
            if name not in at_once:
                self._write(plan, name, views[name])
            self._note(resident, plan, name)
        for conversion in resident.placement.conversions:
            names = [name for _, name in conversion.sources]
            changed = [self._must_write(resident, plan, name) for name in names]
            if any(changed):
                state = model.state_dict(keep_vars=True)
                dtype = state[conversion.first_target].dtype
                converted = conversion.run(lambda name, dtype=dtype: self._whole(plan, name, dtype), model)
                for target, value in converted.items():
                    state[target].copy_(value)
                for name in names:
                    self._note(resident, plan, name)

    def adopt(self, model: Any) -> _Resident:
        """Find out, once, where tensors lie in a model; ResourceError if it is offloaded."""
        if model not in self._residents:
            shapes = {name: self.sources.reference.shape(name) for name in self.sources.names}
            self._residents[model] = _Resident(place(model, shapes))
        return self._residents[model]

    @torch.no_grad()
    def stream(
        self,
        recipe: Recipe,
        out: Path,
        *,
        shard_size: int = SHARD_SIZE,
        progress: Report | None = None,
        durable: bool = True,
    ) -> dict[str, str]:
        """Write the merge to safetensors files in the existing folder ``out``: one, or shards and their index.

        Args:
            shard_size: bytes of tensors that a file may hold; a larger tensor has a file of its own.
            progress: called with (bytes written, bytes in all).
            durable: wait until all is on the disk, and hash it; False for a folder that lives for one evaluation.

        Returns the SHA-256 of each weight file by its name; nothing without ``durable``. Raises UserError if the recipe
        does not fit the sources, NotFiniteError if a merged number is not finite in the recipe's export_dtype.
        """
        plan, reference = MergePlan(self, recipe), self.sources.reference
        dtype = torch_dtype(recipe.export_dtype)
        types = {n: dtype if self.sources.is_float(n) else reference.dtype(n) for n in self.sources.names}
        sizes = {n: reference.numel(n) * types[n].itemsize for n in self.sources.names}
        files = _shards(sizes, shard_size)
        total, done, hashes = sum(sizes.values()), 0, {}
        for file, names in files.items():
            names.sort(key=lambda n: -types[n].itemsize)  # wide types first: every tensor is aligned to its type
            writer = ShardWriter(out / file, {n: (types[n], reference.shape(n)) for n in names}, durable=durable)
            with writer:
                for name in names:
                    for piece in self._merged(plan, name):
                        if piece.is_floating_point() and not math.isfinite(piece.sum(dtype=torch.float32)):
                            check_finite(name, piece)
                        writer.write(piece)
                        done += piece.numel() * piece.element_size()
                        if progress is not None:
                            progress(done, total)
            if durable:
                hashes[file] = writer.sha256
        if len(files) > 1:
            weight_map = {name: file for file, names in files.items() for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            with (out / INDEX).open("x") as handle:
                json.dump(index, handle, indent=2)
                handle.flush()
                if durable:
                    os.fsync(handle.fileno())
        return hashes

    def statistics(self, recipe: Recipe, method: Method) -> Sequence[Any] | None:
        """A mapping an expert of the statistics that ``method`` needs and ``recipe`` names, opened once; or None."""
        kind = method.statistics
        if kind is None:
            return None
        place = _place(kind, recipe.statistics)
        if self._lent is not None and self._lent[0] == place:
            return self._lent[1]
        if place not in self._statistics:
            self._statistics[place] = statistics_for(recipe, kind, method.name)
        return self._statistics[place]

    def lend(self, kind: str, collected: Collected, statistics: Sequence[Any]) -> None:
        """From now on, until others are lent, recipes that name ``collected`` get these: mappings in memory."""
        self._lent = _place(kind, collected), statistics

    def state(self, name: str, part: _Part, seed: int, statistics: Sequence[Any] | None = None) -> Any:
        """What a method prepared for the tensors of ``part`` and those of its parameters that nothing changes.

        A method that ``draws`` learns the seed where there will be many candidates: they have it in common.
        """
        method, tensors, groups = part.method, part.names, list(part.params.values())
        first, known_fixed = groups[0], (self.fixed_params or {}).get(name)
        fixed = {
            key: value
            for key, value in first.items()
            if all(group[key] == value for group in groups)
            and (known_fixed is None or (key in known_fixed and known_fixed[key] == value))
        }
        if method.draws and self.fixed_params is not None:
            fixed["seed"] = seed
        known = self._states.get(method)
        if known is None or known[:2] != (fixed, tensors) or known[2] is not statistics:
            held = self.sources if len(tensors) == len(self.infos) else self.sources.part(tensors)
            if known is not None and known[:2] == (fixed, tensors):
                state = method.renew(known[3], held, statistics, **fixed)
            else:
                state = method.prepare(held, statistics, **fixed)
            known = self._states[method] = fixed, tensors, statistics, state
        return known[3]

    def _must_write(self, resident: _Resident, plan: MergePlan, name: str) -> bool:
        """False where the model is known to hold this very tensor already."""
        if not self.sources.is_float(name):
            return False  # counters and masks are the base's, from loading
        if resident.held.get(name) == plan.held(name, self._stays_base(plan, name)):
            return False
        resident.held.pop(name, None)
        return True

    def _note(self, resident: _Resident, plan: MergePlan, name: str) -> None:
        """A tensor has been written. Of rounded merges only the base's are known: nothing else comes twice."""
        is_base = self._stays_base(plan, name)
        if is_base or plan.dtype is None:
            resident.held[name] = plan.held(name, is_base)

    def moving(self, plan: MergePlan) -> dict[str, int]:
        """The tensors whose merge depends on the weights of their group, each with the number of that group."""
        numbers = {id(group): number for number, group in enumerate(plan.recipe.groups)}
        return {
            name: numbers[id(plan.of(name)[1])]
            for name in self.infos
            if self.sources.base is None or self.sources.touched(name) or not plan.of(name)[0].method.keeps_base
        }

    def directions(self, plan: MergePlan, name: str) -> Iterator[tuple[int, int, Tensor | LowRank]]:
        """(start, t, v_t) of one tensor: slices of ``Method.directions``, and the flat offset at which they start."""
        part, _, params = plan.of(name)
        for piece, base, experts, state in self._slices(plan, name):
            call = {"info": piece, "state": state, "seed": plan.recipe.seed, **params}
            for t, vector in part.method.directions(base, experts, **call):
                yield piece.start, t, vector

    def task_scales(self, plan: MergePlan, name: str) -> list[float] | None:
        """c with directions v_t = c_t tau_t of dense task vectors of one tensor; else None."""
        part, _, params = plan.of(name)
        if self.sources.base is None or (part.method.factors and self.sources.has_factors(name)):
            return None
        return part.method.task_scales(len(plan.recipe.experts), params)

    def task_slices(self, plan: MergePlan, name: str) -> Iterator[tuple[int, Tensor, list[Any]]]:
        """(start, base, experts) of one tensor's slices, for who computes with task vectors himself."""
        for piece, base, experts, _ in self._slices(plan, name):
            assert base is not None
            yield piece.start, base, experts

    def _stays_base(self, plan: MergePlan, name: str) -> bool:
        """False where it takes a merge to know."""
        if self.sources.base is None:
            return False
        if not self.sources.touched(name):
            return plan.of(name)[0].method.keeps_base
        return plan.is_base(name)

    def _merged(self, plan: MergePlan, name: str) -> Iterator[Tensor]:
        """The merged tensor in the recipe's export_dtype: flat pieces in row-major order. Non-floats are the base's."""
        sources = self.sources
        if not sources.is_float(name) or self._stays_base(plan, name):
            tensor = sources.reference.tensor(name).reshape(-1)
            for start, stop in grid(tensor.numel()):
                piece = tensor[start:stop]
                yield plan.round(piece) if tensor.is_floating_point() else piece
            return
        part, group, params = plan.of(name)
        method, weights = part.method, group.weights
        # A method that is affine in its weights does not see an expert of weight zero: spare its B A.
        blind = method.is_linear(**params) and not method.counts_all(**params)
        for piece, base, experts, state in self._slices(plan, name, [weight == 0 and blind for weight in weights]):
            call = {"weights": weights, "info": piece, "state": state, "seed": plan.recipe.seed}
            merged = method.merge(base, experts, **call, **params).reshape(-1)
            for start, stop in grid(merged.numel()):  # a slice may be the whole tensor
                yield plan.round(merged[start:stop])

    def _slices(
        self, plan: MergePlan, name: str, skip: Sequence[bool] = ()
    ) -> Iterator[tuple[TensorInfo, Tensor | None, list[Any], State | None]]:
        """What a tensor's method is called with, slice after slice: (info, base, experts, state), on the device.

        Args:
            skip: the experts that may stay at the base, where that spares something.
        """
        part, _, params = plan.of(name)
        method, state = part.method, part.state
        factors = method.factors and self.sources.has_factors(name)
        if not factors and method.chunked_with(state, **params):
            options = {"device": self.device, "skip": skip, "widen": not method.widens}
            for piece, base, experts in self.sources.chunks(name, **options):
                yield piece, base, experts, state
            return
        _, base, experts = self.sources.load(name, factors=factors, kept=True)
        base, experts = _on_device(self.device, base, experts)
        yield from slices(method, base, experts, self.infos[name], state, params)

    def _write(self, plan: MergePlan, name: str, view: Tensor) -> None:
        """Merge one tensor into its part of a parameter."""
        direct = view.is_contiguous()
        flat = view.view(-1) if direct else torch.empty(view.numel(), dtype=view.dtype, device=view.device)
        place = 0
        for piece in self._merged(plan, name):
            flat[place : place + piece.numel()].copy_(piece)
            place += piece.numel()
        if not direct:
            view.copy_(flat.view(view.shape))

    def _write_at_once(self, plan: MergePlan, views: Mapping[str, Tensor]) -> set[str]:
        """Merge the tensors that are sums of dense task vectors in one call; says which. The bits of ``_write``."""
        chosen: dict[torch.dtype, list[tuple[str, Place, list[float]]]] = {}
        if fused.kernels() is None or self.device != "cpu":
            return set()
        for name, view in views.items():
            part, group, params = plan.of(name)
            if not part.method.sums_task_vectors or self._stays_base(plan, name):
                continue
            place = self.task_vectors.place(name)
            exact = place is not None and view.dtype == fused.WIDENED[place.dtype] and plan.dtype in (None, view.dtype)
            if place is not None and exact and view.is_contiguous() and view.device.type == "cpu":
                count = len(group.weights)
                check_experts(part.method, self.sources.base is not None, count)
                weights = check_weights(part.method, group.weights, count)
                coefficients = part.method.task_coefficients(weights, **params)
                assert coefficients is not None
                chosen.setdefault(place.dtype, []).append((name, place, coefficients))
        for found in chosen.values():
            merge([place for _, place, _ in found], [c for _, _, c in found], [views[name] for name, _, _ in found])
        return {name for found in chosen.values() for name, _, _ in found}

    def _whole(self, plan: MergePlan, name: str, dtype: torch.dtype) -> Tensor:
        """One merged tensor, rounded to export_dtype and then cast to ``dtype``."""
        if not self.sources.is_float(name):
            return self.sources.reference.tensor(name)
        whole = torch.empty(self.sources.reference.shape(name), dtype=dtype, device=self.device)
        self._write(plan, name, whole)
        return whole


def _place(kind: str, collected: Collected | None) -> str:
    """What statistics are known by."""
    return json.dumps([kind, collected and collected.to_dict()])


def written_bytes(sources: Sources, export_dtype: str) -> int:
    """How many bytes of tensors ``Merger.stream`` writes."""
    return Unbuilt(sources.reference, torch_dtype(export_dtype)).total_bytes


def _on_device(device: str, base: Tensor | None, experts: Sequence[Any]) -> tuple[Tensor | None, list[Any]]:
    """The same on ``device``; an expert that is the base stays the very object."""
    if device == "cpu":
        return base, list(experts)
    moved = None if base is None else base.to(device)

    def move(expert: Any) -> Any:
        if expert is base:
            return moved
        if isinstance(expert, Tensor):
            return expert.to(device)
        return replace(expert, B=expert.B.to(device), A=expert.A.to(device))

    return moved, [move(expert) for expert in experts]


def check_finite(name: str, piece: Tensor) -> None:
    """CheckpointError if a merged number is NaN or infinite."""
    if not torch.isfinite(piece).all():
        raise NotFiniteError(
            f"the merged tensor {name} is not finite in {str(piece.dtype).removeprefix('torch.')}",
            remedy="Choose smaller weights, or an export_dtype with a wider range (bfloat16, float32).",
        )


def _shards(sizes: Mapping[str, int], shard_size: int) -> dict[str, list[str]]:
    """File name -> tensor names: filled in order, none above ``shard_size`` bytes unless by a single tensor."""
    shards: list[list[str]] = [[]]
    room = shard_size
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = shard_size
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards)}


def open_sources(recipe: Recipe) -> Sources:
    """The recipe's base and experts, opened without reading tensor data; raises CheckpointError naming the source.

    A stage without a folder is checked all the way down, and is there with its names and shapes only (``Unbuilt``).
    """
    base = None
    if recipe.base is not None:
        with _naming(recipe.base, "base"):
            base = open_source(recipe.base)
    experts: list[Any] = []
    tensors: frozenset[str] | None = None
    for source in recipe.experts:
        with _naming(source, "expert"):
            first = base if base is not None else (experts[0] if experts else None)
            if first is not None and recipe.tokenizer is not None and tensors is None:
                tensors = vocabulary_names(first)
            expert = open_source(source, first, tensors or ())
            if first is not None and recipe.tokenizer is None:
                check_tokenizers(first, [expert])
            experts.append(expert)
    if recipe.tokenizer is None:
        sources = Sources(base, experts)
    else:
        names = [source.name for source in recipe.experts]
        sources = align(base, experts, names, recipe.tokenizer, tensors or vocabulary_names(experts[0]))
    check_parts(recipe, [sources.info(name) for name in sources.names if sources.is_float(name)])
    return sources


def open_source(source: Source, base: Any = None, vocabulary: Collection[str] = ()) -> Any:
    """One source, a fine-tuned one of ``base`` if that is given; raises CheckpointError.

    Args:
        vocabulary: the tensors that may have another number of rows than the base's.
    """
    if source.recipe is None or source.path:
        return open_checkpoint(source.path) if base is None else open_expert(source.path, base, vocabulary)
    stage = Unbuilt(open_sources(source.recipe).reference, torch_dtype(source.recipe.export_dtype))
    if base is not None:
        check_family(stage, base, vocabulary)
    return stage


def pin_sources(recipe: Recipe, progress: Progress | None = None) -> Recipe:
    """``recipe`` with its Hugging Face ids at the commits that they stand for, fetched; raises CheckpointError."""

    def pinned(source: Source, role: str) -> Source:
        with _naming(source, role):
            if source.recipe is not None:
                return replace(source, recipe=pin_sources(source.recipe, progress))
            return replace(source, path=pin(source.path, progress))

    base = None if recipe.base is None else pinned(recipe.base, "base")
    return replace(recipe, base=base, experts=tuple(pinned(source, "expert") for source in recipe.experts))


def verify_sources(recipe: Recipe, progress: Callable[[str, int, int], None] | None = None) -> Recipe:
    """Hash every source (each file is read once, or known from the cache), and look for NaN and infinity on the way.

    Args:
        progress: called with (source name, bytes done, bytes in all).

    Returns the recipe with all hashes filled in, those of its stages, statistics and adapters included. Raises
    CheckpointError for a source or adapters whose content is not what the recipe's sha256 says, and for statistics of
    others than its sources.
    """

    def checked(source: Source, role: str) -> Source:
        def report(done: int, total: int) -> None:
            if progress is not None:
                progress(source.name, done, total)

        with _naming(source, role):
            if source.recipe is not None:
                stage = verify_sources(source.recipe, progress)
                if source.sha256 and source.sha256 != stage.hash:
                    raise CheckpointError(
                        f"the recipe of this stage has the hash {stage.hash}, but the recipe was made with "
                        f"{source.sha256}",
                        remedy="Restore the stage's recipe, or take the sha256 out to merge what it says now.",
                    )
                return replace(source, recipe=stage, sha256=stage.hash)
            found = content_hash(source.path, progress=report)
            if source.sha256 and source.sha256 != found:
                raise CheckpointError(
                    f"the content of {source.path} has the hash {found}, but the recipe was made with {source.sha256}",
                    remedy="Restore the folder, or take the sha256 out of the recipe to merge what is there now.",
                )
        return replace(source, sha256=found)

    base = None if recipe.base is None else checked(recipe.base, "base")
    recipe = replace(recipe, base=base, experts=tuple(checked(source, "expert") for source in recipe.experts))
    if recipe.surgery is not None:
        recipe = replace(recipe, surgery=verify_surgery(recipe.surgery))
    kinds = sorted({kind for group in recipe.groups if (kind := method_of(recipe, group).statistics) is not None})
    if recipe.statistics is None or not kinds:
        return recipe
    return replace(recipe, statistics=verify_collected(recipe.statistics, kinds, recipe))


@contextmanager
def _naming(source: Source, role: str) -> Iterator[None]:
    """CheckpointErrors from inside say which source they are about."""
    try:
        yield
    except CheckpointError as error:
        where = error.where or f"{role} {source.name}"
        if error.where and source.recipe is not None:
            where = f"{role} {source.name}: {error.where}"
        raise CheckpointError(error.problem, where=where, remedy=error.remedy) from None


def load_resident(
    base_path: str | Path,
    *,
    auto_class: str,
    compute_dtype: str,
    device: str = "cpu",
    unused: Sequence[str] = (),
    alignment: Alignment | None = None,
) -> Any:
    """The base as a transformers model to merge into: in evaluation mode, without gradients, in ``compute_dtype``.

    Args:
        base_path: a Hugging Face folder, or an id.
        auto_class: a transformers class such as ``AutoModelForCausalLM``.
        compute_dtype: ``float32``, ``bfloat16``, ...
        unused: beginnings of the names of parameters that nobody looks at, so that the folder may lack them.
        alignment: the vocabulary of what will be merged into it. Embeddings of another size than the base's hold
            nothing until then.

    Raises EvaluatorError for an unknown class, CheckpointError if the folder lacks a tensor that the class needs (it
    would be filled at random) or cannot be loaded, ResourceError if parts of the model are offloaded.
    """
    import transformers

    model_class = getattr(transformers, auto_class, None)
    if model_class is None or not hasattr(model_class, "from_pretrained"):
        known = [name for name in dir(transformers) if name.startswith("AutoModel")]
        raise EvaluatorError(f"transformers has no class {auto_class!r}", remedy=nearest(auto_class, known))
    folder = find_folder(base_path)
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    other: dict[str, Any] = {}
    if alignment is not None:
        other = {"config": alignment.model_config(), "ignore_mismatched_sizes": True}
    try:
        model, info = model_class.from_pretrained(
            folder,
            dtype=torch_dtype(compute_dtype),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **other,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"transformers cannot load {folder} as {auto_class}: {error}", remedy="Does the evaluator fit the base?"
        ) from error
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    missing = sorted(name for name in info["missing_keys"] if not name.startswith(tuple(unused)))
    if missing:
        raise CheckpointError(
            f"{folder} lacks {some(missing)}, which {auto_class} needs and would fill at random",
            remedy="Let the evaluator name a class (auto_class) that the base has all tensors for.",
        )
    refuse_offloaded(model)
    if alignment is not None and alignment.generation is not None and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_dict(dict(alignment.generation))
    return model.to(device).eval().requires_grad_(False)
