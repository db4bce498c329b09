"""What a source of text is: its format, its column, and how much it holds, told from its first rows."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from stages.documents import source_files
from stages.options import SourceOptions
from stages.passages import passages
from storage.errors import ConfigError, CorpusError

ROWS = 500  # documents that are looked at, at most
_BYTES = 4_000_000  # of their text, about
_LISTED = 20  # names of a hub data set's configurations that a message shows
_SUFFIXES = {
    ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet",
    ".txt": "text", ".md": "text", ".rst": "text", ".text": "text",
}  # fmt: skip
_CHAT_COLUMNS = ("messages", "conversations", "conversation")


@dataclass(frozen=True)
class Found:
    """A source and what its first rows tell.

    Attributes:
        options: as the configuration will have it.
        sample: the first documents: texts, or lists of messages; a long file's text is its beginning.
        whole: whether these are all of them, to their ends.
        documents: how many there are; estimated unless `exact`.
        tokens: of all of them, by the sample's; 0 until they are counted.
        times: how many times the sample's text all of the text is, about.
        more: whether nobody knows how much more there is than the sample: documents, tokens and times
            are the least then.
    """

    options: SourceOptions
    sample: list[Any]
    whole: bool
    documents: int
    tokens: int = 0
    times: float = 1.0
    more: bool = False

    @property
    def exact(self) -> bool:
        """Whether the documents are counted: files are, and rows where the format tells their number."""
        told = self.options.format in ("text", "parquet", "disk")
        return self.whole or (told and not self.options.passage_chars)

    @property
    def how_sure(self) -> str:
        """What is said before the number of documents."""
        return "" if self.exact else "at least " if self.more else "about "

    @property
    def about(self) -> str:
        """One line for people."""
        column = self.options.messages_field or self.options.text_field
        what = "passages" if self.options.passage_chars else "texts"
        what = "chats" if self.options.messages_field else what
        counted = self.how_sure
        where = "" if self.options.format == "text" else f' in "{column}"'
        tokens = f"{'at least' if self.more else 'about'} {self.tokens:,} tokens"
        return f"{counted}{self.documents:,} {what}{where}, {tokens}"


Look = Callable[[SourceOptions, str, str | None], Found]
"""Looks at a source: (the source, its name for messages, its column if that is known) → what it is."""


UNTOLD: Final = "it cannot be told which column holds the text"
"""Said where several columns could be the text and none was named: at a terminal that can be asked."""


def parse(text: str, key: str) -> list[dict[str, Any]]:
    """Returns what the user wrote, DOMAIN=PATH or PATH, as values of SourceOptions.

    A folder gives a source for each suffix of the files in it, all of one domain.

    Raises:
        ConfigError: there is nothing there, or nothing of a known format.
    """
    domain, equals, path = text.partition("=")
    if not equals:
        domain, path = "", text
    if path.startswith("hub:"):
        return [_hub_source(domain, path.removeprefix("hub:"))]
    domain = (
        domain or Path(path.rstrip("/")).name.split(".")[0].replace("*", "").strip("-_") or "text"
    )
    folder = Path(path)
    if folder.is_dir():
        if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return [{"domain": domain, "format": "disk", "path": path}]
        suffixes = sorted({p.suffix for p in folder.rglob("*") if p.suffix in _SUFFIXES})
        patterns = [(_SUFFIXES[s], f"{path.rstrip('/')}/**/*{s}") for s in suffixes]
        if patterns:
            return [{"domain": domain, "format": kind, "path": p} for kind, p in patterns]
    elif Path(path).suffix in _SUFFIXES:
        return [{"domain": domain, "format": _SUFFIXES[Path(path).suffix], "path": path}]
    raise ConfigError(
        "the format of a source cannot be told", where=f"{key} {text}",
        expected=f"files that end in {', '.join(_SUFFIXES)}, a folder of them or of save_to_disk, or "
        "hub:NAME[:CONFIG[:SPLIT]]",
        todo="name such files (a glob in quotes will do), or rename them",
    )  # fmt: skip


def _hub_source(domain: str, text: str) -> dict[str, Any]:
    """Returns the values of NAME[:CONFIG[:SPLIT]][@REVISION]; what is left empty is not given."""
    named, _, revision = text.partition("@")
    name, config, split = (*named.split(":", 2), "", "")[:3]
    given = {"hub_config": config, "hub_split": split, "revision": revision}
    return {
        "domain": domain or name.rsplit("/", 1)[-1], "format": "hub", "path": name,
        **{key: value for key, value in given.items() if value},
    }  # fmt: skip


def find(
    text: str, key: str, fields: Mapping[str, str] = MappingProxyType({}), split: str = "train",
    look: Look | None = None,
) -> list[Found]:  # fmt: skip
    """Returns the sources that the user means, each with its first documents.

    Args:
        text: DOMAIN=PATH or PATH.
        key: the flag, for messages.
        fields: domain → column of text or messages; found if not given.
        look: looks at one of the sources, in place of `look_at`.

    Raises:
        ConfigError: no known format, or no column of text can be told.
        CorpusError: no files, or not readable as what their suffix says.
    """
    where, found = f"{key} {text}", []
    parsed = parse(text, key)
    for values in parsed:
        if values["format"] == "hub" and "revision" not in values:
            values["revision"] = _newest_revision(values["path"], where)
        # Beside files that have columns, a folder's plain texts are no reason to refuse one.
        bare = values["format"] == "text" and len(parsed) > 1
        column = None if bare else fields.get(values["domain"])
        source = SourceOptions(**{**values, "split": split})
        found.append((look or look_at)(source, where, column))
    return found


def look_at(source: SourceOptions, key: str, field: str | None = None) -> Found:
    """Returns a source's first documents and how many there are; its column is found if not given.

    Raises:
        ConfigError, CorpusError
    """
    rows, total = _first_rows(source, key)
    more = total is None
    total = len(rows) + 1 if total is None else total
    if not rows:
        raise CorpusError(
            "the source is empty", where=f"{key}: {source.path}", todo="give one with documents"
        )
    column, chat = _column(rows, source, key, field)
    if source.format != "text":
        changed = {"messages_field": column} if chat else {"text_field": column}
        source = source.model_copy(update=changed)
    sample = [row[column] for row in rows]
    times = _times_read(source, key, sample) if source.format == "text" else total / len(rows)
    whole = len(rows) == total and times == 1.0
    found = Found(source, sample, whole, total, times=times, more=more)
    return in_passages(found, source.passage_chars) if source.passage_chars and not chat else found


def in_passages(found: Found, length: int) -> Found:
    """Returns a source of texts, cut into passages of at most so many characters."""
    pieces = [piece for text in found.sample for piece in passages(text, length)]
    options = found.options.model_copy(update={"passage_chars": length})
    sample, documents = pieces[:ROWS], int(len(pieces) * found.times)
    return replace(
        found, options=options, sample=sample, whole=found.whole and len(pieces) <= ROWS,
        documents=documents, times=documents / max(1, len(sample)),
    )  # fmt: skip


def count_tokens(found: Found, key: str, tokenizer: Any) -> Found:
    """Returns the source with its tokens counted on the sample, by the corpus's own code.

    Raises:
        CorpusError: a row is not text, or not a chat that the template can render.
    """
    undivided = replace(found, options=found.options.model_copy(update={"heldout": 0.0}))
    tokens = sum(_tokens(undivided, key, tokenizer, False))
    return replace(found, tokens=max(1, int(tokens * found.times)))


def sides(found: Found, key: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Returns the tokens of each of the sample's documents that is held out, and that is not."""
    held = _tokens(found, key, tokenizer, True) if found.options.heldout else []
    return held, _tokens(found, key, tokenizer, False)


def _tokens(found: Found, key: str, tokenizer: Any, heldout: bool) -> list[int]:
    """Returns the tokens of each of the sample's documents on one side of the held-out share."""
    import datasets

    from stages.documents import DocumentStream, require_chat_template

    source = found.options
    if source.messages_field:
        require_chat_template(tokenizer, key)
    column = source.messages_field or source.text_field
    rows = datasets.Dataset.from_dict({column: found.sample})
    stream = DocumentStream(source, key, rows, heldout, tokenizer, tokenizer.eos_token_id)
    return [len(document.tokens) for document in stream.documents(0)]


def _column(
    rows: list[dict[str, Any]], source: SourceOptions, key: str, field: str | None
) -> tuple[str, bool]:
    """Returns the column that holds the text, and whether it holds chats."""
    columns = list(rows[0])
    texts = [name for name in columns if all(isinstance(row.get(name), str) for row in rows)]
    chats = [name for name in columns if all(_is_chat(row.get(name)) for row in rows)]
    if field is not None:
        if field in texts or field in chats:
            return field, field in chats
    elif source.messages_field in chats or source.text_field in texts:
        return (
            (source.messages_field, True) if source.messages_field in chats
            else (source.text_field, False)
        )  # fmt: skip
    else:
        named = [name for name in chats if name in _CHAT_COLUMNS] or chats
        if named:
            return named[0], True
        if len(texts) == 1:
            return texts[0], False
    listed = ", ".join(f"{name} ({_kind(rows[0][name])})" for name in columns)
    where, found = f"{key}: {source.path}", f"columns: {listed}"
    if field is None and not (texts or chats):
        raise ConfigError(
            "no column holds text or chat messages in every row", where=where, found=found,
            todo='give a source that has one; chats are lists of {"role": …, "content": …}',
        )  # fmt: skip
    flag = f"name the column with --field {source.domain}=COLUMN"
    todo = flag if key.startswith("--") else f"set {key}.text_field or messages_field"
    raise ConfigError(
        UNTOLD if field is None
        else f"the column {field!r} holds neither text nor chat messages in every row",
        where=where, found=found,
        todo=f'{todo}; chats are lists of {{"role": …, "content": …}}',
    )  # fmt: skip


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(
        isinstance(one, dict) and "role" in one and "content" in one for one in value
    )  # fmt: skip


def _kind(value: Any) -> str:
    names = {str: "text", list: "list", dict: "mapping", bool: "yes or no", int: "number"}
    return names.get(type(value), type(value).__name__)


def _first_rows(source: SourceOptions, key: str) -> tuple[list[dict[str, Any]], int | None]:
    """Returns the first rows, and how many there are: estimated from sizes where not all are read, None
    where a stream does not tell."""
    readers = {"text": _texts, "jsonl": _json_rows, "parquet": _parquet_rows}
    try:
        if source.format in readers:
            return readers[source.format](source, source_files(source, key))
        return _dataset_rows(source, key)
    except (CorpusError, ConfigError):
        raise
    except (
        Exception
    ) as error:  # each library raises its own kinds for files that are not its format
        text = str(error).strip().splitlines() or [""]
        raise CorpusError(
            f"the source cannot be read: {type(error).__name__}: {text[0][:300]}",
            where=f"{key}: {source.path}", todo=f"check that it is {source.format!r} and not damaged",
        ) from error  # fmt: skip


def _limited(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields rows until there are enough of them, or of their text."""
    size = 0
    for row in islice(rows, ROWS):
        yield row
        size += sum(len(value) for value in row.values() if isinstance(value, str))
        if size > _BYTES:
            return


def _texts(source: SourceOptions, files: list[Path]) -> tuple[list[dict[str, Any]], int]:
    return list(_limited({source.text_field: _beginning(path)} for path in files)), len(files)


def _beginning(path: Path) -> str:
    """Returns a file's text, or of a long one its first megabytes up to a whole character."""
    with path.open("rb") as file:
        data = file.read(_BYTES)
        ended = not file.read(1)
    return codecs.getincrementaldecoder("utf-8")().decode(data, final=ended)


def _times_read(source: SourceOptions, key: str, texts: Sequence[str]) -> float:
    """Returns how many times what was read of a source's files they are."""
    size = sum(path.stat().st_size for path in source_files(source, key))
    return max(1, size) / max(1, sum(len(text.encode()) for text in texts))


def _is_list(path: Path) -> bool:
    """Returns whether a file is one JSON list, and not a value a line."""
    with path.open("rb") as file:
        return file.read(1 << 12).lstrip()[:1] == b"["


def _json_rows(source: SourceOptions, files: list[Path]) -> tuple[list[dict[str, Any]], int]:
    if files[0].suffix == ".json" and _is_list(files[0]):
        values = [row for path in files for row in json.loads(path.read_text())]
        return list(_limited(iter(values))), len(values)
    read = 0

    def lines() -> Iterator[dict[str, Any]]:
        nonlocal read
        for path in files:
            with path.open("rb") as file:
                for line in file:
                    read += len(line)
                    if line.strip():
                        yield json.loads(line)

    rows = list(_limited(lines()))
    size = sum(path.stat().st_size for path in files)
    return rows, len(rows) if read >= size or not read else max(
        len(rows) + 1, len(rows) * size // read
    )


def _parquet_rows(source: SourceOptions, files: list[Path]) -> tuple[list[dict[str, Any]], int]:
    from pyarrow import parquet

    def rows() -> Iterator[dict[str, Any]]:
        for path in files:
            for batch in parquet.ParquetFile(path).iter_batches(batch_size=64):
                yield from batch.to_pylist()

    return list(_limited(rows())), sum(parquet.read_metadata(path).num_rows for path in files)


def _dataset_rows(source: SourceOptions, key: str) -> tuple[list[dict[str, Any]], int | None]:
    import datasets

    datasets.disable_progress_bars()
    if source.format == "disk":
        loaded = datasets.load_from_disk(source.path)
        if isinstance(loaded, datasets.DatasetDict):
            if source.hub_split not in loaded:
                raise _no_split(
                    source, key, list(loaded),
                    f"name one's folder, {source.path}/{next(iter(loaded), 'SPLIT')}",
                )  # fmt: skip
            loaded = loaded[source.hub_split]
        return list(_limited(iter(loaded))), len(loaded)
    try:
        stream = datasets.load_dataset(
            source.path, source.hub_config, split=source.hub_split, revision=source.revision,
            streaming=True,
        )  # fmt: skip
    except ValueError:
        _require_named(source, key)
        raise
    waiting = iter(stream)
    rows = list(_limited(waiting))
    known = (stream.info.splits or {}).get(source.hub_split)
    if known and known.num_examples:
        return rows, int(known.num_examples)
    return rows, len(rows) if next(waiting, None) is None else None


def _require_named(source: SourceOptions, key: str) -> None:
    """Refuses a configuration or split that a hub's data set does not have.

    Raises:
        CorpusError: with the names of those it has.
    """
    import datasets

    name, config, revision = source.path, source.hub_config, source.revision
    configs = datasets.get_dataset_config_names(name, revision=revision)
    default = datasets.get_dataset_default_config_name(name, revision=revision)
    if (config or default) not in configs:
        raise CorpusError(
            f"the data set has no configuration {config!r}" if config
            else "the data set has several configurations, and none is named",
            where=f"{key}: {name}", expected=f"one of {_listed(configs)}", found=config,
            todo=f"name one, such as hub:{name}:{configs[0]}, or set hub_config",
        )  # fmt: skip
    splits = datasets.get_dataset_split_names(name, config, revision=revision)
    if source.hub_split not in splits:
        raise _no_split(
            source, key, splits, f"name one, such as hub:{name}:{config or ''}:{splits[0]}"
        )


def _no_split(source: SourceOptions, key: str, splits: Sequence[str], todo: str) -> CorpusError:
    return CorpusError(
        "the data set has no such split", where=f"{key}: {source.path}",
        expected=f"one of {_listed(splits)}", found=source.hub_split,
        todo=f"{todo}, or set hub_split",
    )  # fmt: skip


def _listed(names: Sequence[str]) -> str:
    more = f", … ({len(names)} in all)" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _newest_revision(name: str, where: str) -> str:
    """Returns the commit that the hub's data set has now, so that the corpus stays the same.

    Raises:
        CorpusError: the hub cannot be asked.
    """
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name).sha)
    except Exception as error:  # the hub client has no common base for "cannot be had"
        raise CorpusError(
            f"the data set's revision cannot be had: {type(error).__name__}", where=where, found=name,
            todo="check name and network, or give the revision: hub:NAME@REVISION",
        ) from error  # fmt: skip
