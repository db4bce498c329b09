"""What an Arrow record batch says of its size, read before it is decompressed: pyarrow would allocate it.

15 kB of zstd can stand for half a gigabyte. It is said in the message's metadata, a flatbuffer, and at
the beginning of each compressed buffer (Arrow's format: Message.fbs, Schema.fbs).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pyarrow as pa

_V5, _RECORD_BATCH = 4, 3  # of the enumerations MetadataVersion and MessageHeader
_VERSION, _HEADER_TYPE, _HEADER = 0, 1, 2  # fields of a Message
_LENGTH, _NODES, _BUFFERS, _COMPRESSION = 0, 1, 2, 3  # fields of a RecordBatch
_ALIGNED = 64  # writers may round buffers up to so many bytes


def require_sizes(
    message: pa.Message, rows: int, nodes: Sequence[int], buffers: Sequence[int]
) -> None:
    """Refuses a record batch that is of another size, or would be decompressed to another.

    Args:
        message: of the batch; its body may be compressed.
        rows: how many it must have.
        nodes: how many values each array must have, in the format's order, children after parents.
        buffers: bytes of each buffer, in that order; it may be missing where Arrow allows that.

    Raises:
        ValueError: it is of another size, or no record batch.
    """
    try:
        sizes = _uncompressed(message, rows, nodes)
    except (struct.error, IndexError) as error:
        raise ValueError(f"no metadata of a record batch: {error}") from None
    if len(sizes) != len(buffers):
        raise ValueError(f"{len(sizes)} buffers")
    for size, expected in zip(sizes, buffers, strict=True):
        if not 0 <= size <= -(-expected // _ALIGNED) * _ALIGNED:
            raise ValueError(f"a buffer of {size:,} bytes in place of {expected:,}")


def _uncompressed(message: pa.Message, rows: int, nodes: Sequence[int]) -> list[int]:
    """Returns the bytes of each buffer once it is decompressed, as they are stated."""
    metadata, body = memoryview(message.metadata), memoryview(message.body)
    root = _at(metadata, 0)
    version, kind = _field(metadata, root, _VERSION), _field(metadata, root, _HEADER_TYPE)
    header = _field(metadata, root, _HEADER)
    if kind is None or metadata[kind] != _RECORD_BATCH or header is None:
        raise ValueError("no record batch")
    batch = _at(metadata, header)
    length = _field(metadata, batch, _LENGTH)
    counts = [count for count, _ in _pairs(metadata, _field(metadata, batch, _NODES))]
    if length is None or _int64(metadata, length) != rows or counts != list(nodes):
        raise ValueError("another number of rows")
    found = _pairs(metadata, _field(metadata, batch, _BUFFERS))
    if _field(metadata, batch, _COMPRESSION) is None:
        # Version 4 may say that it is compressed in another place.
        if version is None or struct.unpack_from("<h", metadata, version)[0] != _V5:
            raise ValueError("metadata of an earlier version")
        return [size for _, size in found]
    return [_stated(body, offset, size) for offset, size in found]


def _stated(body: memoryview, offset: int, size: int) -> int:
    """Returns how many bytes a compressed buffer says it has; −1 says: as they are stored."""
    if size == 0:
        return 0
    if offset < 0:
        raise ValueError("a buffer outside the body")
    stated = _int64(body, offset)
    return size - 8 if stated == -1 else stated


def _field(data: memoryview, table: int, number: int) -> int | None:
    """Returns where a table's field lies; None if it is not there, and so has its default."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if vtable < 0 or 4 + 2 * number >= struct.unpack_from("<H", data, vtable)[0]:
        return None
    offset = struct.unpack_from("<H", data, vtable + 4 + 2 * number)[0]
    return table + offset if offset else None


def _pairs(data: memoryview, field: int | None) -> list[tuple[int, int]]:
    """Returns a vector of structs of two int64."""
    if field is None:
        return []
    vector = _at(data, field)
    count = struct.unpack_from("<I", data, vector)[0]
    numbers = struct.unpack_from(f"<{2 * count}q", data, vector + 4)
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _at(data: memoryview, place: int) -> int:
    """Returns where the reference at a place leads."""
    return place + int(struct.unpack_from("<I", data, place)[0])


def _int64(data: memoryview, place: int) -> int:
    return int(struct.unpack_from("<q", data, place)[0])
