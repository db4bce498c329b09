"""JSON that came from disk: read with a bound, and taken for what it says only if it has the right shape.

A checksum tells of damage, not of intent: whoever writes a file may sign it as well. So what is read is
also checked field by field, before anything is allocated by it.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from storage import durable
from storage.errors import CorruptShard, unreadable
from storage.fingerprint import canonical_json, fingerprint
from storage.remote import Root

T = TypeVar("T")

LARGEST = 1 << 26
"""Bytes of a JSON file that is read: a corpus of 10^5 sources takes 16 MB."""


def read_bounded(path: Root) -> bytes:
    """Returns a small file's bytes; of a larger one no more than LARGEST are read, or asked of a store.

    Raises:
        OSError: as the file system says.
        ValueError: it has more than LARGEST, or more than it says.
    """
    if not isinstance(path, Path):
        data, size = path.read_bytes(LARGEST + 1), LARGEST
    else:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(size + 1) if size <= LARGEST else b""
    if size > LARGEST or len(data) > size:
        raise ValueError(f"more than {min(size, LARGEST):,} bytes")
    return data


def parse(data: bytes) -> Any:
    """Returns what a JSON text says.

    Raises:
        ValueError: it is none, or is nested deeper than the interpreter reads.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_signed(data: bytes) -> dict[str, Any]:
    """Returns a JSON object that carries the sha256 of itself, without it.

    Raises:
        ValueError: it is no such object, or its checksum does not hold.
    """
    body = parse(data)
    try:
        if isinstance(body, dict) and body.pop("sha256", None) == fingerprint(body):
            return body
    except RecursionError:
        pass
    raise ValueError("not what was written")


def typed(kind: type[T], body: Any) -> T:
    """Returns JSON values as a dataclass, lists as its tuples.

    Raises:
        ValueError: a field is missing, unknown, or of another type.
    """
    adapter: Any = _adapter(kind)  # type: ignore[arg-type]
    value = adapter.validate_json(canonical_json(body), strict=True)
    if unknown := sorted(set(body) - {f.name for f in fields(kind)}):  # type: ignore[arg-type]
        raise ValueError(f"unknown: {', '.join(unknown)}")
    return value  # type: ignore[no-any-return]


@functools.cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter  # not at start-up: it takes a fifth of a second

    return TypeAdapter(kind)


def reason(error: Exception) -> str:
    """Returns a line on what is wrong with values: of a list of problems, the first."""
    problems = getattr(error, "errors", None)
    if problems is None:
        return str(error) or type(error).__name__
    first = problems(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"


def read_checked(path: Root, command: str) -> dict[str, Any] | None:
    """Returns the object of a file that carries its sha256, or None if there is no such file.

    Args:
        command: what writes the file again.

    Raises:
        CorruptShard: the file cannot be read, or its checksum does not hold.
    """
    try:
        return parse_signed(durable.patiently(lambda: read_bounded(path), path))
    except FileNotFoundError:
        return None
    except OSError as error:
        todo = "run `scholiast repair`; finished parts are kept"
        raise unreadable(path.name, error, path, todo) from error
    except ValueError:
        raise CorruptShard(
            f"{path.name}'s bytes are not those that were written", where=path,
            todo=f"delete this file and run `scholiast {command}` again; finished parts are kept",
        ) from None  # fmt: skip


def nonsense(path: Root, error: Exception, command: str) -> CorruptShard:
    """Returns the error of a file whose checksum holds and whose values no command of ours writes."""
    return CorruptShard(
        f"{path.name} states what cannot be", where=path, found=reason(error),
        todo=f"trust nothing that came with it; delete this file and run `scholiast {command}` again",
    )  # fmt: skip
