"""One teacher's cache as one Zarr v3 group: names, dtypes, chunks, shards, byte codecs.

Part i owns block range i and therefore exactly one shard of each array. Every inner chunk is
compressed by pcodec (lossless) and carries a crc32c; so does each shard's index.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from storage.codec import LOGPROB_CODECS, LogprobCodec
from storage.generations import (
    Generation,
    blocks_of,
    blocks_until,
    part_of,
    part_range,
    parts_until,
)

FORMAT = 1
GROUP = "notes.zarr"
PCODEC_LEVEL = 8


@dataclass(frozen=True)
class ArraySpec:
    """One array of the group; shapes count blocks in the first dimension."""

    dtype: str
    shape: tuple[int, ...]
    shard: tuple[int, ...]
    chunk: tuple[int, ...]
    dimensions: tuple[str, ...]

    @property
    def chunks_per_block(self) -> int:
        return self.shape[1] // self.chunk[1] if len(self.shape) > 1 else 1

    @property
    def chunks_per_shard(self) -> int:
        return self.shard[0] * self.chunks_per_block


@dataclass(frozen=True)
class Layout:
    """What one teacher's cache stores, and how it is cut.

    Attributes:
        blocks, blocks_per_part, block_length: how many blocks there are, the width of a part, T.
        vocab_size: V, the tokenizer's ids; a model's padding rows beyond it are left out of the
            softmax.
        k: K, head entries a token.
        precision: "exact" or "balanced" (see codec.LOGPROB_CODECS).
        temperatures: the grid of log_z.
        feature_layers: decoder layers (from 1) whose outputs are pooled.
        segments: G, equal spans of a block that are pooled apart.
        hidden_size: D (0 where no layer is pooled).
        generations: of a corpus that has grown; () is all blocks at one time.
    """

    blocks: int
    blocks_per_part: int
    block_length: int
    vocab_size: int
    k: int
    precision: str
    temperatures: tuple[float, ...]
    feature_layers: tuple[int, ...]
    segments: int
    hidden_size: int
    generations: tuple[Generation, ...] = ()

    @cached_property
    def _spans(self) -> tuple[Generation, ...]:
        return self.generations or (Generation(0, self.blocks, ""),)

    @property
    def parts(self) -> int:
        return parts_until(self._spans, self.blocks_per_part)

    def until(self, generations: int) -> Layout:
        """Returns the layout as it was with the first so many generations."""
        kept = self._spans[:generations]
        blocks = sum(g.blocks for g in kept)
        return replace(self, blocks=blocks, generations=kept if len(kept) > 1 else ())

    @property
    def logprob_codec(self) -> LogprobCodec:
        return LOGPROB_CODECS[self.precision]

    def part_range(self, part: int) -> tuple[int, int]:
        """Returns (first block, one past the last block) of a part."""
        return part_range(self._spans, self.blocks_per_part, part)

    def part_of(self, block: int) -> int:
        """Returns the part that holds a block.

        Raises:
            IndexError: there is no such block.
        """
        return part_of(self._spans, self.blocks_per_part, block)

    def blocks_of(self, parts: Sequence[int]) -> int:
        """Returns how many blocks some distinct parts hold together."""
        return blocks_of(self._spans, self.blocks_per_part, parts)

    def arrays(self) -> dict[str, ArraySpec]:
        """Returns every array of the group by name."""
        ids = "uint16" if self.vocab_size <= 1 << 16 else "uint32"
        specs = {
            "head_ids": self._per_token(ids, ("rank", self.k)),
            "head_logprobs": self._per_token(self.logprob_codec.dtype, ("rank", self.k)),
            "entropy": self._per_token("float32"),
            "log_tail_mass": self._per_token("float32"),
            "gold_logprob": self._per_token("float32"),
        }
        if self.temperatures:
            specs["log_z"] = self._per_token("float32", ("temperature", len(self.temperatures)))
        if self.feature_layers:
            specs["feature_count"] = self._spec("int32", (self.segments,), ("segment",))
        for layer in self.feature_layers:
            specs[f"feature_{layer}"] = self._spec(
                "uint16", (self.segments, self.hidden_size), ("segment", "hidden")
            )
        return specs

    def _per_token(self, dtype: str, last: tuple[str, int] | None = None) -> ArraySpec:
        tail = (last[1],) if last else ()
        names = ("token", last[0]) if last else ("token",)
        chunk = _chunk_tokens(self.block_length) if tail and tail[0] > 8 else self.block_length
        return self._spec(dtype, (self.block_length, *tail), names, (chunk, *tail))

    def _spec(
        self,
        dtype: str,
        inner: tuple[int, ...],
        names: tuple[str, ...],
        chunk: tuple[int, ...] | None = None,
    ) -> ArraySpec:
        end = blocks_until(self._spans, self.blocks_per_part)
        return ArraySpec(
            dtype, (end, *inner), (self.blocks_per_part, *inner), (1, *(chunk or inner)),
            ("block", *names),
        )  # fmt: skip

    def bytes_per_token_raw(self) -> float:
        """Returns the bytes a token takes before compression: an upper bound for planning."""
        total = sum(
            np.dtype(spec.dtype).itemsize * int(np.prod(spec.shape[1:], dtype=np.int64))
            for spec in self.arrays().values()
        )
        return total / self.block_length

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Layout:
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in value.items()
        }
        fields["generations"] = tuple(Generation(**g) for g in value["generations"])
        return cls(**fields)


def _chunk_tokens(block_length: int) -> int:
    """Inner chunks of 128–256 tokens where T allows; size hardly changes the ratio."""
    for size in range(min(256, block_length), 63, -1):
        if block_length % size == 0:
            return size
    return block_length


def create_group(path: Path, layout: Layout) -> None:
    """Creates the group's metadata, with empty arrays, at `path`."""
    import zarr
    from zarr.codecs import Crc32cCodec
    from zarr.codecs.numcodecs import PCodec

    with quiet_zarr():
        group = zarr.create_group(path, zarr_format=3)
        group.attrs.update({"scholiast": {"format": FORMAT, "layout": layout.to_dict()}})
        for name, spec in layout.arrays().items():
            group.create_array(
                name, shape=spec.shape, shards=spec.shard, chunks=spec.chunk, dtype=spec.dtype,
                serializer=PCodec(level=PCODEC_LEVEL), compressors=[Crc32cCodec()], fill_value=0,
                dimension_names=spec.dimensions,
            )  # fmt: skip


def shard_name(array: str, part: int, dimensions: int) -> str:
    """Returns a shard's file, relative to the cache folder."""
    return "/".join([GROUP, array, "c", str(part), *["0"] * (dimensions - 1)])


class quiet_zarr(warnings.catch_warnings):
    """Silences one warning: that numcodecs' pcodec is not (yet) in the Zarr v3 specification."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr")
