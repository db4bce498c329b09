"""What the readers of other tools' captures give: sequences with the heads that were captured on them.

Shapes: n tokens of a sequence, m entries (one distribution each), W candidates of an entry.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from storage.errors import ConfigError, CorruptShard
from storage.types import Float32, Int32, Int64

Format = Literal["distillkit", "topk-jsonl", "vllm"]
Values = Literal["logprobs", "probabilities"]
Keys = Literal["ids", "tokens"]

SUFFIX = {"distillkit": ".parquet", "topk-jsonl": ".jsonl", "vllm": ".jsonl"}
"""Files of a folder that are looked at, by format."""


def usual_offset(kind: Format, tokens: Path | None) -> int:
    """Returns of which token, from its own place on, an entry is the distribution: what each tool writes.

    Args:
        tokens: the file of sequences beside a capture of answers, whose entries are of their own tokens.
    """
    return 1 if kind == "distillkit" or (kind == "topk-jsonl" and tokens is None) else 0


@dataclass(frozen=True)
class CapturedSequence:
    """One captured sequence.

    Attributes:
        where: file and row, for messages.
        tokens: int32 [n], as the teacher read them.
        first: entry j is the distribution of token first + j, given the tokens before it.
        counts: int64 [m], candidates of each entry; 0 where nothing was captured.
        ids: int32 [Σ counts]; logprobs: float32 [Σ counts]; entry by entry, in any order.
        entropy, gold: float32 [m], NaN where not known: the distribution's, and the logprob of the actual
            token, where a capture tells them apart from its candidates (our own exports do); None else.
    """

    where: str
    tokens: Int32
    first: int
    counts: Int64
    ids: Int32
    logprobs: Float32
    entropy: Float32 | None = None
    gold: Float32 | None = None


@dataclass(frozen=True)
class Reading:
    """How a capture is to be read.

    Attributes:
        format: whose it is.
        offset: entry j of a sequence is the distribution of token j + offset.
        values, keys: what topk-jsonl's numbers and keys are.
        layout: a file that describes DistillKit's compression; tokens: one with the sequences of a
            topk-jsonl capture that has none.
        vocabulary: token → id of the corpus's tokenizer; encode: text → ids by it.
    """

    format: Format
    offset: int
    values: Values
    keys: Keys
    layout: Path | None
    tokens: Path | None
    vocabulary: dict[str, int]
    encode: Callable[[str], list[int]]


def capture_files(path: Path, kind: Format) -> list[Path]:
    """Returns a capture's files, sorted by name: a file, a folder's, or those of a glob.

    Raises:
        ConfigError: there are none.
    """
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix == SUFFIX[kind] and p.is_file())
    else:
        files = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
    if not files:
        raise ConfigError(
            "there are no captures", where="--from", expected=f"*{SUFFIX[kind]}", found=path,
            todo="give a file, a folder of them, or a glob",
        )  # fmt: skip
    return files


def refuse(what: str, where: object, *, expected: Any = None, found: Any = None) -> CorruptShard:
    """Returns the error of a capture that is not what it should be."""
    return CorruptShard(
        what, where=where, expected=expected, found=found,
        todo="check --format and how the capture was made; nothing was imported",
    )  # fmt: skip


def tokens_of(ids: Sequence[Any], where: str) -> Int32:
    """Returns a sequence's tokens; refuses what are no ids at all."""
    try:
        tokens = np.array(ids, np.int64)
        whole = set(map(type, ids)) <= {int}  # of 1.5 NumPy makes 1
    except (TypeError, ValueError, OverflowError):
        tokens, whole = np.zeros(0, np.int64), False
    if not whole or (tokens.size and (tokens.min() < 0 or tokens.max() >= 1 << 31)):
        raise refuse("the sequence's tokens are no ids", where)
    return tokens.astype(np.int32)


def read_capture(files: Sequence[Path], reading: Reading) -> Iterator[CapturedSequence]:
    """Yields the sequences of a capture's files, in their order.

    Raises:
        CorruptShard: a file is not of that format; says which file and row.
        ConfigError: the options do not go with the format.
    """
    if reading.format == "distillkit":
        from pipeline.exchange.distillkit import read_distillkit

        yield from read_distillkit(files, reading)
    elif reading.format == "vllm":
        from pipeline.exchange.vllm import read_vllm

        yield from read_vllm(files, reading)
    else:
        from pipeline.exchange.topk_jsonl import read_topk

        yield from read_topk(files, reading)
