"""A part of blocks → its shards → its manifest.

A part's shards are written in a folder of the writer's own, and hashed there; then all are moved to
their places under one lock and vouched for. Two writers of one part are wasteful and harmless: the part
is that of whoever commits first, whatever device each had, and is never touched again.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from storage import durable, manifest
from storage.checked import nonsense, read_checked
from storage.errors import CorruptShard, StaleCache
from storage.fingerprint import canonical_json, describe_differences, fingerprint
from storage.layout import (
    FORMAT,
    GROUP,
    Layout,
    create_group,
    shard_name,
)
from storage.metadata import require_metadata, stored_layout
from storage.orders import IdOrders
from storage.remote import Root
from storage.shard import write_shard
from storage.tables import carried_orders, digest, load_orders, save_spares
from storage.types import AnyArray

LOCK = ".commit.lock"
IMPORTED = "imported"
"""An identity's `origin` where it has one."""


def open_cache(root: Root) -> tuple[dict[str, Any], Layout] | None:
    """Returns (identity, layout) of the cache at `root`, or None if there is none.

    Raises:
        CorruptShard: cache.json is not what was written, or states what cannot be.
        StaleCache: it was written by another version of the format.
    """
    path = root / "cache.json"
    body = read_checked(path, "cache-teachers")
    if body is None:
        return None
    if body.get("format") != FORMAT:
        raise StaleCache(
            "the cache has another format", where=path, expected=f"format {FORMAT}",
            found=f"format {body.get('format')}", todo="cache this teacher again in another folder",
        )  # fmt: skip
    try:
        identity, layout = body.get("identity"), Layout.from_dict(body.get("layout"))
        if not isinstance(identity, dict) or not isinstance(identity.get("corpus"), str):
            raise ValueError("an identity that names no corpus")
        return identity, layout
    except ValueError as error:
        raise nonsense(path, error, "cache-teachers") from None


def is_imported(identity: Mapping[str, Any]) -> bool:
    """Returns whether a cache was read from another tool's capture: no teacher can go on with it."""
    return identity.get("origin") == IMPORTED


def owners(identity: Mapping[str, Any], layout: Layout) -> manifest.Owners:
    """Returns which fingerprint each part's manifest carries: that of the cache as it was when the
    part's generation was the corpus's last."""
    grown = layout.generations
    if not grown:
        return manifest.Owners((0,), (fingerprint(identity),))
    return manifest.Owners(
        tuple(g.first_part for g in grown),
        tuple(fingerprint({**identity, "corpus": g.fingerprint}) for g in grown),
    )


def require_identity(root: Root, identity: Mapping[str, Any], layout: Layout) -> bool:
    """Returns whether a cache stands at `root`; refuses one that was made from something else.

    A cache of an earlier generation of the same corpus is no other: it lacks parts.

    Raises:
        StaleCache: names every key of the two identities that disagrees.
    """
    opened = open_cache(root)
    if opened is None:
        return False
    require_same(root, opened[0], identity, layout)
    return True


def require_same(
    root: Root, found_identity: Mapping[str, Any], identity: Mapping[str, Any], layout: Layout
) -> None:
    """Refuses the identity that a cache was found to have, as `require_identity` does.

    Raises:
        StaleCache
    """
    if fingerprint(found_identity) not in owners(identity, layout).fingerprints:
        expected, found = describe_differences(identity, found_identity)
        raise StaleCache(
            "the cache was made from something else", where=root, expected=expected, found=found,
            todo="restore what it was made from, or name another cache_dir, "
            "or delete this folder to cache the teacher again",
        )  # fmt: skip


class CacheWriter:
    """Writes one teacher's cache, a part at a time; any number of processes may do so at once.

    Args:
        root: the cache folder.
        identity: what the cache is of.
        layout: what it stores.
        learn: gives the orders of ids (see orders.py); asked only if the cache has none yet.

    Attributes:
        orders: the cache's orders, with which its parts are to be encoded.

    Raises (on construction):
        StaleCache: `root` holds a cache of another identity.
        CorruptShard: the group's metadata have been altered, or the orders are not the parts'.
        DiskFull: no space for the metadata.
    """

    def __init__(
        self,
        root: Path,
        identity: Mapping[str, Any],
        layout: Layout,
        learn: Callable[[], IdOrders],
    ) -> None:
        self.root, self.layout = root, layout
        self._owners = owners(identity, layout)
        require_identity(root, identity, layout)
        with durable.disk_errors(root):
            once = functools.cache(learn)
            durable.patiently(lambda: _make_group(root, layout, once), root)
            grown = _require_layout(root, layout)
            self.orders = load_orders(root, layout)
            _require_carried(root, self._owners, self.orders)
            durable.patiently(lambda: save_spares(root), root)
            if grown:
                _grow_group(root, layout, self.orders)
        require_metadata(root, layout, self.orders)  # or other readers would be told lies
        self._carry = {"orders": digest(self.orders)}
        save_info(root, identity, layout)

    def write_part(self, part: int, arrays: Mapping[str, AnyArray]) -> manifest.Manifest:
        """Writes and commits one part.

        Args:
            arrays: every array of the layout, as stored (encoded), [blocks of the part, …].

        Returns:
            Its manifest; where another writer was quicker, that one's.

        Raises:
            DiskFull, FailingFolder: nothing is committed.
            ValueError: an array is missing, superfluous, or of another shape or dtype.
        """
        specs = self.layout.arrays()
        if set(arrays) != set(specs):
            raise ValueError(f"arrays {sorted(arrays)} given, {sorted(specs)} stored")
        first, last = self.layout.part_range(part)
        for name, spec in specs.items():
            data = arrays[name]
            if data.shape != (last - first, *spec.shape[1:]) or data.dtype != spec.dtype:
                raise ValueError(f"{name}: {data.dtype}{data.shape} given, {spec} stored")
        return durable.patiently(lambda: self._write_once(part, arrays), self.root)

    def _write_once(self, part: int, arrays: Mapping[str, AnyArray]) -> manifest.Manifest:
        (first, last), specs = self.layout.part_range(part), self.layout.arrays()
        names = [shard_name(name, part, len(spec.shape)) for name, spec in specs.items()]
        # Written and hashed where no other writer comes: two of them need not have the same bits (other
        # devices, other batch sizes), and a manifest must never vouch for a mixture.
        private = self.root / f".{part:06d}.{uuid.uuid4().hex}.tmp"
        try:
            with durable.disk_errors(self.root):
                for (name, spec), path in zip(specs.items(), names, strict=True):
                    (private / path).parent.mkdir(parents=True)
                    write_shard(private / path, spec, arrays[name])
                done = manifest.Manifest(
                    self._owners.of(part), part, first, last - first,
                    manifest.describe(private, names), self._carry,
                )  # fmt: skip
                return self._commit(private, names, done)
        finally:
            shutil.rmtree(private, ignore_errors=True)

    def _commit(
        self, private: Path, names: list[str], done: manifest.Manifest
    ) -> manifest.Manifest:
        """Moves a part's shards to their places and writes its manifest, one writer at a time."""
        with durable.alone(self.root / LOCK):
            standing = manifest.load(self.root, done.part, done.fingerprint)
            if standing is not None:
                return standing
            for path in names:
                (self.root / path).parent.mkdir(parents=True, exist_ok=True)
                (private / path).replace(self.root / path)
            for folder in {up for path in names for up in PurePosixPath(path).parents}:
                durable.fsync_folder(self.root / folder)
            manifest.save(self.root, done)
        return done


def _require_carried(root: Path, own: manifest.Owners, orders: IdOrders) -> None:
    """Refuses to write parts with other orders than the finished ones have: no reader has two."""
    carried, found = carried_orders(root, own), digest(orders)
    if carried not in (None, found):
        raise CorruptShard(
            "the orders of ids are not those of the finished parts", where=root,
            expected=str(carried)[:16], found=found[:16], todo="run `scholiast repair`",
        )  # fmt: skip


def save_info(root: Path, identity: Mapping[str, Any], layout: Layout) -> None:
    """Writes cache.json, which says what the cache is of."""
    body: dict[str, Any] = {
        "format": FORMAT,
        "identity": dict(identity),
        "layout": layout.to_dict(),
    }
    body["sha256"] = fingerprint(body)
    durable.write_bytes(root / "cache.json", canonical_json(body))


def _require_layout(root: Path, layout: Layout) -> bool:
    """Returns whether the group is of an earlier generation of `layout`, and has to grow.

    Raises:
        StaleCache: it is of another layout, which only a lost cache.json leaves to be found out.
    """
    stored = stored_layout(root)
    if stored is None:  # unreadable: require_metadata tells
        return False
    known = [
        {"format": FORMAT, "layout": json.loads(canonical_json(layout.until(n).to_dict()))}
        for n in range(1, max(1, len(layout.generations)) + 1)
    ]
    if stored not in known:
        a, b = describe_differences(known[-1], stored if isinstance(stored, dict) else {})
        raise StaleCache(
            "the cache's arrays were made for something else", where=root / GROUP, expected=a,
            found=b, todo="name another cache_dir, or delete this folder to cache the teacher again",
        )  # fmt: skip
    return bool(stored != known[-1])


def _grow_group(root: Path, layout: Layout, orders: IdOrders) -> None:
    """Replaces each array's metadata, the group's last; no shard is touched.

    A larger shape alone changes, so readers of the old metadata and of the new see the same blocks.
    """
    temporary = root / f".{GROUP}.{uuid.uuid4().hex}.tmp"
    try:
        create_group(temporary, layout, orders)
        for name in (*layout.arrays(), "."):
            data = (temporary / name / "zarr.json").read_bytes()
            durable.write_bytes(root / GROUP / name / "zarr.json", data)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _make_group(root: Path, layout: Layout, learn: Callable[[], IdOrders]) -> None:
    """Creates the group under another name and renames it, so that no one sees half of it."""
    if (root / GROUP).exists():
        return
    durable.make_folder(root)
    temporary = root / f".{GROUP}.{uuid.uuid4().hex}.tmp"
    try:
        create_group(temporary, layout, learn())
        durable.fsync_tree(temporary)
        os.rename(temporary, root / GROUP)
    except OSError:
        # Another task was quicker: its group, with its orders, is the cache's. Else a real error.
        if not (root / GROUP / "zarr.json").exists():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    durable.fsync_folder(root)
