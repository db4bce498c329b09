"""begun.json: what a corpus is being prepared from, before corpus.json states it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from storage import durable
from storage.fingerprint import canonical_json

BEGUN = "begun.json"


def begun(root: Path) -> tuple[dict[str, Any] | None, list[int]]:
    """Returns what begun.json says: the identity of a preparation that was begun at `root`, if one
    was, and how many sources there are at the end of each of its generations."""
    try:
        body = json.loads((root / BEGUN).read_bytes())
        return dict(body["identity"]), [int(n) for n in body["generations"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None, []


def write_begun(root: Path, identity: Mapping[str, Any], counts: Sequence[int]) -> None:
    """Writes begun.json.

    Raises:
        DiskFull
    """
    body = {"identity": dict(identity), "generations": list(counts)}
    durable.write_bytes(root / BEGUN, canonical_json(body))


def cut(identity: Mapping[str, Any], sources: int) -> dict[str, Any]:
    """Returns a corpus's identity as it was with the first so many sources."""
    kept = dict(sorted(identity["sources"].items())[:sources])
    return {**identity, "sources": kept}
