"""The order of blocks: a function of (seed, epoch, corpus fingerprint) alone.

The parts that hold blocks of the split are shuffled; each window of WINDOW_PARTS parts in that order
is then read as one, its blocks shuffled among themselves. So a store is read part by part, a few
parts at a time, whereas a corpus of at most one window is shuffled altogether. Any place in an epoch
is reached by arithmetic: nothing before it is generated.

Cost: O(parts log parts) an epoch, O(window) a window; some 60 bytes a part, nothing a block.
The fallback for a finer shuffle is a larger window: more parts open at once.

The permutation of n things under a seed s (uint64) sorts them by key, where the key of number i is
output i of splitmix64 started at s (a bijection of i, so no two keys are the same):

    z = s + (i + 1)·0x9E3779B97F4A7C15          (all modulo 2^64)
    z = (z ^ (z >> 30))·0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27))·0x94D049BB133111EB
    key = z ^ (z >> 31)

s is the first 16 hex digits of the fingerprint (sha256 of the canonical JSON) of [seed, epoch, corpus]
for the parts, ascending, and of [seed, epoch, corpus, w] for window w's blocks, numbered part after
part in the shuffled order and ascending within a part.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.errors import CheckpointError
from storage.fingerprint import fingerprint
from storage.sampling import INCREMENT, mix
from storage.types import Int64

WINDOW_PARTS = 64

Ranges = Sequence[tuple[int, int]]
"""Blocks as (first block, how many), ascending and disjoint."""


@dataclass(frozen=True)
class Position:
    """Where the next sample lies in the endless sequence of epochs.

    Attributes:
        epoch: from 0.
        consumed: samples of the epoch taken so far, by all ranks together.
    """

    epoch: int = 0
    consumed: int = 0


@dataclass(frozen=True)
class _Epoch:
    """One epoch's shuffled parts: `parts` index the order's own; `starts` [windows + 1] samples."""

    number: int
    parts: Int64
    starts: Int64


class BlockOrder:
    """A fresh order of some blocks for every epoch.

    Args:
        ranges: the blocks.
        blocks_per_part: width of a part.
        seed: of the run.
        corpus: fingerprint of the corpus.
    """

    def __init__(self, ranges: Ranges, blocks_per_part: int, seed: int, corpus: str) -> None:
        self.seed, self._corpus = seed, corpus
        self._first = np.array([first for first, count in ranges if count], np.int64)
        counts = np.array([count for _, count in ranges if count], np.int64)
        self._before = np.concatenate([[0], counts.cumsum()])  # samples before each range
        self._parts, self._counts = _by_part(self._first, counts, blocks_per_part)
        self._offsets = self._counts.cumsum() - self._counts  # samples before each part, unshuffled
        self._epoch = _Epoch(-1, self._parts, self._offsets)
        self._window: tuple[tuple[int, int], Int64] = ((-1, -1), self._offsets)

    def __len__(self) -> int:
        """Samples of an epoch."""
        return int(self._before[-1])

    def copy(self) -> BlockOrder:
        """Returns the same order for another thread: each remembers the epoch and window it is in."""
        return copy.copy(self)

    def take(self, position: Position, count: int) -> tuple[Int64, Position]:
        """Returns the next `count` blocks, running on into the next epoch, and what follows them."""
        taken = [np.empty(0, np.int64)]
        while count:
            epoch = self._enter(position.epoch)
            window = int(np.searchsorted(epoch.starts, position.consumed, side="right")) - 1
            begin = position.consumed - int(epoch.starts[window])
            piece = self._blocks(epoch, window)[begin : begin + count]
            taken.append(piece)
            count -= len(piece)
            position = self.after(position, len(piece))
        return np.concatenate(taken), position

    def after(self, position: Position, count: int) -> Position:
        """Returns the position `count` samples further on."""
        epochs, consumed = divmod(position.consumed + count, len(self))
        return Position(position.epoch + epochs, consumed)

    def upcoming(self, position: Position, count: int) -> list[int]:
        """Returns the next parts that will be read, in order of first use at the latest.

        They are those of the position's own window, then those of the windows that follow, into the
        next epochs: at least `count` unless the split has fewer, at most a window more.
        """
        found: dict[int, None] = {}
        number, consumed = position.epoch, position.consumed
        while len(found) < min(count, len(self._parts)):
            epoch = self._enter(number)
            first = int(np.searchsorted(epoch.starts, consumed, side="right")) - 1
            for window in range(first, len(epoch.starts) - 1):
                if len(found) < count:
                    found |= dict.fromkeys(self._parts[self._members(epoch, window)].tolist())
            number, consumed = number + 1, 0
        return list(found)

    def state(self, position: Position) -> dict[str, int]:
        """Returns what a checkpoint keeps: {epoch, consumed, seed}."""
        return {**asdict(position), "seed": self.seed}

    def resume(self, state: Any) -> Position:
        """Returns the position that `state` keeps.

        Raises:
            CheckpointError: it is a position in the order of another seed, or none.
        """
        state = state if isinstance(state, dict) else {}
        if state.get("seed") != self.seed:
            raise CheckpointError(
                "the checkpoint stands in the order of another seed", where="train.seed",
                expected=self.seed, found=state.get("seed"),
                todo="restore that seed, or name another run_dir",
            )  # fmt: skip
        epoch, consumed = (state.get(key) for key in ("epoch", "consumed"))
        known = isinstance(epoch, int) and isinstance(consumed, int)
        if not known or not 0 <= epoch < 1 << 48 or not 0 <= consumed < max(1, len(self)):
            raise CheckpointError(
                "the checkpoint stands where no epoch has a sample", where="position",
                expected=f"0 to {len(self) - 1}", found=f"epoch {epoch!r:.30}, {consumed!r:.30}",
                todo="go on from another checkpoint, or train from the beginning",
            )  # fmt: skip
        return Position(epoch, consumed)

    def _enter(self, number: int) -> _Epoch:
        epoch = self._epoch
        if epoch.number != number:
            parts = permutation(len(self._parts), [self.seed, number, self._corpus])
            ends = self._counts[parts].cumsum()
            starts = np.concatenate([[0], ends[WINDOW_PARTS - 1 :: WINDOW_PARTS]])
            if starts[-1] != len(self):
                starts = np.append(starts, len(self))
            self._epoch = epoch = _Epoch(number, parts, starts)
        return epoch

    def _members(self, epoch: _Epoch, window: int) -> Int64:
        return epoch.parts[window * WINDOW_PARTS : (window + 1) * WINDOW_PARTS]

    def _blocks(self, epoch: _Epoch, window: int) -> Int64:
        """Returns a window's block ids in order."""
        if self._window[0] != (epoch.number, window):
            members = self._members(epoch, window)
            counts = self._counts[members]
            ends = counts.cumsum()
            # Sample j of the window is the (j − samples of earlier parts)-th of its part.
            samples = np.arange(ends[-1]) + np.repeat(
                self._offsets[members] - ends + counts, counts
            )
            order = permutation(len(samples), [self.seed, epoch.number, self._corpus, window])
            samples = samples[order]
            index = np.searchsorted(self._before, samples, side="right") - 1
            blocks = self._first[index] + samples - self._before[index]
            self._window = ((epoch.number, window), blocks)
        return self._window[1]


def _by_part(first: Int64, counts: Int64, blocks_per_part: int) -> tuple[Int64, Int64]:
    """Returns the parts that hold blocks of the ranges, ascending, and how many each holds."""
    parts, sizes = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for begin, count in zip(first.tolist(), counts.tolist(), strict=True):
        touched = np.arange(begin // blocks_per_part, (begin + count - 1) // blocks_per_part + 1)
        edges = np.clip(np.append(touched, touched[-1] + 1) * blocks_per_part, begin, begin + count)
        parts.append(touched)
        sizes.append(np.diff(edges))
    every, size = np.concatenate(parts), np.concatenate(sizes)
    starts = np.flatnonzero(np.diff(every, prepend=-1))  # two ranges may share a part
    return every[starts], np.add.reduceat(size, starts) if len(starts) else size


def permutation(count: int, name: list[Any]) -> Int64:
    """Returns the permutation of `count` things that a name (JSON) stands for (see above)."""
    seed = np.uint64(int(fingerprint(name)[:16], 16))
    # Keys are distinct: any sort gives the same.
    return np.argsort(splitmix64(seed, count))


def splitmix64(seed: np.uint64, count: int) -> npt.NDArray[np.uint64]:
    """Returns the first outputs of splitmix64 (Steele, Lea, Flood 2014) from a state, uint64."""
    with np.errstate(over="ignore"):
        return mix(seed + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(INCREMENT))
