"""Notes decoded on the training device: packed integers go there, torch unpacks them.

The same steps as storage.notes.NotesDecoder, on whole batches: running sums of gaps, look-ups in the
same tables, one float32 product and difference for draws. Every value has the same bits.

Shapes: B blocks, T tokens, K entries, S draws, Z temperatures, R scored rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from stages.fusion import NoteRows
from storage.codec import DRAW_STEP, CubeRoot
from storage.errors import CorruptShard
from storage.layout import Layout
from storage.orders import IdOrders
from storage.types import LOG_ZERO


class DeviceDecoder:
    """Turns one cache's packed arrays into rows of notes, on their device.

    Args:
        layout, orders: of the cache.
        device: where its tables lie: 4 bytes for each class and rank.
    """

    def __init__(self, layout: Layout, orders: IdOrders, device: torch.device) -> None:
        self._layout, self._stride = layout, orders.stride
        self._ids = torch.from_numpy(orders.ids).to(device)
        codec, statistics = layout.codecs.logprobs, layout.codecs.statistics
        self._levels = (
            torch.from_numpy(codec.levels).to(device) if isinstance(codec, CubeRoot) else None
        )
        codes = np.arange(1 << 16).astype(statistics.dtype)
        self._statistics = (
            None if layout.codecs.exact else torch.from_numpy(statistics.decode(codes)).to(device)
        )

    def rows(self, packed: Mapping[str, Tensor], scored_BT: Tensor) -> NoteRows:
        """Returns the notes on the scored rows.

        Args:
            packed: CacheReader.packed's arrays, as tensors of the same dtypes.
            scored_BT: bool, on the same device.

        Raises:
            CorruptShard: a code stands for nothing. Asked before any table is: an index beyond one would
                end a GPU's whole context.
        """
        layout = self._layout
        self._require_codes(packed)
        first = packed["id_class"].long() * self._stride
        draws = layout.draws > 0
        log_z = self._statistic(packed["log_z"]) if layout.temperatures else None
        signs = [1.0 if t >= 1 else -1.0 for t in layout.temperatures]
        return NoteRows(
            ids=_rows(self._decoded_ids(packed["head_ids"], first), scored_BT),
            logprobs=_rows(self._logprobs(packed), scored_BT),
            entropy=self._known(packed, "entropy", scored_BT),
            log_tail=-self._statistic(packed["log_tail_mass"])[scored_BT],
            gold_logprob=-self._known(packed, "gold_logprob", scored_BT),
            log_z=scored_BT.new_zeros((int(scored_BT.sum()), 0), dtype=torch.float32)
            if log_z is None
            else _rows(log_z * log_z.new_tensor(signs)[:, None], scored_BT),
            draw_ids=_rows(self._decoded_ids(packed["draw_ids"], first), scored_BT)
            if draws
            else None,
            draw_logprobs=_rows(self._draw_logprobs(packed), scored_BT)
            if layout.draws_tempered
            else None,
        )

    def _require_codes(self, packed: Mapping[str, Tensor]) -> None:
        """Refuses ranks, classes and levels that do not exist, by one answer of the device."""
        beyond = [_reach(packed["id_class"]) * self._stride >= len(self._ids)]
        for name in ("head_ids", "draw_ids"):
            if name in packed:
                beyond.append(_reach(packed[name].long().sum(1)) >= self._stride)
        if self._levels is not None:
            levels = packed["head_logprobs"].long() + self._floor(packed)
            floors = packed["head_floor"].long() + int(self._layout.top_p < 1)
            beyond += [_reach(x) >= len(self._levels) for x in (levels, floors)]
        if bool(torch.stack(beyond).any()):
            raise CorruptShard(
                "notes were written wrong", expected="ranks and levels that exist",
                todo="run `scholiast verify --deep`, which says whose and where",
            )  # fmt: skip

    def _decoded_ids(self, gaps: Tensor, first: Tensor) -> Tensor:
        return self._ids[gaps.long().cumsum(1) + first[:, None]].long()

    def _floor(self, packed: Mapping[str, Tensor]) -> Tensor:
        return packed["head_floor"].long()[:, None]

    def _logprobs(self, packed: Mapping[str, Tensor]) -> Tensor:
        stored = packed["head_logprobs"]
        if self._levels is None:
            return stored
        above = stored.long()
        index = above + self._floor(packed)
        if self._layout.top_p < 1:
            index = index.masked_fill(above == 0, 0)
        return self._levels[index]

    def _draw_logprobs(self, packed: Mapping[str, Tensor]) -> Tensor:
        stored = packed["draw_logprobs"]
        if self._levels is None:
            return stored
        floor = self._levels[self._floor(packed) + int(self._layout.top_p < 1)]
        return (floor - stored.float() * DRAW_STEP).clamp_min(LOG_ZERO)

    def _known(self, packed: Mapping[str, Tensor], name: str, scored_BT: Tensor) -> Tensor:
        """Returns a statistic's scored rows, NaN where the cache does not hold it."""
        if name not in self._layout.missing:
            return self._statistic(packed[name])[scored_BT]
        nan = scored_BT.new_full((int(scored_BT.sum()),), float("nan"), dtype=torch.float32)
        return nan

    def _statistic(self, stored: Tensor) -> Tensor:
        return stored if self._statistics is None else self._statistics[stored.long()]


def _reach(codes: Tensor) -> Tensor:
    """Returns the largest code, 0 of none."""
    return codes.long().amax() if codes.numel() else codes.new_zeros((), dtype=torch.long)


def _rows(values_BKT: Tensor, scored_BT: Tensor) -> Tensor:
    """Returns [R, K] of [B, K, T]."""
    return values_BKT.transpose(1, 2)[scored_BT]


def bfloat16(bits: Tensor) -> Tensor:
    """Returns the float32 values of bfloat16 bits (uint16), exactly."""
    return (bits.int() << 16).view(torch.float32)
