"""A tokenised corpus as a whole: `corpus.json`, its commit, and `begun.json`, what is being prepared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from storage import durable, manifest
from storage.checked import nonsense, parse, read_bounded, read_checked, typed
from storage.errors import CorpusError
from storage.fingerprint import canonical_json, fingerprint
from storage.generations import Generation, part_range, parts_until
from storage.limits import require_countable, require_generations
from storage.remote import Root
from storage.types import Int64

FORMAT = 2


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
        starts, index = self._domains_from
        return index[np.searchsorted(starts, block_ids, side="right") - 1]

    @cached_property  # asked for each batch, and there may be 10^5 sources
    def _domains_from(self) -> tuple[Int64, Int64]:
        """(first block, index into `domains`) of each source."""
        number = {domain: i for i, domain in enumerate(self.domains)}
        starts = np.array([s.first_block for s in self.sources])
        return starts, np.array([number[s.domain] for s in self.sources])


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
        body = parse(read_bounded(root / "begun.json"))
        generations = [(int(n), str(owner)) for n, owner in body["generations"]]
        whole = generations[-1][1] == fingerprint(body["identity"]) and _is_identity(
            body["identity"]
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError):
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
        CorruptShard: the file's own checksum does not hold, or it states what cannot be.
        CorpusError: it was written by another version of the format.
    """
    path = root / "corpus.json"
    body = read_checked(path, "prepare")
    if body is None:
        return None
    if body.pop("format", None) != FORMAT:
        raise CorpusError(
            "the corpus has another format", where=path, expected=f"format {FORMAT}",
            todo="delete the corpus folder and run `scholiast prepare` again",
        )  # fmt: skip
    try:
        info = typed(CorpusInfo, body)
        _require_possible(info)
    except ValueError as error:
        raise nonsense(path, error, "prepare") from None
    return info


def _require_possible(info: CorpusInfo) -> None:
    """Refuses what no corpus is, before anything is counted out or allocated by it.

    Raises:
        ValueError: says what.
    """
    if not 1 <= info.block_length <= 1 << 24 or not 1 <= info.vocab_size <= 1 << 31:
        raise ValueError(f"blocks of {info.block_length:,} of {info.vocab_size:,} ids")
    if not info.generations or not info.sources:
        raise ValueError("no generations, or no sources")
    if not _is_identity(info.identity) or info.identity["blocks_per_part"] != info.blocks_per_part:
        raise ValueError("an identity that names no sources, or another width of the parts")
    require_countable(0, info.blocks, info.blocks_per_part)
    require_generations(info.generations, info.blocks_per_part, info.blocks)
    require_countable(info.parts, info.blocks, info.blocks_per_part)
    spans = [_span(g, info.blocks_per_part) for g in info.generations]
    end = 0
    for source in info.sources:
        first, last = source.first_block, source.first_block + source.blocks
        inside = any(low <= first and last <= high for low, high in spans)
        if source.blocks < 0 or (source.blocks and not (first >= end and inside)):
            raise ValueError(f"blocks {first:,} to {last:,} of {source.domain[:40]!r}")
        if source.documents < 0 or source.tokens < 0:
            raise ValueError(f"a negative count of {source.domain[:40]!r}")
        end = max(end, last if source.blocks else end)
    digests = [info.fingerprint, info.tokenizer]
    digests += [text for g in info.generations for text in (g.fingerprint, g.identity)]
    if not all(len(text) == 64 for text in digests):
        raise ValueError("a fingerprint that is none")


def _is_identity(value: Any) -> bool:
    """Returns whether a value has what the identity of any corpus has, whatever else it is of."""
    if not isinstance(value, dict) or not isinstance(value.get("sources"), dict):
        return False
    width = value.get("blocks_per_part")
    return isinstance(width, int) and not isinstance(width, bool) and width > 0


def _span(generation: Generation, width: int) -> tuple[int, int]:
    first = generation.first_part * width
    return first, first + generation.blocks


def stored_bytes(root: Root, info: CorpusInfo) -> tuple[int, int]:
    """Returns (bytes of all parts and manifests, how many parts were looked at): scaled by blocks."""
    size, blocks, sampled = 0, 0, 0
    for vouched, own in manifest.sampled(root, range(info.parts), info.owners):
        size += own + sum(n for n, _ in vouched.objects.values())
        blocks, sampled = blocks + vouched.blocks, sampled + 1
    return size * info.blocks // max(1, blocks), sampled
