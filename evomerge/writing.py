"""Folders that are written as a whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evomerge.errors import CheckpointError


def check_out(out: Path) -> None:
    """CheckpointError unless ``out`` does not exist, or is an empty folder."""
    if out.is_dir():
        if any(out.iterdir()):
            raise CheckpointError(
                f"the output folder {out} is not empty", remedy="Choose another one, or empty it. Nothing was written."
            )
    elif out.exists() or out.is_symlink():
        raise CheckpointError(f"the output folder {out} is a file", remedy="Choose another name.")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside ``out`` that becomes ``out`` when the block ends well.

    Whatever goes wrong, the temporary folder is removed and ``out`` is as it was. Raises CheckpointError if ``out`` is
    not empty or cannot be written, or if the disk is full.
    """
    check_out(out)
    temporary = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        temporary.chmod(0o777 & ~umask())
        yield temporary
        temporary.rename(out)
        sync(out.parent)
    except OSError as error:
        raise _write_error(out, error) from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_error(out: Path, error: OSError) -> CheckpointError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            f"the disk is full: {out} could not be written",
            remedy="Free some space, or choose another output folder. What had been written was removed.",
        )
    return CheckpointError(
        f"{out} could not be written: {error.strerror or error}",
        remedy="Check the folder and its rights, or choose another one. What had been written was removed.",
    )


def umask() -> int:
    """The rights that new files of this process do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
