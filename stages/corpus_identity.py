"""What decides the packed blocks, from files alone: no torch, no transformers, no tokenising."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.documents import source_identity
from stages.model_files import locate, tokenizer_identity
from stages.options import CorpusOptions
from storage.corpus_info import FORMAT, CorpusInfo, load_begun, load_info
from storage.errors import IncompleteCache, StaleCache
from storage.fingerprint import HashMemo, describe_differences, fingerprint
from storage.remote import Root

WIDTH = 64
"""Blocks of a part where neither the options nor an estimate say how many."""


def corpus_identity(
    options: CorpusOptions, memo: HashMemo, recorded: int | None = None
) -> dict[str, Any]:
    """Returns what decides the packed blocks, from files alone.

    Args:
        recorded: width of the parts of the corpus that stands there, for options that name none: it
            was decided when that corpus was begun, and is not decided again.

    Raises:
        CorpusError, TeacherError: a source or the tokenizer is not there.
    """
    folder = locate(
        options.tokenizer, options.tokenizer_revision, "corpus.tokenizer", weights=False
    )
    identity = {
        "format": FORMAT,
        "tokenizer_files": tokenizer_identity(folder, "corpus.tokenizer", memo),
        "block_length": options.block_length,
        "blocks_per_part": options.blocks_per_part or recorded,
        "append_eos": options.append_eos,
        "sources": {
            f"{i:03d}": source_identity(source, f"corpus.sources.{i}", memo)
            for i, source in enumerate(options.sources)
        },
    }
    memo.save()
    return identity


def cut(identity: Mapping[str, Any], sources: int) -> dict[str, Any]:
    """Returns the identity as it was with the first so many sources."""
    kept = dict(sorted(identity["sources"].items())[:sources])
    return {**identity, "sources": kept}


def recorded_width(root: Root) -> int | None:
    """Returns how many blocks a part has of the corpus that was prepared or begun at `root`, if any."""
    stands = _standing(load_info(root), root)
    return int(stands["blocks_per_part"]) if stands else None


def _standing(info: CorpusInfo | None, root: Root) -> dict[str, Any] | None:
    """Returns the identity of the complete corpus, else of what was begun."""
    if info is not None:
        return info.identity
    begun = load_begun(root)
    return begun[0] if begun else None


def require_corpus(
    options: CorpusOptions, root: Root, memo: HashMemo
) -> tuple[dict[str, Any], CorpusInfo | None]:
    """Returns (identity, the corpus at `root` if it is complete).

    The identity's `blocks_per_part` is None where the options leave it open and nothing was begun.

    Raises:
        StaleCache: `root` holds a corpus made from something else.
    """
    info = load_info(root)
    stands = _standing(info, root)
    identity = corpus_identity(options, memo, stands["blocks_per_part"] if stands else None)
    if stands is not None and fingerprint(stands) != fingerprint(identity):
        raise _other(identity, stands, root, grown=info is not None and _extends(identity, stands))
    return identity, info


def require_appendable(
    options: CorpusOptions, root: Path, memo: HashMemo
) -> tuple[dict[str, Any], CorpusInfo]:
    """Returns (identity, the complete corpus at `root`, whose sources it begins with).

    Raises:
        IncompleteCache: there is no complete corpus.
        StaleCache: something else than sources at the end differs.
    """
    info = load_info(root)
    if info is None:
        raise IncompleteCache(
            "there is no complete corpus to append to", where=root,
            todo="run `scholiast prepare` with this configuration",
        )  # fmt: skip
    identity = corpus_identity(options, memo, info.blocks_per_part)
    if identity != info.identity and not _extends(identity, info.identity):
        raise _other(identity, info.identity, root, grown=False)
    return identity, info


def _extends(identity: Mapping[str, Any], earlier: Mapping[str, Any]) -> bool:
    count = len(earlier["sources"])
    return count < len(identity["sources"]) and cut(identity, count) == earlier


def _other(
    identity: Mapping[str, Any], stands: Mapping[str, Any], root: Root, grown: bool
) -> StaleCache:
    expected, found = describe_differences(identity, stands)
    todo = (
        "restore the sources and options, name another corpus_dir, or delete this folder to prepare "
        "the corpus again (`scholiast append` takes sources that are added after the last one)"
    )
    if grown:
        todo = "run `scholiast append` to prepare the added sources, or name another corpus_dir"
    return StaleCache(
        "the corpus was prepared from something else", where=root, expected=expected,
        found=found, todo=todo,
    )  # fmt: skip
