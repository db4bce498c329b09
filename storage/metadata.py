"""The Zarr group's own metadata against the layout they follow from.

Our reader and writer take shapes and dtypes from cache.json and never look here; zarr-python, which
other people read with, looks nowhere else.
"""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from storage import durable
from storage.checked import parse, read_bounded
from storage.errors import CorruptShard, unreadable
from storage.fingerprint import canonical_json
from storage.layout import GROUP, Layout, create_group
from storage.orders import NEAR, IdOrders

NAME = "zarr.json"
LEVELS = f"{GROUP}/logprob_levels/c/0"
"""The codec's table, which our own readers do not look at either."""


def group_metadata(layout: Layout, orders: IdOrders) -> dict[str, bytes]:
    """Returns every metadata file of a layout's group: path relative to the cache → its bytes."""
    return _group_metadata(layout, len(orders.near), len(orders.far))


@lru_cache(maxsize=16)
def _group_metadata(layout: Layout, classes: int, seen: int) -> dict[str, bytes]:
    from zarr.storage import MemoryStore

    near = np.zeros((classes, min(NEAR, layout.vocab_size)), np.int32)
    orders = IdOrders(near, np.zeros(seen, np.int32), layout.vocab_size)
    files: dict[str, Any] = {}
    create_group(MemoryStore(files), layout, orders)
    return {
        f"{GROUP}/{name}": files[name].to_bytes()
        for name in sorted(files)
        if name.endswith(NAME) or f"{GROUP}/{name}" == LEVELS
    }


def altered_metadata(root: Path, layout: Layout, orders: IdOrders) -> dict[str, str]:
    """Returns what is wrong with the metadata of the group under `root`: path → one sentence.

    Compared as JSON values, so that spaces and the order of keys may differ.
    """
    problems = {}
    for name, expected in group_metadata(layout, orders).items():
        what = "the table of levels" if name == LEVELS else "the array's metadata"
        try:
            found = durable.patiently(partial(read_bounded, root / name), root / name)
            if name != LEVELS:
                found, expected = (canonical_json(parse(x)) for x in (found, expected))
        except FileNotFoundError:
            problems[name] = f"{what}: the file is missing"
        except OSError as error:
            problems[name] = unreadable(what, error, name).what
        except (ValueError, RecursionError):
            problems[name] = f"{what}: no JSON"
        else:
            if found != expected:
                problems[name] = f"{what} differ from what the layout makes"
    return problems


def require_metadata(root: Path, layout: Layout, orders: IdOrders) -> None:
    """Refuses a group that zarr-python would read with other dtypes, shapes or codecs.

    Raises:
        CorruptShard: names the first file that is altered or missing.
    """
    for name, what in altered_metadata(root, layout, orders).items():
        raise CorruptShard(
            what, where=root / name, todo="run `scholiast repair` on this cache; parts are kept"
        )


def stored_layout(root: Path) -> Any:
    """Returns {format, layout} as the group under `root` states it, None if it cannot be read."""
    try:
        data = durable.patiently(lambda: read_bounded(root / GROUP / NAME), root)
        return parse(data)["attributes"]["scholiast"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def rewrite_metadata(root: Path, layout: Layout, orders: IdOrders, name: str) -> None:
    """Writes one metadata file anew from the layout and the orders' shapes."""
    durable.write_bytes(root / name, group_metadata(layout, orders)[name])
