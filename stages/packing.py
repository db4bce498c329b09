"""Documents → blocks of T, part by part, and from any part on.

A pass is one source and split; its tokens are laid end to end and cut every T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.documents import (
    DocumentStream,
    load_rows,
    require_chat_template,
)
from stages.options import CorpusOptions
from stages.progress import Progress
from stages.tokenizer import eos_id, tokenizer_fingerprint
from storage import durable, manifest
from storage.blocks import content_digest, write_part
from storage.corpus_info import CorpusGeneration, SourceRange
from storage.errors import CorpusError
from storage.fingerprint import bytes_sha256, fingerprint
from storage.generations import parts_until
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


class Packer:
    """Cuts every pass (source × split) into blocks and commits them part by part.

    After a kill, `run` takes the last finished part's cursor, and goes on from that token; the result
    is the same as undisturbed. That manifest alone is opened: it carries all that the earlier ones
    gave, their content as a chain of digests.

    Args:
        plan: per generation, how many sources there are at its end, and the fingerprint of the
            identity with these.
        width: blocks of a part.

    Attributes:
        passes: (source number, whether its held-out share is wanted), in the order of the blocks.
        ranges: the finished passes' blocks.
        generations: the finished ones.
    """

    def __init__(
        self, options: CorpusOptions, tokenizer: Any, root: Path,
        plan: Sequence[tuple[int, str]], progress: Progress, width: int,
    ) -> None:  # fmt: skip
        self.options, self.tokenizer, self.root = options, tokenizer, root
        self.plan, self.progress, self.width = plan, progress, width
        self._told = 0
        self.ranges: list[SourceRange] = []
        self.generations: list[CorpusGeneration] = []
        self._content = ""  # sha256 chained over the content of this generation's parts
        self._part = 0
        self._known_rows: list[int] = []
        self._eos = eos_id(tokenizer, "corpus.append_eos") if options.append_eos else None
        self._pending: list[TokenBlocks] = []
        self._loaded: dict[int, Any] = {}
        self.passes = [
            (number, heldout)
            for number, source in enumerate(options.sources)
            for heldout in ((False, True) if source.heldout else (False,))
        ]

    def run(self) -> None:
        """Packs what is not packed yet."""
        cursor = self._resume()
        first = cursor.pass_index
        # Every source is opened before the first is packed: a missing one is told at once.
        for number, _ in self.passes[first:]:
            self._rows(number)
        sizes = [self._count(number) for number, _ in self.passes]
        self._told = sum(sizes[:first]) + cursor.row
        self.progress.start("prepare corpus", sum(sizes), "document", self._told)
        self._end_generation(first)  # it may have been all packed and not yet counted
        for index in range(first, len(self.passes)):
            if index != cursor.pass_index:
                cursor = Cursor(index)
            for block, after in self.cut(index, cursor):
                cursor = after
                self._pending.append(block)
                if len(self._pending) == self.width:
                    self._commit(cursor)
            self._close(index, cursor)
            self._tell(sum(sizes[: index + 1]))
            self._end_generation(index + 1)
        self.progress.finish()

    def _tell(self, documents: int) -> None:
        self.progress.advance(documents - self._told)
        self._told = documents

    def _resume(self) -> Cursor:
        listed = manifest.listing(self.root)
        prefixes = np.array([identity[: manifest.PREFIX] for _, identity in self.plan], "S")
        ours = np.isin(listed.prefixes, prefixes)
        manifest.require_prefixes(
            self.root, listed, np.where(ours, listed.prefixes, prefixes[-1]),
            "restore the sources they were made from"
            + (
                ", or delete the manifests of that fingerprint: an append of other sources, not "
                "finished, leaves such"
                if len(self.plan) > 1
                else ": where this corpus had grown, and corpus.json and begun.json are both lost, only "
                "a copy of one of them tells how; else name another corpus_dir"
            ),
        )  # fmt: skip
        # Parts that follow a gap are packed again: only what precedes them says where they begin.
        done = int((listed.parts == np.arange(len(listed))).sum())
        last = None
        if done:
            owner = dict(zip(prefixes.tolist(), self.plan, strict=True))[listed.prefixes[done - 1]][
                1
            ]
            last = manifest.finished(self.root, done - 1, owner)
        if last is None:
            return Cursor()
        carry, self._part = last.carry, done
        self._content, self._known_rows = str(carry["chain"]), list(carry["rows"])
        self.ranges = [SourceRange(**r) for r in carry["ranges"]]
        self.generations = [CorpusGeneration(**g) for g in carry["generations"]]
        return Cursor(**carry["cursor"])

    def _commit(self, cursor: Cursor) -> None:
        sources, identity = self.plan[len(self.generations)]
        batch = concatenate(self._pending, self._part * self.width)
        durable.require_free(
            self.root,
            batch.tokens.size * _BYTES_PER_TOKEN,
            "a part of the corpus",
            "fewer corpus.sources",
        )
        content = content_digest(batch)
        self._content = bytes_sha256((self._content + content).encode())
        carry = {
            "cursor": asdict(cursor), "ranges": [asdict(r) for r in self.ranges],
            "generations": [asdict(g) for g in self.generations],
            "rows": [self._count(number) for number in range(sources)],
            "content": content, "chain": self._content,
        }  # fmt: skip
        write_part(self.root, identity, self._part, batch, carry)
        self._pending, self._part = [], self._part + 1

    def _end_generation(self, index: int) -> None:
        """Counts the generation if it ends before pass `index`; its last part may be short."""
        if len(self.generations) == len(self.plan):
            return
        sources, identity = self.plan[len(self.generations)]
        if index != sum(number < sources for number, _ in self.passes):
            return
        if self._pending:
            self._commit(Cursor(index))
        first = self._first_part()
        blocks = sum(r.blocks for r in self.ranges) - sum(g.blocks for g in self.generations)
        if not blocks:
            begin = self.generations[-1].sources if self.generations else 0
            raise CorpusError(
                "the corpus has no tokens" if not begin else "the added sources have no tokens",
                where="corpus.sources",
                found=", ".join(s.path for s in self.options.sources[begin:sources]),
                todo="give sources that hold at least one non-empty document",
            )  # fmt: skip
        before = {"before": self.generations[-1].fingerprint} if self.generations else {}
        content = fingerprint({
            **before, "content": self._content, "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "block_length": self.options.block_length,
            "blocks_per_part": self.width,
        })  # fmt: skip
        self.generations.append(CorpusGeneration(first, blocks, content, sources, identity))
        self._content = ""

    def _first_part(self) -> int:
        """Returns the first part of the generation that is being packed."""
        done = self.generations
        return parts_until(done, self.width) if done else 0

    def _close(self, index: int, cursor: Cursor) -> None:
        """Notes a finished pass's range; a pass without a token has none."""
        number, heldout = self.passes[index]
        source = self.options.sources[number]
        if not cursor.blocks:
            if source.heldout:
                raise CorpusError(
                    f"holding out {source.heldout} of this source leaves nothing "
                    f"{'held out' if heldout else 'to train on'}",
                    where=f"corpus.sources.{number}: {source.path}",
                    found=f"{len(self._rows(number))} documents",
                    todo="cut it into more with passage_chars, change `heldout`, or name a source with "
                    "split: heldout",
                )  # fmt: skip
            return
        packed = sum(r.blocks for r in self.ranges) - sum(g.blocks for g in self.generations)
        first = self._first_part() * self.width + packed
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

    def _count(self, number: int) -> int:
        """Returns a source's documents; those of finished parts are known without opening it."""
        if number < len(self._known_rows):
            return self._known_rows[number]
        return len(self._rows(number))

    def _pieces(self, index: int, cursor: Cursor) -> Iterator[dict[str, Any]]:
        """Yields a pass's documents as parallel arrays, the first one from the cursor's token on."""
        number, heldout = self.passes[index]
        base = sum(self._count(earlier) for earlier in range(number))
        before = sum(self._count(earlier) for earlier, _ in self.passes[:index])
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

    def cut(self, index: int, cursor: Cursor) -> Iterator[tuple[TokenBlocks, Cursor]]:
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
            cursor = _after(cursor, merged, buffer.size, len(self._rows(self.passes[index][0])), 0)
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


def concatenate(blocks: list[TokenBlocks], first: int) -> TokenBlocks:
    """Returns blocks of one each as blocks of many, numbered from `first` on."""
    return TokenBlocks(
        np.arange(first, first + len(blocks)),
        *(
            np.concatenate([getattr(b, name) for b in blocks])
            for name in ("tokens", "document", "offset", "loss_mask")
        ),
    )
