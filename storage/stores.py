"""A cache or a corpus as far as its own files tell, damaged or whole: what it is, which parts it
has, which files each part consists of."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from storage import manifest
from storage.blocks import object_name
from storage.checked import parse
from storage.corpus_info import CorpusInfo, load_begun, load_info
from storage.durable import patiently
from storage.errors import CorruptShard, ScholiastError, unreadable
from storage.fingerprint import canonical_json
from storage.layout import GROUP, Layout, order_names, shard_name
from storage.manifest import Manifest
from storage.metadata import altered_metadata, group_metadata
from storage.orders import IdOrders
from storage.remote import RemotePath, Root
from storage.tables import altered_orders, carried_orders, sound_orders
from storage.writer import open_cache, owners

CACHE, CORPUS = "cache", "corpus"
INFO = {CACHE: "cache.json", CORPUS: "corpus.json"}
BEGUN = "begun.json"
MANIFEST = re.compile(r"([0-9]{6,})-[0-9a-f]{12}\.json")

Mend = Literal["redo", "rewrite", "restore", "drop", "none"]


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it was written.

    Attributes:
        part: index of the part; None where it is of the whole.
        path: relative to the root.
        what: one sentence.
        mend: what repair can do. "redo": drop the part, stage one makes it anew; "rewrite": the
            file follows from the layout; "restore": another file holds the same bytes; "drop": the
            next command writes the file again; "none".
    """

    part: int | None
    path: str
    what: str
    mend: Mend


@dataclass(frozen=True)
class Store:
    """A cache or a corpus as far as it can be told from its own files.

    Attributes:
        root, kind: the folder; "cache" or "corpus".
        orders: a cache's orders of ids; None where they are lost.
        owners: fingerprints that the parts' manifests must carry; None if no file tells.
        layout, info: of a cache, of a corpus; None where its file is damaged or missing.
        known: False for another version of the format, of which nothing else can be told.
    """

    root: Path
    kind: str
    owners: manifest.Owners | None = None
    layout: Layout | None = None
    info: CorpusInfo | None = None
    orders: IdOrders | None = None
    known: bool = True

    @property
    def parts(self) -> int | None:
        known = self.layout or self.info
        return known.parts if known else None

    def path(self, part: int) -> str:
        """Returns a part's manifest, relative to the root."""
        own = manifest.path_of(self.root, part, self.owners.of(part) if self.owners else "")
        if not own.exists():  # made from something else, or by we do not know what
            own = min((self.root / "manifests").glob(f"{part:06d}-*.json"), default=own)
        return f"manifests/{own.name}"

    def load(self, part: int) -> Manifest | None:
        """Returns a part's manifest, whatever it was made from (see manifest.read)."""
        return manifest.read(self.root / self.path(part))

    def listed(self) -> list[int]:
        """Returns the parts that have a manifest, ascending, from names alone."""
        parts: list[int] = np.unique(manifest.listing(self.root).parts).tolist()
        return parts if self.parts is None else [p for p in parts if p < self.parts]

    def objects(self, part: int) -> set[str] | None:
        """Returns the files that a part consists of; None if that cannot be told."""
        if self.kind == CORPUS:
            return {object_name(part)}
        if self.layout is None:
            return None
        specs = self.layout.arrays()
        return {shard_name(name, part, len(spec.shape)) for name, spec in specs.items()}

    def metadata(self) -> set[str]:
        """Returns the Zarr metadata's files."""
        if self.layout is None or self.orders is None:
            return set()
        return set(group_metadata(self.layout, self.orders))


def kind_of(root: Path) -> str | None:
    """Returns whether a folder is a "cache" or a "corpus", even one that is damaged; else None."""
    if (root / INFO[CACHE]).exists() or (root / GROUP).is_dir():
        return CACHE
    if (root / INFO[CORPUS]).exists() or (root / BEGUN).exists():
        return CORPUS
    return CORPUS if (root / "blocks").is_dir() and (root / "manifests").is_dir() else None


def whole_files(root: Path) -> Iterator[str]:
    """Yields what no manifest vouches for: identity, Zarr's metadata, orders of ids and their copies,
    log, begun.json; no temporary files."""
    skipped = {root / "manifests", root / "blocks"}
    try:
        opened = open_cache(root)
    except ScholiastError:
        opened = None
    if opened:
        skipped |= {root / GROUP / name / "c" for name in opened[1].arrays()}
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        folders[:] = sorted(n for n in folders if here / n not in skipped and n[0] != ".")
        for name in sorted(names):
            if name[0] != "." and not name.endswith(".tmp"):
                yield (here / name).relative_to(root).as_posix()


def whole_bytes(root: Root) -> int:
    """Returns the bytes of these files; of a remote root 0, for asking takes a request each."""
    if isinstance(root, RemotePath):
        return 0
    return patiently(lambda: sum((root / n).stat().st_size for n in whole_files(root)), root)


def find_stores(root: Path) -> dict[str, Path]:
    """Returns the caches and corpora at or below a folder (two levels down), by name.

    A run's folder holds them two levels down, a folder of several teachers' caches one.
    """
    if kind_of(root):
        return {root.resolve().name: root}
    found: dict[str, Path] = {}
    for folder in [*sorted(root.glob("*/")), *sorted(root.glob("*/*/"))]:
        if kind_of(folder) and folder.parent not in found.values():
            name = folder.name
            found[folder.relative_to(root).as_posix() if name in found else name] = folder
    return found


def open_store(root: Path) -> tuple[Store, list[Problem]]:
    """Returns what lies at `root`, and what is wrong with the files that are of the whole."""
    kind = kind_of(root)
    if kind == CACHE:
        return _open_cache(root)
    if kind == CORPUS:
        return _open_corpus(root)
    raise ValueError(f"{root} is neither a cache nor a corpus")


def _open_cache(root: Path) -> tuple[Store, list[Problem]]:
    name = INFO[CACHE]
    opened, problems = None, []
    try:
        opened = open_cache(root)
    except CorruptShard as error:
        problems.append(Problem(None, name, error.what, "drop"))
    except ScholiastError as error:
        return Store(root, CACHE, known=False), [Problem(None, name, error.what, "none")]
    if opened is None:
        bare = Store(root, CACHE)
        if not problems and bare.listed():
            problems.append(Problem(None, name, "cache.json is missing", "drop"))
        return Store(root, CACHE, _listed_owners(root)), problems
    orders = _orders(root, opened[1], owners(*opened), problems)
    store = Store(root, CACHE, owners(*opened), opened[1], None, orders)
    if orders is not None:
        altered = altered_metadata(root, opened[1], orders)
        problems += [Problem(None, path, what, "rewrite") for path, what in altered.items()]
    return store, problems + not_canonical(root, name, "drop")


def _orders(
    root: Path, layout: Layout, owners: manifest.Owners, problems: list[Problem]
) -> IdOrders | None:
    """Returns the orders of ids with which the parts were written, from either copy; adds to
    `problems` what is wrong with any of their files."""
    found = sound_orders(root, layout, carried_orders(root, owners))
    if found is None:
        lose = (
            "; its other copy is lost too: delete this cache's folder and cache the teacher again"
        )
        lost = altered_orders(root, layout, order_names())
        problems += [Problem(None, path, what + lose, "none") for path, what in lost.items()]
        return None
    altered = altered_orders(root, layout, found[1])
    problems += [Problem(None, path, what, "restore") for path, what in altered.items()]
    return found[0]


def _open_corpus(root: Path) -> tuple[Store, list[Problem]]:
    name = INFO[CORPUS]
    info, problems = None, []
    try:
        info = load_info(root)
    except CorruptShard as error:
        problems.append(Problem(None, name, error.what, "drop"))
    except ScholiastError as error:
        return Store(root, CORPUS, known=False), [Problem(None, name, error.what, "none")]
    if info is not None:
        store = Store(root, CORPUS, info.owners, None, info)
        return store, [*_begun(root, info), *not_canonical(root, name, "drop")]
    # Not complete: begun.json, which carries no checksum, must be what the parts were made from.
    begun, owners = load_begun(root), _listed_owners(root)
    known = {owner for _, owner in begun[1]} if begun else set[str]()
    if not known or (owners and not known.issuperset(owners.fingerprints)):
        what = "begun.json is missing, or not what the finished parts were made from"
        problems.append(Problem(None, BEGUN, what, "drop"))
    return Store(root, CORPUS, owners), problems


def generations_of(info: CorpusInfo) -> list[tuple[int, str]]:
    """Returns what begun.json states of a complete corpus's generations."""
    return [(generation.sources, generation.identity) for generation in info.generations]


def _begun(root: Path, info: CorpusInfo) -> list[Problem]:
    """Finds a begun.json that is not corpus.json's: should that one be lost, nothing else tells what
    the parts were made from. An append that is under way has added generations to it."""
    begun, own = load_begun(root), generations_of(info)
    if begun is None or begun[1][: len(own)] != own:
        what = "begun.json is missing, or not what the parts were made from"
        return [Problem(None, BEGUN, what, "rewrite")]
    return not_canonical(root, BEGUN, "rewrite")


def not_canonical(root: Path, name: str, mend: Mend, part: int | None = None) -> list[Problem]:
    """Finds what a JSON parser passes over: bytes that are not the canonical text."""
    try:
        data = (root / name).read_bytes()
        with contextlib.suppress(ValueError, RecursionError):
            if canonical_json(parse(data)) == data:
                return []
    except OSError as error:
        return [Problem(part, name, unreadable("the file", error, name).what, mend)]
    return [Problem(part, name, "the file's bytes are not those that were written", mend)]


def _listed_owners(root: Path) -> manifest.Owners | None:
    """Returns what the manifests themselves say they belong to; None if there are none.

    Their names tell where a generation begins; its whole fingerprint stands in any of its manifests.
    """
    listed = manifest.listing(root)
    if not len(listed):
        return None
    begins = [0, *(np.flatnonzero(listed.prefixes[1:] != listed.prefixes[:-1]) + 1).tolist()]
    fingerprints = []
    for first, end in zip(begins, [*begins[1:], len(listed)], strict=True):
        prefix = listed.prefixes[first].decode()
        whole = (_owner_of(root, int(part), prefix) for part in listed.parts[first:end])
        fingerprints.append(next((found for found in whole if found), prefix))
    return manifest.Owners((0, *listed.parts[begins[1:]].tolist()), tuple(fingerprints))


def _owner_of(root: Path, part: int, prefix: str) -> str | None:
    try:
        found = manifest.read(manifest.path_of(root, part, prefix))
    except ScholiastError:
        return None
    return found.fingerprint if found else None
