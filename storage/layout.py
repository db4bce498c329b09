"""One teacher's cache as one Zarr v3 group: names, dtypes, chunks, shards, byte codecs.

Part i owns block range i and therefore exactly one shard of each array. Every inner chunk is
compressed by pcodec (lossless) and carries a crc32c; so does each shard's index.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from storage.checked import typed
from storage.codec import PRESETS, CubeRoot, Preset
from storage.generations import (
    Generation,
    blocks_of,
    blocks_until,
    part_of,
    part_range,
    parts_until,
)
from storage.limits import require_possible
from storage.orders import NEAR, IdOrders
from storage.types import AnyArray

FORMAT = 2
GROUP = "notes.zarr"
POOLINGS = ("mean", "last")
"""What a segment's features may be, in the order in which a layout names them."""
OPTIONAL = ("entropy", "gold_logprob")
"""Statistics that another tool's capture may not tell; every teacher that we run tells them."""


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
        preset: "exact", "balanced" or "compact" (see codec.PRESETS).
        k: K, head entries a token.
        temperatures: the grid of log_z.
        feature_layers: decoder layers (from 1) whose outputs are pooled.
        segments: G, equal spans of a block that are pooled apart.
        hidden_size: D (0 where no layer is pooled).
        draws: S, tail draws a token.
        top_p: a row keeps the fewest of its K entries whose mass reaches this; 1 keeps all.
        seed: of the draws.
        generations: of a corpus that has grown; () is all blocks at one time.
        pooling: which of POOLINGS are stored of each segment, in their order.
        missing: which of OPTIONAL are not stored; of imported caches alone.
        bounds: which of OPTIONAL are lower bounds and not the figures themselves; the same.
    """

    blocks: int
    blocks_per_part: int
    block_length: int
    vocab_size: int
    preset: str
    k: int
    temperatures: tuple[float, ...]
    feature_layers: tuple[int, ...]
    segments: int
    hidden_size: int
    draws: int = 0
    top_p: float = 1.0
    seed: int = 0
    generations: tuple[Generation, ...] = ()
    pooling: tuple[str, ...] = POOLINGS[:1]
    missing: tuple[str, ...] = ()
    bounds: tuple[str, ...] = ()

    @property
    def codecs(self) -> Preset:
        """The codecs of the preset."""
        return PRESETS[self.preset]

    @property
    def draws_tempered(self) -> bool:
        """Whether the draws' logprobs are stored: what temperatures other than 1 need of them."""
        return self.draws > 0 and any(t != 1.0 for t in self.temperatures)

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
        """Returns every array that has a row a block, by name."""
        logprobs, statistic = self.codecs.logprobs.dtype, self.codecs.statistics.dtype
        specs = {
            "head_ids": self._per_token(self.rank_dtype, ("entry", self.k), _chunk_entries(self.k)),
            "head_logprobs": self._per_token(logprobs, ("entry", self.k)),
            "id_class": self._per_token("uint16"),
        }
        if not self.codecs.exact:
            specs["head_floor"] = self._per_token("uint16")
        if self.draws:
            specs["draw_ids"] = self._per_token(self.rank_dtype, ("draw", self.draws))
        if self.draws_tempered:
            specs["draw_logprobs"] = self._per_token(logprobs, ("draw", self.draws))
        for name in ("entropy", "log_tail_mass", "gold_logprob"):
            if name not in self.missing:
                specs[name] = self._per_token(statistic)
        if self.temperatures:
            specs["log_z"] = self._per_token(statistic, ("temperature", len(self.temperatures)))
        if self.feature_layers:
            specs["feature_count"] = self._spec("int32", (self.segments,), ("segment",))
        for name in self.feature_names():
            specs[name] = self._spec(
                "uint16", (self.segments, self.hidden_size), ("segment", "hidden")
            )
        return specs

    def feature_names(self) -> dict[str, tuple[str, int]]:
        """Returns the arrays of pooled features: name → (pooling, layer)."""
        return {
            feature_name(pooling, layer): (pooling, layer)
            for pooling in self.pooling
            for layer in self.feature_layers
        }

    @property
    def rank_dtype(self) -> str:
        """The integer type that holds any rank of an id (see orders.py)."""
        return "uint16" if min(NEAR, self.vocab_size) + self.vocab_size <= 1 << 16 else "uint32"

    def _per_token(
        self, dtype: str, first: tuple[str, int] | None = None, entries: int = 0
    ) -> ArraySpec:
        if first is None:
            return self._spec(dtype, (self.block_length,), ("token",))
        name, count = first
        return self._spec(
            dtype,
            (count, self.block_length),
            (name, "token"),
            (entries or count, self.block_length),
        )

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
        """Returns JSON values. What older caches could not say goes unsaid where it is as with them."""
        fields = asdict(self)
        usual = {"pooling": POOLINGS[:1], "missing": (), "bounds": ()}
        return {k: v for k, v in fields.items() if k not in usual or v != usual[k]}

    @classmethod
    def from_dict(cls, value: Any) -> Layout:
        """Returns the layout that JSON values state.

        Raises:
            ValueError: they state none that could be, by type or by size.
        """
        layout = typed(cls, value)
        if not layout.pooling or layout.pooling != tuple(
            p for p in POOLINGS if p in layout.pooling
        ):
            raise ValueError(f"pooling {list(layout.pooling)[:8]}")
        require_possible(layout)
        return layout


def feature_name(pooling: str, layer: int) -> str:
    """Returns the array of one layer's features, pooled in one way."""
    return f"feature_{layer}" if pooling == "mean" else f"feature_{pooling}_{layer}"


def _chunk_entries(k: int) -> int:
    """Returns how many head entries share a chunk: the largest divisor of K up to 16, or up to K/8.

    Gaps between ids grow from entry to entry, so a chunk of few entries compresses better (3.3 B a
    token at K = 64) until its own header outweighs that.
    """
    limit = max(16, k // 8)
    best = max(d for d in range(1, limit + 1) if k % d == 0)
    return best if best >= min(8, k) else k


def create_group(path: Any, layout: Layout, orders: IdOrders) -> None:
    """Creates the group at a path or Zarr store: the orders of ids, the metadata of all other arrays."""
    import zarr
    from zarr.codecs import Crc32cCodec

    with quiet_zarr():
        group = zarr.create_group(path, zarr_format=3)
        group.attrs.update({"scholiast": {"format": FORMAT, "layout": layout.to_dict()}})
        for name, spec in layout.arrays().items():
            group.create_array(
                name, shape=spec.shape, shards=spec.shard, chunks=spec.chunk, dtype=spec.dtype,
                serializer=_serializer(), compressors=[Crc32cCodec()], fill_value=0,
                dimension_names=spec.dimensions,
            )  # fmt: skip
        for name, values, names in _tables(layout, orders):
            array = group.create_array(
                name, shape=values.shape, chunks=values.shape, dtype=values.dtype,
                serializer=_serializer(delta_spec="auto"), compressors=[Crc32cCodec()], fill_value=0,
                dimension_names=names, config={"write_empty_chunks": True},
            )  # fmt: skip
            array[...] = values


_PCODEC = {"level": 8, "mode_spec": "classic", "delta_spec": "none"}
"""The byte codec. The large arrays hold neither deltas nor multiples: not looking for them writes faster,
to the same bytes."""


def pcodec() -> Any:
    """Returns the byte codec of the arrays as numcodecs has it."""
    from numcodecs.pcodec import PCodec

    return PCodec(**_PCODEC)


def _serializer(**other: Any) -> Any:
    """Returns the byte codec as Zarr has it."""
    from zarr.codecs.numcodecs import PCodec

    return PCodec(**{**_PCODEC, **other})


def _tables(layout: Layout, orders: IdOrders) -> list[tuple[str, AnyArray, tuple[str, ...]]]:
    """Returns the arrays that belong to the whole cache: name, values, dimensions."""
    dtype = "uint16" if layout.vocab_size <= 1 << 16 else "uint32"
    tables: list[tuple[str, AnyArray, tuple[str, ...]]] = [
        ("near_ids", orders.near.astype(dtype), ("class", "rank")),
        ("far_ids", orders.far.astype(dtype), ("rank",)),
    ]
    if isinstance(layout.codecs.logprobs, CubeRoot):
        tables.append(("logprob_levels", layout.codecs.logprobs.levels, ("level",)))
    return tables


def order_names() -> list[str]:
    """Returns the files that hold the orders of ids, relative to the cache folder."""
    return [f"{GROUP}/near_ids/c/0/0", f"{GROUP}/far_ids/c/0"]


def shard_name(array: str, part: int, dimensions: int) -> str:
    """Returns a shard's file, relative to the cache folder."""
    return "/".join([GROUP, array, "c", str(part), *["0"] * (dimensions - 1)])


class quiet_zarr(warnings.catch_warnings):
    """Silences one warning: that numcodecs' pcodec is not (yet) in the Zarr v3 specification."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr")
