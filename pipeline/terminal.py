"""Text for a terminal: what would move its cursor, colour it or turn its direction is shown, not done.

Texts of a corpus, ends of logs, names in a tampered file or a student's own words may hold escape
sequences; a terminal obeys them (a title, a link, a rewritten line), whoever wrote them.
"""

from __future__ import annotations

import sys
import unicodedata

_KEPT = "\n\t"
_TURNING = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C}
"""Characters that turn the direction of writing."""
_ACTED_ON = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories: controls (ESC, those of 8 bits), surrogates, separators of lines and paragraphs."""


def harmless(text: object) -> str:
    """Returns text without anything that a terminal would act on, but line breaks and tabs."""
    found = str(text)
    if found.isascii() and found.isprintable():
        return found
    return "".join(c if _printed(c) else c.encode("unicode_escape").decode() for c in found)


def _printed(character: str) -> bool:
    if character in _KEPT:
        return True
    acted_on = unicodedata.category(character) in _ACTED_ON or ord(character) in _TURNING
    return not acted_on


def for_output(text: str) -> str:
    """Returns text for standard output: as it is for a file or a pipe, harmless for a terminal."""
    return harmless(text) if sys.stdout.isatty() else text
