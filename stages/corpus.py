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

from pathlib import Path
from typing import Any

from stages.corpus_identity import cut, require_appendable, require_corpus
from stages.model_files import locate
from stages.options import CorpusOptions
from stages.packing import Packer
from stages.progress import Progress
from stages.tokenizer import load_tokenizer, tokenizer_fingerprint, vocab_size
from storage.corpus_info import CorpusInfo, load_begun, save_begun, save_info
from storage.fingerprint import HashMemo, fingerprint


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
    packer = Packer(options, tokenizer, root, plan, progress)
    packer.run()
    info = CorpusInfo(
        identity=identity, fingerprint=packer.generations[-1].fingerprint,
        tokenizer=tokenizer_fingerprint(tokenizer), vocab_size=vocab_size(tokenizer),
        block_length=options.block_length,
        blocks=sum(r.blocks for r in packer.ranges), blocks_per_part=options.blocks_per_part,
        sources=tuple(packer.ranges), generations=tuple(packer.generations),
    )  # fmt: skip
    save_info(root, info)
    return info
