"""Which documents are measured on: a share of each source, or of its passages where they are few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pipeline.start.sources import Found, count_tokens, in_passages, sides
from storage.errors import ConfigError

_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
_MOST_HELD = 0.4  # of the tokens
_ENOUGH = 20  # held-out documents that a share should give where only some could be looked at
_FEW = 20  # documents; with fewer a share of them is no share of the text
_SHORTEST, _LONGEST = 1_000, 4_000  # characters of a passage, about
_WANTED = 200  # passages


def prepared(found: Sequence[Found], tokenizer: Any) -> list[tuple[Found, float]]:
    """Returns the sources, their tokens counted, with their held-out shares.

    A source whose domain has held-out text of its own is not divided. Fewer than twenty texts are cut
    into passages.

    Raises:
        ConfigError: nothing of a source can be held out.
        CorpusError: a document is not what its column should hold.
    """
    held = {one.options.domain for one in found if one.options.split == "heldout"}
    sources: list[tuple[Found, float]] = []
    for i, one in enumerate(found):
        key = f"corpus.sources.{i}"
        if one.options.split == "heldout" or one.options.domain in held:
            sources.append((count_tokens(one, key, tokenizer), 0.0))
        else:
            sources.append(_divided(one, key, tokenizer))
    return sources


def _divided(found: Found, key: str, tokenizer: Any) -> tuple[Found, float]:
    """Returns a source, as it is or in passages, and its share."""
    where = f"--source {found.options.domain}={found.options.path}"
    if not any(str(text).strip() for text in found.sample):
        raise ConfigError(
            "the source holds no text", where=where, todo="name a file with text in it"
        )
    tried = [found] if found.documents >= _FEW or found.options.messages_field else []
    if not found.options.messages_field:
        characters = int(sum(map(len, found.sample)) * found.times)
        tried.append(in_passages(found, min(_LONGEST, max(_SHORTEST, characters // _WANTED))))
    for one in tried:
        counted = count_tokens(one, key, tokenizer)
        share = hold_out(counted, key, tokenizer)
        if share is not None:
            return counted, share
    raise ConfigError(
        "none of these documents can be held out to measure on",
        where=where, expected="text that can be cut into at least two passages",
        found=f"{found.documents:,} document{'' if found.documents == 1 else 's'}, too short for that",
        todo=f"give more, or --heldout {found.options.domain}=PATH with other text",
    )  # fmt: skip


def hold_out(found: Found, key: str, tokenizer: Any) -> float | None:
    """Returns the share of documents to hold out: the least that leaves enough to measure on.

    It is tried on the documents themselves, since their hashes decide and their lengths differ. None
    if no share gives two documents, and between 2 and 40 per cent of the tokens.
    """
    big = found.tokens > 50_000_000
    for share in _SHARES:
        if share < (0.01 if big else 0.05):
            continue
        if not found.whole:
            if share * found.documents >= _ENOUGH:
                return share
            continue
        cut = replace(found, options=found.options.model_copy(update={"heldout": share}))
        held, kept = sides(cut, key, tokenizer)
        if len(held) >= 2 and 0.02 <= sum(held) / max(1, sum(held) + sum(kept)) <= _MOST_HELD:
            return share
    return None
