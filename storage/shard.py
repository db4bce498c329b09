"""One shard file of a Zarr v3 array, read and written directly.

Layout (Zarr v3 `sharding_indexed`, index at the end): chunks, then (offset, bytes) as little-endian
uint64 pairs in C order of the chunk grid, then the index's crc32c. A chunk is its values by pcodec, then
their crc32c. zarr-python reads the same values, and writes the same bytes but for the order of the chunks
where a block has several; both are tested.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
from pcodec import standalone

from storage.errors import CorruptShard, MissingShard
from storage.layout import ArraySpec, pcodec
from storage.remote import RemotePath, Root, open_object
from storage.types import AnyArray

_MISSING = 2**64 - 1
_HASHED: set[int] = set()
"""What this process has hashed: of each file's device, inode, size, time of change and sha256, 64 bits.
A shard that is opened again after others took its descriptor is not hashed again."""
_MOST_HASHED = 1 << 20  # 60 MB
_RESIDUE = 0x48674BC7
"""The crc32c of any bytes followed by their own crc32c, little-endian."""


class Shard:
    """One shard file: its index, checked once, and its chunks, each checked when read.

    Args:
        path: of the shard.
        part: which it is of, for messages.
        vouched: (bytes, sha256) by its manifest, by which a remote shard is fetched, and a local one
            checked when a process first opens it.

    Raises (on construction):
        MissingShard, CorruptShard
    """

    def __init__(
        self, path: Root, spec: ArraySpec, part: int, vouched: tuple[int, str] = (0, "")
    ) -> None:
        self.path, self.spec = path, spec
        self._todo = (
            "run `scholiast repair` and then `scholiast cache-teachers`: "
            f"part {part} alone is made anew"
        )
        try:
            self._fd = open_object(path, *vouched)
        except FileNotFoundError:
            raise MissingShard("a shard is missing", where=path, todo=self._todo) from None
        if vouched[1] and not isinstance(path, RemotePath):  # what is fetched is checked there
            self._require_bytes(*vouched)
        self._index = self._read_index(spec.chunks_per_shard)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if hasattr(self, "_fd"):
            close(self._fd)  # at exit the module `os` may be gone

    def _require_bytes(self, size: int, sha256: str) -> None:
        """Refuses a sound shard of another part or array: its crc32c hold, wherever it lies."""
        stat = os.fstat(self._fd)
        seen = hash((stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, sha256))
        if seen in _HASHED:
            return
        with open(self._fd, "rb", buffering=0, closefd=False) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256 or stat.st_size != size:
            raise self._corrupt("a shard's sha256 is not the one in its manifest")
        if len(_HASHED) >= _MOST_HASHED:
            _HASHED.clear()
        _HASHED.add(seen)

    def _read_index(self, entries: int) -> list[int]:
        """Returns offset and bytes of each chunk, in turn; all lie before the index."""
        size = 16 * entries + 4
        begin = os.fstat(self._fd).st_size - size
        tail = os.pread(self._fd, size, begin) if begin >= 0 else b""  # nothing is allocated unseen
        if len(tail) != size:
            raise self._corrupt("a shard is shorter than its index")
        self._check(tail, "a shard's index")
        index = np.frombuffer(tail, "<u8", 2 * entries).reshape(-1, 2)
        known = index[index[:, 0] != _MISSING]
        if (known > begin).any() or (known.sum(1) > begin).any():
            raise self._corrupt("a shard's index names bytes that are not there")
        return [int(number) for number in index.reshape(-1)]

    def read_into(self, block: int, out: AnyArray) -> None:
        """Decodes a block's chunks into `out`, C-contiguous, of the array's dtype and inner shape.

        Args:
            block: index within the part.
        """
        per_block = self.spec.chunks_per_block
        rows = out.reshape(per_block, -1)
        for c in range(per_block):
            entry = 2 * (block * per_block + c)
            offset, size = self._index[entry], self._index[entry + 1]
            if offset == _MISSING:
                raise MissingShard(
                    f"chunk {c} of block {block} is missing from a shard",
                    where=self.path, todo=self._todo,
                )  # fmt: skip
            data = os.pread(self._fd, size, offset)
            if len(data) != size:
                raise self._corrupt("a shard ends before its index says")
            self._check(data, f"chunk {c} of block {block}")
            self._decode(data, rows[c])

    def _decode(self, data: bytes, out: AnyArray) -> None:
        try:
            progress = standalone.simple_decompress_into(data, out)  # ends at pcodec's own mark
        except RuntimeError as error:
            raise self._corrupt(f"a chunk cannot be decompressed: {error}") from error
        if progress.n_processed != out.size or not progress.finished:
            raise self._corrupt("a chunk holds another number of values than its shape")

    def _check(self, data: bytes, what: str) -> None:
        if google_crc32c.value(data) != _RESIDUE:
            raise self._corrupt(f"{what} fails its crc32c")

    def _corrupt(self, what: str) -> CorruptShard:
        return CorruptShard(what, where=self.path, todo=self._todo)


def write_shard(path: Path, spec: ArraySpec, data: AnyArray) -> None:
    """Writes a shard of its first blocks, chunk after chunk, and makes it durable.

    Args:
        path: of the shard, which must not exist.
        data: [n, …] of the array's dtype and inner shape; blocks beyond are missing in the shard.

    Raises:
        OSError: as the file system says.
    """
    codec, per_block = pcodec(), spec.chunks_per_block
    index = np.full((spec.chunks_per_shard, 2), _MISSING, "<u8")
    with open(path, "xb") as file:
        for block, values in enumerate(data):
            for c, chunk in enumerate(np.ascontiguousarray(values).reshape(per_block, -1)):
                body = codec.encode(chunk)
                index[block * per_block + c] = file.tell(), len(body) + 4
                file.write(body)
                file.write(_crc32c(body))
        file.write(index.tobytes())
        file.write(_crc32c(index.tobytes()))
        file.flush()
        os.fsync(file.fileno())


def _crc32c(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(4, "little")
