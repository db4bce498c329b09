"""The order of blocks: reproducible, windowed, reached at any place, the same for any ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages import order as module
from stages.order import BlockOrder, Position, permutation, splitmix64
from stages.stream import Share
from storage.errors import CheckpointError

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


def plain(ranges: list[tuple[int, int]], width: int, name: list[object], window: int) -> list[int]:
    """One epoch's order by the documented rule, in plain Python."""

    def shuffled(things: list[object], name: list[object]) -> list[object]:
        return [things[i] for i in permutation(len(things), list(name))]

    blocks = [b for first, count in ranges for b in range(first, first + count)]
    parts = shuffled(sorted({b // width for b in blocks}), name)
    found: list[object] = []
    for w in range(-(-len(parts) // window)):
        mine = parts[w * window : (w + 1) * window]
        inside = [b for part in mine for b in blocks if b // width == part]
        found += shuffled(inside, [*name, w])
    return found  # type: ignore[return-value]


def walk(order: BlockOrder, count: int, position: Position = Position()) -> list[int]:  # noqa: B008
    return order.take(position, count)[0].tolist()


def test_splitmix64_is_the_published_one() -> None:
    """First outputs from state 1234567, as in the reference implementation's test vectors."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423,
                4593380528125082431, 16408922859458223821]  # fmt: skip
    assert splitmix64(np.uint64(1234567), 5).tolist() == expected


RANGES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=6)


@given(gaps=RANGES, width=st.integers(1, 5), window=st.integers(1, 4), epoch=st.integers(0, 2))
def test_order_follows_the_documented_rule(
    gaps: list[tuple[int, int]], width: int, window: int, epoch: int
) -> None:
    ranges, end = [], 0
    for gap, count in gaps:
        ranges.append((end + gap, count))
        end += gap + count
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WINDOW_PARTS", window)
        order = BlockOrder(ranges, width, 5, "c")
        found = walk(order, len(order), Position(epoch, 0)) if len(order) else []
    assert found == plain(ranges, width, [5, epoch, "c"], window)
    assert sorted(found) == [b for first, n in ranges for b in range(first, first + n)]


def test_order_is_a_function_of_seed_epoch_and_corpus() -> None:
    ranges = [(100, 20)]
    first = walk(BlockOrder(ranges, 4, 1, "corpus"), 20)
    assert first == walk(BlockOrder(ranges, 4, 1, "corpus"), 20)
    for other in (
        walk(BlockOrder(ranges, 4, 1, "corpus"), 20, Position(1, 0)),
        walk(BlockOrder(ranges, 4, 2, "corpus"), 20),
        walk(BlockOrder(ranges, 4, 1, "other"), 20),
    ):
        assert other != first and sorted(other) == sorted(first)


@pytest.mark.parametrize("size", [1, 3, 7, 20, 33])
def test_any_step_walks_the_same_endless_order(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW_PARTS", 2)
    order, position, seen = BlockOrder([(0, 13), (30, 7)], 4, 0, "c"), Position(), list[int]()
    for _ in range(60 // size + 1):
        ids, position = order.take(position, size)
        assert len(ids) == size
        seen += ids.tolist()
    whole = BlockOrder([(0, 13), (30, 7)], 4, 0, "c")
    endless = [b for e in range(6) for b in walk(whole, 20, Position(e, 0))]
    assert seen == endless[: len(seen)]
    assert position == Position(len(seen) // 20, len(seen) % 20)
    fresh = BlockOrder([(0, 13), (30, 7)], 4, 0, "c")
    assert walk(fresh, 9, Position(2, 11)) == endless[51:60]


def test_upcoming_parts_are_those_that_the_walk_will_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW_PARTS", 3)
    order = BlockOrder([(2, 31)], 4, 0, "c")
    for consumed in range(31):
        ahead = order.upcoming(Position(0, consumed), 5)
        assert 5 <= len(ahead) <= 5 + 2 and len(set(ahead)) == len(ahead)
        read = [b // 4 for b in walk(order, 31, Position(0, consumed))]
        assert set(dict.fromkeys(read[:8])) <= set(ahead)
    assert sorted(order.upcoming(Position(3, 30), 100)) == list(range(9))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_taken_in_turn_are_the_order_and_resume_with_another_number(world: int) -> None:
    """Positions count samples of all ranks, so any number of them goes on where others stopped."""
    order, whole = BlockOrder([(0, 50)], 4, 0, "c"), BlockOrder([(0, 50)], 4, 0, "c")
    position, seen = Position(0, 7), list[int]()
    for world_now in (world, 4 - world):
        for _ in range(3):
            shares = [Share(2, 2, rank, world_now) for rank in range(world_now)]
            pieces = [share.of_step(order, position) for share in shares]
            seen += [b for a in range(2) for piece in pieces for b in piece[a].tolist()]
            position = order.after(position, shares[0].samples)
    assert seen == walk(whole, len(seen), Position(0, 7))
    assert position == whole.after(Position(0, 7), len(seen))


def test_state_is_epoch_consumed_and_seed_and_another_seed_is_refused() -> None:
    order = BlockOrder([(0, 5)], 4, 3, "c")
    assert order.state(Position(2, 4)) == {"epoch": 2, "consumed": 4, "seed": 3}
    assert order.resume(order.state(Position(2, 4))) == Position(2, 4)
    with pytest.raises(CheckpointError, match=r"expected:\s+3\n\s+found:\s+4"):
        order.resume({"epoch": 2, "consumed": 4, "seed": 4})


def test_an_epoch_of_a_million_parts_is_cheap() -> None:
    """The benchmark, which sees every block once, at two sizes: a few bytes a part, none a block."""
    import order as benchmark

    small, large = benchmark.run(1_000), benchmark.run(40_000)
    assert small["blocks"] == 99_000 and large["blocks"] == 3_960_000
    assert large["build_peak_bytes"] - small["build_peak_bytes"] < 100 * 39_000
