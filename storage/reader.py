"""Block ids → one teacher's notes, checksummed, by direct reads of the Zarr shards.

zarr-python reads the same files but returns fill values for a chunk that is gone, and is about ten
times slower; here a missing chunk raises. Equality with zarr-python is tested.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from pcodec import standalone

from storage import manifest
from storage.codec import from_bfloat16
from storage.errors import CorruptShard, IncompleteCache, MissingShard
from storage.fingerprint import fingerprint
from storage.layout import ArraySpec, Layout, shard_name
from storage.types import (
    AnyArray,
    Int64,
    PooledFeatures,
    SparseLogits,
    TeacherNotes,
    TokenStats,
)
from storage.writer import open_cache

_OPEN_SHARDS = 256  # file descriptors a reader keeps
_MISSING = np.uint64(2**64 - 1)


class Shard:
    """One shard file: its index, checked once, and its chunks, each checked when read.

    Layout (Zarr v3 `sharding_indexed`, index at the end): chunks, then (offset, bytes) as
    little-endian uint64 pairs in C order of the chunk grid, then the index's crc32c.

    Raises (on construction):
        MissingShard, CorruptShard
    """

    def __init__(self, path: Path, spec: ArraySpec, part: int) -> None:
        self.path, self.spec = path, spec
        self._todo = (
            f"delete manifests/{part:06d}.json of this cache and run `scholiast cache-teachers` "
            "again: that part alone is made anew"
        )
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise MissingShard("a shard is missing", where=path, todo=self._todo) from None
        entries = spec.chunks_per_shard
        size = 16 * entries + 4
        tail = os.pread(self._fd, size, max(0, os.fstat(self._fd).st_size - size))
        if len(tail) != size:
            raise self._corrupt("a shard is shorter than its index")
        self._index = np.frombuffer(self._checked(tail, "a shard's index"), "<u8").reshape(-1, 2)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def read_into(self, block: int, out: AnyArray) -> None:
        """Decodes a block's chunks into `out`, C-contiguous, of the array's dtype and inner shape.

        Args:
            block: index within the part.
        """
        per_block = self.spec.chunks_per_block
        rows = out.reshape(per_block, -1)
        for c in range(per_block):
            offset, size = self._index[block * per_block + c]
            if offset == _MISSING:
                raise MissingShard(
                    f"chunk {c} of block {block} is missing from a shard",
                    where=self.path, todo=self._todo,
                )  # fmt: skip
            data = os.pread(self._fd, int(size), int(offset))
            if len(data) != size:
                raise self._corrupt("a shard ends before its index says")
            self._decode(self._checked(data, f"chunk {c} of block {block}"), rows[c])

    def _decode(self, data: bytes, out: AnyArray) -> None:
        progress = standalone.simple_decompress_into(data, out)
        if progress.n_processed != out.size:
            raise self._corrupt("a chunk holds fewer values than its shape")

    def _checked(self, data: bytes, what: str) -> bytes:
        body, stored = data[:-4], int.from_bytes(data[-4:], "little")
        if google_crc32c.value(body) != stored:
            raise self._corrupt(f"{what} fails its crc32c")
        return body

    def _corrupt(self, what: str) -> CorruptShard:
        return CorruptShard(what, where=self.path, todo=self._todo)


class CacheReader:
    """Random access to one teacher's complete cache by block id.

    Args:
        root: the teacher's cache folder.
        name: the teacher's name, for messages.

    Raises (on construction):
        IncompleteCache: no cache, or parts of it are not done.
    """

    def __init__(self, root: Path, name: str = "") -> None:
        opened = open_cache(root)
        if opened is None:
            raise IncompleteCache(
                f"teacher {name!r} has no cache", where=root, todo="run `scholiast cache-teachers`"
            )
        self.root, self.name = root, name
        self.identity: dict[str, Any] = opened[0]
        self.layout: Layout = opened[1]
        self._fingerprint = fingerprint(self.identity)
        self._specs = self.layout.arrays()
        self._vouched: set[int] = set()
        self._shards: OrderedDict[tuple[str, int], Shard] = OrderedDict()

    def array(self, name: str, block_ids: Int64) -> AnyArray:
        """Returns one array's blocks as stored (encoded), [n, …], in the order asked for.

        Raises:
            IncompleteCache: a block's part is not done.
            MissingShard, CorruptShard: its bytes are not those that were written.
        """
        spec = self._specs[name]
        out = np.empty((len(block_ids), *spec.shape[1:]), spec.dtype)
        for row, block in enumerate(block_ids.tolist()):
            if not 0 <= block < self.layout.blocks:
                raise IndexError(f"block ids must lie in [0, {self.layout.blocks})")
            part, index = divmod(block, self.layout.blocks_per_part)
            self._shard(name, part).read_into(index, out[row])
        return out

    def read(self, block_ids: Int64) -> TeacherNotes:
        """Returns the teacher's notes on the blocks, decoded, in the order asked for."""
        layout = self.layout
        take: Callable[[str], Any] = lambda name: self.array(name, block_ids)  # noqa: E731
        shape = (len(block_ids), layout.block_length, 0)
        return TeacherNotes(
            SparseLogits(
                take("head_ids").astype(np.int32),
                layout.logprob_codec.decode(take("head_logprobs")),
            ),
            TokenStats(
                take("entropy"), take("log_tail_mass"), take("gold_logprob"),
                take("log_z") if layout.temperatures else np.empty(shape, np.float32),
            ),
            PooledFeatures(
                take("feature_count") if layout.feature_layers else np.empty((*shape[:1], 0), np.int32),
                {n: from_bfloat16(take(f"feature_{n}")) for n in layout.feature_layers},
            ),
        )  # fmt: skip

    def _shard(self, name: str, part: int) -> Shard:
        key = (name, part)
        if key in self._shards:
            self._shards.move_to_end(key)
            return self._shards[key]
        self._require_part(part)
        spec = self._specs[name]
        shard = Shard(self.root / shard_name(name, part, len(spec.shape)), spec, part)
        self._shards[key] = shard
        if len(self._shards) > _OPEN_SHARDS:
            self._shards.popitem(last=False)
        return shard

    def _require_part(self, part: int) -> None:
        if part in self._vouched:
            return
        if manifest.finished(self.root, part, self._fingerprint) is None:
            raise IncompleteCache(
                f"part {part} of teacher {self.name!r} is not done", where=self.root,
                todo="run `scholiast cache-teachers`",
            )  # fmt: skip
        self._vouched.add(part)
