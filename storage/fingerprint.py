"""Identity by content: canonical JSON → sha256, and the hash of files. Never a path, never a time.

A stored thing's identity is a nested dict in which the fingerprints of its parents appear, so that
a change anywhere upstream changes every fingerprint downstream.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from storage import durable


def canonical_json(value: Any) -> bytes:
    """Returns the one JSON text of `value`: keys sorted, no spaces, ASCII; NaN refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def fingerprint(value: Any) -> str:
    """Returns the sha256, as 64 hex digits, of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def bytes_sha256(data: bytes) -> str:
    """Returns the sha256 of `data` as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    """Returns the sha256 of a file's bytes as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class HashMemo:
    """Remembers sha256 by (path, size, mtime, inode), as git's index does, so that asking for the
    state of three 7B teachers does not read 45 GB each time. The identity itself stays the content's.

    What is new is written when a second has passed, and ten times what the last writing took: with each
    of 10^5 files it would take quadratic time. A kill costs that much hashing again; `save` writes the
    rest.

    Args:
        path: the file that remembers.
        keep: whether what is new is written there; without it nothing is.
    """

    def __init__(self, path: Path, keep: bool = True) -> None:
        self._path, self._keep = path, keep
        self._known: dict[str, list[Any]] = {}
        self._new, self._due = False, 0.0
        # A memo that cannot be read costs a second hashing, nothing else.
        with contextlib.suppress(OSError, ValueError, RecursionError):
            known = json.loads(path.read_text())
            self._known = known if isinstance(known, dict) else {}

    def sha256(self, path: Path) -> str:
        """Returns the sha256 of the file at `path`, read only if it changed since last asked."""
        real = path.resolve()
        stat = real.stat()
        key = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        entry = self._known.get(str(real))
        if isinstance(entry, list) and len(entry) == 4 and entry[:3] == key:
            return str(entry[3])
        digest = file_sha256(real)
        self._known[str(real)] = [*key, digest]
        self._new = self._keep
        if time.monotonic() >= self._due:
            self.save()
        return digest

    def save(self) -> None:
        """Writes what is new, if anything is.

        Raises:
            DiskFull, FailingFolder
        """
        if self._new:
            began = time.monotonic()
            durable.write_bytes(self._path, json.dumps(self._known).encode())
            ended = time.monotonic()
            self._new, self._due = False, ended + max(1.0, 10 * (ended - began))


def differences(
    expected: Mapping[str, Any], found: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yields (dotted key, expected value, found value) wherever two identities disagree."""
    for key in sorted({*expected, *found}):
        a, b = expected.get(key), found.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", a, b


def describe_differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the disagreeing parts of two identities as two short texts (expected, found)."""
    rows = list(differences(expected, found))
    return (
        "; ".join(f"{key}={_short(a)}" for key, a, _ in rows),
        "; ".join(f"{key}={_short(b)}" for key, _, b in rows),
    )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 48 else f"{text[:44]}…"


def tree_bytes(root: Path) -> int:
    """Returns the bytes of all files under `root` (0 if it does not exist)."""
    return sum(
        (Path(folder) / name).lstat().st_size
        for folder, _, names in os.walk(root)
        for name in names
    )
