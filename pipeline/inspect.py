"""What a cache or a corpus is, of what, how large, and what its numbers look like.

Sizes come from manifests, figures from a sample of blocks; both say of how many. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from storage.corpus_info import load_info
from storage.errors import IncompleteCache
from storage.fingerprint import fingerprint
from storage.layout import FORMAT
from storage.reader import CacheReader
from storage.stores import Store, open_store, whole_bytes
from storage.types import Bool, Float32, Int64, TokenStats

_MANIFESTS = 1000  # opened at most to tell the sizes
_PERCENTILES = (10, 50, 90)


def describe_cache(root: Path, name: str, sample: int) -> dict[str, Any]:
    """Returns what one teacher's cache is.

    Args:
        root: the cache folder; name: the teacher's, for messages.
        sample: blocks whose notes are read, at most.

    Returns:
        JSON values: kind, root, format, fingerprint, identity, layout, parts and parts_done,
        tokens (of the finished parts), the sizes (see `_sizes`) and `figures` (see `_figures`).

    Raises:
        IncompleteCache, StaleCache, CorruptShard, MissingShard
    """
    reader = CacheReader(root, name)
    layout, (store, _) = reader.layout, open_store(root)
    done = store.listed()
    blocks = np.concatenate(
        [np.empty(0, np.int64), *(np.arange(*layout.part_range(part)) for part in done)]
    )
    specs = layout.arrays()
    sizes = _sizes(store, done, len(blocks), len(blocks) * layout.block_length)
    for array, row in sizes["arrays"].items():
        row |= {"dtype": specs[array].dtype, "shape": list(specs[array].shape)}
    return {
        "kind": "cache", "root": str(root), "format": FORMAT,
        "fingerprint": fingerprint(reader.identity), "identity": reader.identity,
        "layout": layout.to_dict(), "parts": layout.parts, "parts_done": len(done),
        "tokens": len(blocks) * layout.block_length, **sizes,
        "figures": _figures(reader, spread(blocks, sample)),
    }  # fmt: skip


def describe_corpus(root: Path) -> dict[str, Any]:
    """Returns what a complete corpus is: what corpus.json states, and its size.

    Raises:
        IncompleteCache, CorpusError, CorruptShard
    """
    info = load_info(root)
    if info is None:
        raise IncompleteCache(
            "the corpus has not been prepared", where=root, todo="run `scholiast prepare`"
        )
    store, _ = open_store(root)
    sizes = _sizes(store, store.listed(), info.blocks, info.blocks * info.block_length)
    facts = {k: v for k, v in asdict(info).items() if k != "sources"}
    sources = [asdict(source) for source in info.sources]
    return {
        "kind": "corpus", "root": str(root), **facts, "tokens": info.tokens, "parts": info.parts,
        "bytes": sizes["bytes"], "sources": sources,
    }  # fmt: skip


def first_common_block(caches: Mapping[str, Path]) -> int | None:
    """Returns the first block on which every cache has notes, None if there is none."""
    stores = [open_store(root)[0] for root in caches.values()]
    common = set.intersection(*(set(store.listed()) for store in stores)) if stores else set()
    layout = stores[0].layout if stores else None
    return layout.part_range(min(common))[0] if layout and common else None


def spread(values: Int64, count: int) -> Int64:
    """Returns at most `count` of the values, evenly spread, in their order."""
    picked = np.linspace(0, len(values) - 1, min(len(values), count)).round()
    return values[np.unique(picked.astype(np.int64))]


def has_target(stats: TokenStats) -> Bool:
    """Returns bool [N, T], whether a row predicts anything; told without the corpus.

    A row without a target holds zeros. In no preset does one with a target: a tail whose mass is stored
    as 1 (a small head of a flat distribution) leaves no id more than the rounding, so that the entropy
    is large; an entropy stored as 0 leaves nearly no tail, whose log is far from 0. A cache without
    entropies was imported, and there a head has some mass.
    """
    target: Bool = (stats.log_tail_mass != 0) | (np.nan_to_num(stats.entropy) != 0)
    return target


def _sizes(store: Store, done: Sequence[int], blocks: int, tokens: int) -> dict[str, Any]:
    """Returns bytes, bytes_per_token, manifest_bytes and arrays → {bytes, bytes_per_token} of the
    finished parts, scaled by blocks where not every manifest was opened (manifests_read); and
    other_bytes of what belongs to the whole (identity, metadata, orders of ids and their copies, log).
    The first two count all of it."""
    picked = spread(np.array(done, np.int64), _MANIFESTS).tolist()
    arrays: dict[str, int] = {}
    own, seen = 0, 0
    for part in picked:
        vouched = store.load(part)
        if vouched is None:
            continue
        seen += vouched.blocks
        own += (store.root / store.path(part)).stat().st_size
        for name, (size, _) in vouched.objects.items():
            array = name.split("/")[1] if store.kind == "cache" else "blocks"
            arrays[array] = arrays.get(array, 0) + size
    scale = blocks / max(1, seen)
    other = whole_bytes(store.root)
    total = (sum(arrays.values()) + own) * scale + other
    return {
        "bytes": round(total), "bytes_per_token": total / max(1, tokens),
        "manifest_bytes": round(own * scale), "manifests_read": len(picked), "other_bytes": other,
        "arrays": {
            name: {"bytes": round(size * scale), "bytes_per_token": size * scale / max(1, tokens)}
            for name, size in arrays.items()
        },
    }  # fmt: skip


def _figures(reader: CacheReader, blocks: Int64) -> dict[str, Any] | None:
    """Returns the distribution of the exact statistics over these blocks' rows with a target."""
    rows: list[tuple[Float32, Float32, Float32]] = []
    for block in blocks:
        stats = reader.read(np.array([block])).stats
        kept = has_target(stats)
        rows.append((stats.entropy[kept], stats.log_tail_mass[kept], stats.gold_logprob[kept]))
    if not rows or not sum(len(row[0]) for row in rows):
        return None
    entropy, log_tail, gold = (
        np.concatenate(column).astype(np.float64) for column in zip(*rows, strict=True)
    )
    tail = np.exp(log_tail)
    return {
        "blocks": len(blocks), "rows": len(entropy),
        "head_mass": _distribution(1 - tail), "tail_mass": _distribution(tail),
        "entropy": _distribution(entropy), "gold_logprob": _distribution(gold),
        "perplexity": None if np.isnan(gold).any() else float(np.exp(-gold.mean())),
    }  # fmt: skip


def _distribution(values: Any) -> dict[str, float] | None:
    """Returns mean and percentiles, None of what the cache does not hold."""
    if np.isnan(values).any():
        return None
    marks = np.percentile(values, _PERCENTILES).tolist()
    return {
        "mean": float(values.mean()),
        **{f"p{p}": mark for p, mark in zip(_PERCENTILES, marks, strict=True)},
    }
