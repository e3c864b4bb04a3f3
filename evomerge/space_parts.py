"""Parts of the model that a space treats in their own way: its ``filter`` or its ``methods``, as sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field

from evomerge.errors import SpecError, nearest
from evomerge.parts import AVERAGE, BASE, KINDS, REST, Settled, check_labels, conditions, matcher, settled, word_of
from evomerge.recipe import holds
from evomerge.validation import Strict, at

if TYPE_CHECKING:
    from evomerge.methods.base import TensorInfo
    from evomerge.space_file import SpaceModel

Part = tuple[tuple[int, int] | None, tuple[str, ...] | None, tuple[str, ...] | None]  # layers, kinds, tensors


class FilterModel(Strict):
    """Which tensors are merged, and what happens to the rest."""

    model_config = ConfigDict(title="filter")

    tensors: list[str] | None = Field(
        default=None, min_length=1, description="checkpoint names, or patterns of them such as '*self_attn*'"
    )
    kinds: list[str] | None = Field(default=None, min_length=1, description=f"kinds of modules: {', '.join(KINDS)}")
    rest: str = Field(description="what the other tensors are: average (of the experts), base, or an expert's name")


class PartModel(Strict):
    """The method of a part of the model."""

    model_config = ConfigDict(title="part")

    method: str = Field(description="the merge method of this part")
    params: dict[str, Any] = Field(default_factory=dict, description="its parameters, fixed or moving")


@dataclass(frozen=True)
class Section:
    """A part of the model that one method merges.

    Args:
        label: what its parameters' dimensions begin with; empty for a space without parts.
        key: where it stands in the space.
        method: its method, None for the one that the space calls so (which may be a choice).
        fixed: what one word settles: method, parameters and weights.
        word: that word.
    """

    label: str = ""
    key: str = ""
    kinds: tuple[str, ...] | None = None
    tensors: tuple[str, ...] | None = None
    method: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    fixed: Settled | None = None
    word: str = ""

    @property
    def text(self) -> str:
        """Its place and what it asks for, as people read it."""
        words = [*(self.kinds or ()), *(self.tensors or ())]
        return self.key + (f" ({', '.join(words)})" if words and not self.label else "")

    def holds(self, info: TensorInfo) -> bool:
        return holds(info, None, self.kinds, None) and (self.tensors is None or matcher(self.tensors)(info.name))

    def within(self, part: Part) -> Part | None:
        """What the section and a part of a granularity have in common; None if no tensor can be in both."""
        layers, kinds, tensors = part
        if self.kinds is not None:
            kinds = self.kinds if kinds is None else tuple(kind for kind in kinds if kind in self.kinds)
        if self.tensors is not None:
            matches = matcher(self.tensors)
            tensors = self.tensors if tensors is None else tuple(name for name in tensors if matches(name))
        return None if kinds == () or tensors == () else (layers, kinds, tensors)


def sections(model: SpaceModel, experts: Sequence[str], where: str) -> list[Section]:
    """The parts of a space in the order in which they take tensors; the last one takes what is left.

    Raises:
        SpecError: an unknown kind or expert, no ``rest``, a word that may mean two things.
    """
    if model.filter is not None:
        return _filtered(model.filter, experts, where)
    if model.parts is None:
        return [Section()]

    def refuse(problem: str, remedy: str | None) -> SpecError:
        return SpecError(problem, where=at(where, "methods"), remedy=remedy)

    check_labels(model.parts, refuse)
    found = []
    for label, value in sorted(model.parts.items(), key=lambda item: item[0] == REST):
        key = f"methods.{label}"
        try:
            word = settled(value, experts)
        except ValueError as error:
            raise SpecError(str(error), where=at(where, key), remedy="Rename the expert.") from None
        held = {} if label == REST else {k: tuple(v) for k, v in conditions(label).items()}
        if word is not None:
            method, params = word.method, word.params
        else:
            method, params = (value, {}) if isinstance(value, str) else (value.method, value.params)
        own = None if label == REST else method
        found.append(
            Section(label, key, method=own, params=params, fixed=word, word=str(value) if word else "", **held)
        )
    return found


def _filtered(model: FilterModel, experts: Sequence[str], where: str) -> list[Section]:
    for kind in model.kinds or ():
        if kind not in KINDS:
            raise SpecError(
                f"there is no kind of module {kind!r}", where=at(where, "filter.kinds"), remedy=nearest(kind, KINDS)
            )
    if model.tensors is None and model.kinds is None:
        raise SpecError(
            "the filter holds everything", where=at(where, "filter"), remedy="Say which tensors or kinds are merged."
        )

    def refuse(problem: str, remedy: str | None) -> SpecError:
        return SpecError(problem, where=at(where, f"filter.{REST}"), remedy=remedy)

    rest = word_of(model.rest, experts, refuse)
    kinds, tensors = (None if words is None else tuple(words) for words in (model.kinds, model.tensors))
    held = Section("", "filter", kinds, tensors)
    return [held, Section(REST, f"filter.{REST}", method=rest.method, params=rest.params, fixed=rest, word=model.rest)]


def shares_of(sections: Sequence[Section], tensors: Sequence[TensorInfo]) -> list[list[TensorInfo]]:
    """Section by section the tensors that belong to it: each to the first that holds it."""
    found: list[list[TensorInfo]] = [[] for _ in sections]
    for info in tensors:
        next(share for section, share in zip(sections, found, strict=True) if section.holds(info)).append(info)
    return found


def describe_rest(word: str) -> str:
    """What a word makes of a part, as people read it."""
    return {AVERAGE: "the average of the experts", BASE: "the base"}.get(word, f"expert {word}")
