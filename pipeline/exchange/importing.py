"""A capture → a cache: read and check all of it, join it with the corpus, then write part by part.

Nothing is written into the cache before the whole capture has been read, its numbers, its shift and its
coverage found right. Parts are committed as stage one commits them, so a stopped import goes on with the
parts that are left; the capture is then not read again (see scratch.py).

Shapes: R rows with notes, K head entries, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.exchange.captured import Reading, read_capture, refuse
from pipeline.exchange.checks import TOLERANCES, ShiftCheck, clean
from pipeline.exchange.found import Found, Tally, Wanted
from pipeline.exchange.head_statistics import head_statistics
from pipeline.exchange.matching import Match, RowFinder
from pipeline.exchange.scratch import Scratch, ScratchWriter
from stages.progress import Progress
from stages.teacher_jobs import generations_of, learning_blocks
from storage import manifest
from storage.blocks import BlockReader
from storage.corpus_info import CorpusInfo
from storage.durable import require_free
from storage.errors import ConfigError
from storage.layout import FORMAT, OPTIONAL, Layout
from storage.notes import encode_rows
from storage.orders import IdOrders, learn_orders
from storage.types import AnyArray, Float32, HostNotes, Int64
from storage.writer import IMPORTED, CacheWriter, owners, require_identity


def read_into(
    scratch: Path, files: Sequence[Path], reading: Reading, vocab_size: int, key: str, progress: Progress
) -> Scratch:  # fmt: skip
    """Reads a capture, checks its numbers and its shift, and leaves it in a scratch folder.

    Args:
        scratch: the folder; one that is whole and has the same key is taken as it is.
        key: names files and options.

    Raises:
        CorruptShard, VocabularyMismatch, ConfigError: the capture is not what it should be.
        DiskFull
    """
    found = Scratch.found(scratch, key)
    if found is not None:
        return found
    shift, tolerance = ShiftCheck(vocab_size), TOLERANCES[reading.format]
    sequences, entries, least, most, mass = 0, 0, 1 << 31, 0, 0.0
    size = sum(path.stat().st_size for path in files)
    require_free(scratch, size, "the capture while it is imported", "a part of it")
    progress.say(f"reading {len(files)} files, {size / 1e6:,.1f} MB")
    with ScratchWriter(scratch) as writer:
        for one in read_capture(files, reading):
            checked = clean(one, vocab_size, tolerance)
            shift.add(one, checked)
            writer.add(one, checked)
            told = one.counts[one.counts > 0]
            sequences, entries = sequences + 1, entries + len(told)
            least, most = (
                min(least, int(told.min(initial=1 << 31))),
                max(most, int(told.max(initial=0))),
            )
            mass = max(mass, checked.mass)
        if not entries:
            raise refuse("the capture holds no distributions", files[0])
        shift.require(reading.offset)
        facts = Found(sequences, entries, (least, most), shift.means, shift.rows, mass)
        writer.finish(key, facts.to_dict())
    again = Scratch.found(scratch, key)
    assert again is not None, "it was written just now"
    return again


class Import:
    """One capture, read and checked, and the corpus that it is imported for.

    Args:
        name: the teacher's.
        corpus: complete.
        scratch: from `read_into`.
        wanted: what is to be made of it.
    """

    def __init__(self, name: str, corpus: BlockReader, scratch: Scratch, wanted: Wanted) -> None:
        self.name, self.corpus, self.scratch, self.wanted = name, corpus, scratch, wanted
        self._finder = RowFinder(corpus, scratch)
        facts = {**scratch.facts, "candidates": tuple(scratch.facts["candidates"])}
        self.found = Found(**{**facts, "missing": (), "bounds": ()})

    def cover(self, progress: Progress) -> Found:
        """Joins the capture with every block; refuses one that leaves rows without notes.

        Raises:
            ConfigError: k is more than some entry has.
            CorruptShard: rows are not covered; says how many, and the first.
        """
        info, tally = self.corpus.info, Tally(self._entries())
        progress.start("match blocks", info.blocks, "block")
        for part in range(info.parts):
            for block in range(*info.part_range(part)):
                self._count(block, tally)
                progress.advance(1)
        progress.finish()
        tally.require(self.found)
        unknown = {"entropy": not tally.entropy_known, "gold_logprob": not tally.gold_known}
        bounds = ("entropy",) if self.wanted.entropy_bound and unknown["entropy"] else ()
        self.found = replace(
            self.found, k=tally.k, rows=tally.rows, same=tally.same, other=tally.other, bounds=bounds,
            missing=tuple(n for n in OPTIONAL if unknown[n] and n not in bounds),
        )  # fmt: skip
        return self.found

    def _count(self, block: int, tally: Tally) -> None:
        match = self._finder.match(block)
        rows = np.flatnonzero(match.scored)
        served = rows[match.entries[rows] >= 0]
        entries, lost = match.entries[served], np.setdiff1d(rows, served, assume_unique=True)
        thin = served[self.scratch.counts(entries) < tally.k]
        same = int(match.same[served].sum())
        tally.rows += len(rows)
        tally.same, tally.other = tally.same + same, tally.other + len(served) - same
        tally.lost, tally.thin = tally.lost + len(lost), tally.thin + len(thin)
        tally.first_lost = tally.first_lost or _place(block, lost, match)
        tally.first_thin = tally.first_thin or _place(block, thin, match)
        if tally.gold_known or tally.entropy_known:
            gold, entropy = self._known(entries, match.gold[served])
            tally.gold_known &= not np.isnan(gold).any()
            tally.entropy_known &= not np.isnan(entropy).any()

    def _entries(self) -> int:
        """Returns K: the least number of candidates that an entry has, or what was asked for."""
        least, most = self.found.candidates
        k = self.wanted.k
        if k is not None:
            return k
        if most > least + 1:  # the k most probable, and the actual token where it is none of them
            raise ConfigError(
                "the capture's entries differ in how many candidates they have", where="--k",
                expected="one number, or one more where the actual token was added",
                found=f"{least} to {most}", todo=f"give --k {least}: a row's further candidates then "
                "count as its tail",
            )  # fmt: skip
        return least

    def _known(self, entries: Int64, gold: AnyArray) -> tuple[Float32, Float32]:
        """Returns the gold tokens' logprobs and the entropies, NaN where the capture tells neither."""
        logprobs = self.scratch.logprob_of(entries, gold.astype(np.int64))
        return logprobs, self.scratch.entropies(entries)

    def layout(self) -> Layout:
        """Returns what the cache stores."""
        info = self.corpus.info
        return Layout(
            blocks=info.blocks, blocks_per_part=info.blocks_per_part, block_length=info.block_length,
            vocab_size=info.vocab_size, preset=self.wanted.preset, k=self.found.k, temperatures=(),
            feature_layers=(), segments=1, hidden_size=0, generations=generations_of(info),
            missing=self.found.missing, bounds=self.found.bounds,
        )  # fmt: skip

    def write(self, root: Path, source: Mapping[str, Any], progress: Progress) -> int:
        """Writes the parts that are not there yet; returns how many.

        Args:
            root: the cache folder.
            source: what the capture was, for the identity.

        Raises:
            StaleCache: the folder holds another cache. DiskFull, CorruptShard, FailingFolder
        """
        layout = self.layout()
        identity = imported_identity(self.corpus.info, layout, source, self.found)
        require_identity(root, identity, layout)
        done = manifest.done_parts(root, owners(identity, layout), layout.parts)
        pending = np.setdiff1d(np.arange(layout.parts), done, assume_unique=True).tolist()
        writer = CacheWriter(root, identity, layout, lambda: self._learn(layout))
        total = layout.blocks * layout.block_length
        left = layout.blocks_of(pending) * layout.block_length
        progress.start(f"import {self.name}", total, "token", total - left)
        for part in pending:
            first, last = layout.part_range(part)
            tokens = (last - first) * layout.block_length
            require_free(
                root, int(layout.bytes_per_token_raw() * tokens), f"part {part}", "smaller --k"
            )
            writer.write_part(part, self._part(first, last, layout, writer.orders))
            progress.advance(tokens)
        progress.finish()
        return len(pending)

    def _learn(self, layout: Layout) -> IdOrders:
        heads = [np.zeros((0, layout.k), np.int64)]
        for block in learning_blocks(layout).tolist():
            match = self._finder.match(block)
            heads.append(
                self.scratch.heads(match.entries[match.scored], layout.k)[0].astype(np.int64)
            )
        return learn_orders(np.concatenate(heads), layout.vocab_size)

    def _part(self, first: int, last: int, layout: Layout, orders: IdOrders) -> dict[str, AnyArray]:
        arrays = {
            name: np.zeros((last - first, *spec.shape[1:]), spec.dtype)
            for name, spec in layout.arrays().items()
        }
        for block in range(first, last):
            match = self._finder.match(block)
            out = {name: array[block - first : block - first + 1] for name, array in arrays.items()}
            encode_rows(layout, orders, self._notes(match, layout), match.scored[None], out)
        return arrays

    def _notes(self, match: Match, layout: Layout) -> HostNotes:
        entries, gold = match.entries[match.scored], match.gold[match.scored]
        ids, logprobs = self.scratch.heads(entries, layout.k)
        log_tail, bound = head_statistics(logprobs, layout.vocab_size)
        known_gold, entropy = self._known(entries, gold)
        return HostNotes(
            ids, logprobs, np.zeros((len(ids), 0), np.int32), np.zeros((len(ids), 0), np.float32),
            bound if "entropy" in layout.bounds else entropy, log_tail, known_gold,
            np.zeros((len(ids), 0), np.float32),
        )  # fmt: skip


def imported_identity(
    info: CorpusInfo, layout: Layout, source: Mapping[str, Any], found: Found
) -> dict[str, Any]:
    """Returns what an imported cache is named by (storage/README.md)."""
    return {
        "format": FORMAT,
        "corpus": info.fingerprint,
        "origin": IMPORTED,
        "source": {**source, "context": {"same": found.same, "other": found.other}},
        "store": {
            "k": layout.k, "draws": 0, "top_p": 1.0, "seed": None, "preset": layout.preset,
            **layout.codecs.to_dict(), "temperatures": [], "segments": 1, "feature_layers": [],
            "missing": list(layout.missing), "bounds": list(layout.bounds),
        },
    }  # fmt: skip


def _place(block: int, rows: Int64, match: Match) -> str:
    """Says where the first of some rows is."""
    if not len(rows):
        return ""
    row = int(rows[0])
    return f"block {block}, row {row}, document {int(match.document[row])}"
