"""Models by their Hugging Face id: fetched through huggingface_hub, and from then on meant by their commit.

What is resolved once (``pin``) is written as ``org/name@COMMIT`` into recipes, studies and what workers are built from:
every machine that opens it gets the same files, into a cache of its own, and a branch that moves changes nothing.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import CheckpointError
from evomerge.folders import TEMPLATES, TOKENIZER_FILES, find_folder

if TYPE_CHECKING:
    from evomerge.progress import Progress

_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>\w[\w./-]*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")

# What is fetched: never pickles, never code. A repository's other copies of the weights are left out.
WANTED = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json",
    *TOKENIZER_FILES, f"{TEMPLATES}/*.jinja",
)  # fmt: skip
UNWANTED = ("*/*.safetensors", "*/*.json", "consolidated*", "model.*.safetensors", "*.index.*.json")


@dataclass(frozen=True)
class HubId:
    """A model on the hub: ``org/name``, and a branch, tag or commit (None: its main branch)."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo

    @property
    def pinned(self) -> bool:
        """True if the revision is a commit, which stands for the same files for ever."""
        return _COMMIT.fullmatch(self.revision or "") is not None


def hub_id(text: str) -> HubId | None:
    """The id that ``text`` is, in the form ``org/name`` or ``org/name@revision``; None if it cannot be one."""
    match = _ID.fullmatch(text)
    return HubId(match["repo"], match["revision"]) if match else None


def pin(path: str, progress: Progress | None = None) -> str:
    """``path`` as it will mean the same later: a folder stays as it is, an id gets its commit and is fetched.

    A folder goes before an id of the same name. Raises CheckpointError if there is neither.
    """
    folder, wanted = find_folder(path, progress=progress), hub_id(path)
    return path if wanted is None or Path(path).is_dir() else str(HubId(wanted.repo, folder.name))


def fetch(wanted: HubId, progress: Progress | None = None) -> Path:
    """The local copy of a model's files, downloaded unless the cache has them. The folder is named like the commit.

    Nothing is asked of the network for a commit whose files are all in the cache. With HF_HUB_OFFLINE=1, or where the
    hub cannot be reached, the cache is all there is.

    Raises CheckpointError: the hub has no such model or revision, does not give it to this user, or cannot be reached;
    the cache lacks it; it has no safetensors.
    """
    if progress is None:
        folder = _download(wanted, None)
    else:
        with progress.stage(f"fetching {wanted}", 1, unit="B") as stage:

            def report(done: float, total: float) -> None:
                stage.total = total
                stage.update(done)

            folder = _download(wanted, report)
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{wanted} on the hub has no weights in safetensors files; pickled ones can run code and are not fetched",
            remedy="Name a revision that has them (often refs/pr/1), or convert it with save_pretrained.",
        )
    return folder


def _download(wanted: HubId, report: Callable[[float, float], None] | None) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(
            huggingface_hub.snapshot_download(
                wanted.repo,
                revision=wanted.revision,
                allow_patterns=list(WANTED),
                ignore_patterns=list(UNWANTED),
                tqdm_class=_bar(report),
            )
        )
    except (OSError, HFValidationError) as error:  # the hub's errors are OSErrors
        raise _explained(wanted, error) from error


def _bar(report: Callable[[float, float], None] | None) -> Any:
    """A tqdm that shows nothing, and hands the bytes that were written to ``report``."""
    from tqdm.std import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **{**kwargs, "disable": True})
            # Of two bars in bytes, one counts what came over the network, which compression makes less.
            self.counts = kwargs.get("unit") == "B" and kwargs.get("desc") != "Downloading bytes"

        def update(self, n: float | None = 1) -> bool | None:
            with self.get_lock():
                self.n += n or 0
                if self.counts and report is not None:
                    report(self.n, max(self.total or 0, self.n))
            return None

    return Bar


def _explained(wanted: HubId, error: Exception) -> CheckpointError:
    """What went wrong with ``wanted`` and what to do, from huggingface_hub's error."""
    from huggingface_hub import constants, errors

    hub, cache = f"the hub ({constants.ENDPOINT})", f"the local cache ({constants.HF_HUB_CACHE})"
    command = f"hf download {wanted.repo}" + (f" --revision {wanted.revision}" if wanted.revision else "")
    log_in = "log in with `hf auth login`, or set HF_TOKEN, on every machine that has workers."
    if isinstance(error, errors.GatedRepoError):
        problem = f"the hub gives {wanted} only to those whom its owners let in"
        remedy = f"Ask for access on its page, {constants.ENDPOINT}/{wanted.repo}, and {log_in}"
    elif isinstance(error, errors.RepositoryNotFoundError):
        problem = f"{hub} has no model {wanted.repo}, or it is private"
        remedy = f"Check the name; if it is private, {log_in}"
    elif isinstance(error, errors.RevisionNotFoundError):
        problem = f"the model {wanted.repo} on the hub has no revision {wanted.revision or 'main'}"
        remedy = "Give a branch, a tag or a whole commit hash after the @."
    elif isinstance(error, errors.HFValidationError):
        problem, remedy = f"{wanted} is no Hugging Face id: {error}", "Ids have the form org/name."
    elif isinstance(error, errors.LocalEntryNotFoundError):
        problem = f"{cache} does not hold the files of {wanted}, or not all of them, and "
        if constants.HF_HUB_OFFLINE:
            problem += "HF_HUB_OFFLINE forbids to fetch it"
            remedy = f"Unset HF_HUB_OFFLINE, or fetch it where there is a network: {command}"
        else:
            problem += f"{hub} cannot be reached: {_first_line(error.__cause__ or error)}"
            remedy = f"Check the network, or fetch it elsewhere and bring the cache: {command}"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        problem = f"the disk is full: {wanted} could not be fetched into {cache}"
        remedy = "Free some space, or set HF_HOME to a folder on another disk."
    else:
        problem = f"{wanted} could not be fetched: {type(error).__name__}: {_first_line(error)}"
        remedy = f"Try again: whole files are kept. Or by hand: {command}"
    return CheckpointError(problem, remedy=remedy)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
