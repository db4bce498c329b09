"""A finished corpus or cache → a remote store, in the order of commit.

Each part's objects go before its manifest, and cache.json or corpus.json goes last: what a reader
finds vouched for is there. A part whose manifest stands in the store with the same bytes is skipped,
so a copy that was stopped goes on where it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from storage import manifest
from storage.errors import CorruptShard, MissingShard
from storage.fingerprint import file_sha256
from storage.layout import GROUP
from storage.remote import RemotePath
from storage.writer import open_cache

_LAST = ("cache.json", "corpus.json")
_THREADS = 8


def push(
    root: Path, owners: manifest.Owners, target: RemotePath, tell: Callable[[int], None]
) -> int:
    """Copies a corpus or a cache; returns the bytes sent.

    Args:
        root: the local folder.
        owners: which fingerprint each part's manifest carries.
        target: where to.
        tell: called after each part with its bytes, sent or skipped.

    Raises:
        MissingShard, CorruptShard: a local file is not what its manifest vouches for.
        RemoteError, ConfigError: of the store.
    """
    there, sent = set((target / "manifests").names()), 0
    listed = manifest.parse_names(there)
    manifest.require_prefixes(
        target, listed, owners.prefixes(listed.parts),
        "push to another place, or empty this one first: it holds something else",
    )  # fmt: skip
    with ThreadPoolExecutor(_THREADS) as pool:
        for part in manifest.done_parts(root, owners).tolist():
            sent += _push_part(root, owners.of(part), part, target, there, tell, pool)
    for name in [*_small_files(root), *_LAST]:
        if (root / name).exists():
            (target / name).write(root / name)
            sent += (root / name).stat().st_size
    return sent


def _push_part(
    root: Path, owner: str, part: int, target: RemotePath, there: set[str],
    tell: Callable[[int], None], pool: ThreadPoolExecutor,
) -> int:  # fmt: skip
    """Copies one part; returns the bytes sent, 0 if it was there."""
    vouched = manifest.load(root, part, owner)
    assert vouched is not None  # it was listed a moment ago
    name = f"manifests/{manifest.path_of(root, part, owner).name}"
    size = sum(n for n, _ in vouched.objects.values())
    tell(size)
    own = (root / name).read_bytes()
    if Path(name).name in there and (target / name).read_bytes() == own:
        return 0

    def send(item: tuple[str, tuple[int, str]]) -> None:
        _require_whole(root / item[0], *item[1])
        (target / item[0]).write(root / item[0])

    list(pool.map(send, vouched.objects.items()))
    (target / name).write(root / name)
    return size + len(own)


def _require_whole(path: Path, size: int, digest: str) -> None:
    todo = "run `scholiast verify`, mend what it finds, and push again"
    if not path.exists():
        raise MissingShard("a file that its manifest vouches for is missing", where=path, todo=todo)
    if path.stat().st_size != size or file_sha256(path) != digest:
        raise CorruptShard("a file has bytes that were not written there", where=path, todo=todo)


def _small_files(root: Path) -> Iterator[str]:
    """Yields what no manifest vouches for: Zarr's metadata, orders of ids, log, begun.json."""
    opened = open_cache(root)
    shards = {root / GROUP / name / "c" for name in opened[1].arrays()} if opened else set()
    skipped = {root / "manifests", root / "blocks", *shards}
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        folders[:] = sorted(n for n in folders if here / n not in skipped and n[0] != ".")
        for name in sorted(names):
            path = (here / name).relative_to(root).as_posix()
            if name[0] != "." and not name.endswith(".tmp") and path not in _LAST:
                yield path
