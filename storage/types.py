"""What travels between the rooms: frozen dataclasses of NumPy arrays.

Shape suffixes: N blocks, T tokens of a block, K head entries, G segments, Z temperatures,
D hidden size. Row t of a block predicts token t+1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt16 = npt.NDArray[np.uint16]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]
AnyArray = npt.NDArray[Any]

LOG_ZERO = -1e4
"""Stands for log 0 in stored values: exp(LOG_ZERO) is exactly 0 in every float, and 0·LOG_ZERO is
0 where 0·(−inf) would be NaN."""


@dataclass(frozen=True)
class TokenBlocks:
    """Packed blocks of T input tokens and one look-ahead token each.

    The look-ahead token is the next block's first token, so that the prediction made at row T−1
    is not lost at the seam.

    Attributes:
        block_ids: int64 [N], index of each block in the corpus.
        tokens: int32 [N, T+1].
        document: int64 [N, T+1], number of the document in the corpus; −1 is padding.
        offset: int64 [N, T+1], byte in the document's UTF-8 text at which the token begins
            (the text's length for an end-of-document token).
        loss_mask: bool [N, T+1], whether the token may be asked for as a target.
    """

    block_ids: Int64
    tokens: Int32
    document: Int64
    offset: Int64
    loss_mask: Bool

    @property
    def inputs(self) -> Int32:
        """int32 [N, T], what a model reads."""
        return self.tokens[:, :-1]

    @property
    def gold(self) -> Int32:
        """int32 [N, T], the token that row t predicts."""
        return self.tokens[:, 1:]

    @property
    def present(self) -> Bool:
        """bool [N, T], whether row t holds a token and not padding."""
        return self.document[:, :-1] >= 0

    @property
    def scored(self) -> Bool:
        """bool [N, T], whether row t's target lies in the same document and in the loss mask."""
        same = self.document[:, :-1] == self.document[:, 1:]
        scored: Bool = same & self.present & self.loss_mask[:, 1:]
        return scored

    @property
    def positions(self) -> Int64:
        """int64 [N, T], position within the document's piece in this block, from 0."""
        document = self.document[:, :-1]
        index = np.broadcast_to(np.arange(document.shape[1]), document.shape)
        starts = np.ones(document.shape, bool)
        starts[:, 1:] = document[:, 1:] != document[:, :-1]
        positions: Int64 = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
        return positions

    def take(self, rows: slice) -> TokenBlocks:
        """Returns the blocks at `rows` of this batch."""
        return TokenBlocks(
            self.block_ids[rows], self.tokens[rows], self.document[rows], self.offset[rows],
            self.loss_mask[rows],
        )  # fmt: skip


@dataclass(frozen=True)
class SparseLogits:
    """The head of a next-token distribution: its most probable ids, in no particular order.

    Attributes:
        ids: int32 [N, T, K], distinct. Entries that a top-p cut left unused repeat an id of the row.
        logprobs: float32 [N, T, K], their logprobs under the full-vocabulary softmax at
            temperature 1, never renormalised; LOG_ZERO for unused entries.
    """

    ids: Int32
    logprobs: Float32


@dataclass(frozen=True)
class TailDraws:
    """S ids drawn from the tail in proportion to their probability at temperature 1.

    With t the tail's mass, t·(count of an id)/S estimates its probability without bias.

    Attributes:
        ids: int32 [N, T, S]; an id drawn twice stands there twice.
        logprobs: float32 [N, T, S], the ids' own logprobs at temperature 1; None where the cache
            serves temperature 1 alone.
    """

    ids: Int32
    logprobs: Float32 | None


@dataclass(frozen=True)
class TokenStats:
    """Statistics of the full-vocabulary softmax, taken from it exactly and then stored as the preset
    says (`balanced`: to 2^−10 nats).

    Attributes:
        entropy: float32 [N, T], nats; of an imported cache maybe a lower bound (Layout.bounds), or NaN
            where it is not known (Layout.missing).
        log_tail_mass: float32 [N, T], log of the mass outside the K stored entries.
        gold_logprob: float32 [N, T], logprob of the next token; 0 where the row has no target, NaN where
            it is not known (Layout.missing).
        log_z: float32 [N, T, Z], log Σ_v p_v^(1/τ) for each τ of the cache's grid: a stored
            logprob ℓ becomes ℓ/τ − log_z at temperature τ, exactly.
    """

    entropy: Float32
    log_tail_mass: Float32
    gold_logprob: Float32
    log_z: Float32


@dataclass(frozen=True)
class PooledFeatures:
    """Hidden states pooled over the present tokens of each segment; 0 where it has none.

    Attributes:
        count: int32 [N, G], present tokens of each segment.
        layers: layer (1 = output of the first decoder block) → their mean, float32 [N, G, D].
        last: layer → the state of the last of them, float32 [N, G, D].
    """

    count: Int32
    layers: dict[int, Float32]
    last: dict[int, Float32] = field(default_factory=dict)

    def pooled(self, pooling: str) -> dict[int, Float32]:
        """Returns layer → features pooled in one way ("mean" or "last")."""
        return self.layers if pooling == "mean" else self.last


@dataclass(frozen=True)
class TeacherNotes:
    """All that one teacher noted about some blocks."""

    head: SparseLogits
    stats: TokenStats
    features: PooledFeatures
    draws: TailDraws | None = None


@dataclass(frozen=True)
class HostNotes:
    """What a teacher noted about R rows, on the host and not encoded yet.

    Attributes:
        ids: int64 or int32 [R, K], most probable first; unused entries (top-p) repeat the first.
        logprobs: float32 [R, K]; LOG_ZERO for unused entries.
        draw_ids, draw_logprobs: int and float32 [R, S], in any order.
        entropy, log_tail_mass, gold_logprob: float32 [R].
        log_z: float32 [R, Z].
    """

    ids: AnyArray
    logprobs: Float32
    draw_ids: AnyArray
    draw_logprobs: Float32
    entropy: Float32
    log_tail_mass: Float32
    gold_logprob: Float32
    log_z: Float32
