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
