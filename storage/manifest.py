"""A part's manifest. Its presence is the commit: nothing else means done.

A manifest names the fingerprint of what the part belongs to, the part's block range, and the size
and sha256 of every object. It carries a checksum of itself, so a flipped byte in it is seen too.

Its file's name holds part and fingerprint, so one listing of the folder tells what is done, for
10^6 parts in a few seconds, and no manifest is opened; contents are checked when a part is first
read.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from storage import checked, durable
from storage.errors import CorruptShard, MissingShard, StaleCache, unreadable
from storage.fingerprint import canonical_json, file_sha256, fingerprint
from storage.inside import is_below
from storage.remote import RemotePath, Root
from storage.types import Int64

PREFIX = 12
"""Hex digits of the fingerprint in a manifest's name: 48 bits tell identities apart; the whole
fingerprint stands inside and is compared when the manifest is read."""
SAMPLE = 1000
"""Manifests that are opened at most to say how much a cache takes."""
REMOTE_SAMPLE = 32
"""The same where each takes a request to a store."""

_DIGITS = 19  # of a part's number: fewer fit into int64
_NAME = re.compile(r"([0-9]{6,})-([0-9a-f]{12})\.json")
_SHA256 = re.compile(r"[0-9a-f]{64}")

REDO = (
    "run `scholiast repair`, which drops that part alone, and then `scholiast cache-teachers` (of a "
    "corpus: `scholiast prepare`), which makes it anew"
)


@dataclass(frozen=True)
class Manifest:
    """What a finished part vouches for.

    Attributes:
        fingerprint: of the identity of the corpus or cache that the part belongs to.
        part: index of the part, from 0.
        first_block, blocks: the block range [first_block, first_block + blocks).
        objects: path relative to the root → (bytes, sha256).
        carry: what the next part needs in order to go on (of a corpus); the digest of the orders of ids
            (of a cache).
    """

    fingerprint: str
    part: int
    first_block: int
    blocks: int
    objects: dict[str, tuple[int, str]]
    carry: dict[str, Any] = field(default_factory=dict)


def path_of(root: Root, part: int, fingerprint: str) -> Root:
    """Returns the manifest's place: `root/manifests/000123-0a1b2c3d4e5f.json`."""
    return root / "manifests" / f"{part:06d}-{fingerprint[:PREFIX]}.json"


@dataclass(frozen=True)
class Listing:
    """What the names in a folder of manifests say.

    Attributes:
        parts: int64 [n], ascending; a part stands once per identity.
        prefixes: 12 bytes [n], the first hex digits of each manifest's fingerprint.
    """

    parts: Int64
    prefixes: npt.NDArray[np.bytes_]

    def __len__(self) -> int:
        return len(self.parts)

    def until(self, part: int) -> Listing:
        """Returns the manifests of the parts before one."""
        end = int(np.searchsorted(self.parts, part))
        return Listing(self.parts[:end], self.prefixes[:end])


def listing(root: Root) -> Listing:
    """Lists a folder's manifests in one pass; other names (temporary files) are passed over.

    Cost: about 2 µs and 100 bytes a manifest; of a remote store, a request a thousand.
    """
    folder = root / "manifests"
    if isinstance(folder, RemotePath):
        return parse_names(folder.names())
    try:
        return parse_names(durable.patiently(lambda: os.listdir(folder), folder))
    except FileNotFoundError:
        return parse_names([])


def parse_names(names: Iterable[str]) -> Listing:
    """Returns what the names of a folder of manifests say; other names are passed over."""
    parts, prefixes = [], []
    for name in names:
        found = _NAME.fullmatch(name)
        if found and found[1] == f"{int(found[1]):06d}" and len(found[1]) < _DIGITS:
            parts.append(int(found[1]))
            prefixes.append(found[2].encode())
    numbers = np.array(parts, np.int64)
    order = np.argsort(numbers, kind="stable")
    return Listing(numbers[order], np.array(prefixes, f"S{PREFIX}")[order])


@dataclass(frozen=True)
class Owners:
    """Which fingerprint each part's manifest must carry.

    Attributes:
        first_parts: where each generation's parts begin, ascending from 0.
        fingerprints: of each generation.
    """

    first_parts: tuple[int, ...]
    fingerprints: tuple[str, ...]

    def of(self, part: int) -> str:
        """Returns the fingerprint of one part."""
        return self.fingerprints[bisect_right(self.first_parts, part) - 1]

    def prefixes(self, parts: Int64) -> npt.NDArray[np.bytes_]:
        """Returns the prefix, 12 bytes, of each part."""
        known = np.array([f[:PREFIX] for f in self.fingerprints], f"S{PREFIX}")
        return known[np.searchsorted(self.first_parts, parts, side="right") - 1]


def done_parts(root: Root, owners: Owners, parts: int) -> Int64:
    """Returns the parts whose manifests stand, int64 and ascending, from the listing alone.

    Args:
        parts: how many there are; manifests beyond are not counted (an append's that is under way).

    Raises:
        StaleCache: a part was made from something else.
    """
    listed = listing(root).until(parts)
    todo = "choose another folder, or delete this one to make it anew"
    require_prefixes(root, listed, owners.prefixes(listed.parts), todo)
    return listed.parts


def require_prefixes(
    root: Root, listed: Listing, expected: npt.NDArray[np.bytes_], todo: str
) -> None:
    """Refuses manifests of another identity.

    Args:
        expected: prefix that each listed manifest should have, 12 bytes [n].
        todo: what to do about them.

    Raises:
        StaleCache: shows the first one with both sides.
    """
    foreign = np.flatnonzero(listed.prefixes != expected)
    if len(foreign):
        i = int(foreign[0])
        found = listed.prefixes[i].decode()
        raise StaleCache(
            f"finished parts were made from something else ({len(foreign):,} of them)",
            where=path_of(root, int(listed.parts[i]), found),
            expected=f"fingerprint {expected[i].decode()}…", found=f"fingerprint {found}…",
            todo=todo,
        )  # fmt: skip


def sampled(root: Root, parts: Sequence[int], owners: Owners) -> Iterator[tuple[Manifest, int]]:
    """Yields (manifest, bytes of its file) of at most SAMPLE finished parts (REMOTE_SAMPLE of a remote
    root), evenly spread.

    Raises:
        CorruptShard: a manifest's own checksum does not hold.
    """
    most = REMOTE_SAMPLE if isinstance(root, RemotePath) else SAMPLE
    picked = np.unique(np.linspace(0, len(parts) - 1, min(len(parts), most)).round())
    for part in (parts[int(i)] for i in picked):
        path = path_of(root, part, owners.of(part))
        data = _bytes(path)
        if data is None:
            continue
        yield _of_name(parse(path, data), path, part, owners.of(part)), len(data)


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
    name = path_of(root, manifest.part, manifest.fingerprint).name
    durable.write_bytes(root / "manifests" / name, canonical_json(body))


def load(root: Root, part: int, expected: str) -> Manifest | None:
    """Returns the part's manifest, or None if the part is not done for this fingerprint.

    Raises:
        CorruptShard: the manifest's own checksum does not hold.
        StaleCache: its name says this fingerprint, its content another.
    """
    path = path_of(root, part, expected)
    manifest = read(path)
    return None if manifest is None else _of_name(manifest, path, part, expected)


def _of_name(manifest: Manifest, path: Root, part: int, expected: str) -> Manifest:
    """Returns the manifest if it is what its name says."""
    if manifest.fingerprint != expected or manifest.part != part:
        raise StaleCache(
            "a manifest is not what its name says", where=path,
            expected=f"part {part} of fingerprint {expected[:16]}",
            found=f"part {manifest.part} of fingerprint {manifest.fingerprint[:16]}", todo=REDO,
        )  # fmt: skip
    return manifest


def read(path: Root) -> Manifest | None:
    """Returns the manifest at a path, whatever it is of; None if there is none.

    Raises:
        CorruptShard: its own checksum does not hold, or it cannot be read.
    """
    data = _bytes(path)
    return None if data is None else parse(path, data)


def _bytes(path: Root) -> bytes | None:
    try:
        return durable.patiently(lambda: checked.read_bounded(path), path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable("a manifest", error, path, REDO) from error
    except ValueError as error:
        raise CorruptShard(
            "a manifest is far too large", where=path, found=error, todo=REDO
        ) from None


def parse(path: Root, data: bytes) -> Manifest:
    """Returns the manifest that a file's bytes are (see `read` for what is raised)."""
    try:
        body = checked.parse_signed(data)
    except ValueError:
        raise CorruptShard(
            "a manifest's bytes are not those that were written", where=path, todo=REDO
        ) from None
    try:
        manifest = checked.typed(Manifest, body)
        _require_possible(manifest)
    except ValueError as error:
        raise CorruptShard(
            "a manifest states what cannot be", where=path, found=checked.reason(error), todo=REDO
        ) from None
    if outside := [name for name in manifest.objects if not is_below(name)]:
        raise CorruptShard(
            "a manifest names a file outside its folder", where=path, found=outside[0], todo=REDO
        )
    return manifest


def _require_possible(manifest: Manifest) -> None:
    """Refuses numbers and digests that no part has; a digest also names a file of the local cache.

    Raises:
        ValueError: says which.
    """
    digests = [manifest.fingerprint, *(digest for _, digest in manifest.objects.values())]
    if strange := [digest for digest in digests if not _SHA256.fullmatch(digest)]:
        raise ValueError(f"no sha256: {strange[0]!r}")
    numbers = [manifest.part, manifest.first_block, manifest.blocks]
    numbers += [size for size, _ in manifest.objects.values()]
    if not all(0 <= number < 1 << 63 for number in numbers):
        raise ValueError("a number is negative, or larger than any there is")


def stands(root: Root, part: int, expected: str) -> bool:
    """Returns whether a part's manifest is there, by its name alone."""
    return durable.patiently(path_of(root, part, expected).exists, root)


def finished(root: Root, part: int, expected: str) -> Manifest | None:
    """Returns the manifest if the part is done and its objects are all there with their sizes.

    A remote root's objects are not asked for here: each is checked when it is fetched.

    Raises:
        StaleCache: the manifest's content is of something else.
        MissingShard, CorruptShard: an object is gone or has another size.
    """
    manifest = load(root, part, expected)
    if manifest is None or isinstance(root, RemotePath):
        return manifest
    for name, (size, _) in manifest.objects.items():
        path = root / name
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            raise MissingShard(
                "a file that its manifest vouches for is missing",
                where=path, todo=REDO,
            ) from None  # fmt: skip
        if found != size:
            raise CorruptShard(
                "a file has not the size that its manifest states",
                where=path, expected=f"{size} bytes", found=f"{found} bytes",
                todo=REDO,
            )  # fmt: skip
    return manifest
