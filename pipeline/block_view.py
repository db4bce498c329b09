"""One block's notes as text for people: what each row read, what each teacher expected next."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.inspect import has_target
from storage.blocks import BlockReader
from storage.errors import ConfigError, StaleCache
from storage.reader import CacheReader
from storage.types import LOG_ZERO, TeacherNotes, TokenBlocks

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class Vocabulary:
    """Token ids as text.

    Args:
        tokenizer: a tokenizers.Tokenizer; transformers is not needed.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def read(cls, folder: Path) -> Vocabulary:
        """Returns the vocabulary of a folder's tokenizer.json.

        Raises:
            ConfigError: there is none.
        """
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(
                "there is no tokenizer", where=path,
                todo="name the folder of the tokenizer that the corpus was prepared with",
            )  # fmt: skip
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # tokenizers raises plain ones
            raise ConfigError(
                "the tokenizer cannot be read", where=path, found=error,
                todo="name the folder of the tokenizer that the corpus was prepared with",
            ) from error  # fmt: skip

    def text(self, token: int) -> str:
        """Returns a token's text; bytes that are no whole character as ⟨E2⟩."""
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return f"#{token}"
        if "▁" in piece:  # decoding one such token alone would lose its space
            return str(piece).replace("▁", " ")
        text = str(self._tokenizer.decode([token], skip_special_tokens=False))
        return text if text and _UNKNOWN not in text else _bytes_of(str(piece))


def _bytes_of(piece: str) -> str:
    """Returns a token that is no text as what text it holds, its other bytes in hexadecimal."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):  # SentencePiece's byte fallback
        return f"⟨{piece[3:5]}⟩"
    if not piece or not all(c in _BYTES for c in piece):
        return f"«{piece}»"
    raw = bytes(_BYTES[c] for c in piece)
    text = raw.decode("utf-8", errors="surrogateescape")
    return "".join(f"⟨{ord(c) - 0xDC00:02X}⟩" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in text)


def _byte_alphabet() -> dict[str, int]:
    """Returns the characters that stand for bytes in a byte-level vocabulary (GPT-2's).

    Printable bytes stand for themselves, the others for U+0100 and onwards, in order.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTES = _byte_alphabet()


class BlockView:
    """Looks at single blocks of several teachers' caches, side by side.

    Args:
        caches: teacher → its cache.
        corpus: the tokenised corpus, if the tokens are to be shown.
        vocabulary: ids are shown as numbers without it.

    Raises (on construction):
        StaleCache: the caches, or the corpus, do not belong together.
    """

    def __init__(
        self,
        caches: Mapping[str, CacheReader],
        corpus: BlockReader | None,
        vocabulary: Vocabulary | None,
    ) -> None:
        self._caches, self._corpus, self._vocabulary = caches, corpus, vocabulary
        first = next(iter(caches.values()))
        self.block_length = first.layout.block_length
        expected = corpus.info.fingerprint if corpus else first.identity["corpus"]
        for name, cache in caches.items():
            if cache.identity["corpus"] != expected:
                raise StaleCache(
                    f"the cache of teacher {name!r} belongs to another corpus", where=cache.root,
                    expected=expected[:16], found=cache.identity["corpus"][:16],
                    todo="look at caches of one corpus at a time",
                )  # fmt: skip

    def rows(self, block: int, first: int, last: int, top: int) -> dict[str, Any]:
        """Returns rows [first, last) of a block's notes, as JSON values.

        Args:
            top: candidates of each teacher.

        Returns:
            {block, domain and split (of the corpus), rows: [{row, scored, token, next, document
            (of the corpus), teachers: name → {entropy, tail_mass, gold_logprob, candidates,
            drawn}}]}; null where an imported cache does not tell it. A token is {id, text}; a
            candidate has its probability `p` too.

        Raises:
            ConfigError: no such block or rows.
            IncompleteCache, MissingShard, CorruptShard
        """
        for cache in self._caches.values():
            try:
                cache.layout.part_of(block)
            except IndexError as error:  # beyond the end, or between two generations
                raise ConfigError("no such block", where="--block", expected=str(error), found=block,
                                  todo="choose another") from None  # fmt: skip
        length = self.block_length
        if not 0 <= first < last <= length:
            raise ConfigError("no such rows", where="--rows", expected=f"A:B within 0:{length}",
                              found=f"{first}:{last}", todo="choose some of them")  # fmt: skip
        ids = np.array([block])
        notes = {name: cache.read(ids) for name, cache in self._caches.items()}
        tokens = self._corpus.read(ids) if self._corpus else None
        shown = [self._row(t, notes, tokens, top) for t in range(first, last)]
        return {"block": block, **self._place(block), "rows": shown}

    def _place(self, block: int) -> dict[str, Any]:
        for source in self._corpus.info.sources if self._corpus else ():
            if source.first_block <= block < source.first_block + source.blocks:
                return {"domain": source.domain, "split": source.split}
        return {}

    def _row(
        self, t: int, notes: Mapping[str, TeacherNotes], tokens: TokenBlocks | None, top: int
    ) -> dict[str, Any]:
        known = next(iter(notes.values()))
        scored = bool(tokens.scored[0, t] if tokens else has_target(known.stats)[0, t])
        row: dict[str, Any] = {"row": t, "scored": scored}
        if tokens:
            row["document"] = int(tokens.document[0, t])
            row["token"] = self._token(int(tokens.tokens[0, t]))
            row["next"] = self._token(int(tokens.tokens[0, t + 1]))
        row["teachers"] = {
            name: self._notes(note, t, top) for name, note in notes.items() if scored
        }
        return row

    def _notes(self, notes: TeacherNotes, t: int, top: int) -> dict[str, Any]:
        ids, logprobs = notes.head.ids[0, t], notes.head.logprobs[0, t]
        order = np.argsort(-logprobs, kind="stable")[:top]
        return {
            "entropy": _known(notes.stats.entropy[0, t]),
            "tail_mass": float(np.exp(notes.stats.log_tail_mass[0, t])),
            "gold_logprob": _known(notes.stats.gold_logprob[0, t]),
            "candidates": [
                {**self._token(int(ids[i])), "p": float(np.exp(logprobs[i]))}
                for i in order if logprobs[i] > LOG_ZERO / 2  # unused entries of a cut head
            ],
            "drawn": [
                {**self._token(token), "times": times} for token, times in drawn(notes, t)
            ],
        }  # fmt: skip

    def _token(self, token: int) -> dict[str, Any]:
        text = self._vocabulary.text(token) if self._vocabulary else f"#{token}"
        return {"id": token, "text": text}


def _known(value: Any) -> float | None:
    """Returns a statistic, None where the cache does not hold it."""
    return None if np.isnan(value) else float(value)


def drawn(notes: TeacherNotes, t: int) -> list[tuple[int, int]]:
    """Returns the ids drawn from row t's tail with how often, most often first."""
    return Counter([] if notes.draws is None else notes.draws.ids[0, t].tolist()).most_common()


def visible(text: str) -> str:
    """Returns the text with control characters, and what a terminal would act on, escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
