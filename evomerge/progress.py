"""Progress of long work: a live bar in a terminal, plain log lines elsewhere."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from evomerge.errors import UserError

LOG_EVERY_SECONDS = 5.0
QUICK_SECONDS = 1.0  # reading and writing that takes less is not worth a line


def clock(seconds: float) -> str:
    """Seconds as 12s, 3m05s or 2h07m."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def size(num_bytes: float) -> str:
    """Bytes in decimal units, as disks are sold: 1.3 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def parse_size(text: str, *, where: str) -> int:
    """Bytes in ``500MB``, ``2GB`` (decimal units), ``1.5GiB`` (powers of 1024) or ``1000``.

    Raises UserError, naming ``where``, if it is no size above zero.
    """
    match = _SIZE.fullmatch(text.strip())
    number, unit, binary = match.groups() if match else ("0", "", "")
    size = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))
    if size < 1 or (binary and not unit):
        raise UserError(
            f"a size above zero is a number with a unit, but this is {text!r}",
            where=where,
            remedy="Write it like 500MB, 2GB or 1.5GiB.",
        )
    return size


class Stage:
    """One step of known length. ``advance`` may be called with a note that replaces the last one.

    ``before``: how much was done before it began, and says nothing of how fast it goes.
    """

    def __init__(self, progress: Progress, title: str, total: float, unit: str, before: float = 0.0):
        self.progress, self.title, self.total, self.unit = progress, title, total, unit
        self.done, self.before, self.note = before, before, ""
        self.started = time.monotonic()
        self._logged_at, self._logged_done = -1e9, -1.0
        self._bar = progress._add_bar(title, total) if progress.live else None

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        self.update(self.done + amount, note)

    def update(self, done: float, note: str | None = None) -> None:
        self.done = done
        if note is not None:
            self.note = note
        if self._bar is not None:
            self.progress._update_bar(self._bar, done, f"{self._count()}  {self._text()}")
            return
        now = time.monotonic()
        if self.unit == "B" and now - self.started < QUICK_SECONDS:
            return
        if now - self._logged_at >= LOG_EVERY_SECONDS or (done >= self.total and self._logged_done < self.total):
            self._logged_at, self._logged_done = now, done
            self.progress.log(f"{self.title}: {self._count()}  {self._text()}".rstrip())

    def _count(self) -> str:
        if self.unit == "B":
            return f"{size(self.done)} of {size(self.total)}"
        return f"{self.done:g} of {self.total:g}"

    def _text(self) -> str:
        elapsed = time.monotonic() - self.started
        parts = []
        done = self.done - self.before
        if done > 0 and elapsed > 0.5:
            rate = done / elapsed
            if self.unit == "B":
                parts.append(f"{size(rate)}/s")
            else:
                parts.append(f"{elapsed / done:.1f} s each")
            parts.append(f"{clock((self.total - self.done) / rate)} left")
        if self.note:
            parts.append(self.note)
        return ", ".join(parts)


class Progress:
    """Where progress goes: standard error, as bars if it is a terminal.

    Args:
        quiet: show nothing.
        live: bars (True) or lines (False); by default bars on a terminal.
    """

    def __init__(self, *, quiet: bool = False, live: bool | None = None):
        self.quiet = quiet
        self.live = not quiet and (sys.stderr.isatty() if live is None else live)
        self._rich = None

    def log(self, line: str) -> None:
        """One line, now."""
        if self.quiet:
            return
        if self._rich is not None:
            self._rich.console.print(line, markup=False, highlight=False)
        else:
            stamp = "" if sys.stderr.isatty() else time.strftime("%H:%M:%S ")
            print(f"{stamp}{line}", file=sys.stderr, flush=True)

    @contextmanager
    def stage(self, title: str, total: float, unit: str = "") -> Iterator[Stage]:
        """A step of ``total`` units; its bar is closed when the block ends."""
        outermost = self.live and self._rich is None
        if outermost:
            self._open()
        try:
            yield Stage(self, title, total, unit)
        finally:
            if outermost:
                self._close()

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._rich = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}"),
            console=Console(stderr=True),
        )
        self._rich.start()

    def _close(self) -> None:
        if self._rich is not None:
            self._rich.stop()
            self._rich = None

    def _add_bar(self, title: str, total: float):
        assert self._rich is not None
        return self._rich.add_task(title, total=total, text="")

    def _update_bar(self, bar, done: float, text: str) -> None:
        if self._rich is not None:
            self._rich.update(bar, completed=done, text=text)
