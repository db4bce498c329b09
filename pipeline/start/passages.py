"""A few long texts → many passages, so that some can be held out: documents are held out whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

FEW = 20  # documents; with fewer a share of them is no share of the text
_SHORTEST, _LONGEST = 1_000, 4_000  # characters of a passage, about
_WANTED = 200  # passages
_ENDS = (re.compile(r"\n[ \t]*\n\s*"), re.compile(r"\n"), re.compile(r"\s"))


def passages(text: str, length: int = _LONGEST) -> Iterator[str]:
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


def as_rows(texts: Sequence[str]) -> bytes:
    """Returns the texts' passages as JSON lines with a column "text"."""
    length = min(_LONGEST, max(_SHORTEST, sum(map(len, texts)) // _WANTED))
    pieces = (piece for text in texts for piece in passages(text, length))
    lines = [json.dumps({"text": piece}, ensure_ascii=False) for piece in pieces]
    return ("\n".join(lines) + "\n").encode()
