"""What decides the packed blocks, from files alone: no torch, no transformers, no tokenising."""

from __future__ import annotations

import json
from typing import Any

from stages.documents import source_identity
from stages.model_files import locate, tokenizer_identity
from stages.options import CorpusOptions
from storage.blocks import FORMAT, CorpusInfo, load_info
from storage.errors import StaleCache
from storage.fingerprint import HashMemo, describe_differences, fingerprint
from storage.remote import Root


def corpus_identity(options: CorpusOptions, memo: HashMemo) -> dict[str, Any]:
    """Returns what decides the packed blocks, from files alone.

    Raises:
        CorpusError, TeacherError: a source or the tokenizer is not there.
    """
    folder = locate(
        options.tokenizer, options.tokenizer_revision, "corpus.tokenizer", weights=False
    )
    return {
        "format": FORMAT,
        "tokenizer_files": tokenizer_identity(folder, "corpus.tokenizer", memo),
        "block_length": options.block_length,
        "blocks_per_part": options.blocks_per_part,
        "append_eos": options.append_eos,
        "sources": {
            f"{i:03d}": source_identity(source, f"corpus.sources.{i}", memo)
            for i, source in enumerate(options.sources)
        },
    }


def begun_identity(root: Root) -> dict[str, Any] | None:
    """Returns the identity of a preparation that was begun at `root`, if one was."""
    try:
        begun: dict[str, Any] = json.loads((root / "begun.json").read_bytes())
    except (OSError, ValueError):
        return None
    return begun


def require_corpus(
    options: CorpusOptions, root: Root, memo: HashMemo
) -> tuple[dict[str, Any], CorpusInfo | None]:
    """Returns (identity, the corpus at `root` if it is complete).

    Raises:
        StaleCache: `root` holds a corpus made from something else.
    """
    identity = corpus_identity(options, memo)
    info = load_info(root)
    begun = info.identity if info is not None else begun_identity(root)
    if begun is not None and fingerprint(begun) != fingerprint(identity):
        expected, found = describe_differences(identity, begun)
        raise StaleCache(
            "the corpus was prepared from something else", where=root, expected=expected,
            found=found, todo="restore the sources and options, name another corpus_dir, "
            "or delete this folder to prepare the corpus again",
        )  # fmt: skip
    return identity, info
