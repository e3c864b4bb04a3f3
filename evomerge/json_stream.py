"""JSON read piece by piece: of a document of any length, only what is asked for is in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any, TextIO

PIECE = 1 << 20  # characters read at a time
LONGEST = 1 << 26  # characters of one value: more is no study
WHITE = " \t\n\r"


class JsonStream:
    """A JSON document from a text file, in its own order.

    Every method raises ValueError (or UnicodeDecodeError, which is one) for what is not JSON: NaN, infinity and keys
    that stand twice included.
    """

    def __init__(self, handle: TextIO):
        self._handle, self._text, self._at = handle, "", 0
        self._decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse)

    def fields(self) -> Iterator[str]:
        """The keys of an object. The value of each must be read (``value``, ``items``) before the next is asked for."""
        for _ in self._members("{", "}"):
            key = self.value()
            if not isinstance(key, str):
                raise ValueError(f"a key must be text, but is {key!r}")
            self._take(":")
            yield key

    def items(self) -> Iterator[Any]:
        """The values of an array, one after the other."""
        for _ in self._members("[", "]"):
            yield self.value()

    def value(self) -> Any:
        """The next value, whole."""
        self._peek()
        size = PIECE
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                if end + 3 <= len(self._text) or not self._more(size):  # else a number may go on: 1.5 and e+7
                    break
            except json.JSONDecodeError as error:
                inside = error.pos < len(self._text) - 8 and not error.msg.startswith("Unterminated string")
                if inside or not self._more(size):
                    raise
            except RecursionError:
                raise ValueError("values are nested too deeply") from None
            size *= 2
        self._at = end
        return value

    @property
    def offset(self) -> int:
        """Bytes of the file that have been read."""
        return os.lseek(self._handle.fileno(), 0, os.SEEK_CUR)

    def end(self) -> None:
        """There must be nothing more."""
        if self._peek():
            raise ValueError(f"there is more after the end: {self._text[self._at : self._at + 40]!r}")

    def _members(self, begin: str, end: str) -> Iterator[None]:
        self._take(begin)
        if self._peek() == end:
            self._at += 1
            return
        while True:
            yield
            if self._peek() == end:
                self._at += 1
                return
            self._take(",")

    def _take(self, char: str) -> None:
        found = self._peek()
        if found != char:
            raise ValueError(f"{char!r} is missing before {self._text[self._at : self._at + 40]!r}")
        self._at += 1

    def _peek(self) -> str:
        """The next character that is not white; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in WHITE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(PIECE):
                return ""

    def _more(self, size: int) -> bool:
        """Read on; False at the end of the file. What was read before the present value is forgotten."""
        if len(self._text) - self._at > LONGEST:
            raise ValueError(f"a value of more than {LONGEST} characters")
        piece = self._handle.read(size)
        if piece:
            self._text, self._at = self._text[self._at :] + piece, 0
        return bool(piece)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands twice in one object")
    return found


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is no number")
