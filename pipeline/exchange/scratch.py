"""A capture, read once and checked, as flat files from which any sequence's heads are read at random.

Other tools write rows in any order (DistillKit shuffles), and Parquet and JSON have no cheap random
access. So the capture is read front to back once, beside the cache: `tokens` (big-endian int32, so that
bytes compare as ids do), `ids`, `logprobs` (candidates of all entries, each entry's most probable first),
and int64 tables of where sequences and entries end. It is deleted when the import is done; a stopped one
finds it again, if it is whole and of the same files and options. `facts.json` says so, and is written
when all others are on the device: a power cut leaves no facts of files that it took.

Shapes: n sequences, R of their entries that are asked for.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from pipeline.exchange.captured import CapturedSequence
from pipeline.exchange.checks import CleanHeads
from storage import durable
from storage.fingerprint import canonical_json, fingerprint
from storage.types import AnyArray, Float32, Int32, Int64

TYPES = {
    "tokens": ">i4", "ids": "<i4", "logprobs": "<f4", "entropy": "<f4", "gold": "<f4", "actual": "<i4",
    "token_ends": "<i8", "entry_ends": "<i8", "candidate_ends": "<i8", "firsts": "<i8",
}  # fmt: skip
FACTS = "facts.json"


class ScratchWriter:
    """Appends sequences to the files of a new scratch folder; a context that leaves them closed.

    Args:
        root: the folder; what stood there is deleted.
    """

    def __init__(self, root: Path) -> None:
        shutil.rmtree(root, ignore_errors=True)
        durable.make_folder(root)
        self._root = root
        self._files: dict[str, BinaryIO] = {n: (root / n).open("wb") for n in TYPES}
        self._ends = {"token_ends": 0, "entry_ends": 0, "candidate_ends": 0}

    def add(self, one: CapturedSequence, heads: CleanHeads) -> None:
        """Appends a sequence with its checked candidates."""
        of = one.first + np.arange(len(one.counts))
        there = (of >= 0) & (of < len(one.tokens))
        actual = np.full(len(of), -1)
        actual[there] = one.tokens[of[there]]
        with durable.disk_errors(self._root):
            self._put("tokens", one.tokens)
            self._put("firsts", np.array([one.first]))
            self._put("ids", heads.ids)
            self._put("logprobs", heads.logprobs)
            self._put("entropy", heads.entropy)
            self._put("gold", heads.gold)
            self._put("actual", actual)
            self._put("candidate_ends", self._advance("candidate_ends", np.cumsum(one.counts)))
            self._put("token_ends", self._advance("token_ends", np.array([len(one.tokens)])))
            self._put("entry_ends", self._advance("entry_ends", np.array([len(one.counts)])))

    def _put(self, name: str, values: AnyArray) -> None:
        self._files[name].write(values.astype(TYPES[name]).tobytes())

    def _advance(self, name: str, ends: Int64) -> Int64:
        moved = ends + self._ends[name]
        if len(moved):
            self._ends[name] = int(moved[-1])
        return moved

    def finish(self, key: str, facts: Mapping[str, Any]) -> None:
        """Says that the folder is whole: `key` names files and options, `facts` what was found."""
        with durable.disk_errors(self._root):
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
        self._close()
        sizes = {name: (self._root / name).stat().st_size for name in TYPES}
        body = {"key": key, "facts": dict(facts), "sizes": sizes}
        body["sha256"] = fingerprint(body)
        durable.write_bytes(self._root / FACTS, canonical_json(body))

    def __enter__(self) -> ScratchWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._close()

    def _close(self) -> None:
        with durable.disk_errors(self._root):
            for file in self._files.values():
                file.close()


class Scratch:
    """The files of a scratch folder that is whole.

    Attributes:
        root: the folder.
        facts: what was found while it was written.
    """

    def __init__(self, root: Path, facts: dict[str, Any]) -> None:
        self.root, self.facts = root, facts

    @classmethod
    def found(cls, root: Path, key: str) -> Scratch | None:
        """Returns the folder's contents if it is whole and of these files and options."""
        try:
            body = json.loads((root / FACTS).read_bytes())
            stated = body.pop("sha256")
        except (OSError, ValueError, KeyError, AttributeError):
            return None
        whole = stated == fingerprint(body) and body["key"] == key and _there(root, body)
        return cls(root, body["facts"]) if whole else None

    def array(self, name: str) -> AnyArray:
        """Returns a file's values, mapped into memory."""
        path = self.root / name
        if not path.stat().st_size:
            return np.zeros(0, TYPES[name])
        return np.memmap(path, TYPES[name], "r")

    @cached_property
    def _starts(self) -> dict[str, Int64]:
        names = ("token_ends", "entry_ends", "candidate_ends")
        return {n: np.concatenate([[0], self.array(n).astype(np.int64)]) for n in names}

    @cached_property
    def tokens(self) -> AnyArray:
        """Big-endian int32, all sequences end to end."""
        return self.array("tokens")

    @cached_property
    def firsts(self) -> AnyArray:
        """int64 [n]: which token a sequence's first entry is the distribution of."""
        return self.array("firsts")

    @cached_property
    def _candidates(self) -> tuple[AnyArray, AnyArray]:
        return self.array("ids"), self.array("logprobs")

    @cached_property
    def _entries(self) -> tuple[AnyArray, AnyArray, AnyArray]:
        return self.array("entropy"), self.array("gold"), self.array("actual")

    def entropies(self, entries: Int64) -> Float32:
        """Returns float32 [R], NaN where the capture does not tell it."""
        found: Float32 = self._entries[0][entries].astype(np.float32)
        return found

    @property
    def token_starts(self) -> Int64:
        """int64 [n + 1]: sequence s has the tokens from s's to s + 1's."""
        return self._starts["token_ends"]

    @property
    def entry_starts(self) -> Int64:
        """int64 [n + 1], of entries."""
        return self._starts["entry_ends"]

    def counts(self, entries: Int64) -> Int64:
        """Returns how many candidates some entries have."""
        starts = self._starts["candidate_ends"]
        return starts[entries + 1] - starts[entries]

    def heads(self, entries: Int64, k: int) -> tuple[Int32, Float32]:
        """Returns the k most probable candidates of entries that have as many: int32, float32 [R, k]."""
        at = self._starts["candidate_ends"][entries][:, None] + np.arange(k)
        ids, logprobs = self._candidates
        return ids[at].astype(np.int32), logprobs[at].astype(np.float32)

    def logprob_of(self, entries: Int64, tokens: Int64) -> Float32:
        """Returns a token's logprob by each entry, float32 [R], NaN where the capture does not tell it.

        As the actual token's where that is told apart, else as the candidate's.
        """
        counts = self.counts(entries)
        width = int(counts.max(initial=0))
        ids, logprobs = self._candidates
        found = np.full(len(entries), np.nan, np.float32)
        columns = np.arange(width)
        at = self._starts["candidate_ends"][entries][:, None] + columns
        at = np.minimum(at, len(ids) - 1)
        hit = (ids[at] == tokens[:, None]) & (columns < counts[:, None])
        rows = np.flatnonzero(hit.any(1))
        if len(rows):  # a capture of other tokens serves no row, and argmax wants a column
            found[rows] = logprobs[at[rows, hit[rows].argmax(1)]]
        _, gold, actual = self._entries
        return np.where(
            (actual[entries] == tokens) & ~np.isnan(gold[entries]), gold[entries], found
        )


def _there(root: Path, body: Mapping[str, Any]) -> bool:
    """Returns whether the files are as long as they were."""
    try:
        return {name: (root / name).stat().st_size for name in TYPES} == body.get("sizes")
    except OSError:
        return False
