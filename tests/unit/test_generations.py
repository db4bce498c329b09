"""Which blocks exist in a corpus that has grown, against plain enumeration."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.generations import (
    Generation,
    blocks_of,
    blocks_until,
    part_of,
    part_range,
    parts_until,
)
from storage.layout import Layout
from storage.manifest import Owners


def enumerate_parts(width: int, sizes: list[int]) -> tuple[list[Generation], list[list[int]]]:
    """Lays generations out part by part, without arithmetic."""
    generations: list[Generation] = []
    parts: list[list[int]] = []
    for size in sizes:
        generations.append(Generation(len(parts), size, "f"))
        left = size
        while left:
            first, taken = len(parts) * width, min(width, left)
            parts.append(list(range(first, first + taken)))
            left -= taken
    return generations, parts


@given(st.integers(1, 5), st.lists(st.integers(1, 12), min_size=1, max_size=4), st.data())
def test_against_enumeration(width: int, sizes: list[int], data: st.DataObject) -> None:
    generations, parts = enumerate_parts(width, sizes)
    assert parts_until(generations, width) == len(parts)
    assert blocks_until(generations, width) == parts[-1][-1] + 1
    for part, blocks in enumerate(parts):
        assert list(range(*part_range(generations, width, part))) == blocks
    where = {block: part for part, blocks in enumerate(parts) for block in blocks}
    for block in range(-width, len(parts) * width + 2 * width):
        if block in where:
            assert part_of(generations, width, block) == where[block]
        else:
            with pytest.raises(IndexError):
                part_of(generations, width, block)
    chosen = data.draw(st.lists(st.sampled_from(range(len(parts))), unique=True))
    assert blocks_of(generations, width, chosen) == sum(len(parts[p]) for p in chosen)


def test_owner_of_a_part_is_its_generations() -> None:
    owners = Owners((0, 3), ("a" * 64, "b" * 64))
    assert [owners.of(part)[0] for part in range(5)] == list("aaabb")


def test_layout_knows_what_it_was_before() -> None:
    first = Layout(
        blocks=7, blocks_per_part=3, block_length=8, vocab_size=100, preset="exact", k=4,
        temperatures=(2.0,), feature_layers=(), segments=1, hidden_size=0,
    )  # fmt: skip
    grown = replace(first, blocks=12, generations=(Generation(0, 7, "a"), Generation(3, 5, "b")))
    assert grown.until(1) == first and grown.until(2) == grown
    assert Layout.from_dict(grown.to_dict()) == grown
    assert (first.arrays()["entropy"].shape[0], grown.arrays()["entropy"].shape[0]) == (7, 14)
    assert first.part_range(2) == grown.part_range(2) == (6, 7)
    assert grown.part_range(3) == (9, 12)
