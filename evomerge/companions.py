"""What goes beside the weights of an export for text to go in and come out: a tokenizer, and chat templates."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from evomerge.checkpoints import Sources
from evomerge.errors import SpecError, nearest
from evomerge.folders import PROCESSOR_FILES, TEMPLATES, find_folder, inside, read_json, tokenizer_files
from evomerge.hub import pin
from evomerge.recipe import Recipe
from evomerge.vocabulary import check_tokenizer

TEMPLATE = "chat_template.jinja"
OTHER_TEMPLATES = ("chat_template.json",)  # of processors, read in place of TEMPLATE by some versions


@dataclass(frozen=True)
class Companions:
    """A tokenizer's folder and chat templates that were chosen for an export. Made by ``choose``.

    Attributes:
        tokenizer: what was chosen (``expert:NAME``, a name); None for the default, the base's.
        folder: where its files are.
        chat_template: what was chosen; None for those that come with the tokenizer.
        templates: name -> text; the one called ``default`` is used unless another is asked for.
    """

    tokenizer: str | None = None
    folder: Path | None = None
    chat_template: str | None = None
    templates: Mapping[str, str] | None = None

    def facts(self) -> dict[str, str]:
        """What was chosen, for the manifest and the model card."""
        chosen = {"tokenizer": self.tokenizer, "chat_template": self.chat_template}
        return {key: value for key, value in chosen.items() if value is not None}

    def write(self, out: Path, default: Path | None) -> None:
        """Write the files into ``out``.

        Args:
            default: the folder of the tokenizer (and processor) if none was chosen; None: write nothing then.
        """
        origin = self.folder or default
        if origin is None:
            return
        files = {file.relative_to(origin).as_posix(): file for file in tokenizer_files(origin)}
        if self.folder is not None and default is not None:  # what prepares images or sound stays the base's
            files = {name: file for name, file in files.items() if name not in PROCESSOR_FILES}
            files |= {file.name: file for file in tokenizer_files(default) if file.name in PROCESSOR_FILES}
        for name, file in files.items():
            if self.templates is not None and (Path(name).suffix == ".jinja" or name in OTHER_TEMPLATES):
                continue
            copy = out / name
            copy.parent.mkdir(exist_ok=True)
            dropped = ["auto_map"]  # names Python files that are neither run nor copied
            if self.templates is not None:
                dropped.append("chat_template")
            if name == "tokenizer_config.json" and any(key in (settings := read_json(file)) for key in dropped):
                settings = {key: value for key, value in settings.items() if key not in dropped}
                copy.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            else:
                shutil.copyfile(file, copy)
        for name, text in (self.templates or {}).items():
            place = out / (TEMPLATE if name == "default" else f"{TEMPLATES}/{name}.jinja")
            place.parent.mkdir(exist_ok=True)
            place.write_text(text, encoding="utf-8")


BASE_ONLY = Companions()


def choose(tokenizer: str | None, chat_template: str | None, recipe: Recipe, sources: Sources) -> Companions:
    """The companions that ``base``, ``expert:NAME``, a folder, an id, or (for templates) a .jinja file stand for.

    Args:
        tokenizer: None is the merge's: ``base``, unless the recipe's ``tokenizer`` says otherwise.
        chat_template: None: those that come with the tokenizer.

    Raises SpecError for what cannot be found or is no template, CheckpointError for a tokenizer that numbers tokens
    otherwise than the merged model.
    """
    base = sources.reference
    chosen, folder = None, None
    aligned = sources.alignment is not None
    if tokenizer is not None and (aligned or tokenizer != "base"):
        chosen, folder = _named("--tokenizer", tokenizer, recipe, sources)
        check_tokenizer(folder, base)
    if chat_template is None:
        return Companions(chosen, folder)
    file = Path(chat_template).expanduser()
    if file.is_file():
        label, templates = file.name, {"default": _text(file)}
    else:
        label, place = _named("--chat-template", chat_template, recipe, sources)
        templates = chat_templates(place)
        if not templates:
            have = [s.name for s, e in zip(recipe.experts, sources.experts, strict=True) if chat_templates(e.path)]
            raise SpecError(
                f"{chat_template} has no chat template",
                where="--chat-template",
                remedy=f"Experts that have one: {', '.join(have) or 'none'}. Or give a .jinja file.",
            )
    for name, text in templates.items():
        _check_template(f"{label}: template {name}", text)
    return Companions(chosen, folder or (None if aligned else base.path), label, templates)


def chat_templates(folder: Path) -> dict[str, str]:
    """name -> text of a folder's chat templates, as transformers finds them: in files of their own, or else in
    tokenizer_config.json. Raises SpecError for a name that would lead elsewhere."""
    found: dict[str, str] = {}
    if (folder / TEMPLATE).is_file():
        found["default"] = _text(inside(folder / TEMPLATE))
    found |= {file.stem: _text(file) for file in tokenizer_files(folder) if file.parent.name == TEMPLATES}
    if found or not (folder / "tokenizer_config.json").is_file():
        return found
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, str):
        return {"default": template}
    for entry in template if isinstance(template, list) else []:
        name, text = (entry.get(key) if isinstance(entry, dict) else None for key in ("name", "template"))
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w-]*", name) or not isinstance(text, str):
            raise SpecError(
                f"a chat template must have a name of letters and digits and a text, but this is {str(entry)[:80]!r}",
                where=str(folder / "tokenizer_config.json"),
            )
        found[name] = text
    return found


def _named(option: str, name: str, recipe: Recipe, sources: Sources) -> tuple[str, Path]:
    """(label, folder) of ``base``, ``expert:NAME``, a folder or an id. Labels hold no paths of this machine."""
    if name == "base":
        return "base", sources.reference.path
    if name.startswith("expert:"):
        experts = {s.name: e.path for s, e in zip(recipe.experts, sources.experts, strict=True)}
        expert = name.removeprefix("expert:")
        if expert not in experts:
            raise SpecError(f"there is no expert {expert!r}", where=option, remedy=nearest(expert, experts))
        return name, experts[expert]
    folder = find_folder(pinned := pin(name))
    return (folder.name if Path(name).is_dir() else pinned), folder


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SpecError(f"{file} cannot be read as text: {error}", where="--chat-template") from None


def _check_template(label: str, text: str) -> None:
    """SpecError for a template that is empty or that transformers cannot compile. It is not run."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        if not text.strip():
            raise TemplateError("it is empty")
        render_jinja_template([], chat_template=text)
    except TemplateError as error:
        raise SpecError(
            f"{label} is no template that transformers can use: {error}",
            where="--chat-template",
            remedy="Give a Jinja template as tokenizer.chat_template has it.",
        ) from None
