"""Context orders of ids: what makes a head's ids cheap.

A head is a set of ids. Sorted by how usual an id is, with the gaps stored, it takes far fewer bits than
the ids themselves; and what is usual depends on the context. So a cache has C *classes* of contexts,
each with an order of its own: the R ids most usual there, *near*. Ids outside a class's R follow in one
common order, *far*. A row names its class; an id's *rank* in the row is its place in near, or R + its
place in far. Orders are learned from some blocks of the corpus when the cache is made (hard EM of a
mixture of id frequencies), are stored in the cache, and change nothing but its size.

Shapes: n rows, K ids of a row, C classes, R near ids of a class, F ids in far, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from storage.sampling import INCREMENT, mix
from storage.types import AnyArray, Float32, Int32, Int64

MAX_CLASSES, NEAR = 32, 1024
TOKENS_A_CLASS = 256
"""Rows that a class should have to learn from; fewer rows make fewer classes."""
_TABLE = (
    1 << 23
)  # entries of a whole table of ranks or ids (32 MB), beyond which there are fewer classes
_ROUNDS = 7
_SMOOTHING = 200.0  # ids of the common distribution added to each class's counts
_SAMPLED = 16  # most probable ids of a row that choose its class while learning
_ASKED = 32  # ids of a row that choose its class: 32 · 32 · 25 bits is below 2^15
_ROWS = 512  # rows classified at once: their sums of costs, and one id's, 64 kB
_SHIFT = 32.0  # an id at rank r costs about log2(r + 32) bits


@dataclass(frozen=True)
class IdOrders:
    """The orders of one cache.

    Attributes:
        near: int32 [C, R], the most usual ids of each class, most usual first.
        far: int32 [F ≥ 1], ids seen while learning, most usual first; all others follow, ascending.
        vocab_size: V.
    """

    near: Int32
    far: Int32
    vocab_size: int

    @cached_property
    def common(self) -> Int32:
        """int32 [V], all ids in the common order."""
        unseen = np.ones(self.vocab_size, bool)
        unseen[self.far] = False
        return np.concatenate([self.far, np.flatnonzero(unseen).astype(np.int32)])

    @cached_property
    def ids(self) -> Int32:
        """int32 [C·(R + V)]: class c's id of rank r is at c·(R + V) + r."""
        common = np.broadcast_to(self.common, (len(self.near), self.vocab_size))
        return np.concatenate([self.near, common], axis=1).reshape(-1)

    @property
    def stride(self) -> int:
        """R + V, the number of ranks."""
        return int(self.near.shape[1]) + self.vocab_size

    @cached_property
    def ranks(self) -> Int32:
        """int32 [V, C], the rank of every id in every class."""
        classes, depth = self.near.shape
        place = np.empty(self.vocab_size, np.int32)
        place[self.common] = np.arange(self.vocab_size, dtype=np.int32) + depth
        ranks = np.repeat(place[:, None], classes, axis=1)
        for c in range(classes):
            ranks[self.near[c], c] = np.arange(depth)
        return ranks

    @cached_property
    def _costs(self) -> AnyArray:
        """int16 [V, C]: about the bits of an id in a class, in units of 1/32; _ASKED of them fit."""
        costs: AnyArray = np.rint(32.0 * np.log2(self.ranks + _SHIFT)).astype(np.int16)
        return costs

    def classify(self, ids: AnyArray) -> Int64:
        """Returns each row's class, int64 [n]: the one in which its ids [n, K] are cheapest.

        At most _ASKED of the ids, evenly taken, are asked; integers, so that sums are exact.
        """
        asked = np.ascontiguousarray(ids[:, :: -(-ids.shape[1] // _ASKED)].T)
        classes = np.empty(len(ids), np.int64)
        rows = min(_ROWS, len(ids))
        sums, costs = np.empty((2, rows, len(self.near)), np.int16)
        for i in range(0, len(ids), _ROWS):
            some = asked[:, i : i + _ROWS]
            n = some.shape[1]
            self._costs.take(some[0], axis=0, out=sums[:n], mode="wrap")
            for one in some[1:]:
                self._costs.take(one, axis=0, out=costs[:n], mode="wrap")
                sums[:n] += costs[:n]
            classes[i : i + n] = sums[:n].argmin(1)
        return classes

    def ranks_of(self, ids: AnyArray, classes: Int64) -> Int32:
        """Returns the ranks of ids [n, K] in each row's class, int32 [n, K]."""
        first = ids * self.ranks.shape[1] + classes[:, None]
        ranks: Int32 = self.ranks.reshape(-1).take(first, mode="wrap")
        return ranks  # quicker than ranks[ids, classes]


def class_count(rows: int, vocab_size: int) -> int:
    """Returns C for that many rows to learn from: a power of two, at least 1."""
    wanted = min(max(1, rows // TOKENS_A_CLASS), most_classes(vocab_size))
    return 1 << (wanted.bit_length() - 1)


def most_classes(vocab_size: int) -> int:
    """Returns how many classes the orders of a vocabulary have at most."""
    return min(MAX_CLASSES, max(1, _TABLE // vocab_size))


def learn_orders(ids: AnyArray, vocab_size: int) -> IdOrders:
    """Learns orders from the ids of some rows.

    Deterministic: the same ids give the same orders.

    Args:
        ids: [n, K + S], each row's most probable id first, its draws last; n may be 0.
        vocab_size: V.
    """
    depth = min(NEAR, vocab_size)
    counts = np.bincount(ids.reshape(-1), minlength=vocab_size)
    seen = np.flatnonzero(counts) if len(ids) else np.zeros(1, np.int64)
    far = seen[np.argsort(-counts[seen], kind="stable")].astype(np.int32)
    classes = class_count(len(ids), vocab_size)
    numbers = np.arange(len(ids), dtype=np.uint64)
    member = (mix(numbers + np.uint64(INCREMENT)) % np.uint64(classes)).astype(np.int64)
    common = (counts + 0.05) / (counts.sum() + 0.05 * vocab_size)
    for _ in range(_ROUNDS):
        scores = _scores(ids, member, common, classes)
        member = _best(scores, ids)
    near = np.argsort(-_scores(ids, member, common, classes), axis=0, kind="stable")[:depth]
    return IdOrders(np.ascontiguousarray(near.T).astype(np.int32), far, vocab_size)


def _scores(ids: AnyArray, member: Int64, common: AnyArray, classes: int) -> AnyArray:
    """Returns float32 [V, C], the log frequency of each id in each class, smoothed."""
    pairs = ids.astype(np.int64) * classes + member[:, None]
    counts = np.bincount(pairs.reshape(-1), minlength=len(common) * classes)
    counts = counts.reshape(len(common), classes)
    total = counts.sum(0) + _SMOOTHING
    scores: Float32 = np.log((counts + _SMOOTHING * common[:, None]) / total).astype(np.float32)
    return scores


def _best(scores: AnyArray, ids: AnyArray) -> Int64:
    best = np.empty(len(ids), np.int64)
    for i in range(0, len(ids), 1024):
        best[i : i + 1024] = scores[ids[i : i + 1024, :_SAMPLED]].sum(1).argmax(1)
    return best
