"""Notes ↔ the cache's integer arrays: ids as gaps between ranks, logprobs as levels above a floor.

Encoding sorts each row's entries by the rank of their id in the row's class (orders.py) and keeps the
gaps: the first entry its rank, each further one what its rank exceeds the one before by (0 where a
draw repeats, or an entry that a top-p cut left unused). A level is kept relative to the row's least.
Rows without notes are zeros. Arrays are [N, K, T], so that both directions are a few operations on
vectors of T tokens.

Shapes: N blocks, T tokens, K entries, S draws, Z temperatures, R rows with notes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from storage.codec import DRAW_STEP, CubeRoot
from storage.layout import Layout
from storage.lookup import Table, empty
from storage.orders import IdOrders
from storage.types import (
    LOG_ZERO,
    AnyArray,
    Bool,
    HostNotes,
    Int32,
    Int64,
    SparseLogits,
    TailDraws,
    TokenStats,
)

_ROUNDING = 1e-3  # nats above 0 that a float32 softmax does not reach
STATISTICS = ("entropy", "log_tail_mass", "gold_logprob", "log_z")


def encode_rows(
    layout: Layout, orders: IdOrders, notes: HostNotes, scored: Bool, out: Mapping[str, AnyArray]
) -> None:
    """Encodes the notes on the scored rows of some blocks into the layout's arrays.

    Args:
        notes: of R rows.
        scored: bool [N, T] with R true entries, in the rows' order.
        out: the layout's arrays of these N blocks, zeroed; per-token arrays are filled in.
    """
    start = 0
    for n, mask in enumerate(scored):  # what one block needs stays in the processor's cache
        stop = start + int(mask.sum())
        values = {f.name: getattr(notes, f.name)[start:stop] for f in fields(HostNotes)}
        block = {name: array[n] for name, array in out.items()}
        _encode_block(layout, orders, HostNotes(**values), mask, block)
        start = stop


def _encode_block(
    layout: Layout, orders: IdOrders, notes: HostNotes, scored: Bool, out: Mapping[str, AnyArray]
) -> None:
    """Encodes one block's rows; scored: [T]; out: arrays [T] and [K, T]."""
    if not len(notes.ids):
        return
    statistics = layout.codecs.statistics
    classes = orders.classify(notes.ids)
    out["id_class"][scored] = classes
    ranks = orders.ranks_of(notes.ids, classes)
    levels = layout.codecs.logprobs.encode(notes.logprobs)
    ranks, levels = _sorted_pairs(ranks, levels, orders)
    _put(out["head_ids"], scored, _gaps(ranks))
    if not layout.codecs.exact:
        out["head_floor"][scored], levels = _above_floor(levels, layout.top_p < 1)
    _put(out["head_logprobs"], scored, levels)
    if layout.draws:
        _encode_draws(layout, orders, notes, classes, scored, out)
    for name in STATISTICS[:3]:
        if name not in layout.missing:
            out[name][scored] = statistics.encode(np.abs(getattr(notes, name)))
    if layout.temperatures:
        _put(out["log_z"], scored, statistics.encode(np.abs(notes.log_z)))


def _sorted_pairs(ranks: AnyArray, values: AnyArray, orders: IdOrders) -> tuple[AnyArray, AnyArray]:
    """Returns ranks ascending [R, K] and the values that belong to them.

    16-bit values travel with their rank through one sort of integers, several times quicker than an
    argsort.
    """
    if values.dtype != np.uint16:
        order = np.argsort(ranks, axis=1, kind="stable")
        return np.take_along_axis(ranks, order, 1), np.take_along_axis(values, order, 1)
    wide: Any = np.uint64 if orders.stride > 1 << 16 else np.uint32
    keys = (ranks.astype(wide) << wide(16)) | values
    keys.sort(axis=1)
    return keys >> wide(16), keys.astype(np.uint16)


def _gaps(ranks: AnyArray) -> AnyArray:
    gaps = ranks.copy()
    gaps[:, 1:] -= ranks[:, :-1]
    return gaps


def _above_floor(levels: AnyArray, cut: bool) -> tuple[AnyArray, AnyArray]:
    """Returns (floor [R], levels above it [R, K]); with a top-p cut 0 is kept for unused entries."""
    if not cut:
        floor = levels.min(1)
        return floor, levels - floor[:, None]
    unused = levels == 0
    floor = np.where(unused, np.uint16(65535), levels).min(1) - np.uint16(1)
    return floor, np.where(unused, np.uint16(0), levels - floor[:, None])


def _encode_draws(
    layout: Layout,
    orders: IdOrders,
    notes: HostNotes,
    classes: Int64,
    scored: Bool,
    out: Mapping[str, AnyArray],
) -> None:
    ranks = orders.ranks_of(notes.draw_ids, classes)
    values: AnyArray = notes.draw_logprobs
    codec = layout.codecs.logprobs
    if isinstance(codec, CubeRoot):
        floor = codec.levels[_floor_index(layout, out["head_floor"][scored])]
        depth = np.rint((floor[:, None] - notes.draw_logprobs) / np.float32(DRAW_STEP))
        values = np.clip(depth, 0, 65535).astype(np.uint16)
    ranks, values = _sorted_pairs(ranks, values, orders)
    _put(out["draw_ids"], scored, _gaps(ranks))
    if layout.draws_tempered:
        _put(out["draw_logprobs"], scored, values)


def _floor_index(layout: Layout, floor: AnyArray) -> AnyArray:
    """Returns the level of a row's least entry."""
    return floor if layout.top_p == 1 else floor + np.uint16(1)


def _put(out: AnyArray, scored: Bool, rows: AnyArray) -> None:
    """Writes rows [R, K] to the scored places of [K, T]; the others are zeros."""
    dense = np.zeros((len(scored), rows.shape[1]), out.dtype)
    dense[scored] = rows
    out[...] = dense.T


def require_codes(layout: Layout, orders: IdOrders, arrays: Mapping[str, AnyArray]) -> None:
    """Refuses codes that stand for nothing, summed without a limit: what `verify --deep` asks.

    Raises:
        IndexError: of which array, and what.
    """
    limits = {"id_class": (arrays["id_class"], len(orders.near))}
    for name in ("head_ids", "draw_ids"):
        if name in arrays:
            limits[name] = (arrays[name].sum(1, dtype=np.int64), orders.stride)
    codec = layout.codecs.logprobs
    if isinstance(codec, CubeRoot):
        level = arrays["head_logprobs"].astype(np.int64) + arrays["head_floor"][:, None]
        limits["head_logprobs"] = (level, len(codec.levels))
    for name, (codes, limit) in limits.items():
        if codes.size and int(codes.max()) >= limit:
            raise IndexError(f"{name}: {int(codes.max())}, there are {limit}")


class NotesDecoder:
    """Turns one cache's integer arrays back into notes.

    Args:
        layout, orders: of the cache.

    Every method raises IndexError where a code stands for nothing, or a float for no logprob, which only
    a writer's mistake or its malice makes.
    Sums beyond 16 bits wrap and may go unseen here: `require_codes` finds them, too.
    """

    def __init__(self, layout: Layout, orders: IdOrders) -> None:
        self._layout, self._orders = layout, orders
        narrow = orders.vocab_size <= 1 << 16  # half the bytes: more of it stays in the cache
        self._ids = Table(orders.ids.astype(np.uint16) if narrow else orders.ids)
        codec = layout.codecs.logprobs
        self._levels = Table(codec.levels) if isinstance(codec, CubeRoot) else None

    def head(self, arrays: Mapping[str, AnyArray]) -> SparseLogits:
        """Returns the head; `head_ids` is turned into ranks in place."""
        ids = self._ids_of(arrays["head_ids"], arrays["id_class"])
        logprobs = arrays["head_logprobs"]
        if self._levels is not None:
            index = empty(logprobs.shape, np.uint16)
            np.add(logprobs, arrays["head_floor"][:, None], out=index)
            if self._layout.top_p < 1:
                index[logprobs == 0] = 0
            logprobs = self._levels[index]
        else:
            _require_logprobs(logprobs)
        return SparseLogits(ids.swapaxes(1, 2), logprobs.swapaxes(1, 2))

    def draws(self, arrays: Mapping[str, AnyArray]) -> TailDraws:
        """Returns the draws; `draw_ids` is turned into ranks in place."""
        ids = self._ids_of(arrays["draw_ids"], arrays["id_class"]).swapaxes(1, 2)
        if not self._layout.draws_tempered:
            return TailDraws(ids, None)
        stored = logprobs = arrays["draw_logprobs"]
        if self._levels is not None:
            floor = self._levels[_floor_index(self._layout, arrays["head_floor"])][:, None]
            logprobs = empty(stored.shape, np.float32)
            np.multiply(stored, np.float32(-DRAW_STEP), out=logprobs)
            np.add(logprobs, floor, out=logprobs)
            np.maximum(logprobs, np.float32(LOG_ZERO), out=logprobs)
        else:
            _require_logprobs(logprobs)
        return TailDraws(ids, logprobs.swapaxes(1, 2))

    def stats(self, arrays: Mapping[str, AnyArray]) -> TokenStats:
        """Returns the statistics with their signs; NaN for those that the cache does not hold."""
        decode, grid = self._layout.codecs.statistics.decode, self._layout.temperatures
        count, length = arrays["log_tail_mass"].shape
        if self._layout.codecs.exact:
            for name in STATISTICS[: 4 if grid else 3]:
                if name not in self._layout.missing:
                    _require_logprobs(-arrays[name])
        log_z = np.empty((count, len(grid), length), np.float32)
        for i, temperature in enumerate(grid):  # Σ p^(1/τ) is above 1 for τ > 1 and below for τ < 1
            np.multiply(
                decode(arrays["log_z"][:, i]), 1.0 if temperature >= 1 else -1.0, out=log_z[:, i]
            )
        entropy, gold = (
            np.full((count, length), np.nan, np.float32)
            if name in self._layout.missing
            else decode(arrays[name])
            for name in ("entropy", "gold_logprob")
        )
        return TokenStats(entropy, -decode(arrays["log_tail_mass"]), -gold, log_z.swapaxes(1, 2))

    def _ids_of(self, gaps: AnyArray, classes: AnyArray) -> Int32:
        """Returns ids int32 [N, K, T] of gaps [N, K, T], which become ranks."""
        sum_gaps(gaps)
        stride, count = self._orders.stride, len(self._orders.near)
        if gaps.size and (int(gaps.max()) >= stride or int(classes.max()) >= count):
            raise IndexError(
                f"rank {int(gaps.max())} of {stride}, class {int(classes.max())} of {count}"
            )
        index = empty(gaps.shape, np.uint32)
        first = classes.astype(np.uint32) * np.uint32(self._orders.stride)
        np.add(gaps, first[:, None], out=index)
        ids: Int32 = empty(gaps.shape, np.int32)
        ids[...] = self._ids[index]
        return ids


def _require_logprobs(values: AnyArray) -> None:
    if values.size and not float(values.max()) <= _ROUNDING:  # NaN is not either
        raise IndexError(f"a logprob of {float(values.max())}")


def sum_gaps(gaps: AnyArray) -> None:
    """Turns gaps [N, K, T] into ranks in place: running sums over K, by groups of eight.

    Twice the additions of a plain loop over K, in a third of its calls.
    """
    count, k, length = gaps.shape
    groups = k // 8
    inner = gaps[:, : 8 * groups].reshape(count, groups, 8, length)
    for j in range(1, 8):
        np.add(inner[:, :, j - 1], inner[:, :, j], out=inner[:, :, j])
    for group in range(1, groups):
        np.add(inner[:, group - 1, 7:], inner[:, group], out=inner[:, group])
    for j in range(max(1, 8 * groups), k):
        np.add(gaps[:, j - 1], gaps[:, j], out=gaps[:, j])
