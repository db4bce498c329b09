"""Which blocks exist where a corpus has grown: each generation begins at a part of its own.

The last part of a generation may be short; the block ids between it and the next generation's first
block do not exist. So what is appended never shares a file with what was there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from storage.types import Int64


@dataclass(frozen=True)
class Generation:
    """Blocks that came at one time.

    Attributes:
        first_part: index of its first part; its first block is first_part · P.
        blocks: how many it has, without a gap.
        fingerprint: of the corpus up to its end.
    """

    first_part: int
    blocks: int
    fingerprint: str


def index_of(generations: Sequence[Generation], part: int) -> int:
    """Returns which generation a part belongs to."""
    return bisect_right(generations, part, key=lambda g: g.first_part) - 1


def parts_until(generations: Sequence[Generation], width: int) -> int:
    """Returns one past the last part; `width` is P, blocks of a part."""
    return generations[-1].first_part - (-generations[-1].blocks // width)


def blocks_until(generations: Sequence[Generation], width: int) -> int:
    """Returns one past the last block's id."""
    return generations[-1].first_part * width + generations[-1].blocks


def part_range(generations: Sequence[Generation], width: int, part: int) -> tuple[int, int]:
    """Returns (first block, one past the last block) of a part."""
    first = part * width
    end = blocks_until(generations[: index_of(generations, part) + 1], width)
    return first, min(first + width, end)


def part_of(generations: Sequence[Generation], width: int, block: int) -> int:
    """Returns the part that holds a block.

    Raises:
        IndexError: there is no such block.
    """
    part = block // width
    if 0 <= block and block < part_range(generations, width, part)[1]:
        return part
    raise IndexError(
        f"there is no block {block}: ids lie in [0, {blocks_until(generations, width)})"
        + (", with gaps between generations" if len(generations) > 1 else "")
    )


def blocks_of(generations: Sequence[Generation], width: int, parts: Sequence[int]) -> int:
    """Returns how many blocks some distinct parts hold together."""
    count = len(parts) * width
    chosen: Int64 = np.asarray(parts, np.int64)
    for i, generation in enumerate(generations):  # only a generation's last part may be short
        last = parts_until(generations[: i + 1], width) - 1
        if (chosen == last).any():
            count += generation.blocks - (last + 1 - generation.first_part) * width
    return count


MOST_PARTS, MOST_BLOCKS = 10_000_000, 1 << 30
"""Ten times the parts that planning is measured with; blocks of 1,024 tokens: 10^12 tokens."""


def require_countable(parts: int, blocks: int, width: int) -> None:
    """Refuses numbers that would be counted out in memory, whatever file claims them.

    Raises:
        ValueError: says which.
    """
    if not 1 <= width <= 1 << 20 or parts > MOST_PARTS or blocks > MOST_BLOCKS:
        raise ValueError(f"{blocks:,} blocks in {parts:,} parts of {width:,}")


def require_generations(generations: Sequence[Generation], width: int, blocks: int) -> None:
    """Refuses generations that overlap, or that do not hold as many blocks as there are.

    Args:
        width: P, blocks of a part.
        blocks: of all generations together.

    Raises:
        ValueError: says what is wrong.
    """
    if not 0 < width or any(g.blocks < 1 for g in generations):
        raise ValueError("a generation without blocks")
    begins = [0, *(parts_until(generations[: i + 1], width) for i in range(len(generations) - 1))]
    if [g.first_part for g in generations] != begins:
        raise ValueError("generations that do not follow one another")
    if sum(g.blocks for g in generations) != blocks:
        raise ValueError(f"generations of other than {blocks:,} blocks")
