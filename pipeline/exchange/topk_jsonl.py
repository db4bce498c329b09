"""Plain top-k JSON lines: a line a sequence, in it a mapping of candidates for each token.

    {"input_ids": [5, 9, 2], "logprobs": [{"9": -0.1, "4": -2.5}, {"2": -0.3}], "start": 0}
    {"text": "…", "logprobs": […]}
    [{"9": 0.9, "4": 0.08}, …]                         EasyDistill's, of the teacher's answers alone

Entry j is the distribution of token start + j + offset (offset 1: what follows token start + j). A null
entry says that nothing was captured there. EasyDistill (github.com/modelscope/easydistill, kd_white_box)
writes bare lists of *probabilities* of the tokens that the teacher wrote, and not what they are: its
lines need a file with a line {"input_ids": […]} or {"text": "…"} each (prompt and answer). They tell of
its last tokens (or of those from its "start" on), with offset 0.

An entry is a mapping of ids (or token strings) to numbers, or a list of {"token_id" or "id" or "token":
…, "logprob": …}. Our own exports also have "gold_logprobs" and "entropy", a number an entry.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.exchange.captured import CapturedSequence, Reading, refuse, tokens_of
from storage.errors import ConfigError
from storage.types import Float32, Int32, Int64

_MOST, _LEAST = 1.001, 1e-45  # of a probability; what is less counts as the least float32
_LARGEST = float(np.finfo(np.float32).max)
_ID_KEYS = ("token_id", "id", "token")

LONGEST = 1 << 30
"""Bytes of a line that is read: a hundred candidates for each of 10^5 tokens as vLLM dumps them."""


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a JSON object; a key that stands twice is an error, where json takes the last."""
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} stands twice")
    return made


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (file and line, value) of each line that is not empty.

    Raises:
        CorruptShard: a line is no JSON, or an object in it has a key twice, or it is LONGEST or more.
    """
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST), b""), 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            if len(line) == LONGEST:
                raise refuse("the line is too long to be a sequence's", where,
                             expected=f"less than {LONGEST:,} bytes")  # fmt: skip
            try:
                yield where, json.loads(line, object_pairs_hook=distinct)
            except (ValueError, RecursionError) as error:
                raise refuse(f"no JSON: {error}", where) from error


def read_topk(files: Sequence[Path], reading: Reading) -> Iterator[CapturedSequence]:
    """Yields the sequences of JSON-lines captures.

    Raises:
        CorruptShard, ConfigError
    """
    lines = (line for path in files for line in json_lines(path))
    if reading.tokens is None:
        for where, row in lines:
            yield _sequence(row, None, reading, where)
        return
    for line, sequence in zip_longest(lines, json_lines(reading.tokens)):
        if line is None or sequence is None:
            raise ConfigError(
                "the file of sequences has another number of lines than the capture",
                where=f"--tokens {reading.tokens}", todo="give one line for each of the capture's",
            )  # fmt: skip
        yield _sequence(line[1], sequence[1], reading, line[0])


def _sequence(row: Any, sequence: Any, reading: Reading, where: str) -> CapturedSequence:
    if isinstance(row, list):
        row = {"logprobs": row}
    if not isinstance(row, dict) or not isinstance(row.get("logprobs"), list):
        raise refuse("the line has no list of candidates", where, expected="logprobs: […]")
    entries = row["logprobs"]
    told = sequence if sequence is not None else row
    tokens = sequence_tokens(told, ("input_ids", "token_ids", "prompt_token_ids"), reading, where)
    # Of EasyDistill's the entries are those of the answer, which ends the sequence.
    start = told.get("start", 0 if sequence is None else len(tokens) - len(entries))
    if type(start) is not int or not 0 <= start <= len(tokens):
        raise refuse("the entries begin at no token", where, expected=f"start 0 to {len(tokens):,}",
                     found=repr(start)[:80])  # fmt: skip
    ids, values, counts = parse_entries(entries, reading, where)
    count = len(counts)
    return CapturedSequence(
        where, tokens, start + reading.offset, counts, ids, values,
        _numbers(row.get("entropy"), count, "entropy", where),
        _numbers(row.get("gold_logprobs"), count, "gold_logprobs", where),
    )  # fmt: skip


def sequence_tokens(
    row: Any, keys: Sequence[str], reading: Reading, where: str, texts: Sequence[str] = ("text",)
) -> Int32:
    """Returns a sequence's tokens: ids where they are told, else its text by the corpus's tokenizer.

    Raises:
        ConfigError: neither is there. CorruptShard: no ids, or no text.
    """
    if isinstance(row, dict):
        for key in keys:
            if isinstance(row.get(key), list):
                return tokens_of(row[key], where)
        for key in texts:
            if isinstance(row.get(key), str):
                return tokens_of(reading.encode(_characters(row[key], key, where)), where)
    raise ConfigError(
        "the capture does not say which tokens its distributions belong to", where=where,
        expected=f"one of {', '.join((*keys, *texts))}", todo="add them, or give --tokens FILE: a line "
        '{"input_ids": […]} or {"text": "…"} for each line of the capture',
    )  # fmt: skip


def _characters(text: str, key: str, where: str) -> str:
    """Returns the text, which a tokenizer takes only without halves of pairs (JSON can hold them)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise refuse(
            f"{key} holds what is no character", f"{where}, character {error.start}",
            found=repr(text[error.start]),
        ) from None  # fmt: skip
    return text


def parse_entries(
    entries: Sequence[Any], reading: Reading, where: str
) -> tuple[Int32, Float32, Int64]:
    """Returns (ids, logprobs, how many of each entry).

    Raises:
        CorruptShard, ConfigError: an entry is not of the format; says which.
    """
    if reading.keys == "ids":  # quickly, as nearly all are; what fails here is told below
        with contextlib.suppress(TypeError, ValueError, OverflowError, AttributeError, KeyError):
            return _plain_entries(entries, reading)
    ids: list[int] = []
    values: list[float] = []
    counts: list[int] = []
    for j, entry in enumerate(entries):
        pairs = _pairs(entry, where, j)
        counts.append(len(pairs))
        for key, value in pairs:
            ids.append(_id(key, reading, where, j))
            values.append(_logprob(value, reading, where, j))
    return np.array(ids, np.int32), np.array(values, np.float32), np.array(counts, np.int64)


def _plain_entries(entries: Sequence[Any], reading: Reading) -> tuple[Int32, Float32, Int64]:
    """Returns what `parse_entries` does of mappings of ids to numbers, or to vLLM's objects.

    Raises:
        TypeError, ValueError, OverflowError, AttributeError, KeyError: they are something else.
    """
    told = [entry for entry in entries if entry is not None]
    keys = [int(key) for entry in told for key in entry.keys()]  # noqa: SIM118
    found = [value for entry in told for value in entry.values()]
    if found and isinstance(found[0], dict):
        found = [value["logprob"] for value in found]
    if not {type(value) for value in found} <= {float, int}:
        raise TypeError("no numbers")
    values, ids = np.array(found, np.float64), np.array(keys, np.int64)
    if len(ids) and (ids.min() < 0 or ids.max() >= 1 << 31):
        raise OverflowError("no ids")
    if reading.values == "probabilities":
        if not ((values >= 0) & (values <= _MOST)).all():
            raise ValueError("no probabilities")
        values = np.log(np.maximum(values, _LEAST))
    counts = [0 if entry is None else len(entry) for entry in entries]
    with np.errstate(over="ignore"):  # what is infinite is refused later
        return ids.astype(np.int32), values.astype(np.float32), np.array(counts, np.int64)


def _pairs(entry: Any, where: str, j: int) -> list[tuple[Any, Any]]:
    if entry is None:
        return []
    if isinstance(entry, Mapping):
        return list(entry.items())
    if isinstance(entry, list) and all(isinstance(one, dict) for one in entry):
        found = [
            (next((one[k] for k in _ID_KEYS if k in one), None), one.get("logprob"))
            for one in entry
        ]
        if all(key is not None for key, _ in found):
            return found
    raise refuse("an entry is no mapping of candidates", f"{where}, entry {j}")


def _id(key: Any, reading: Reading, where: str, j: int) -> int:
    if reading.keys == "tokens":
        if key in reading.vocabulary:
            return reading.vocabulary[key]
        raise refuse(
            "a candidate is no token of the corpus's tokenizer",
            f"{where}, entry {j}",
            found=repr(key),
        )
    try:
        number = int(key)
    except (TypeError, ValueError):
        raise ConfigError(
            "a candidate is no token id", where=f"{where}, entry {j}", found=repr(key),
            todo="give --keys tokens if the keys are the tokenizer's tokens",
        ) from None  # fmt: skip
    if not 0 <= number < 1 << 31:
        raise refuse("a candidate is no token id", f"{where}, entry {j}", found=number)
    return number


def _logprob(value: Any, reading: Reading, where: str, j: int) -> float:
    if isinstance(value, Mapping):  # vLLM's: logprob, rank, decoded_token
        value = value.get("logprob")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refuse("a candidate has no number", f"{where}, entry {j}", found=repr(value))
    if reading.values == "logprobs":
        return _float32(value)
    if not 0 <= value <= _MOST:
        raise refuse("no probability", f"{where}, entry {j}", expected="0 to 1", found=value)
    return math.log(max(value, _LEAST))


def _numbers(values: Any, count: int, name: str, where: str) -> Any:
    """Returns float32 [count] of a list with nulls (NaN), None where there is no list."""
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != count:
        raise refuse(f"{name} has not a number for each entry", where, expected=count)
    made = np.full(count, np.nan, np.float32)
    for j, value in enumerate(values):
        if value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or value != value:  # NaN says as little as text does; null: not known
            raise refuse(
                f"{name} holds what is no number", f"{where}, entry {j}", found=repr(value)
            )
        made[j] = _float32(value)
    return made


def _float32(value: float) -> float:
    """Returns the number; what float32 cannot hold (or any float: an int can be so large) is infinite."""
    return value if abs(value) <= _LARGEST else math.copysign(math.inf, 1 if value > 0 else -1)
