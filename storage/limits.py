"""How large a cache or a corpus can be: what a file claims beyond that is refused before anything is
counted out or allocated by it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from storage.codec import PRESETS
from storage.generations import Generation, parts_until

if TYPE_CHECKING:
    from storage.layout import Layout

MOST, MOST_BYTES = 4096, 1 << 31
"""Most layers and temperatures; most bytes of one block of an array."""
_LIMITS = {
    "blocks": (1, 1 << 40), "blocks_per_part": (1, 1 << 20), "block_length": (1, 1 << 24),
    "vocab_size": (1, 1 << 24), "k": (1, 1 << 24), "draws": (0, 1 << 24), "segments": (1, 1 << 24),
    "hidden_size": (0, 1 << 24), "seed": (-(1 << 64), 1 << 64),
}  # fmt: skip
"""Least and most of a layout's whole numbers: what a file claims beyond them is refused unread."""
MOST_PARTS, MOST_BLOCKS = 10_000_000, 1 << 30
"""Ten times the parts that planning is measured with; blocks of 1,024 tokens: 10^12 tokens."""


def require_possible(layout: Layout) -> None:
    """Refuses what no writer of ours makes, before an array is allocated by it.

    Raises:
        ValueError: says which number.
    """
    whole = {name: getattr(layout, name) for name in _LIMITS}
    beyond = [n for n, value in whole.items() if not _LIMITS[n][0] <= value <= _LIMITS[n][1]]
    if beyond:
        raise ValueError(f"{beyond[0]} is {whole[beyond[0]]}")
    if layout.preset not in PRESETS:
        raise ValueError(f"no such preset: {layout.preset!r}")
    if layout.k > layout.vocab_size or layout.segments > layout.block_length:
        raise ValueError("more entries than ids, or more segments than tokens")
    if not 0 < layout.top_p <= 1 or not all(0 < t < math.inf for t in layout.temperatures):
        raise ValueError("top_p or a temperature is out of range")
    if len(layout.temperatures) > MOST or len(layout.feature_layers) > MOST:
        raise ValueError(f"more than {MOST} temperatures or layers")
    layers = layout.feature_layers
    if len(set(layers)) != len(layers) or not all(0 < n <= MOST for n in layers):
        raise ValueError(f"layers {list(layers)[:8]}")
    if layout.generations:
        require_generations(layout.generations, layout.blocks_per_part, layout.blocks)
    require_countable(layout.parts, layout.blocks, layout.blocks_per_part)
    largest = max(
        np.dtype(spec.dtype).itemsize * math.prod(spec.shape[1:])
        for spec in layout.arrays().values()
    )
    if largest > MOST_BYTES:
        raise ValueError(f"one block of an array takes {largest:,} bytes")


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
