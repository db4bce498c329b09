"""Block ids → one teacher's notes, checksummed, by direct reads of the Zarr shards.

zarr-python reads the same files but returns fill values for a chunk that is gone, and is about ten
times slower; here a missing chunk raises. Equality with zarr-python is tested.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from storage import manifest
from storage.codec import from_bfloat16
from storage.errors import IncompleteCache
from storage.layout import Layout, shard_name
from storage.shard import Shard
from storage.types import (
    AnyArray,
    Int64,
    PooledFeatures,
    SparseLogits,
    TeacherNotes,
    TokenStats,
)
from storage.writer import open_cache, owners

_OPEN_SHARDS = 256  # file descriptors a reader keeps


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
        self._owners = owners(self.identity, self.layout)
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
            part = self.layout.part_of(block)
            index = block - part * self.layout.blocks_per_part
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
        if manifest.finished(self.root, part, self._owners.of(part)) is None:
            raise IncompleteCache(
                f"part {part} of teacher {self.name!r} is not done", where=self.root,
                todo="run `scholiast cache-teachers`",
            )  # fmt: skip
        self._vouched.add(part)
