"""A few long texts → many passages, so that some can be held out: documents are held out whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

FEW = 20  # files; with fewer a share of them is no share of the text
_LENGTH = 4_000  # characters of a passage, about
_ENDS = (re.compile(r"\n[ \t]*\n\s*"), re.compile(r"\n"), re.compile(r"\s"))


def passages(text: str) -> Iterator[str]:
    """Yields the pieces of a text, in order; laid end to end they are the text.

    A piece ends at the last blank line before its length is reached, or if there is none in its second
    half at the last line end, or at the last space, or where it must.
    """
    start = 0
    while start < len(text):
        end = _end(text, start)
        yield text[start:end]
        start = end


def _end(text: str, start: int) -> int:
    stop = start + _LENGTH
    if stop >= len(text):
        return len(text)
    for pattern in _ENDS:
        found = [m.end() for m in pattern.finditer(text, start + _LENGTH // 2, stop)]
        if found:
            return found[-1]
    return stop


def as_rows(files: list[Path]) -> bytes:
    """Returns the texts' passages as JSON lines with a column "text"."""
    lines = [
        json.dumps({"text": piece}, ensure_ascii=False)
        for path in files
        for piece in passages(path.read_bytes().decode())
    ]
    return ("\n".join(lines) + "\n").encode()
