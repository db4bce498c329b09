"""Every byte of a cache or a corpus against its manifests: what is bad, undone, or vouched for by
nothing.

Files are hashed in threads (hashlib lets go of the interpreter's lock), so that the disk is the
limit; memory is a window of parts, whatever the size of the whole. Nothing is changed here: see
repair.py.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from storage import manifest
from storage.blocks import BlockReader
from storage.corpus_info import load_begun
from storage.errors import ScholiastError
from storage.fingerprint import file_sha256
from storage.inside import stays_inside
from storage.layout import GROUP
from storage.manifest import Manifest
from storage.metadata import LEVELS
from storage.notes import require_codes
from storage.reader import CacheReader
from storage.stores import (
    BEGUN,
    CACHE,
    CORPUS,
    INFO,
    MANIFEST,
    Problem,
    Store,
    not_canonical,
    open_store,
)
from storage.tables import digest, order_paths

_OTHERS = {CACHE: {"log.jsonl"}, CORPUS: {BEGUN}}
_WINDOW = 256  # parts whose manifests are held at once
_DEEP_BLOCKS = 8  # blocks decoded at once
_OBJECT = re.compile(rf"{re.escape(GROUP)}/[^/]+/c/([0-9]+)(/0)*|blocks/([0-9]{{6,}})\.arrow")
_TEMPORARY = re.compile(
    r"(^|/)\.[^/]+\.[0-9a-f]{32}\.tmp(/|$)|\.partial$|^\.commit\.lock$|^\.leases/"
)


@dataclass(frozen=True)
class Leftover:
    """A file that nothing vouches for and nothing reads, or a stopped writer's folder without any.

    Attributes:
        path: relative to the root.
        bytes: its size.
        ours: whether it is what a stopped writer leaves: temporary, or of a part without manifest.
    """

    path: str
    bytes: int
    ours: bool


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        store: what was checked.
        checked: parts with a manifest; objects, bytes: what of them was read; seconds: it took.
        deep: whether every chunk was decoded too.
        problems: by part.
        missing: parts that are not done, which is no fault (unless corpus.json vouches for them).
        leftovers: files that nothing vouches for.
    """

    store: Store
    checked: int
    objects: int
    bytes: int
    seconds: float
    deep: bool
    problems: tuple[Problem, ...]
    missing: tuple[int, ...]
    leftovers: tuple[Leftover, ...]

    @property
    def sound(self) -> bool:
        return not self.problems

    @property
    def complete(self) -> bool:
        return not self.missing and self.store.parts is not None


def verify(
    root: Path,
    workers: int = 4,
    deep: bool = False,
    tell: Callable[[int, int], None] = lambda parts, total: None,
) -> Report:
    """Checks a cache or a corpus.

    Args:
        root: its folder (see `kind_of`).
        workers: threads.
        deep: also decode every chunk with the reader.
        tell: called with (parts checked just now, parts in all), with 0 parts at first.
    """
    begun = time.monotonic()
    store, problems = open_store(root)
    parts = store.listed() if store.known else []
    objects, size = 0, 0
    tell(0, len(parts))
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(parts), _WINDOW):
            window = parts[start : start + _WINDOW]
            found = list(pool.map(partial(_check_manifest, store), window))
            jobs = [(m.part, *o) for m, _ in found if m for o in m.objects.items()]
            bad = [p for _, problem in found for p in problem]
            bad += [p for p in pool.map(partial(_check_object, store), jobs) if p]
            if deep:
                whole = [part for part in window if part not in {p.part for p in bad}]
                bad += [p for p in pool.map(partial(_decode, store), whole) if p]
            problems += sorted(bad, key=lambda p: (p.part or 0, p.path))
            objects, size = objects + len(jobs), size + sum(job[2][0] for job in jobs)
            tell(len(window), len(parts))
    total = max(parts, default=-1) + 1 if store.parts is None else store.parts
    missing = tuple(np.setdiff1d(np.arange(total), parts).tolist())
    problems += _strays(store) if store.known else []
    if store.info is not None:  # corpus.json vouches for all of them
        gone = "a manifest is missing, though corpus.json stands"
        problems += [Problem(part, store.path(part), gone, "redo") for part in missing]
        missing = ()
    return Report(
        store, len(parts), objects, size, time.monotonic() - begun, deep, tuple(problems), missing,
        tuple(_leftovers(store, set(parts), {p.path for p in problems})) if store.known else (),
    )  # fmt: skip


def _check_manifest(store: Store, part: int) -> tuple[Manifest | None, list[Problem]]:
    path = store.path(part)
    try:
        found = store.load(part)
        if found is None:  # taken away since it was listed
            return None, []
        plain = not_canonical(store.root, path, "redo", part)
    except ScholiastError as error:
        return None, [Problem(part, path, error.what, "redo")]
    if store.owners is None or found.fingerprint != store.owners.of(part):
        what = f"the part was made from something else: fingerprint {found.fingerprint[:16]}"
        return None, [Problem(part, path, what, "none")]
    known = store.layout or store.info
    first, last = known.part_range(part) if known else (found.first_block, None)
    if store.orders is not None and found.carry.get("orders") != digest(store.orders):
        return found, [Problem(part, path, "the part was written with other orders of ids", "redo")]
    named = store.objects(part)
    if (
        found.part != part
        or found.first_block != first
        or found.blocks != (last - first if last is not None else found.blocks)
        or set(found.objects) != (set(found.objects) if named is None else named)
    ):
        return None, [Problem(part, path, "the manifest is of another part", "redo")]
    return found, plain


def _strays(store: Store) -> list[Problem]:
    """Finds manifests beside the right ones: of another fingerprint, or of a part that does not exist.

    Other commands refuse the former. A corpus's append that is under way has said in begun.json which
    fingerprint its parts carry: these are no problem, and no part of the corpus yet.
    """
    if store.owners is None or store.parts is None:
        return []
    listed, problems = manifest.listing(store.root), []
    begun = load_begun(store.root) if store.kind == CORPUS else None
    coming = {owner[: manifest.PREFIX].encode() for _, owner in begun[1]} if begun else set()
    coming -= {owner[: manifest.PREFIX].encode() for owner in store.owners.fingerprints}
    beyond, expected = listed.parts >= store.parts, store.owners.prefixes(listed.parts)
    for i in np.flatnonzero(beyond | (listed.prefixes != expected)).tolist():
        part, prefix = int(listed.parts[i]), listed.prefixes[i]
        path = f"manifests/{part:06d}-{prefix.decode()}.json"
        if prefix != expected[i]:
            if path == store.path(part) and not beyond[i]:  # the part's only one: checked as such
                continue
            if not (beyond[i] and prefix in coming):
                what = f"a manifest of something else: fingerprint {prefix.decode()}…"
                problems.append(Problem(part, path, what, "none"))
        else:
            what = f"a manifest of a part that does not exist: there are {store.parts:,}"
            problems.append(Problem(part, path, what, "drop"))
    return problems


def _check_object(store: Store, job: tuple[int, str, tuple[int, str]]) -> Problem | None:
    part, name, (size, digest) = job
    path = store.root / name
    try:
        if not stays_inside(store.root, name):
            return Problem(part, name, "a link leads out of the folder", "none")
        found = path.stat().st_size
        if found != size:
            return Problem(part, name, f"{found:,} bytes instead of {size:,}", "redo")
        if file_sha256(path) != digest:
            return Problem(part, name, "its sha256 is not the one in its manifest", "redo")
    except FileNotFoundError:
        return Problem(part, name, "the file is missing", "redo")
    except OSError as error:  # a failing disk: the other files are still worth checking
        return Problem(part, name, f"the file cannot be read: {error.strerror}", "redo")
    return None


def _decode(store: Store, part: int) -> Problem | None:
    """Decodes a part as training would: what was written wrong has the right sha256."""
    known = store.layout or store.info
    if known is None:
        return None
    first, last = known.part_range(part)
    try:
        if store.kind == CORPUS:
            return _decode_corpus(store, part)
        reader = CacheReader(store.root)
        for start in range(first, last, _DEEP_BLOCKS):
            blocks = np.arange(start, min(start + _DEEP_BLOCKS, last))
            require_codes(reader.layout, reader.orders, reader.packed(blocks))
            notes = reader.read(blocks)
            ids = notes.head.ids
            if ids.min() < 0 or ids.max() >= reader.layout.vocab_size:
                return Problem(part, store.path(part), "an id lies outside the vocabulary", "redo")
            if not np.isfinite(notes.head.logprobs).all():
                return Problem(part, store.path(part), "a logprob is not finite", "redo")
    except ScholiastError as error:
        where = os.path.relpath(error.where, store.root) if error.where else store.path(part)
        return Problem(part, where, error.what, "redo")
    except Exception as error:  # whatever a decompressor raises
        return Problem(part, store.path(part), f"cannot be decoded: {error}", "redo")
    return None


def _decode_corpus(store: Store, part: int) -> Problem | None:
    BlockReader(store.root).part(part)
    return None


def _leftovers(store: Store, parts: set[int], bad: set[str]) -> Iterator[Leftover]:
    known = {INFO[store.kind], *_OTHERS[store.kind], *store.metadata(), *bad}
    if store.kind == CACHE:
        known |= {LEVELS, *order_paths()}
    # A part beyond corpus.json's belongs to an append that is under way; without cache.json nothing
    # can be told.
    kept = {*manifest.listing(store.root).parts.tolist()}
    told = store.kind == CORPUS or store.layout is not None
    for path in _names_below(store.root):
        named = _OBJECT.fullmatch(path)
        part = int(named[1] or named[3]) if named else -1
        listed = MANIFEST.fullmatch(path.removeprefix("manifests/"))
        if path in known or (listed and path == store.path(int(listed[1]))):
            continue
        if part in parts and path in (store.objects(part) or {path}):
            continue
        if store.layout is None and store.kind == CACHE and path.endswith("/zarr.json"):
            continue  # cannot be told without cache.json
        ours = bool(_TEMPORARY.search(path)) or (named is not None and told and part not in kept)
        yield Leftover(path, (store.root / path).lstat().st_size, ours)
    for folder in empty_temporaries(store.root):
        yield Leftover(folder.relative_to(store.root).as_posix(), 0, True)


def _names_below(root: Path) -> Iterator[str]:
    for folder, _, names in os.walk(root):
        for name in sorted(names):
            yield Path(folder, name).relative_to(root).as_posix()


def empty_temporaries(root: Path) -> list[Path]:
    """Returns the folders of stopped writers that hold no file (any more), only folders."""
    return [
        folder for folder in sorted(root.glob(".*.tmp"))
        if folder.is_dir() and not folder.is_symlink() and _TEMPORARY.search(folder.name)
        and not any(names for _, _, names in os.walk(folder))
    ]  # fmt: skip
