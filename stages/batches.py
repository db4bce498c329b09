"""Blocks joined over the teachers by block id, as batches ready for the student.

Shapes: B blocks, T tokens, R rows with a target, G segments, D hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from stages.common_caches import least_draws, require_alike
from stages.decode import DeviceDecoder, bfloat16
from stages.fusion import FusedTarget, NoteRows, fuse, rows_of
from stages.mixture_em import domain_weights
from stages.options import Pooling, Tail
from stages.target_options import FusionOptions
from stages.weighting import WEIGHTINGS, first_weights, parsed, possible
from storage.blocks import BlockReader
from storage.errors import ConfigError, StaleCache
from storage.layout import feature_name
from storage.reader import CacheReader
from storage.types import Int64, TokenBlocks


@dataclass(frozen=True)
class Batch:
    """What the student's forward needs of some blocks.

    Attributes:
        inputs, positions: int64 [B, T].
        present: bool [B, T], rows that hold a token.
        scored: bool [B, T], rows that have a target: R of them.
        gold: int64 [R].
        domain: int64 [B], index into the corpus's domains.
        target: fused target of the R rows, or None where only gold tokens are wanted.
        features: (teacher, layer) → float32 [B, G, D], pooled as the reader was asked to.
        segment_weights: teacher → fused weight averaged over each segment's scored rows [B, G]
            (0 where a segment has none).
        packed: teacher → arrays as the cache holds them, where they are decoded on the training
            device (BatchReader.ready); else empty.
    """

    inputs: Tensor
    positions: Tensor
    present: Tensor
    scored: Tensor
    gold: Tensor
    domain: Tensor
    target: FusedTarget | None
    features: dict[tuple[str, int], Tensor]
    segment_weights: dict[str, Tensor]
    packed: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """R, rows with a target."""
        return len(self.gold)

    @property
    def segments(self) -> int:
        """Segments with a target, the same for every teacher; 0 where only gold tokens are wanted."""
        if not self.segment_weights:
            return 0
        return count_segments(self.scored, next(iter(self.segment_weights.values())).shape[1])

    @property
    def row_domain(self) -> Tensor:
        """int64 [R], the domain of each row."""
        return self.domain[:, None].expand_as(self.scored)[self.scored]

    @property
    def row_sequence(self) -> Tensor:
        """int64 [R], which piece of a document, counted over the batch, each row lies in."""
        starts = (self.positions == 0).flatten()  # every block begins with one
        return (starts.cumsum(0) - 1).view_as(self.scored)[self.scored]

    def to(self, device: torch.device) -> Batch:
        """Returns the batch on a device."""
        move = {
            name: getattr(self, name).to(device)
            for name in ("inputs", "positions", "present", "scored", "gold", "domain")
        }
        target = self.target
        if target is not None:
            fields = ["ids", "logp", "p", "tail", "weights"]
            fields += ["spent"] if target.spent is not None else []
            target = replace(target, **{n: getattr(target, n).to(device) for n in fields})
        return replace(
            self, **move, target=target,
            features={key: value.to(device) for key, value in self.features.items()},
            segment_weights={key: value.to(device) for key, value in self.segment_weights.items()},
            packed={
                name: {key: value.to(device) for key, value in arrays.items()}
                for name, arrays in self.packed.items()
            },
        )  # fmt: skip


class BatchReader:
    """Joins corpus and caches by block id and fuses the targets.

    Args:
        corpus: the tokenised corpus.
        caches: teacher → cache; empty for gold tokens alone.
        temperature: of the fused target.
        options: how the teachers are weighted.
        on_device: leave the decoding to `ready`, on the training device.
        tail: what stands for the tail; draws where every cache has some, else the bucket, if not given.
        pooled: which features a batch has; the caches must read them.

    Raises (on construction):
        StaleCache: a cache belongs to another corpus.
        ConfigError: a smaller head is to be decoded on the device, draws are wanted of a cache
            without, or an imported cache cannot serve the weights or the temperature.
    """

    def __init__(
        self,
        corpus: BlockReader,
        caches: Mapping[str, CacheReader],
        temperature: float,
        options: FusionOptions,
        on_device: bool = False,
        tail: Tail | None = None,
        pooled: Pooling = "mean",
    ) -> None:
        for name, cache in caches.items():
            if on_device and cache.k != cache.layout.k:
                raise ConfigError(
                    "a smaller head is not decoded on the device", where="fusion.k", found=cache.k,
                    todo="set train.decode: cpu, or leave fusion.k out",
                )  # fmt: skip
            if cache.identity["corpus"] != corpus.info.fingerprint:
                raise StaleCache(
                    f"the cache of teacher {name!r} belongs to another corpus", where=cache.root,
                    expected=corpus.info.fingerprint[:16], found=cache.identity["corpus"][:16],
                    todo="run `scholiast cache-teachers` with another cache_dir",
                )  # fmt: skip
            if tail == "draws" and not cache.layout.draws:
                raise ConfigError(
                    f"the cache of teacher {name!r} holds no draws", where="loss.target",
                    expected="auto, bucket, renormalised or residual", found=tail,
                    todo="choose one of these, or set store.draws and cache again (a capture that was "
                    "imported has none)",
                )  # fmt: skip
            cache.require(
                WEIGHTINGS[parsed(options.weights)[0]].needs, f"fusion.weights: {options.weights}",
                f"set fusion.weights to one of {possible(cache.layout.missing)}",
            )  # fmt: skip
        require_alike(caches, temperature)
        self.corpus, self.caches = corpus, dict(caches)
        self._temperature, self._options = temperature, options
        self._on_device, self._pooled = on_device, pooled
        self._tail: Tail = tail or ("draws" if least_draws(caches) else "bucket")
        self._decoders: dict[str, DeviceDecoder] = {}
        self._fitted: Tensor | None = None

    @property
    def tail(self) -> Tail:
        """What stands for the tail of every teacher."""
        return self._tail

    @property
    def ramp(self) -> float:
        """Share of a training's steps over which the weights move to those that are asked for."""
        return self._options.ramp

    def at(self, temperature: float, tail: Tail) -> BatchReader:
        """Returns a reader of targets at another temperature with another tail; it shares this one's
        open files and what is fitted."""
        self.calibrate()  # for both
        other = copy.copy(self)
        other._temperature, other._tail = temperature, tail
        return other

    def calibrate(self) -> None:
        """Fits the weights that are fitted (em), once; every process that does so finds the same.

        Raises:
            CorpusError: there is nothing to fit them on.
            MissingShard, CorruptShard, IncompleteCache, RemoteError
        """
        if self.caches and self._options.weights == "em" and self._fitted is None:
            fitted = domain_weights(self.corpus, self.caches, self._options.calibration_blocks)
            self._fitted = torch.from_numpy(fitted)

    def ramped(self, batch: Batch, share: float) -> Batch:
        """Returns a batch whose weights are this share of the way from the first to its own.

        (1 − share)·first + share·w, in the target and in the segments; segments without rows keep 0.
        """
        target = batch.target
        if target is None or share >= 1.0:
            return batch
        names = list(batch.segment_weights)
        first = dict(zip(names, first_weights(names, self._options), strict=True))
        begin = target.weights.new_tensor(list(first.values()))[:, None]
        filled = torch.stack(list(batch.segment_weights.values())).sum(0) > 0
        segments = {
            name: share * mine + (1.0 - share) * first[name] * filled
            for name, mine in batch.segment_weights.items()
        }
        weights = share * target.weights + (1.0 - share) * begin
        return replace(batch, target=replace(target, weights=weights), segment_weights=segments)

    def read(self, block_ids: Int64) -> Batch:
        """Returns the batch of these blocks, on the CPU.

        Raises:
            MissingShard, CorruptShard, IncompleteCache, ConfigError
        """
        blocks = self.corpus.read(block_ids)
        batch = gold_batch(blocks, self.corpus.info.domain_of(block_ids))
        return self._with_notes(batch, blocks) if self.caches else batch

    def _with_notes(self, batch: Batch, blocks: TokenBlocks) -> Batch:
        self.calibrate()  # here, where one thread at a time reads, and not in `ready`
        if self._on_device:
            packed = {
                name: {
                    key: torch.from_numpy(a) for key, a in cache.packed(blocks.block_ids).items()
                }
                for name, cache in self.caches.items()
            }
            return replace(batch, packed=packed)
        notes = {name: cache.read(blocks.block_ids) for name, cache in self.caches.items()}
        features = {
            (name, layer): torch.from_numpy(values)
            for name, note in notes.items()
            for layer, values in note.features.pooled(self._pooled).items()
        }
        rows = {name: rows_of(note, blocks.scored) for name, note in notes.items()}
        return self.fused(batch, rows, features)

    def ready(self, batch: Batch, device: torch.device) -> Batch:
        """Returns a batch of `read` on the training device, decoded and fused."""
        batch = batch.to(device)
        if not batch.packed:
            return batch
        for name, cache in self.caches.items():
            if name not in self._decoders:
                self._decoders[name] = DeviceDecoder(cache.layout, cache.orders, device)
        rows = {
            name: self._decoders[name].rows(arrays, batch.scored)
            for name, arrays in batch.packed.items()
        }
        features = {
            (name, layer): bfloat16(arrays[feature_name(self._pooled, layer)])
            for name, arrays in batch.packed.items()
            for layer in self.caches[name].layers
        }
        return replace(self.fused(batch, rows, features), packed={})

    def fused(
        self,
        batch: Batch,
        rows: Mapping[str, NoteRows],
        features: dict[tuple[str, int], Tensor],
    ) -> Batch:
        """Returns a batch with the fused target of the teachers' notes on its rows, on their device.

        Args:
            batch: without a target.
            rows: teacher → notes on the batch's rows; the teachers of this reader, in its order.
            features: as a batch has them.

        Raises:
            ConfigError: the caches cannot serve the temperature or the tail.
        """
        layout = next(iter(self.caches.values())).layout
        segments = next((c.layout.segments for c in self.caches.values() if c.layers), 1)
        target = fuse(
            rows, layout.temperatures, self.corpus.info.vocab_size, self._temperature,
            self._options, self._tail, batch.gold, batch.row_sequence, self._fitted_to(batch),
        )  # fmt: skip
        weights = {
            name: segment_means(row, batch.scored, segments)
            for name, row in zip(rows, target.teacher_weights, strict=True)
        }
        return replace(batch, target=target, features=features, segment_weights=weights)

    def _fitted_to(self, batch: Batch) -> Tensor | None:
        """Returns each row's fitted weights, float32 [M, R]."""
        self.calibrate()
        if self._fitted is None:
            return None
        return self._fitted.to(batch.domain.device, torch.float32).t()[:, batch.row_domain]


def gold_batch(blocks: TokenBlocks, domain_B: Int64) -> Batch:
    """Returns a batch of some blocks without a target: gold tokens alone, on the CPU."""
    scored = blocks.scored
    return Batch(
        inputs=torch.from_numpy(blocks.inputs.astype(np.int64)),
        positions=torch.from_numpy(blocks.positions),
        present=torch.from_numpy(blocks.present),
        scored=torch.from_numpy(scored),
        gold=torch.from_numpy(blocks.gold.astype(np.int64)[scored]),
        domain=torch.from_numpy(domain_B),
        target=None, features={}, segment_weights={},
    )  # fmt: skip


def count_segments(scored_BT: Tensor, segments: int) -> int:
    """Returns how many of the blocks' segments have a row with a target."""
    return int((segment_means(scored_BT[scored_BT], scored_BT, segments) > 0).sum())


def segment_means(values_R: Tensor, scored_BT: Tensor, segments: int) -> Tensor:
    """Returns the mean of a row value over each segment's scored rows, float32 [B, G] (0 if none)."""
    values = values_R.float()
    dense = values.new_zeros(scored_BT.shape).masked_scatter_(scored_BT, values)
    length = scored_BT.shape[1]
    means = []
    for g in range(segments):
        span = slice(g * length // segments, (g + 1) * length // segments)
        means.append(dense[:, span].sum(1) / scored_BT[:, span].sum(1).clamp_min(1))
    return torch.stack(means, 1)
