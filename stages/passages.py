"""Long texts → passages, so that a share of them can be held out: documents are held out whole."""

from __future__ import annotations

import re
from collections.abc import Iterator

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
