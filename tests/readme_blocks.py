"""The fenced code blocks of a README, by language and heading, and a way to run those in Python."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FENCE = re.compile(r"^(\s*)(`{3,}|~{3,})\s*(\S*)")
_HEADING = re.compile(r"^(#{1,6})\s+(.+?)\s*#*$")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        language: the word after the fence, "" if there is none.
        headings: those it stands under, the outermost first.
        text: its lines, without the fence's indentation.
        path, line: the file, and the line (from 1) of its first line of text.
    """

    language: str
    headings: tuple[str, ...]
    text: str
    path: Path
    line: int

    def run(self, namespace: dict[str, Any]) -> None:
        """Runs a block of Python; tracebacks name the README's own lines."""
        padded = "\n" * (self.line - 1) + self.text
        exec(compile(padded, str(self.path), "exec", dont_inherit=True), namespace)


def readme_blocks(
    path: Path, language: str | None = None, heading: str | None = None
) -> list[Block]:
    """Returns the blocks of a Markdown file in order.

    Args:
        language: of these alone ("" for blocks without one).
        heading: under this one alone, at any depth.

    Raises:
        ValueError: a fence is never closed.
    """
    found = _blocks(path)
    return [
        block for block in found
        if language in (None, block.language) and (heading is None or heading in block.headings)
    ]  # fmt: skip


def _blocks(path: Path) -> list[Block]:
    lines, blocks, headings, i = path.read_text().splitlines(), [], dict[int, str](), 0
    while i < len(lines):
        title, fence = _HEADING.match(lines[i]), _FENCE.match(lines[i])
        i += 1
        if title:
            level = len(title[1])
            headings = {n: text for n, text in headings.items() if n < level} | {level: title[2]}
        if fence:
            end = _end(lines, i, fence[2], path)
            text = "".join(line.removeprefix(fence[1]) + "\n" for line in lines[i:end])
            blocks.append(Block(fence[3], tuple(headings.values()), text, path, i + 1))
            i = end + 1
    return blocks


def _end(lines: Sequence[str], start: int, fence: str, path: Path) -> int:
    """Returns the line that closes a fence: of the same sign, at least as long, and nothing else."""
    for i in range(start, len(lines)):
        mark = lines[i].strip()
        if len(mark) >= len(fence) and set(mark) == {fence[0]}:
            return i
    raise ValueError(f"{path}: the fence of line {start} is never closed")
