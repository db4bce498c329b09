"""What stage one measured, a line a part: never part of a cache's identity."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.durable import disk_errors, patiently
from storage.remote import Root

_LOGGED = (("tokens", int), ("seconds", int | float), ("peak_bytes", int), ("device", str))
_LOG_BYTES = 1 << 22  # of the log's end that is read: a rate needs no more


def log_path(root: Root) -> Root:
    """Returns the file of measurements: a line a part, never part of the cache's identity."""
    return root / "log.jsonl"


def append_log(root: Path, row: Mapping[str, Any]) -> None:
    """Appends one measurement; a single write, so that concurrent tasks do not mix lines.

    Raises:
        DiskFull
    """
    path = root / "log.jsonl"
    with disk_errors(path):
        patiently(lambda: _append(path, row), path)


def _append(path: Path, row: Mapping[str, Any]) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(fd, (json.dumps(row) + "\n").encode())
    finally:
        os.close(fd)


def read_log(root: Root) -> list[dict[str, Any]]:
    """Returns the newest measurements (some 25,000); a line cut by a crash is passed over."""
    try:
        with log_path(root).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_BYTES))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and all(isinstance(row.get(key), kind) for key, kind in _LOGGED):
            rows.append(row)  # the first line may be the end of one: a number, say
    return rows


@dataclass(frozen=True)
class Measured:
    """The sums of a log's newest measurements.

    Attributes:
        tokens, seconds: of these parts.
        peak_bytes: the largest memory of one of them.
        device: of the last one.
    """

    tokens: int
    seconds: float
    peak_bytes: int
    device: str


def measured(root: Root) -> Measured | None:
    """Returns the log's sums, None if nothing was measured."""
    rows = read_log(root)
    if not any(row["seconds"] for row in rows):
        return None
    return Measured(
        sum(row["tokens"] for row in rows), sum(row["seconds"] for row in rows),
        max(row["peak_bytes"] for row in rows), rows[-1]["device"],
    )  # fmt: skip
