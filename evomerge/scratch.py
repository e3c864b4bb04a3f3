"""Checkpoints that live for one evaluation: written to a folder of their own, and removed however it ends.

A folder belongs to the process that made it: a lock file beside it is held (flock) as long as that process lives. Of
one that was killed both stay behind, and whoever comes next on that machine removes them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.errors import CandidateError, ResourceError
from evomerge.evaluation import Target
from evomerge.progress import size

if TYPE_CHECKING:
    from evomerge.merging import Merger
    from evomerge.recipe import Recipe

LOCK = ".lock"


@contextlib.contextmanager
def written(merger: Merger, recipe: Recipe, place: str, device: str = "cpu") -> Iterator[Target]:
    """The merge as a checkpoint in a scratch folder, by the code that exports it: what is scored is what is exported.

    Raises:
        CandidateError: a merged number is not finite (kind ``nan``), or the disk is full.
    """
    from evomerge.exporting import write_checkpoint
    from evomerge.merging import NotFiniteError, written_bytes

    with scratch_folder(place) as folder:
        target = Target(device=device, checkpoint=folder / "checkpoint", scratch=folder / "own")
        try:
            for part in (folder / "checkpoint", folder / "own"):
                part.mkdir()
            write_checkpoint(merger, recipe, folder / "checkpoint", durable=False)
        except NotFiniteError as error:
            raise CandidateError("nan", error.problem) from error
        except OSError as error:
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)  # what is free without it
            needed = written_bytes(merger.sources, recipe.export_dtype)
            raise _unwritable(folder.parent, error, f"it needs {size(needed)}, and ") from error
        yield target


@contextlib.contextmanager
def scratch_folder(place: str = "") -> Iterator[Path]:
    """A new folder in ``place`` (made if it is not there; "": the system's temporary folder), removed at the end."""
    lock, handle = _new_lock(_folder(place))
    folder = lock.with_suffix("")
    try:
        try:
            folder.mkdir(mode=0o700)
        except OSError as error:
            raise _unwritable(folder.parent, error) from error
        yield folder
    finally:
        _remove(folder, lock)
        os.close(handle)


def remove_stale(place: str = "") -> int:
    """Remove the folders of processes of this user and machine that are gone; how many there were."""
    where, removed = _folder(place, make=False), 0
    for lock in sorted(where.glob(f"{glob.escape(_prefix())}*{LOCK}")):
        try:
            handle = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # removed meanwhile, or another user's
            continue
        try:
            if os.fstat(handle).st_uid != os.geteuid():
                continue
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            _remove(lock.with_suffix(""), lock)
            removed += 1
        finally:
            os.close(handle)
    return removed


def check_scratch(place: str, needed: int, *, workers: int = 1) -> None:
    """ResourceError unless ``place`` can be written and has ``needed`` bytes free, for all ``workers`` together."""
    folder = _folder(place, make=False)
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    remedy = "Name a folder on a larger disk with workers.scratch."
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ResourceError(
            f"the evaluator needs candidates on disk, but {existing} is not a folder that can be written to",
            where="workers.scratch",
            remedy=remedy,
        )
    free = room(existing)
    if needed > free:
        many = f" ({workers} workers write {size(needed // workers)} each)" if workers > 1 else ""
        raise ResourceError(
            f"the evaluator needs candidates on disk: {size(needed)}{many}, but {existing} has {size(free)} left",
            where="workers.scratch",
            remedy=f"Free some space there. {remedy}",
        )


def room(folder: Path) -> int:
    """Free bytes for this user on the disk of ``folder``."""
    return shutil.disk_usage(folder).free


def _folder(place: str, *, make: bool = True) -> Path:
    folder = Path(place or tempfile.gettempdir())
    if make:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CandidateError("error", f"the folder for candidates cannot be made: {error}") from error
    return folder


def _unwritable(where: Path, error: OSError, needed: str = "") -> CandidateError:
    reason = "its disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
    left = f"{where} has {size(room(where))} left"
    return CandidateError(
        "error", f"the checkpoint could not be written: {reason}; {needed}{left} (workers.scratch names another folder)"
    )


def _prefix() -> str:
    return f"evomerge-{socket.gethostname()}-"


def _new_lock(where: Path) -> tuple[Path, int]:
    """A new lock file, and its descriptor. Who looks for stale folders may be faster than our lock: then once more."""
    while True:
        try:
            handle, name = tempfile.mkstemp(prefix=_prefix(), suffix=LOCK, dir=where)
        except OSError as error:
            raise _unwritable(where, error) from error
        fcntl.flock(handle, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(name)):  # noqa: PTH116
                return Path(name), handle
        os.close(handle)


def _remove(folder: Path, lock: Path) -> None:
    """The lock goes last, and only if its folder has gone: what cannot be removed now is tried again later."""
    for _ in range(5):  # a killed engine may still be writing
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            with contextlib.suppress(FileNotFoundError):
                lock.unlink()
            return
        time.sleep(0.1)
