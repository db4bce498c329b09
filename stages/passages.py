"""Long texts → passages, so that a share of them can be held out: documents are held out whole."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np

VERSION: Final = 1
"""Of the rule by which texts are cut: part of a corpus's identity."""

_ENDS = (re.compile(r"\n[ \t]*\n\s*"), re.compile(r"\n"), re.compile(r"\s"))


def passages(text: str, length: int) -> Iterator[str]:
    """Yields the pieces of a text of at most so many characters; laid end to end they are the text.

    A piece ends at the last blank line before its length is reached, or if there is none in its second
    half at the last line end, or at the last space, or where it must.
    """
    start = 0
    while start < len(text):
        end = _end(text, start, length)
        yield text[start:end]
        start = end


def _end(text: str, start: int, length: int) -> int:
    stop = start + length
    if stop >= len(text):
        return len(text)
    for pattern in _ENDS:
        found = [m.end() for m in pattern.finditer(text, start + length // 2, stop)]
        if found:
            return found[-1]
    return stop


class Passages:
    """The passages of a column of texts, in order, cut when they are read: 24 bytes each are kept.

    Args:
        rows: a map-style data set.
        column: of its texts.
        length: characters of a passage, at most.
        refuse: (row, what is wrong) → the error to raise for a row that is not text.

    Raises:
        CorpusError: as `refuse` has it.
    """

    def __init__(
        self, rows: Any, column: str, length: int, refuse: Callable[[int, str], Exception]
    ) -> None:
        self._rows, self._column, self._text = rows, column, (-1, "")
        found = array("q")
        for row in range(len(rows)):
            text = rows[row][column]
            if not isinstance(text, str):
                raise refuse(row, f"a row is {type(text).__name__}, not text")
            start = 0
            for piece in passages(text, length):
                found.extend((row, start, start + len(piece)))
                start += len(piece)
        self._row, self._start, self._end = np.array(found).reshape(-1, 3).T

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, which: slice) -> dict[str, list[str]]:
        """Returns {column: passages}, as a data set gives a slice of its rows."""
        numbers = range(len(self))[which]
        return {self._column: [self._piece(number) for number in numbers]}

    def _piece(self, number: int) -> str:
        row = int(self._row[number])
        if self._text[0] != row:
            self._text = (row, self._rows[row][self._column])
        return self._text[1][self._start[number] : self._end[number]]
