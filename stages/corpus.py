"""Stage zero: documents → tokens → packed blocks of T, nothing dropped.

Tokens of one source and split are laid end to end and cut every T tokens; a block also carries the
next token, so the prediction across the seam is kept. Documents keep their number and byte offsets,
and models restart positions and attention at each document (and at each block: a document that is
cut goes on in the next block without its earlier context; that is the price of packing without
loss). Only the last block of a source is padded. Cost: one pass of the tokenizer; memory: one part.

A corpus grows by generations (storage/generations.py): `append` packs sources that were added after
the last one into parts of their own, and leaves the finished ones as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from stages.corpus_identity import WIDTH, cut, require_appendable, require_corpus
from stages.model_files import locate
from stages.options import CorpusOptions
from stages.packing import Cursor, Packer, concatenate
from stages.progress import Progress, Silent
from stages.tokenizer import load_tokenizer, tokenizer_fingerprint, vocab_size
from storage.corpus_info import CorpusInfo, load_begun, save_begun, save_info
from storage.errors import CorpusError
from storage.fingerprint import HashMemo, fingerprint
from storage.types import TokenBlocks


def prepare(
    options: CorpusOptions, root: Path, memo: HashMemo, progress: Progress,
    width: Callable[[], int] = lambda: WIDTH,
) -> CorpusInfo:  # fmt: skip
    """Prepares the corpus at `root`, or returns it if it is complete; an interrupted run goes on.

    Args:
        root: the corpus folder.
        memo: file hashes known from earlier.
        width: asked for the blocks of a part where the options leave them open, before the first part
            is packed; what it says is recorded, so that a resumed run does not ask again.

    Returns:
        What was prepared.

    Raises:
        CorpusError, TeacherError, StaleCache, CorruptShard, DiskFull
    """
    identity, info = require_corpus(options, root, memo)
    if info is not None:
        return info
    if identity["blocks_per_part"] is None:
        identity["blocks_per_part"] = width()
    # Where corpus.json was lost, what had been appended is cut as it was.
    begun = load_begun(root)
    counts = [n for n, _ in begun[1]] if begun else [len(options.sources)]
    return _pack(options, root, identity, counts, progress)


def append(options: CorpusOptions, root: Path, memo: HashMemo, progress: Progress) -> CorpusInfo:
    """Packs the sources that were added at the end into a generation of their own.

    Until the last of them is packed the corpus at `root` stays what it was; an interrupted run goes
    on. Without added sources the corpus is returned as it is.

    Raises:
        IncompleteCache: there is no complete corpus.
        CorpusError, TeacherError, StaleCache, CorruptShard, DiskFull
    """
    identity, info = require_appendable(options, root, memo)
    if identity == info.identity:
        return info
    counts = [*(g.sources for g in info.generations), len(options.sources)]
    return _pack(options, root, identity, counts, progress)


def _pack(
    options: CorpusOptions, root: Path, identity: dict[str, Any], counts: list[int],
    progress: Progress,
) -> CorpusInfo:  # fmt: skip
    """Packs what is not packed yet and commits the corpus.

    Args:
        counts: how many sources there are at the end of each generation.
    """
    folder = locate(
        options.tokenizer, options.tokenizer_revision, "corpus.tokenizer", weights=False
    )
    tokenizer = load_tokenizer(folder, "corpus.tokenizer")
    plan = [(n, fingerprint(cut(identity, n))) for n in counts]
    save_begun(root, identity, plan)
    width = int(identity["blocks_per_part"])
    packer = Packer(options, tokenizer, root, plan, progress, width)
    packer.run()
    info = CorpusInfo(
        identity=identity, fingerprint=packer.generations[-1].fingerprint,
        tokenizer=tokenizer_fingerprint(tokenizer), vocab_size=vocab_size(tokenizer),
        block_length=options.block_length,
        blocks=sum(r.blocks for r in packer.ranges), blocks_per_part=width,
        sources=tuple(packer.ranges), generations=tuple(packer.generations),
    )  # fmt: skip
    save_info(root, info)
    return info


def first_blocks(options: CorpusOptions, count: int) -> TokenBlocks:
    """Returns about `count` blocks from the beginnings of the training sources, at least one; writes
    nothing.

    Raises:
        CorpusError, TeacherError: a source or the tokenizer is not there, or holds nothing.
    """
    folder = locate(
        options.tokenizer, options.tokenizer_revision, "corpus.tokenizer", weights=False
    )
    tokenizer = load_tokenizer(folder, "corpus.tokenizer")
    packer = Packer(options, tokenizer, Path(), [], Silent(), 1)
    passes = [i for i, (n, held) in enumerate(packer.passes)
              if not held and options.sources[n].split == "train"]  # fmt: skip
    each = -(-count // max(1, len(passes)))
    found = [b for i in passes for b, _ in islice(packer.cut(i, Cursor(i)), each)][:count]
    if not found:
        raise CorpusError(
            "the corpus has no training blocks", where="corpus.sources",
            todo="give at least one source with split: train that holds text",
        )  # fmt: skip
    return concatenate(found, 0)
