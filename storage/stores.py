"""A cache or a corpus as far as its own files tell, damaged or whole: what it is, which parts it
has, which files each part consists of."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from storage import manifest
from storage.blocks import CorpusInfo, load_info, object_name
from storage.errors import CorruptShard, ScholiastError
from storage.fingerprint import canonical_json, fingerprint
from storage.layout import GROUP, Layout, shard_name
from storage.manifest import Manifest
from storage.metadata import altered_metadata, group_metadata
from storage.writer import open_cache

CACHE, CORPUS = "cache", "corpus"
INFO = {CACHE: "cache.json", CORPUS: "corpus.json"}
BEGUN = "begun.json"
MANIFEST = re.compile(r"(\d{6,})\.json")

Mend = Literal["redo", "rewrite", "drop", "none"]


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it was written.

    Attributes:
        part: index of the part; None where it is of the whole.
        path: relative to the root.
        what: one sentence.
        mend: what repair can do. "redo": drop the part, stage one makes it anew; "rewrite": the
            file follows from the layout; "drop": the next command writes the file again; "none".
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
        owner: fingerprint that the parts' manifests must carry; None if no file tells.
        layout, info: of a cache, of a corpus; None where its file is damaged or missing.
    """

    root: Path
    kind: str
    owner: str | None = None
    layout: Layout | None = None
    info: CorpusInfo | None = None

    @property
    def parts(self) -> int | None:
        known = self.layout or self.info
        return known.parts if known else None

    def path(self, part: int) -> str:
        """Returns a part's manifest, relative to the root."""
        return manifest.path_of(self.root, part).relative_to(self.root).as_posix()

    def load(self, part: int) -> Manifest | None:
        """Returns a part's manifest (see manifest.load for what is raised)."""
        return manifest.load(self.root, part)

    def listed(self) -> list[int]:
        """Returns the parts that have a manifest, ascending, from names alone."""
        names = map(MANIFEST.fullmatch, _names(self.root / "manifests"))
        parts = sorted(int(name[1]) for name in names if name)
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
        return set(group_metadata(self.layout)) if self.layout else set()


def kind_of(root: Path) -> str | None:
    """Returns whether a folder is a "cache" or a "corpus", even one that is damaged; else None."""
    if (root / INFO[CACHE]).exists() or (root / GROUP).is_dir():
        return CACHE
    if (root / INFO[CORPUS]).exists() or (root / BEGUN).exists():
        return CORPUS
    return CORPUS if (root / "blocks").is_dir() and (root / "manifests").is_dir() else None


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
    except ScholiastError as error:
        problems.append(Problem(None, name, error.what, _mend_info(error)))
    if opened is None:
        bare = Store(root, CACHE)
        if not problems and bare.listed():
            problems.append(Problem(None, name, "cache.json is missing", "drop"))
        return Store(root, CACHE, _first_owner(bare)), problems
    store = Store(root, CACHE, fingerprint(opened[0]), opened[1])
    altered = altered_metadata(root, opened[1])
    problems += [Problem(None, path, what, "rewrite") for path, what in altered.items()]
    return store, problems + not_canonical(root, name, "drop")


def _open_corpus(root: Path) -> tuple[Store, list[Problem]]:
    name = INFO[CORPUS]
    info, problems = None, []
    try:
        info = load_info(root)
    except ScholiastError as error:
        problems.append(Problem(None, name, error.what, _mend_info(error)))
    if info is not None:
        store = Store(root, CORPUS, fingerprint(info.identity), None, info)
        return store, problems + not_canonical(root, name, "drop")
    # Not complete: begun.json, which carries no checksum, must be what the parts were made from.
    owner = _first_owner(Store(root, CORPUS))
    try:
        begun = fingerprint(json.loads((root / BEGUN).read_bytes()))
    except (OSError, ValueError):
        begun = None
    if begun is None or begun != (owner or begun):
        what = "begun.json is missing, or not what the finished parts were made from"
        problems.append(Problem(None, BEGUN, what, "drop"))
    return Store(root, CORPUS, owner or begun), problems


def _mend_info(error: ScholiastError) -> Mend:
    """A file of another format is whole: it is not for us to drop."""
    return "drop" if isinstance(error, CorruptShard) else "none"


def not_canonical(root: Path, name: str, mend: Mend, part: int | None = None) -> list[Problem]:
    """Finds what a JSON parser passes over: bytes that are not the canonical text."""
    data = (root / name).read_bytes()
    if canonical_json(json.loads(data)) == data:
        return []
    return [Problem(part, name, "the file's bytes are not those that were written", mend)]


def _first_owner(store: Store) -> str | None:
    """Returns the fingerprint of the first manifest that can be read."""
    for part in store.listed():
        try:
            found = store.load(part)
        except ScholiastError:
            continue
        if found is not None:
            return found.fingerprint
    return None


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
