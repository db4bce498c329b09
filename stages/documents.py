"""Documents in all the forms users have → (text, target mask) → tokens with their byte offsets."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from stages.options import SourceOptions
from stages.passages import VERSION, Passages
from storage.errors import CorpusError
from storage.fingerprint import HashMemo
from storage.types import Bool, Int32, Int64

Spans = list[tuple[int, int]]
"""Character ranges of a text."""

_ROWS = 256  # documents tokenised at once


@dataclass(frozen=True)
class Document:
    """One tokenised document.

    Attributes:
        row: its row in the source.
        tokens: int32 [n].
        offset: int64 [n], byte of the UTF-8 text at which each token's first character begins.
        loss_mask: bool [n].
    """

    row: int
    tokens: Int32
    offset: Int64
    loss_mask: Bool


def source_files(source: SourceOptions, key: str) -> list[Path]:
    """Returns a local source's files, sorted by name.

    Raises:
        CorpusError: there are none.
    """
    pattern = f"{source.path}/**/*.arrow" if source.format == "disk" else source.path
    files = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file())
    if source.format == "disk":  # what somebody's `map` left there is no text of the data set
        files = [path for path in files if not path.name.startswith("cache-")]
    if not files:
        raise CorpusError(
            "the source has no files", found=source.path,
            where=key if key.startswith("--") else f"{key}.path",
            todo="give an existing file, a glob that matches files, or a save_to_disk folder",
        )  # fmt: skip
    return files


def source_identity(source: SourceOptions, key: str, memo: HashMemo) -> dict[str, Any]:
    """Returns what decides the source's documents: options, and content hashes (hub: revision)."""
    identity = source.model_dump(mode="json")
    if source.passage_chars is None:
        del identity["passage_chars"]  # corpora from before there was such a key stay what they are
    else:
        identity["passages"] = VERSION
    if source.format != "hub":
        del identity["path"]  # a corpus that is moved stays the same corpus
        identity["files"] = [memo.sha256(path) for path in source_files(source, key)]
    return identity


def load_rows(source: SourceOptions, key: str) -> Any:
    """Returns the source as a map-style `datasets.Dataset` of one column, a row a document.

    Raises:
        CorpusError: it cannot be read, is empty, or lacks the column.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = _load(source, key)
    except CorpusError:
        raise
    except Exception as error:  # datasets raises many kinds; the innermost says what is wrong
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        why = "it is empty" if isinstance(cause, StopIteration) else (
            f"{type(cause).__name__}: {str(cause).strip()[:300]}"
        )  # fmt: skip
        raise CorpusError(
            f"the source cannot be read: {why}",
            where=f"{key}: {source.path}",
            todo=f"check that it is {source.format!r}, that it exists and is not damaged",
        ) from error
    column = source.messages_field or source.text_field
    if column not in rows.column_names:
        raise CorpusError(
            "the source has no such column", where=f"{key}: {source.path}", expected=column,
            found=", ".join(rows.column_names), todo="set text_field or messages_field",
        )  # fmt: skip
    rows = rows.select_columns([column])
    if not source.passage_chars:
        return rows
    return Passages(rows, column, source.passage_chars, partial(_refused, source, key))


def _refused(source: SourceOptions, key: str, row: int, what: str) -> CorpusError:
    return CorpusError(
        what, where=f"{key}: {source.path}, row {row}",
        todo="mend or drop the row, or check text_field and messages_field",
    )  # fmt: skip


def _load(source: SourceOptions, key: str) -> Any:
    import datasets

    if source.format == "hub":
        return datasets.load_dataset(
            source.path, source.hub_config, split=source.hub_split, revision=source.revision
        )
    files = [str(path) for path in source_files(source, key)]
    if source.format == "text":
        # Not the library's text loader: it strips line ends at chunk borders, and a document's
        # bytes must stay what they are for offsets to mean anything.
        texts = [Path(path).read_bytes().decode("utf-8") for path in files]
        features = datasets.Features({source.text_field: datasets.Value("large_string")})
        return datasets.Dataset.from_dict({source.text_field: texts}, features=features)
    if source.format == "disk":
        loaded = datasets.load_from_disk(source.path)
        if isinstance(loaded, datasets.DatasetDict):
            if source.hub_split not in loaded:
                raise CorpusError(
                    "the data set has no such split", where=f"{key}.hub_split",
                    expected=source.hub_split, found=", ".join(loaded), todo="set hub_split",
                )  # fmt: skip
            loaded = loaded[source.hub_split]
        return loaded
    kind = {"jsonl": "json", "parquet": "parquet"}[source.format]
    return datasets.load_dataset(kind, data_files=files, split="train")


def is_heldout(text: str, share: float) -> bool:
    """Returns whether a document is held out: decided by its text alone, so copies stay together."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def byte_offsets(text: str, characters: Int64) -> Int64:
    """Returns the UTF-8 byte at which each character index lies, int64 of the same shape."""
    if text.isascii():
        return characters
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    width = 1 + (points >= 0x80) + (points >= 0x800).astype(np.int64) + (points >= 0x10000)
    offsets: Int64 = np.concatenate([[0], np.cumsum(width)])[characters]
    return offsets


class DocumentStream:
    """The documents of one source and split, from any row on, in row order.

    Args:
        source, key: the source and its configuration key.
        rows: what `load_rows` gave.
        heldout: whether the held-out share or the rest is wanted.
        tokenizer: fast tokenizer.
        eos: id appended to plain-text documents, or None.

    Raises (while iterating):
        CorpusError: a row is not text, not UTF-8, or not a chat that the template can render.
    """

    def __init__(
        self,
        source: SourceOptions,
        key: str,
        rows: Any,
        heldout: bool,
        tokenizer: Any,
        eos: int | None,
    ) -> None:
        self.source, self.key, self.rows, self.heldout = source, key, rows, heldout
        self.tokenizer, self.eos = tokenizer, eos

    def documents(self, first_row: int) -> Iterator[Document]:
        """Yields the documents from `first_row` on; those without a token are passed over."""
        column = self.source.messages_field or self.source.text_field
        for start in range(first_row, len(self.rows), _ROWS):
            values = self.rows[start : start + _ROWS][column]
            numbered = [(start + i, value) for i, value in enumerate(values)]
            texts = [(row, *self._text_and_spans(row, value)) for row, value in numbered]
            yield from self._tokenise([item for item in texts if item[1] and self._wanted(item[1])])

    def _wanted(self, text: str) -> bool:
        share = self.source.heldout
        return not share or is_heldout(text, share) == self.heldout

    def _text_and_spans(self, row: int, value: Any) -> tuple[str, Spans | None]:
        return (
            self._render(row, value)
            if self.source.messages_field
            else (self._text(row, value), None)
        )

    def _text(self, row: int, value: Any) -> str:
        if not isinstance(value, str):
            raise self._refuse(row, f"a row is {type(value).__name__}, not text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self._refuse(row, f"a row is not valid Unicode: {error}") from error
        return value

    def _refuse(self, row: int, what: str) -> CorpusError:
        return _refused(self.source, self.key, row, what)

    def _tokenise(self, kept: list[tuple[int, str, Spans | None]]) -> Iterator[Document]:
        if not kept:
            return
        encoded = self.tokenizer(
            [text for _, text, _ in kept], return_offsets_mapping=True,
            return_attention_mask=False, add_special_tokens=not self.source.messages_field,
            verbose=False,
        )  # fmt: skip
        for (row, text, spans), ids, mapping in zip(
            kept, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            characters = np.array([start for start, _ in mapping], np.int64)
            tokens = np.array(ids, np.int32)
            offset = byte_offsets(text, characters)
            mask = np.ones(len(tokens), bool) if spans is None else _inside(characters, spans)
            if self.eos is not None and spans is None and (not len(ids) or ids[-1] != self.eos):
                tokens = np.append(tokens, np.int32(self.eos))
                offset = np.append(offset, len(text.encode()))
                mask = np.append(mask, True)
            if len(tokens):
                yield Document(row, tokens, offset, mask)

    def _render(self, row: int, messages: Any) -> tuple[str, Spans]:
        """Returns a chat's text and the character spans that the assistant wrote.

        The chat is rendered up to each of the assistant's turns: what the turn adds after the
        generation prompt is its span, its end-of-turn mark included. A template that rewrites
        earlier turns has no such spans, and is refused.
        """
        if not isinstance(messages, list) or not messages:
            raise self._refuse(row, "a row is not a list of chat messages")
        spans: Spans = []
        try:
            text = self._apply(messages, False)
            for i, message in enumerate(messages):
                if message.get("role") != "assistant":
                    continue
                after = self._apply(messages[: i + 1], False)
                # No template renders an empty chat: a first turn begins where its content does.
                opening = after.partition(str(message.get("content")))[0]
                before = self._apply(messages[:i], True) if i else opening
                if not (after.startswith(before) and text.startswith(after)):
                    raise self._refuse(
                        row, "the chat template rewrites earlier turns, so that the assistant's "
                        "tokens cannot be told apart",
                    )  # fmt: skip
                spans.append((len(before), len(after)))
        except CorpusError:
            raise
        except Exception as error:  # a template may raise anything, jinja's errors among them
            raise self._refuse(row, f"the chat template fails: {error}") from error
        return self._text(row, text), spans

    def _apply(self, messages: list[Any], prompt: bool) -> str:
        text: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt
        )
        return text


def _inside(characters: Int64, spans: Spans) -> Bool:
    mask = np.zeros(len(characters), bool)
    for start, end in spans:
        mask |= (characters >= start) & (characters < end)
    return mask


def require_chat_template(tokenizer: Any, key: str) -> None:
    """Refuses chat messages for a tokenizer without a chat template.

    Raises:
        CorpusError
    """
    if not getattr(tokenizer, "chat_template", None):
        raise CorpusError(
            "the source holds chat messages but the tokenizer has no chat template", where=key,
            todo="use the instruct model's tokenizer, or add a chat_template",
        )  # fmt: skip
