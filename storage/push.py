"""A finished corpus or cache → a remote store, in the order of commit.

Each part's objects go before its manifest, and cache.json or corpus.json goes last: what a reader
finds vouched for is there. What stands in the store with the same manifest and the same sizes is not sent
again, nor are the few small files that no manifest vouches for if they have the same bytes; so a copy
that was stopped goes on where it was, and one that lost files is mended. Sizes come from one listing (a
request for a thousand objects); that bytes are right only reading them tells, which is done if asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from storage import manifest
from storage.errors import CorruptShard, MissingShard
from storage.fingerprint import file_sha256
from storage.inside import require_inside
from storage.metadata import require_metadata
from storage.remote import RemotePath
from storage.stores import whole_files
from storage.tables import digest, load_orders
from storage.writer import open_cache

_LAST = ("cache.json", "corpus.json")
_THREADS = 8


def push(
    root: Path, owners: manifest.Owners, parts: int, target: RemotePath, tell: Callable[[int], None],
    verify: bool = False, dry_run: bool = False,
) -> int:  # fmt: skip
    """Copies a corpus or a cache; returns the bytes sent.

    Args:
        root: the local folder.
        owners, parts: which fingerprint each part's manifest carries; how many parts there are.
        target: where to.
        tell: called after each part with its bytes, sent or skipped.
        verify: also read what stands in the store, and send again what has other bytes.
        dry_run: send nothing; returns the bytes that would be sent (local bytes are then not read).

    Raises:
        MissingShard, CorruptShard: a local file is not what its manifest vouches for; a cache's orders
            of ids or its Zarr metadata are damaged.
        RemoteError, ConfigError: of the store.
    """
    orders, copy = _require_sound(root), _Copy(root, target, target.sizes(), verify, dry_run)
    listed = manifest.parse_names(
        name.removeprefix("manifests/") for name in copy.sizes if name.startswith("manifests/")
    )
    manifest.require_prefixes(
        target, listed, owners.prefixes(listed.parts),
        "push to another place, or empty this one first: it holds something else",
    )  # fmt: skip
    sent = 0
    with ThreadPoolExecutor(_THREADS) as pool:
        for part in manifest.done_parts(root, owners, parts).tolist():
            sent += _push_part(copy, owners.of(part), part, orders, tell, pool)
    for name in [*(name for name in whole_files(root) if name not in _LAST), *_LAST]:
        if (root / name).exists():
            require_inside(root, name)  # what lies elsewhere is not to be sent along
            sent += copy.update(name)
    return sent


@dataclass(frozen=True)
class _Copy:
    """A folder on its way to a store.

    Attributes:
        root, target: from where, to where.
        sizes: bytes of what the store has, by path below the target.
        verify: whether bytes are compared as well.
        dry_run: whether nothing is sent.
    """

    root: Path
    target: RemotePath
    sizes: dict[str, int]
    verify: bool
    dry_run: bool

    def stands(self, name: str, size: int, sha256: str, vouched: bool) -> bool:
        """Returns whether the store has an object as its manifest states it.

        Args:
            vouched: whether the store's own manifest states the same; a size alone tells nothing of
                what another manifest, or none, stands beside.
        """
        if self.sizes.get(name) != size:
            return False
        return (self.target / name).sha256() == sha256 if self.verify else vouched

    def send(self, name: str, size: int, sha256: str, vouched: bool) -> int:
        """Sends one object unless it stands; returns the bytes sent."""
        if self.stands(name, size, sha256, vouched):
            return 0
        if self.dry_run:
            return size
        _require_whole(self.root, name, size, sha256)
        return self.put(name)

    def update(self, name: str) -> int:
        """Sends a small file unless the store's has its bytes; returns the bytes sent."""
        own = (self.root / name).read_bytes()
        same = self.sizes.get(name) == len(own) and (self.target / name).read_bytes() == own
        return 0 if same else self.put(name)

    def put(self, name: str) -> int:
        """Sends a file, whatever stands there; returns its bytes."""
        if not self.dry_run:
            (self.target / name).write(self.root / name)
        return (self.root / name).stat().st_size


def _push_part(
    copy: _Copy, owner: str, part: int, orders: str | None, tell: Callable[[int], None],
    pool: ThreadPoolExecutor,
) -> int:  # fmt: skip
    """Copies one part; returns the bytes sent, 0 if all was there."""
    root = copy.root
    vouched = manifest.load(root, part, owner)
    assert vouched is not None  # it was listed a moment ago
    path = root / "manifests" / manifest.path_of(root, part, owner).name
    if orders is not None and vouched.carry.get("orders") != orders:
        raise CorruptShard("a part was written with other orders of ids", where=path, todo=_TODO)
    tell(sum(n for n, _ in vouched.objects.values()))
    name, own = f"manifests/{path.name}", path.read_bytes()
    same = copy.sizes.get(name) == len(own) and (copy.target / name).read_bytes() == own

    def send(item: tuple[str, tuple[int, str]]) -> int:
        return copy.send(item[0], *item[1], same)

    sent = sum(pool.map(send, vouched.objects.items()))
    return sent if same else sent + copy.put(name)


_TODO = "run `scholiast verify`, mend what it finds, and push again"


def _require_sound(root: Path) -> str | None:
    """Refuses a cache of which what no manifest vouches for is damaged; returns its orders' digest."""
    opened = open_cache(root)
    if opened is None:
        return None
    orders = load_orders(root, opened[1])
    if digest(load_orders(root, opened[1], spare=True)) != digest(orders):
        raise CorruptShard(
            "the orders of ids and their spare copy differ", where=root / "spare", todo=_TODO
        )
    require_metadata(root, opened[1], orders)
    return digest(orders)


def _require_whole(root: Path, name: str, size: int, sha256: str) -> None:
    require_inside(root, name)
    path = root / name
    if not path.exists():
        raise MissingShard(
            "a file that its manifest vouches for is missing", where=path, todo=_TODO
        )
    if path.stat().st_size != size or file_sha256(path) != sha256:
        raise CorruptShard("a file has bytes that were not written there", where=path, todo=_TODO)
