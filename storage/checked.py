"""JSON files that carry the sha256 of themselves: cache.json and corpus.json."""

from __future__ import annotations

import json
from typing import Any

from storage import durable
from storage.errors import CorruptShard, unreadable
from storage.fingerprint import fingerprint
from storage.remote import Root


def read_checked(path: Root, command: str) -> dict[str, Any] | None:
    """Returns a file's object without its sha256, or None if there is no such file.

    Args:
        command: what writes the file again.

    Raises:
        CorruptShard: the file cannot be read, or its checksum does not hold.
    """
    try:
        body = json.loads(durable.patiently(path.read_bytes, path))
        whole = body.pop("sha256") == fingerprint(body)
    except FileNotFoundError:
        return None
    except OSError as error:
        todo = "run `scholiast repair`; finished parts are kept"
        raise unreadable(path.name, error, path, todo) from error
    except (ValueError, KeyError, AttributeError, TypeError):
        whole = False
    if not whole:
        raise CorruptShard(
            f"{path.name}'s bytes are not those that were written", where=path,
            todo=f"delete this file and run `scholiast {command}` again; finished parts are kept",
        )  # fmt: skip
    return dict(body)
