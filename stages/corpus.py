"""Stage zero: documents → tokens → packed blocks of T, nothing dropped.

Tokens of one source and split are laid end to end and cut every T tokens; a block also carries the
next token, so the prediction across the seam is kept. Documents keep their number and byte offsets,
and models restart positions and attention at each document (and at each block: a document that is
cut goes on in the next block without its earlier context; that is the price of packing without
loss). Only the last block of a source is padded. Cost: one pass of the tokenizer; memory: one part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.corpus_identity import require_corpus
from stages.documents import (
    DocumentStream,
    load_rows,
    require_chat_template,
)
from stages.model_files import locate
from stages.options import CorpusOptions
from stages.progress import Progress
from stages.tokenizer import eos_id, load_tokenizer, tokenizer_fingerprint, vocab_size
from storage import durable, manifest
from storage.blocks import CorpusInfo, SourceRange, content_digest, save_info, write_part
from storage.errors import CorpusError
from storage.fingerprint import HashMemo, bytes_sha256, canonical_json, fingerprint
from storage.types import TokenBlocks

_BYTES_PER_TOKEN = 8  # of a packed part on disk, with room to spare


@dataclass(frozen=True)
class Cursor:
    """Where the next block begins: pass (source and split), row, token of the row; and what the
    pass has given so far."""

    pass_index: int = 0
    row: int = 0
    token: int = 0
    blocks: int = 0
    documents: int = 0
    tokens: int = 0


class _Buffer:
    """Tokens not yet cut, as parallel arrays: token, document, offset, mask, row, index in row."""

    NAMES = ("tokens", "document", "offset", "loss_mask", "row", "index")

    def __init__(self) -> None:
        self._pieces: list[dict[str, Any]] = []
        self.size = 0

    def add(self, piece: dict[str, Any]) -> None:
        self._pieces.append(piece)
        self.size += len(piece["tokens"])

    def merged(self) -> dict[str, Any]:
        if len(self._pieces) != 1:
            self._pieces = [{n: np.concatenate([p[n] for p in self._pieces]) for n in self.NAMES}]
        return self._pieces[0]

    def drop(self, count: int) -> None:
        merged = self.merged()
        self._pieces = [{n: merged[n][count:] for n in self.NAMES}]
        self.size -= count


def prepare(options: CorpusOptions, root: Path, memo: HashMemo, progress: Progress) -> CorpusInfo:
    """Prepares the corpus at `root`, or returns it if it is complete; an interrupted run goes on.

    Args:
        root: the corpus folder.
        memo: file hashes known from earlier.

    Returns:
        What was prepared.

    Raises:
        CorpusError, TeacherError, StaleCache, CorruptShard, DiskFull
    """
    identity, info = require_corpus(options, root, memo)
    if info is not None:
        return info
    folder = locate(
        options.tokenizer, options.tokenizer_revision, "corpus.tokenizer", weights=False
    )
    tokenizer = load_tokenizer(folder, "corpus.tokenizer")
    durable.write_bytes(root / "begun.json", canonical_json(identity))
    packer = Packer(options, tokenizer, root, fingerprint(identity), progress)
    packer.run()
    if not packer.ranges:
        raise CorpusError(
            "the corpus has no tokens", where="corpus.sources",
            found=", ".join(source.path for source in options.sources),
            todo="give sources that hold at least one non-empty document",
        )  # fmt: skip
    token_rules = tokenizer_fingerprint(tokenizer)
    info = CorpusInfo(
        identity=identity,
        fingerprint=fingerprint({"content": packer.content, "tokenizer": token_rules,
                                 "block_length": options.block_length,
                                 "blocks_per_part": options.blocks_per_part}),
        tokenizer=token_rules, vocab_size=vocab_size(tokenizer),
        block_length=options.block_length,
        blocks=sum(r.blocks for r in packer.ranges), blocks_per_part=options.blocks_per_part,
        sources=tuple(packer.ranges),
    )  # fmt: skip
    save_info(root, info)
    return info


class Packer:
    """Cuts every pass (source × split) into blocks and commits them part by part.

    After a kill, `run` takes the last finished part's cursor, and goes on from that token; the result
    is the same as undisturbed. That manifest alone is opened: it carries all that the earlier ones
    gave, their content as a chain of digests.

    Attributes:
        ranges: the finished passes' blocks.
        content: sha256 chained over the content of every part, in order.
    """

    def __init__(
        self, options: CorpusOptions, tokenizer: Any, root: Path, identity: str, progress: Progress
    ) -> None:
        self.options, self.tokenizer, self.root = options, tokenizer, root
        self.identity, self.progress = identity, progress
        self.ranges: list[SourceRange] = []
        self.content = ""
        self._eos = eos_id(tokenizer, "corpus.append_eos") if options.append_eos else None
        self._pending: list[TokenBlocks] = []
        self._loaded: dict[int, Any] = {}
        # (source number, whether its held-out share is wanted), in the order of the blocks
        self._passes = [
            (number, heldout)
            for number, source in enumerate(options.sources)
            for heldout in ((False, True) if source.heldout else (False,))
        ]

    def run(self) -> None:
        """Packs what is not packed yet."""
        cursor = self._resume()
        first = cursor.pass_index
        # Every source is opened before the first is packed: a missing one is told at once.
        sizes = [len(self._rows(number)) for number, _ in self._passes]
        self._told = sum(sizes[:first]) + cursor.row
        self.progress.start("prepare corpus", sum(sizes), "document", self._told)
        for index in range(first, len(self._passes)):
            if index != cursor.pass_index:
                cursor = Cursor(index)
            for block, after in self._cut(index, cursor):
                cursor = after
                self._pending.append(block)
                if len(self._pending) == self.options.blocks_per_part:
                    self._commit(cursor)
            self._close(index, cursor)
            self._tell(sum(sizes[: index + 1]))
        if self._pending:
            self._commit(Cursor(len(self._passes)))
        self.progress.finish()

    def _tell(self, documents: int) -> None:
        self.progress.advance(documents - self._told)
        self._told = documents

    def _resume(self) -> Cursor:
        done = manifest.done_parts(self.root, self.identity)
        # Parts that follow a gap are packed again: only what precedes them says where they begin.
        self._part = int((done == np.arange(len(done))).sum())
        last = manifest.finished(self.root, self._part - 1, self.identity) if self._part else None
        if last is None:
            self._part = 0
            return Cursor()
        self.content = str(last.carry["chain"])
        self.ranges = [SourceRange(**r) for r in last.carry["ranges"]]
        return Cursor(**last.carry["cursor"])

    def _commit(self, cursor: Cursor) -> None:
        batch = _concatenate(self._pending, self._part * self.options.blocks_per_part)
        durable.require_free(
            self.root, batch.tokens.size * _BYTES_PER_TOKEN, "a part of the corpus"
        )
        content = content_digest(batch)
        self.content = bytes_sha256((self.content + content).encode())
        carry = {
            "cursor": asdict(cursor), "ranges": [asdict(r) for r in self.ranges],
            "content": content, "chain": self.content,
        }  # fmt: skip
        write_part(self.root, self.identity, self._part, batch, carry)
        self._pending, self._part = [], self._part + 1

    def _close(self, index: int, cursor: Cursor) -> None:
        """Notes a finished pass's range; a pass without a token has none."""
        number, heldout = self._passes[index]
        source = self.options.sources[number]
        if not cursor.blocks:
            if source.heldout:
                raise CorpusError(
                    f"holding out {source.heldout} of this source leaves nothing "
                    f"{'held out' if heldout else 'to train on'}",
                    where=f"corpus.sources.{number}: {source.path}",
                    found=f"{len(self._rows(number))} documents",
                    todo="cut the source into more documents, change `heldout`, or name a source "
                    "with split: heldout",
                )  # fmt: skip
            return
        first = sum(r.blocks for r in self.ranges)
        self.ranges.append(
            SourceRange(
                source.domain, "heldout" if heldout else source.split, first, cursor.blocks,
                cursor.documents, cursor.tokens,
            )
        )  # fmt: skip

    def _rows(self, number: int) -> Any:
        if number not in self._loaded:
            source, key = self.options.sources[number], f"corpus.sources.{number}"
            if source.messages_field:
                require_chat_template(self.tokenizer, key)
            self._loaded[number] = load_rows(source, key)
        return self._loaded[number]

    def _pieces(self, index: int, cursor: Cursor) -> Iterator[dict[str, Any]]:
        """Yields a pass's documents as parallel arrays, the first one from the cursor's token on."""
        number, heldout = self._passes[index]
        base = sum(len(self._rows(earlier)) for earlier in range(number))
        before = sum(len(self._rows(earlier)) for earlier, _ in self._passes[:index])
        stream = DocumentStream(
            self.options.sources[number], f"corpus.sources.{number}", self._rows(number),
            heldout, self.tokenizer, self._eos,
        )  # fmt: skip
        for document in stream.documents(cursor.row):
            n = len(document.tokens)
            piece = {
                "tokens": document.tokens,
                "document": np.full(n, base + document.row),
                "offset": document.offset,
                "loss_mask": document.loss_mask,
                "row": np.full(n, document.row),
                "index": np.arange(n),
            }
            skip = cursor.token if document.row == cursor.row else 0
            yield {name: array[skip:] for name, array in piece.items()}
            self._tell(before + document.row + 1)

    def _cut(self, index: int, cursor: Cursor) -> Iterator[tuple[TokenBlocks, Cursor]]:
        """Yields a pass's blocks from the cursor on, each with the cursor that follows it."""
        length, buffer = self.options.block_length, _Buffer()
        for piece in self._pieces(index, cursor):
            buffer.add(piece)
            while buffer.size > length:
                merged = buffer.merged()
                cursor = _after(
                    cursor, merged, length, merged["row"][length], merged["index"][length]
                )
                yield _block(merged, length), cursor
                buffer.drop(length)
        # One last token that was the previous block's look-ahead is already predicted, and a block
        # of its own would predict nothing.
        if buffer.size > 1 or (buffer.size and not cursor.blocks):
            merged = buffer.merged()
            cursor = _after(cursor, merged, buffer.size, len(self._rows(self._passes[index][0])), 0)
            yield _block(merged, length), cursor


def _after(cursor: Cursor, merged: dict[str, Any], used: int, row: int, token: int) -> Cursor:
    begun = int((merged["index"][:used] == 0).sum())
    return Cursor(
        cursor.pass_index, int(row), int(token), cursor.blocks + 1, cursor.documents + begun,
        cursor.tokens + used,
    )  # fmt: skip


def _block(merged: dict[str, Any], length: int) -> TokenBlocks:
    """Returns the buffer's first T+1 tokens as one block, padded if there are fewer."""
    taken = min(len(merged["tokens"]), length + 1)

    def padded(name: str, fill: int, dtype: type) -> Any:
        row: Any = np.full((1, length + 1), fill, dtype)
        row[0, :taken] = merged[name][:taken]
        return row

    return TokenBlocks(
        np.zeros(1, np.int64), padded("tokens", 0, np.int32), padded("document", -1, np.int64),
        padded("offset", 0, np.int64), padded("loss_mask", 0, np.bool_),
    )  # fmt: skip


def _concatenate(blocks: list[TokenBlocks], first: int) -> TokenBlocks:
    return TokenBlocks(
        np.arange(first, first + len(blocks)),
        *(
            np.concatenate([getattr(b, name) for b in blocks])
            for name in ("tokens", "document", "offset", "loss_mask")
        ),
    )
