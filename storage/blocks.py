"""The tokenised corpus: Arrow parts, random access by block id.

`corpus.json` is the commit of the whole; each part has a manifest of its own (see manifest.py).
A part is one zstd-compressed Arrow IPC file with a row a block. Arrow does not notice a flipped
byte, so a part's sha256 is checked when a process first opens it.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from storage import durable, manifest
from storage.corpus_info import CorpusInfo, load_info
from storage.errors import (
    CorpusError,
    CorruptShard,
    IncompleteCache,
    MissingShard,
    unreadable,
)
from storage.fingerprint import bytes_sha256
from storage.generations import part_of
from storage.inside import require_inside
from storage.record_batch import require_sizes
from storage.remote import RemotePath, Root, open_object
from storage.types import Int64, TokenBlocks

_OPEN_PARTS = 64  # decoded parts a reader keeps; a part is some hundred kB to a few MB


def object_name(part: int) -> str:
    """Returns a part's file, relative to the corpus folder."""
    return f"blocks/{part:06d}.arrow"


def content_digest(blocks: TokenBlocks) -> str:
    """Returns the sha256 of the logical content, whatever file format carries it."""
    digest = hashlib.sha256()
    for array in (blocks.tokens, blocks.document, blocks.offset, blocks.loss_mask):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def write_part(
    root: Path, identity_fingerprint: str, part: int, blocks: TokenBlocks, carry: dict[str, Any]
) -> None:
    """Writes and commits one part.

    Args:
        carry: what the packer needs to go on after this part; kept in the manifest.

    Raises:
        DiskFull: nothing is committed.
    """
    columns = {"block_id": pa.array(blocks.block_ids)}
    for name in ("tokens", "document", "offset", "loss_mask"):
        array = getattr(blocks, name)
        columns[name] = pa.FixedSizeListArray.from_arrays(
            pa.array(np.ascontiguousarray(array).reshape(-1)), array.shape[1]
        )
    batch = pa.record_batch(columns)
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch)
    data = sink.getvalue()
    name = object_name(part)
    durable.write_bytes(root / name, data)
    manifest.save(
        root,
        manifest.Manifest(
            fingerprint=identity_fingerprint, part=part, first_block=int(blocks.block_ids[0]),
            blocks=len(blocks.block_ids), objects={name: (len(data), bytes_sha256(data))},
            carry=carry,
        ),
    )  # fmt: skip


class BlockReader:
    """Random access to a complete corpus by block id; every part is checked when first opened.

    Raises (on construction):
        IncompleteCache: the corpus is not complete.
    """

    def __init__(self, root: Root) -> None:
        info = load_info(root)
        if info is None:
            raise IncompleteCache(
                "the corpus has not been prepared", where=root, todo="run `scholiast prepare`"
            )
        self.root, self.info = root, info
        self._open: OrderedDict[int, TokenBlocks] = OrderedDict()

    def read(self, block_ids: Int64 | Sequence[int]) -> TokenBlocks:
        """Returns the blocks in the order asked for.

        Raises:
            MissingShard, CorruptShard: a part's bytes are not those that were written.
            IndexError: no such block.
        """
        ids = np.asarray(block_ids, np.int64)
        rows = []
        for block in ids.tolist():
            part = part_of(self.info.generations, self.info.blocks_per_part, block)
            rows.append((self._part(part), block - part * self.info.blocks_per_part))
        if not rows:
            empty = np.empty((0, self.info.block_length + 1), np.int64)
            return TokenBlocks(ids, empty.astype(np.int32), empty, empty, empty.astype(bool))
        return TokenBlocks(
            ids,
            np.stack([blocks.tokens[i] for blocks, i in rows]),
            np.stack([blocks.document[i] for blocks, i in rows]),
            np.stack([blocks.offset[i] for blocks, i in rows]),
            np.stack([blocks.loss_mask[i] for blocks, i in rows]),
        )

    def part(self, part: int) -> TokenBlocks:
        """Returns all blocks of one part."""
        return self._part(part)

    def fetch(self, part: int) -> int:
        """Brings a remote part's file into the local cache (any thread may); returns its bytes.

        Raises:
            MissingShard, CorruptShard, RemoteError
        """
        vouched = manifest.load(self.root, part, self.info.owners.of(part))
        size, digest = vouched.objects.get(object_name(part), (0, "")) if vouched else (0, "")
        remote = self.root / object_name(part)
        if digest and isinstance(remote, RemotePath):
            remote.fetch(size, digest)
        return size

    def _part(self, part: int) -> TokenBlocks:
        if part in self._open:
            self._open.move_to_end(part)
            return self._open[part]
        blocks = _read_part(self.root, part, self.info)
        self._open[part] = blocks
        if len(self._open) > _OPEN_PARTS:
            self._open.popitem(last=False)
        return blocks


def require_targets(reader: BlockReader, ranges: Sequence[tuple[int, int]]) -> None:
    """Refuses blocks of which no row is scored; reads until one is, mostly in the first.

    Args:
        ranges: (first block, how many).

    Raises:
        CorpusError: nothing could be learned from them.
    """
    for first, count in ranges:
        for block in range(first, first + count):
            if reader.read([block]).scored.any():
                return
    raise CorpusError(
        "no row of the training blocks has a target", where="corpus.sources",
        todo="give documents of two tokens or more, and chats with a message to be learned",
    )  # fmt: skip


def _read_part(root: Root, part: int, info: CorpusInfo) -> TokenBlocks:
    name = object_name(part)
    path, owner = root / name, info.owners.of(part)
    vouched = manifest.load(root, part, owner)
    missing = MissingShard(
        "a part of the corpus is missing", where=path,
        todo="run `scholiast repair` and then `scholiast prepare`",
    )  # fmt: skip
    if vouched is None:
        raise missing
    if name not in vouched.objects:
        raise _corrupt(path, "the manifest of a part of the corpus names another file")
    require_inside(root, name)
    size, digest = vouched.objects[name]

    def whole() -> bytes:
        with os.fdopen(open_object(path, size, digest), "rb") as file:
            return file.read(size + 1)

    try:
        data = durable.patiently(whole, path)
    except FileNotFoundError:
        raise missing from None
    except OSError as error:
        raise unreadable("a part of the corpus", error, path, _TODO) from error
    if len(data) != size or bytes_sha256(data) != digest:
        raise _corrupt(path, "a part of the corpus has bytes that were not written there")
    first, last = info.part_range(part)
    try:
        blocks = _decoded(data, np.arange(first, last), info.block_length)
    except _ARROW_ERRORS as error:  # its checksum is its manifest's: it was written wrong
        raise _corrupt(path, f"a part of the corpus cannot be read: {_line(error)}") from error
    if blocks.tokens.min() < 0 or blocks.tokens.max() >= info.vocab_size:
        raise _corrupt(path, "a part of the corpus has tokens that the tokenizer does not know")
    return blocks


_TODO = "run `scholiast repair` and then `scholiast prepare`: that part is made anew"
_ARROW_ERRORS = (
    pa.ArrowException, OSError, ValueError, KeyError, TypeError, MemoryError, StopIteration,
)  # fmt: skip
_MAGIC = b"ARROW1\0\0"
_COLUMNS = {
    "tokens": pa.int32(), "document": pa.int64(), "offset": pa.int64(), "loss_mask": pa.bool_(),
}  # fmt: skip


def _decoded(data: bytes, block_ids: Int64, block_length: int) -> TokenBlocks:
    """Returns the blocks of an Arrow file, of exactly this shape.

    Raises:
        ValueError and what else Arrow raises: the file is not one of ours.
    """
    count, width = len(block_ids), block_length + 1
    schema, batch_message = _messages(data)
    expected = {name: pa.list_(kind, width) for name, kind in _COLUMNS.items()}
    if {field.name: field.type for field in schema} != {"block_id": pa.int64(), **expected}:
        raise ValueError("another table")
    each = count * width
    require_sizes(
        batch_message, count,
        nodes=[count, *(n for _ in _COLUMNS for n in (count, each))],
        buffers=[_bits(count), 8 * count, *(
            size for kind in _COLUMNS.values()
            for size in (_bits(count), _bits(each), _bits(each * kind.bit_width))
        )],
    )  # fmt: skip
    batch = pa.ipc.read_record_batch(batch_message, schema)
    batch.validate(full=True)
    if batch.num_rows != count or any(column.null_count for column in batch.columns):
        raise ValueError("rows are missing")
    if not np.array_equal(batch.column("block_id").to_numpy(), block_ids):
        raise ValueError("other blocks")
    columns = {}
    for name in _COLUMNS:
        values = batch.column(name).flatten()
        if values.null_count or len(values) != each:
            raise ValueError(f"{name}: values are missing")
        columns[name] = np.array(values.to_numpy(zero_copy_only=False)).reshape(-1, width)
    return TokenBlocks(block_ids, **columns)


def _messages(data: bytes) -> tuple[pa.Schema, pa.Message]:
    """Returns the schema and the only record batch of an Arrow file, which is not decompressed."""
    buffer = pa.py_buffer(data)
    if pa.ipc.open_file(buffer).num_record_batches != 1:
        raise ValueError("another table")
    # The footer may name any place: what is looked at and what is read are the same messages.
    messages = pa.ipc.MessageReader.open_stream(buffer.slice(len(_MAGIC)))
    schema = pa.ipc.read_schema(messages.read_next_message())
    return schema, messages.read_next_message()


def _bits(count: int) -> int:
    """Returns the bytes of so many bits."""
    return -(-count // 8)


def _corrupt(path: Root, what: str) -> CorruptShard:
    return CorruptShard(what, where=path, todo=_TODO)


def _line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
