"""The orders of ids as they lie in a cache: two small Zarr arrays, and a spare copy of each.

Every part depends on them, so one bad byte would cost them all: `spare/` holds the same bytes, from
which `scholiast repair` restores them. Each manifest carries their digest, so parts are never read with
other orders than they were written with.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import google_crc32c
import numpy as np
from pcodec import standalone

from storage import durable, manifest
from storage.checked import read_bounded
from storage.errors import CorruptShard, MissingShard, ScholiastError, unreadable
from storage.layout import Layout, order_names
from storage.orders import NEAR, IdOrders, most_classes
from storage.remote import Root
from storage.types import AnyArray

_ASKED = 32  # manifests that tell with which orders of ids the parts were written


def spare_name(name: str) -> str:
    """Returns where the spare copy of an order's file lies, relative to the cache folder."""
    return f"spare/{name.split('/')[1]}"


def order_paths() -> list[str]:
    """Returns the orders' files and their spare copies, relative to the cache folder."""
    return [path for name in order_names() for path in (name, spare_name(name))]


def save_spares(root: Path) -> None:
    """Copies the orders' files to `spare/`, unless copies are there.

    Raises:
        DiskFull: no space.
    """
    for name in order_names():
        if not (root / spare_name(name)).exists():
            durable.write_bytes(root / spare_name(name), (root / name).read_bytes())


def load_orders(root: Root, layout: Layout, spare: bool = False) -> IdOrders:
    """Returns the cache's orders of ids (from their spare copy if `spare`).

    Raises:
        MissingShard, CorruptShard: a file is gone or has other bytes than were written.
    """
    names = [spare_name(name) if spare else name for name in order_names()]
    return _load(root, layout, names)


def sound_orders(
    root: Path, layout: Layout, carried: str | None
) -> tuple[IdOrders, list[str]] | None:
    """Returns the cache's orders and the files they come from, or None where they are lost.

    Each of the two has two copies. Of those that can be read the pair is taken with which the parts
    were written: orders of another cache are as readable.

    Args:
        carried: the digest in the parts' manifests, if there are any; without it, or where no pair has
            it, the first readable pair is taken.
    """
    found: list[tuple[IdOrders, list[str]]] = []
    for names in itertools.product(*((name, spare_name(name)) for name in order_names())):
        with contextlib.suppress(ScholiastError):
            found.append((_load(root, layout, list(names)), list(names)))
    right = [pair for pair in found if digest(pair[0]) == carried]
    return next(iter([*right, *found]), None)


def carried_orders(root: Path, owners: manifest.Owners) -> str | None:
    """Returns the digest of orders that most of the parts' manifests carry (of some of them)."""
    listed = manifest.listing(root)
    own = listed.parts[listed.prefixes == owners.prefixes(listed.parts)]
    found: Counter[str] = Counter()
    for part in own[:: max(1, len(own) // _ASKED)].tolist():
        with contextlib.suppress(ScholiastError):
            if one := manifest.load(root, part, owners.of(part)):
                found[str(one.carry.get("orders"))] += 1
    return found.most_common(1)[0][0] if found else None


def altered_orders(root: Path, layout: Layout, sources: Sequence[str]) -> dict[str, str]:
    """Returns which of the four files differ from those to go by: path → one sentence."""
    problems = {}
    for name, source in zip(order_names(), sources, strict=True):
        for path in (name, spare_name(name)):
            try:
                read_table(root / path, layout.vocab_size)
                if (root / path).read_bytes() != (root / source).read_bytes():
                    problems[path] = "other orders of ids than the parts were written with"
            except ScholiastError as error:
                problems[path] = error.what
    return problems


def _load(root: Root, layout: Layout, names: Sequence[str]) -> IdOrders:
    vocab = layout.vocab_size
    near, far = (read_table(root / name, vocab) for name in names)
    depth = min(NEAR, vocab)
    if near.size % depth or max(near.max(), far.max()) >= vocab:
        raise _corrupt(root / names[0], "the orders of ids do not fit the vocabulary")
    rows = near.reshape(-1, depth)
    if len(rows) > most_classes(vocab):
        raise _corrupt(root / names[0], "more classes than there can be")
    if not all(_distinct(row, vocab) for row in (far, *rows)):
        raise _corrupt(root / names[0], "an order of ids names an id twice")
    return IdOrders(rows.astype(np.int32), far.astype(np.int32), vocab)


def _distinct(ids: AnyArray, vocab_size: int) -> bool:
    return int(np.bincount(ids, minlength=vocab_size).max()) == 1


def digest(orders: IdOrders) -> str:
    """Returns the sha256 of near and far as little-endian int32."""
    data = orders.near.astype("<i4").tobytes() + orders.far.astype("<i4").tobytes()
    return hashlib.sha256(data).hexdigest()


def read_table(path: Root, vocab_size: int) -> AnyArray:
    """Returns the values of an unsharded Zarr array's only chunk, flat: uint16, or uint32 of a vocabulary
    beyond 65,536.

    pcodec is given the memory for the largest table there is: asked to find out by itself how much a
    chunk takes, it believes the chunk, and a damaged one ends the process.

    Raises:
        MissingShard, CorruptShard
    """
    largest = max(vocab_size, most_classes(vocab_size) * min(NEAR, vocab_size))
    try:
        data = durable.patiently(lambda: read_bounded(path), path)
    except FileNotFoundError:
        raise MissingShard("the orders of ids are missing", where=path, todo=_TODO) from None
    except OSError as error:
        raise unreadable("the orders of ids", error, path, _TODO) from error
    except ValueError as error:
        raise _corrupt(path, f"the orders of ids are too large: {error}") from None
    body, stored = data[:-4], int.from_bytes(data[-4:], "little")
    if not body or google_crc32c.value(body) != stored:
        raise _corrupt(path, "the orders of ids fail their crc32c")
    values: AnyArray = np.empty(largest, "uint16" if vocab_size <= 1 << 16 else "uint32")
    try:
        progress = standalone.simple_decompress_into(body, values)
    except RuntimeError as error:
        raise _corrupt(path, f"the orders of ids cannot be decoded: {error}") from error
    if not progress.finished or not progress.n_processed:
        raise _corrupt(path, "the orders of ids are more than there can be, or none")
    return values[: progress.n_processed]


def restore(root: Path, layout: Layout, carried: str | None = None) -> list[Path]:
    """Puts the sound one of the orders and their spare copy in the other's place.

    Args:
        carried: the digest of the orders with which the parts were written, if known.

    Returns:
        The files written.

    Raises:
        MissingShard, CorruptShard: both are damaged.
        DiskFull: no space.
    """
    found = sound_orders(root, layout, carried)
    if found is None:
        load_orders(root, layout)  # says what is wrong
        raise _corrupt(root / "spare", "the orders of ids are lost")
    written = []
    for name, source in zip(order_names(), found[1], strict=True):
        data = (root / source).read_bytes()
        for path in (root / name, root / spare_name(name)):
            if path.is_dir():  # where a file should be
                shutil.rmtree(path)
            if not path.exists() or path.read_bytes() != data:
                durable.write_bytes(path, data)
                written.append(path)
    return written


_TODO = "run `scholiast repair`, which restores them from their copy in spare/"


def _corrupt(path: Root, what: str) -> CorruptShard:
    return CorruptShard(what, where=path, todo=_TODO)
