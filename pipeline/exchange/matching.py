"""Which entry of a capture belongs to each row of a block: rows and sequences joined by token ids.

A head depends on what was read and on nothing that follows. So entry j of a sequence serves a row if the
tokens read before it are the same, from a place on at which a teacher may have begun: the row's document
in this block, the document itself (which may have begun in an earlier block), or the block. The first of
these that serves is taken, since only it has read exactly what the student reads there.

Sequences are put into lexicographic order once; those that share the longest prefix with some tokens then
stand beside the place at which these would. Cost: about 2 log2(n) comparisons a document and block;
memory: some 100 bytes a sequence.

Shapes: n sequences, T tokens of a block.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.exchange.scratch import Scratch
from storage.blocks import BlockReader
from storage.types import AnyArray, Bool, Int32, Int64

_NEIGHBOURS = 16  # equally good sequences that are asked, to either side


class SequenceOrder:
    """The sequences of a scratch folder in lexicographic order of their tokens."""

    def __init__(self, scratch: Scratch) -> None:
        self._tokens, self._starts = scratch.tokens, scratch.token_starts
        every = range(len(self._starts) - 1)
        self._order = np.array(sorted(every, key=lambda s: _Lazy(self, s)), np.int64)

    def bytes_of(self, sequence: int) -> bytes:
        """Returns a sequence's tokens as big-endian bytes, which compare as its ids do."""
        return self._of(sequence).tobytes()

    def _of(self, sequence: int) -> AnyArray:
        return self._tokens[self._starts[sequence] : self._starts[sequence + 1]]

    def longest(self, tokens: Int32) -> list[tuple[int, int]]:
        """Returns (sequence, tokens shared) of those that share the longest prefix with some tokens."""
        wanted = tokens.astype(">i4")
        at = bisect_left(self._order, wanted.tobytes(), key=lambda s: self.bytes_of(int(s)))
        found: list[tuple[int, int]] = []
        for place, step in ((at, 1), (at - 1, -1)):
            for index in range(place, place + step * _NEIGHBOURS, step):
                shared = self._shared(index, wanted)
                if not shared or (found and shared < found[0][1]):
                    break
                if found and shared > found[0][1]:
                    found = []
                found.append((int(self._order[index]), shared))
        return found

    def _shared(self, index: int, wanted: AnyArray) -> int:
        if not 0 <= index < len(self._order):
            return 0
        mine = self._of(int(self._order[index]))
        n = min(len(mine), len(wanted))
        differ = np.flatnonzero(mine[:n] != wanted[:n])
        return int(differ[0]) if len(differ) else n


class _Lazy:
    """A key of sorting that reads its sequence when it is compared."""

    __slots__ = ("order", "sequence")

    def __init__(self, order: SequenceOrder, sequence: int) -> None:
        self.order, self.sequence = order, sequence

    def __lt__(self, other: _Lazy) -> bool:
        return self.order.bytes_of(self.sequence) < self.order.bytes_of(other.sequence)


@dataclass(frozen=True)
class Match:
    """One block's rows.

    Attributes:
        scored: bool [T].
        gold: int32 [T], the token that each row predicts.
        document: int64 [T].
        entries: int64 [T], the entry of the capture that serves a row; −1 where none does, or none is
            wanted.
        same: bool [T], whether that teacher had read just what the block gives there.
    """

    scored: Bool
    gold: Int32
    document: Int64
    entries: Int64
    same: Bool


class RowFinder:
    """Finds the entries that serve the corpus's rows; blocks are best asked for in ascending order.

    Args:
        corpus: of the cache.
        scratch: the capture.
    """

    def __init__(self, corpus: BlockReader, scratch: Scratch) -> None:
        self._corpus, self._scratch = corpus, scratch
        self._order = SequenceOrder(scratch)
        self._first_blocks = {source.first_block for source in corpus.info.sources}
        self._before: tuple[int, Int32] = (-1, np.zeros(0, np.int32))

    def match(self, block: int) -> Match:
        """Returns which entries serve a block's rows."""
        read = self._corpus.read([block])
        scored, tokens, document = read.scored[0], read.inputs[0], read.document[0, :-1]
        found = Match(
            scored, read.gold[0], document, np.full(len(scored), -1, np.int64),
            np.zeros(len(scored), bool),
        )  # fmt: skip
        for start, stop in pieces(document):
            rows = start + np.flatnonzero(scored[start:stop])
            if not len(rows):
                continue
            last = int(rows[-1]) + 1
            self._fill(found, rows, start, tokens[start:last], True)
            if start == 0 and (found.entries[rows] < 0).any():
                before = self._document_before(block, int(document[0]))
                if len(before):
                    whole = np.concatenate([before, tokens[:last]])
                    self._fill(found, rows, -len(before), whole, False)
            if start > 0:
                self._fill(found, rows, 0, tokens[:last], False)
        return found

    def _fill(self, found: Match, rows: Int64, origin: int, tokens: Int32, same: bool) -> None:
        """Fills those of some rows that nothing serves yet from sequences that begin at `origin`.

        Args:
            origin: the row at which `tokens` begin, negative for earlier blocks.
            same: whether that is what the student reads.
        """
        left = rows[found.entries[rows] < 0]
        for sequence, shared in self._order.longest(tokens) if len(left) else ():
            starts = self._scratch.entry_starts
            place = left - origin  # of the token that the row reads
            entry = place + 1 - int(self._scratch.firsts[sequence])
            count = int(starts[sequence + 1] - starts[sequence])
            there = (place < shared) & (entry >= 0) & (entry < count)
            serving = np.where(there, starts[sequence] + entry, 0)
            if there.any():
                there[there] = self._scratch.counts(serving[there]) > 0
            found.entries[left[there]] = serving[there]
            found.same[left[there]] = same
            left = left[~there]
            if not len(left):
                return

    def _document_before(self, block: int, document: int) -> Int32:
        """Returns what earlier blocks hold of the document with which a block begins."""
        if self._before[0] == block:
            return self._before[1]
        parts: list[Int32] = []
        at = block
        while at not in self._first_blocks:
            earlier = self._corpus.read([at - 1])
            mine = earlier.document[0, :-1] == document
            parts.append(earlier.inputs[0][mine])
            if not mine.all():
                break
            at -= 1
        whole = np.concatenate([np.zeros(0, np.int32), *reversed(parts)])
        self._before = (block, whole)
        return whole


def pieces(document: Int64) -> Iterator[tuple[int, int]]:
    """Yields the row ranges of a block's documents, padding left out."""
    ends = [*(np.flatnonzero(np.diff(document)) + 1).tolist(), len(document)]
    for start, stop in zip([0, *ends[:-1]], ends, strict=True):
        if document[start] >= 0:
            yield start, stop
