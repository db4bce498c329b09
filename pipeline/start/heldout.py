"""Which documents are measured on: a share of each source, or of its passages where they are few."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.start.passages import FEW, as_rows
from pipeline.start.sources import ROWS, Found, count_tokens, sides
from stages.documents import source_files
from stages.options import SourceOptions
from storage.errors import ConfigError

_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
_MOST_HELD = 0.4  # of the tokens
_ENOUGH = 20  # held-out documents that a share should give where only some could be looked at


def prepared(
    found: Sequence[Found], tokenizer: Any, run_dir: Path
) -> tuple[list[tuple[Found, float]], dict[Path, bytes]]:
    """Returns the sources, their tokens counted, with their held-out shares; and the files of passages
    that some of them are now read from.

    A source whose domain has held-out text of its own is not divided.

    Raises:
        ConfigError: nothing of a source can be held out.
        CorpusError: a document is not what its column should hold.
    """
    held = {one.options.domain for one in found if one.options.split == "heldout"}
    sources: list[tuple[Found, float]] = []
    texts: dict[Path, bytes] = {}
    for i, one in enumerate(found):
        key = f"corpus.sources.{i}"
        if one.options.split == "heldout" or one.options.domain in held:
            sources.append((count_tokens(one, key, tokenizer), 0.0))
        else:
            sources.append(_divided(one, key, tokenizer, run_dir, texts))
    return sources, texts


def _divided(
    found: Found, key: str, tokenizer: Any, run_dir: Path, texts: dict[Path, bytes]
) -> tuple[Found, float]:
    """Returns a source and its share: as it is, or of passages, whose file is added to `texts`."""
    where = f"--source {found.options.domain}={found.options.path}"
    if not any(str(text).strip() for text in found.sample):
        raise ConfigError(
            "the source holds no text", where=where, todo="name a file with text in it"
        )
    if found.documents >= FEW or found.options.messages_field:
        counted = count_tokens(found, key, tokenizer)
        share = hold_out(counted, key, tokenizer)
        if share is not None:
            return counted, share
    texts_of = _texts(found)
    if texts_of is not None:
        path = run_dir / "text" / f"{found.options.domain}.jsonl"
        if path in texts:
            path = path.with_stem(f"{path.stem}-{len(texts) + 1}")
        data = as_rows(texts_of)
        counted = count_tokens(_passages(found, path, data), key, tokenizer)
        share = hold_out(counted, key, tokenizer)
        if share is not None:
            texts[path] = data
            return counted, share
    raise ConfigError(
        "none of these documents can be held out to measure on",
        where=where, expected="text that can be cut into at least two passages",
        found=f"{found.documents:,} document{'' if found.documents == 1 else 's'}, too short for that",
        todo=f"give more, or --heldout {found.options.domain}=PATH with other text",
    )  # fmt: skip


def _texts(found: Found) -> list[str] | None:
    """Returns all of a source's texts; None of chats, or where they are too many to have been read."""
    if found.options.messages_field:
        return None
    if found.options.format == "text":
        files = source_files(found.options, "--source")
        return [path.read_bytes().decode() for path in files]
    return found.sample if found.whole else None


def _passages(found: Found, path: Path, data: bytes) -> Found:
    rows = [json.loads(line)["text"] for line in data.decode().split("\n") if line]
    options = SourceOptions(domain=found.options.domain, format="jsonl", path=str(path))
    return replace(
        found, options=options, sample=rows[:ROWS], whole=len(rows) <= ROWS, documents=len(rows)
    )


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
