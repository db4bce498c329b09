"""A part's manifest. Its presence is the commit: nothing else means done.

A manifest names the fingerprint of what the part belongs to, the part's block range, and the size
and sha256 of every object. It carries a checksum of itself, so a flipped byte in it is seen too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storage import durable
from storage.errors import CorruptShard, MissingShard, StaleCache
from storage.fingerprint import canonical_json, file_sha256, fingerprint

REDO = "delete this manifest and run the same command again: that part alone is made anew"


@dataclass(frozen=True)
class Manifest:
    """What a finished part vouches for.

    Attributes:
        fingerprint: of the identity of the corpus or cache that the part belongs to.
        part: index of the part, from 0.
        first_block, blocks: the block range [first_block, first_block + blocks).
        objects: path relative to the root → (bytes, sha256).
        carry: what the next part needs in order to go on (corpus only).
    """

    fingerprint: str
    part: int
    first_block: int
    blocks: int
    objects: dict[str, tuple[int, str]]
    carry: dict[str, Any] = field(default_factory=dict)


def path_of(root: Path, part: int) -> Path:
    """Returns the manifest's place: `root/manifests/000123.json`."""
    return root / "manifests" / f"{part:06d}.json"


def describe(root: Path, paths: list[str]) -> dict[str, tuple[int, str]]:
    """Returns size and sha256 of files that have just been written under `root`."""
    return {p: ((root / p).stat().st_size, file_sha256(root / p)) for p in sorted(paths)}


def save(root: Path, manifest: Manifest) -> None:
    """Commits a part. Everything it vouches for must have been flushed before."""
    body: dict[str, Any] = {
        "fingerprint": manifest.fingerprint,
        "part": manifest.part,
        "first_block": manifest.first_block,
        "blocks": manifest.blocks,
        "objects": {p: list(v) for p, v in manifest.objects.items()},
        "carry": manifest.carry,
    }
    body["sha256"] = fingerprint(body)
    durable.write_bytes(path_of(root, manifest.part), canonical_json(body))


def load(root: Path, part: int) -> Manifest | None:
    """Returns the part's manifest, or None if the part is not done.

    Raises:
        CorruptShard: the manifest's own checksum does not hold.
    """
    path = path_of(root, part)
    try:
        body = json.loads(path.read_bytes())
        checksum = body.pop("sha256")
        whole = checksum == fingerprint(body)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, AttributeError):
        whole = False
    if not whole:
        raise CorruptShard(
            "a manifest's bytes are not those that were written", where=path, todo=REDO
        )
    body["objects"] = {p: (int(size), str(digest)) for p, (size, digest) in body["objects"].items()}
    return Manifest(**body)


def finished(root: Path, part: int, expected: str) -> Manifest | None:
    """Returns the manifest if the part is done and its objects are all there with their sizes.

    Raises:
        StaleCache: the part was made from something else.
        MissingShard, CorruptShard: an object is gone or has another size.
    """
    manifest = load(root, part)
    if manifest is None:
        return None
    if manifest.fingerprint != expected:
        raise StaleCache(
            "a finished part was made from something else",
            where=path_of(root, part),
            expected=f"fingerprint {expected[:16]}",
            found=f"fingerprint {manifest.fingerprint[:16]}",
            todo="choose another folder, or delete this one to make it anew",
        )
    for name, (size, _) in manifest.objects.items():
        path = root / name
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            raise MissingShard(
                "a file that its manifest vouches for is missing",
                where=path, todo=REDO.replace("this manifest", str(path_of(root, part))),
            ) from None  # fmt: skip
        if found != size:
            raise CorruptShard(
                "a file has not the size that its manifest states",
                where=path, expected=f"{size} bytes", found=f"{found} bytes",
                todo=REDO.replace("this manifest", str(path_of(root, part))),
            )  # fmt: skip
    return manifest
