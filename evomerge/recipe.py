"""A recipe: one fully determined merge. Same recipe, same bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evomerge.methods.base import TensorInfo

FORMAT = 1


@dataclass(frozen=True)
class Source:
    """A base or an expert: its name in the experiment, where it lies, and the hash of what it holds."""

    name: str
    path: str
    sha256: str = ""


@dataclass(frozen=True)
class Group:
    """The weights (one an expert, in the recipe's order) for a part of the model.

    ``layers`` is the half-open range of layer indices it covers, or None for all. Tensors outside any layer belong to
    the group that holds layer 0 when they come before the layers (embeddings), otherwise to the last group (final
    norm, head, the rest). ``params`` override the recipe's own.
    """

    weights: tuple[float, ...]
    layers: tuple[int, int] | None = None
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """Sources (with content hashes), method, every number and seed."""

    base: Source | None
    experts: tuple[Source, ...]
    method: str
    groups: tuple[Group, ...]
    params: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    export_dtype: str = "bfloat16"

    def group_for(self, info: TensorInfo) -> Group:
        """The one group that ``info`` belongs to."""
        if len(self.groups) == 1:
            return self.groups[0]
        layer = info.layer
        if layer is None:
            return self.groups[0] if info.kind == "embedding" else self.groups[-1]
        for group in self.groups:
            if group.layers is not None and group.layers[0] <= layer < group.layers[1]:
                return group
        raise ValueError(f"no group of the recipe covers layer {layer} ({info.name})")

    def params_for(self, info: TensorInfo) -> dict[str, Any]:
        return {**self.params, **self.group_for(info).params}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as it stands in recipe.yaml. Paths are kept as they were given."""
        def source(s: Source) -> dict[str, str]:
            return {"name": s.name, "path": s.path, "sha256": s.sha256}

        groups = []
        for group in self.groups:
            entry: dict[str, Any] = {} if group.layers is None else {"layers": list(group.layers)}
            entry["weights"] = {s.name: float(w) for s, w in zip(self.experts, group.weights, strict=True)}
            if group.params:
                entry["params"] = dict(group.params)
            groups.append(entry)
        return {
            "evomerge_recipe": FORMAT,
            "base": source(self.base) if self.base else None,
            "experts": [source(s) for s in self.experts],
            "method": self.method,
            "params": dict(self.params),
            "groups": groups,
            "seed": self.seed,
            "export_dtype": self.export_dtype,
        }

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of everything but names of places: content hashes stand for sources, not their paths."""
        data = self.to_dict()
        for source in [data["base"], *data["experts"]]:
            if source and source["sha256"]:
                del source["path"]
        return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
        raise NotImplementedError

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        raise NotImplementedError

    def to_yaml(self) -> str:
        raise NotImplementedError
