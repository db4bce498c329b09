"""How many bytes of text a token stands for: what bits per byte are counted by.

Byte-level BPE writes each byte as one character of the token's name. Tokenizers of the SentencePiece
kind write a space as "▁", other bytes they do not know as "<0x0A>". In both, the sum over a document's
tokens is the length of its UTF-8 text, as the tokenizer's normaliser leaves it. Special tokens (end of
document, the marks of a chat) are no text: 0 bytes. Of other kinds of tokenizers this cannot be told.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from storage.types import Int64, TokenBlocks

_SPACE = "▁"


def id_bytes(tokenizer: Any) -> Int64 | None:
    """Returns the UTF-8 bytes of every id, int64 [V], or None if the tokenizer does not say.

    Args:
        tokenizer: fast tokenizer.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = [
        *_parts(state["decoder"]),
        *_parts(state["pre_tokenizer"]),
        *_parts(state["normalizer"]),
    ]
    byte_level = any(part["type"] == "ByteLevel" for part in parts)
    if not byte_level and not any(_SPACE in json.dumps(p, ensure_ascii=False) for p in parts):
        return None
    vocabulary = tokenizer.get_vocab()
    sizes = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for token, index in vocabulary.items():
        if byte_level:
            sizes[index] = len(token)
        elif len(token) == 6 and token.startswith("<0x"):
            sizes[index] = 1
        else:
            sizes[index] = len(token.replace(_SPACE, " ").encode())
    for index, added in tokenizer.added_tokens_decoder.items():
        sizes[index] = 0 if added.special else len(added.content.encode())
    return sizes


def _parts(node: Any) -> Iterator[dict[str, Any]]:
    """Yields every step of a tokenizer's decoder, pre-tokeniser or normaliser."""
    if node:
        yield {key: value for key, value in node.items() if not isinstance(value, list)}
        for key in ("decoders", "pretokenizers", "normalizers"):
            for inner in node.get(key, ()):
                yield from _parts(inner)


def added_space(tokenizer: Any, sizes: Int64) -> int:
    """Returns the bytes that the tokenizer puts before a text: 1 where it begins with a space."""
    return int(sizes[tokenizer("a", add_special_tokens=False)["input_ids"]].sum()) - 1


def target_bytes(blocks: TokenBlocks, sizes: Int64, space: int) -> Int64:
    """Returns the bytes of each block's scored targets, int64 [N].

    Args:
        sizes: of every id.
        space: what the tokenizer puts before a text. A document's first token is no target, but the one
            after a BOS is.
    """
    counted = sizes[blocks.tokens]
    # Two tokens may begin a text: the added space, and what follows it.
    begins = (blocks.offset == 0) & (counted > 0)
    first = begins[:, 1:] & ~begins[:, :-1]
    total: Int64 = ((counted[:, 1:] - space * first) * blocks.scored).sum(1)
    return total
