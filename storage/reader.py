"""Block ids → one teacher's notes, checksummed, by direct reads of the Zarr shards.

zarr-python reads the same files but returns fill values for a chunk that is gone, and is about ten
times slower; here a missing chunk raises. Equality with zarr-python is tested.
"""

from __future__ import annotations

import contextlib
import os
import resource
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from storage import manifest
from storage.codec import from_bfloat16
from storage.errors import ConfigError, CorruptShard, IncompleteCache
from storage.inside import require_inside
from storage.layout import Layout, shard_name
from storage.lookup import empty
from storage.manifest import Manifest
from storage.notes import STATISTICS, NotesDecoder
from storage.remote import RemotePath, Root
from storage.shard import Shard
from storage.tables import digest, load_orders
from storage.types import (
    LOG_ZERO,
    AnyArray,
    Int64,
    PooledFeatures,
    SparseLogits,
    TeacherNotes,
    TokenStats,
)
from storage.writer import open_cache, owners

_LEAST_OPEN, _MOST_OPEN = 16, 1 << 16  # shards of a reader, descriptors of a process
_BOUND = {"entropy": ", or import again with --entropy lower-bound"}
_MANIFESTS = 4096  # that it remembers: a few kB each


class CacheReader:
    """Random access to one teacher's complete cache by block id.

    Args:
        root: the teacher's cache folder, also a remote one.
        name: the teacher's name, for messages.
        k: how many of the head's entries are wanted, the most probable ones; all by default.
        layers: which layers' features are wanted; all by default.
        pooled: pooled in which ways (layout.POOLINGS); in all that are stored by default.

    Attributes:
        identity, layout: of the cache.
        k, layers, pooled: what `read` gives.
        orders: of the cache's ids.

    Raises (on construction):
        IncompleteCache: no cache.
        ConfigError: more entries, other layers or poolings than the cache holds, or fewer entries of a
            cache with draws, which stand for the tail of its own head.
        MissingShard, CorruptShard: its orders of ids are damaged.
    """

    def __init__(
        self,
        root: Root,
        name: str = "",
        k: int | None = None,
        layers: Sequence[int] | None = None,
        pooled: Sequence[str] | None = None,
    ) -> None:
        opened = open_cache(root)
        if opened is None:
            raise IncompleteCache(
                f"teacher {name!r} has no cache", where=root, todo="run `scholiast cache-teachers`"
            )
        self.root, self.name = root, name
        self.identity: dict[str, Any] = opened[0]
        self.layout: Layout = opened[1]
        self._owners = owners(self.identity, self.layout)
        self._specs = self.layout.arrays()
        self.k, self.layers = _wanted(root, self.layout, k, layers)
        self.pooled = _pooled(root, self.layout, self.layers, pooled)
        unwanted = {
            name
            for name, (pooling, layer) in self.layout.feature_names().items()
            if pooling not in self.pooled or layer not in self.layers
        }
        self._wanted = [name for name in self._specs if name not in unwanted]
        self.orders = load_orders(root, self.layout)
        self._decoder = NotesDecoder(self.layout, self.orders)
        self._orders = digest(self.orders)
        self._vouched: OrderedDict[int, Manifest] = OrderedDict()
        self._shards: OrderedDict[tuple[str, int], Shard] = OrderedDict()
        self._pid = os.getpid()
        _READERS.add(self)

    def require(self, statistic: str, where: str, todo: str) -> None:
        """Refuses a cache that does not hold a statistic: an imported one may lack some.

        Args:
            statistic: one of layout.OPTIONAL, or "".
            where, todo: of the message: what needs it, and what is possible.

        Raises:
            ConfigError
        """
        if statistic in self.layout.missing:
            raise ConfigError(
                f"the imported cache of teacher {self.name!r} does not hold {statistic}", where=where,
                found=f"missing: {', '.join(self.layout.missing)}",
                todo=todo + _BOUND.get(statistic, ""),
            )  # fmt: skip

    def array(self, name: str, block_ids: Int64) -> AnyArray:
        """Returns one array's blocks as stored (encoded), [n, …], in the order asked for.

        Raises:
            IncompleteCache: a block's part is not done.
            MissingShard, CorruptShard: its bytes are not those that were written.
        """
        spec, blocks = self._specs[name], block_ids.tolist()
        if blocks:  # a shard as long as its index is there before memory is asked for
            self._shard(name, self.layout.part_of(blocks[0]))
        out = empty((len(blocks), *spec.shape[1:]), spec.dtype)
        for row, block in enumerate(blocks):
            part = self.layout.part_of(block)
            index = block - part * self.layout.blocks_per_part
            self._shard(name, part).read_into(index, out[row])
        return out

    def read(self, block_ids: Int64) -> TeacherNotes:
        """Returns the teacher's notes on the blocks, decoded, in the order asked for.

        The arrays of the result are [n, T, …] views of [n, …, T]. Open files are remembered: one thread
        at a time.

        Raises:
            IncompleteCache, MissingShard, CorruptShard
        """
        layout, packed = self.layout, self.packed(block_ids)
        with self._decoding():
            head, stats = self._decoder.head(packed), self._decoder.stats(packed)
            draws = self._decoder.draws(packed) if layout.draws else None
        features = PooledFeatures(packed["feature_count"], {})
        for name, (pooling, layer) in layout.feature_names().items():
            if name in packed:
                features.pooled(pooling)[layer] = from_bfloat16(packed[name])
        notes = TeacherNotes(head, stats, features, draws)
        return notes if self.k == layout.k else smaller_head(notes, self.k)

    def stats(self, block_ids: Int64) -> TokenStats:
        """Returns the statistics alone."""
        names = [name for name in STATISTICS if name in self._specs]
        stored = {name: self.array(name, block_ids) for name in names}
        with self._decoding():
            return self._decoder.stats(stored)

    @contextlib.contextmanager
    def _decoding(self) -> Iterator[None]:
        try:
            yield
        except IndexError as error:
            raise CorruptShard(
                f"notes of teacher {self.name!r} were written wrong", where=self.root,
                expected="ranks and levels that exist", found=error,
                todo="run `scholiast verify --deep`",
            ) from error  # fmt: skip

    def packed(self, block_ids: Int64) -> dict[str, AnyArray]:
        """Returns every array's blocks as stored, [n, …]: what `NotesDecoder` makes notes of."""
        arrays = {name: self.array(name, block_ids) for name in self._wanted}
        arrays.setdefault("feature_count", np.empty((len(block_ids), 0), np.int32))
        return arrays

    def _shard(self, name: str, part: int) -> Shard:
        if self._pid != os.getpid():  # a forked worker opens its own files
            self._pid = os.getpid()
            self._shards.clear()
        key = (name, part)
        if key in self._shards:
            self._shards.move_to_end(key)
            return self._shards[key]
        spec = self._specs[name]
        path = shard_name(name, part, len(spec.shape))
        vouched = self._part(part)
        if path not in vouched.objects:
            raise self._wrong_part(part, f"{path} in its manifest", "no such file")
        require_inside(self.root, path)
        shard = Shard(self.root / path, spec, part, vouched.objects[path])
        self._shards[key] = shard
        while len(self._shards) > max_open():
            self._shards.popitem(last=False)
        return shard

    def fetch(self, part: int) -> int:
        """Brings a part's wanted shards into the local cache (any thread may); returns their bytes.

        Raises:
            IncompleteCache, MissingShard, CorruptShard, RemoteError
        """
        total, vouched = 0, self._require_part(part)
        for name in self._wanted:
            path = shard_name(name, part, len(self._specs[name].shape))
            if path not in vouched.objects:
                raise self._wrong_part(part, f"{path} in its manifest", "no such file")
            size, digest = vouched.objects[path]
            remote = self.root / path
            if isinstance(remote, RemotePath):
                remote.fetch(size, digest)
            total += size
        return total

    def _part(self, part: int) -> Manifest:
        if part not in self._vouched:
            self._vouched[part] = self._require_part(part)
            if len(self._vouched) > _MANIFESTS:
                self._vouched.popitem(last=False)
        return self._vouched[part]

    def _require_part(self, part: int) -> Manifest:
        vouched = manifest.finished(self.root, part, self._owners.of(part))
        if vouched is None:
            raise IncompleteCache(
                f"part {part} of teacher {self.name!r} is not done", where=self.root,
                todo="run `scholiast cache-teachers`",
            )  # fmt: skip
        first, last = self.layout.part_range(part)
        if (vouched.first_block, vouched.blocks) != (first, last - first):
            stated = f"{vouched.blocks} blocks from {vouched.first_block}"
            raise self._wrong_part(part, f"{last - first} blocks from {first}", stated)
        if vouched.carry.get("orders") != self._orders:
            raise CorruptShard(
                f"part {part} of teacher {self.name!r} was written with other orders of ids",
                where=self.root, expected=str(vouched.carry.get("orders"))[:16],
                found=self._orders[:16], todo="run `scholiast repair`",
            )  # fmt: skip
        return vouched

    def _wrong_part(self, part: int, expected: str, found: str) -> CorruptShard:
        return CorruptShard(
            f"the manifest of part {part} of teacher {self.name!r} is of another part",
            where=manifest.path_of(self.root, part, self._owners.of(part)), expected=expected,
            found=found, todo="run `scholiast repair`",
        )  # fmt: skip


_READERS: weakref.WeakSet[CacheReader] = weakref.WeakSet()


def max_open() -> int:
    """Returns how many shards a reader keeps open: its share of half of the process's descriptors."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(_LEAST_OPEN, min(allowed, _MOST_OPEN) // 2 // max(1, len(_READERS)))


def _wanted(
    root: Root, layout: Layout, k: int | None, layers: Sequence[int] | None
) -> tuple[int, tuple[int, ...]]:
    if k is not None and (not 1 <= k <= layout.k or (k < layout.k and layout.draws)):
        raise ConfigError(
            "the cache cannot serve this many head entries" + (
                ": its draws stand for what is outside all that are stored" if layout.draws else ""
            ),
            where=root, expected=f"k = {layout.k}" if layout.draws else f"1 to {layout.k}", found=k,
            todo="leave k (fusion.k) out, or cache again with another store.k" + (
                ", or with store.preset: balanced, whose caches have no draws and serve any fewer"
                if layout.draws else ""
            ),
        )  # fmt: skip
    if layers is not None and not set(layers) <= set(layout.feature_layers):
        raise ConfigError(
            "the cache does not hold these layers", where=root,
            expected=f"some of {list(layout.feature_layers)}", found=list(layers),
            todo="choose layers that are cached, or cache again with other feature_layers",
        )  # fmt: skip
    return k or layout.k, layout.feature_layers if layers is None else tuple(layers)


def _pooled(
    root: Root, layout: Layout, layers: Sequence[int], pooled: Sequence[str] | None
) -> tuple[str, ...]:
    if pooled is None:
        return layout.pooling
    if layers and not set(pooled) <= set(layout.pooling):
        raise ConfigError(
            "the cache does not hold features pooled in this way", where=root,
            expected=f"some of {list(layout.pooling)}", found=list(pooled),
            todo="choose what is cached, or cache again with another store.pooling",
        )  # fmt: skip
    return tuple(pooled)


def smaller_head(notes: TeacherNotes, k: int) -> TeacherNotes:
    """Returns the notes with only the k most probable entries; the tail takes the others' mass."""
    ids, logprobs = notes.head.ids, notes.head.logprobs
    order = np.argpartition(-logprobs, k - 1, axis=-1)
    kept = np.take_along_axis(logprobs, order[..., :k], -1)
    dropped = np.exp(np.take_along_axis(logprobs, order[..., k:], -1)).sum(-1)
    mass = np.exp(notes.stats.log_tail_mass) + dropped
    tail = np.where(mass > 0, np.log(np.maximum(mass, np.float32(1e-38))), np.float32(LOG_ZERO))
    head = SparseLogits(np.take_along_axis(ids, order[..., :k], -1), kept)
    return replace(
        notes,
        head=head,
        stats=replace(notes.stats, log_tail_mass=np.minimum(tail, 0).astype(np.float32)),
    )
