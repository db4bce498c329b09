"""The tokenised corpus: Arrow parts, random access by block id.

`corpus.json` is the commit of the whole; each part has a manifest of its own (see manifest.py).
A part is one zstd-compressed Arrow IPC file with a row a block. Arrow does not notice a flipped
byte, so a part's sha256 is checked when a process first opens it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from storage import durable, manifest
from storage.checked import read_checked
from storage.errors import CorpusError, CorruptShard, IncompleteCache, MissingShard
from storage.fingerprint import bytes_sha256, canonical_json, fingerprint
from storage.generations import Generation, part_of, part_range, parts_until
from storage.remote import RemotePath, Root, open_object
from storage.types import AnyArray, Bool, Int64, TokenBlocks

FORMAT = 2
_OPEN_PARTS = 64  # decoded parts a reader keeps; a part is some hundred kB to a few MB


@dataclass(frozen=True)
class SourceRange:
    """Where one source's blocks lie. A block never mixes two sources.

    Attributes:
        domain: the name that reports group by.
        split: "train" or "heldout".
        first_block, blocks: the block range.
        documents, tokens: how many of each were packed.
    """

    domain: str
    split: str
    first_block: int
    blocks: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class CorpusGeneration(Generation):
    """A generation of a corpus.

    Attributes:
        sources: how many of the configured sources are packed at its end.
        identity: fingerprint of the corpus's identity with these sources; its manifests carry it.
    """

    sources: int
    identity: str


@dataclass(frozen=True)
class CorpusInfo:
    """What `corpus.json` states.

    Attributes:
        identity: sources, tokenizer and packing, as a nested dict.
        fingerprint: of every token, document, offset and mask, and of how they are cut; the last
            generation's.
        tokenizer: the tokenizer's own fingerprint.
        vocab_size: number of ids the tokenizer knows (largest id + 1).
        block_length: T.
        blocks, blocks_per_part: how many blocks there are, and the width of a part.
        sources: in block order.
        generations: what was packed at one time, in order; between two of them ids may be missing.
    """

    identity: dict[str, Any]
    fingerprint: str
    tokenizer: str
    vocab_size: int
    block_length: int
    blocks: int
    blocks_per_part: int
    sources: tuple[SourceRange, ...]
    generations: tuple[CorpusGeneration, ...]

    @property
    def parts(self) -> int:
        return parts_until(self.generations, self.blocks_per_part)

    @property
    def owners(self) -> manifest.Owners:
        """The fingerprints that the parts' manifests carry."""
        return manifest.Owners(
            tuple(g.first_part for g in self.generations),
            tuple(g.identity for g in self.generations),
        )

    @property
    def tokens(self) -> int:
        return sum(source.tokens for source in self.sources)

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(source.domain for source in self.sources))

    def part_range(self, part: int) -> tuple[int, int]:
        """Returns (first block, one past the last block) of a part."""
        return part_range(self.generations, self.blocks_per_part, part)

    def block_ids(self, split: str, domain: str | None = None) -> Int64:
        """Returns the ids, int64 and ascending, of a split's blocks (of one domain if named)."""
        ranges = [
            np.arange(s.first_block, s.first_block + s.blocks)
            for s in self.sources
            if s.split == split and domain in (None, s.domain)
        ]
        return np.concatenate([np.empty(0, np.int64), *ranges])

    def ranges(self, split: str) -> tuple[tuple[int, int], ...]:
        """Returns a split's blocks as (first block, how many), ascending: nothing a block."""
        return tuple((s.first_block, s.blocks) for s in self.sources if s.split == split)

    def domain_of(self, block_ids: Int64) -> Int64:
        """Returns the index into `domains` of each block."""
        starts = np.array([s.first_block for s in self.sources])
        index = np.array([self.domains.index(s.domain) for s in self.sources])
        return index[np.searchsorted(starts, block_ids, side="right") - 1]


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


def save_begun(
    root: Path, identity: dict[str, Any], generations: Sequence[tuple[int, str]]
) -> None:
    """Says what is being prepared, before the first part is.

    Args:
        generations: of each, how many sources there are at its end, and the fingerprint of the
            identity with these.
    """
    body = {"identity": identity, "generations": generations}
    durable.write_bytes(root / "begun.json", canonical_json(body))


def load_begun(root: Root) -> tuple[dict[str, Any], list[tuple[int, str]]] | None:
    """Returns (identity, generations) of what was begun at `root`, None if that cannot be told."""
    try:
        body = json.loads((root / "begun.json").read_bytes())
        generations = [(int(n), str(owner)) for n, owner in body["generations"]]
        whole = generations[-1][1] == fingerprint(body["identity"])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    return (body["identity"], generations) if whole else None


def save_info(root: Path, info: CorpusInfo) -> None:
    """Commits the whole corpus."""
    body = {"format": FORMAT, **asdict(info)}
    body["sha256"] = fingerprint(body)
    durable.write_bytes(root / "corpus.json", canonical_json(body))


def load_info(root: Root) -> CorpusInfo | None:
    """Returns what `corpus.json` states, or None if the corpus is not complete.

    Raises:
        CorruptShard: the file's own checksum does not hold.
        CorpusError: it was written by another version of the format.
    """
    path = root / "corpus.json"
    body = read_checked(path, "prepare")
    if body is None:
        return None
    if body.pop("format") != FORMAT:
        raise CorpusError(
            "the corpus has another format", where=path, expected=f"format {FORMAT}",
            todo="delete the corpus folder and run `scholiast prepare` again",
        )  # fmt: skip
    body["sources"] = tuple(SourceRange(**s) for s in body["sources"])
    body["generations"] = tuple(CorpusGeneration(**g) for g in body["generations"])
    return CorpusInfo(**body)


def stored_bytes(root: Root, info: CorpusInfo) -> tuple[int, int]:
    """Returns (bytes of all parts and manifests, how many parts were looked at): scaled by blocks."""
    size, blocks, sampled = 0, 0, 0
    for vouched, own in manifest.sampled(root, range(info.parts), info.owners):
        size += own + sum(n for n, _ in vouched.objects.values())
        blocks, sampled = blocks + vouched.blocks, sampled + 1
    return size * info.blocks // max(1, blocks), sampled


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
        size, digest = vouched.objects[object_name(part)] if vouched else (0, "")
        remote = self.root / object_name(part)
        if vouched and isinstance(remote, RemotePath):
            remote.fetch(size, digest)
        return size

    def _part(self, part: int) -> TokenBlocks:
        if part in self._open:
            self._open.move_to_end(part)
            return self._open[part]
        blocks = _read_part(self.root, part, self.info.owners.of(part))
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


def _read_part(root: Root, part: int, identity_fingerprint: str) -> TokenBlocks:
    path = root / object_name(part)
    vouched = manifest.load(root, part, identity_fingerprint)
    missing = MissingShard(
        "a part of the corpus is missing", where=path,
        todo="run `scholiast repair` and then `scholiast prepare`",
    )  # fmt: skip
    if vouched is None:
        raise missing
    size, digest = vouched.objects[object_name(part)]

    def whole() -> bytes:
        with os.fdopen(open_object(path, size, digest), "rb") as file:
            return file.read()

    try:
        data = durable.patiently(whole, path)
    except FileNotFoundError:
        raise missing from None
    if bytes_sha256(data) != digest:
        raise CorruptShard(
            "a part of the corpus has bytes that were not written there", where=path,
            todo="run `scholiast repair` and then `scholiast prepare`: that part is made anew",
        )  # fmt: skip
    batch = pa.ipc.open_file(pa.py_buffer(data)).read_all().combine_chunks()

    def matrix(name: str) -> AnyArray:
        column = batch.column(name).chunk(0)
        flat: AnyArray = column.flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(len(column), -1)

    ids = batch.column("block_id").to_numpy()
    mask: Bool = matrix("loss_mask").astype(bool)
    return TokenBlocks(
        ids, matrix("tokens").astype(np.int32), matrix("document").astype(np.int64),
        matrix("offset").astype(np.int64), mask,
    )  # fmt: skip
