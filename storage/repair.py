"""Drops what verify found bad, so that the ordinary commands make just that anew.

Nothing is mended in place but what follows from something sound: the Zarr metadata from the layout,
begun.json from corpus.json. The order is that of the commits, reversed: corpus.json before a part's
manifest, the manifest before its files; a kill between two steps leaves what verify finds again.
No stage one may be writing to the same folder.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from storage import durable
from storage.corpus_info import save_begun
from storage.inside import stays_inside
from storage.metadata import rewrite_metadata
from storage.stores import BEGUN, CORPUS, INFO, Problem, Store, generations_of
from storage.tables import digest, order_paths, restore
from storage.verify import Report, empty_temporaries


@dataclass(frozen=True)
class Action:
    """One step of a repair.

    Attributes:
        verb: "delete" or "write".
        path: the file, relative to the root.
        why: the part it belongs to, or what it is.
    """

    verb: str
    path: str
    why: str


def plan_repair(report: Report, clean: bool = False) -> list[Action]:
    """Returns the steps that would mend what `verify` found, in their order.

    Args:
        clean: also delete what stopped writers have left behind.
    """
    store, actions = report.store, list[Action]()
    redo = sorted({p.part for p in report.problems if p.mend == "redo" and p.part is not None})
    if any(p.path == BEGUN and p.mend == "rewrite" for p in report.problems):
        # First: corpus.json dropped, nothing else tells what the parts were made from.
        actions.append(Action("write", BEGUN, "follows from corpus.json"))
    if store.kind == CORPUS and redo and store.info is not None:
        actions.append(Action("delete", INFO[CORPUS], "vouches for all parts"))
    for problem in report.problems:
        if problem.mend == "restore":
            actions.append(Action("write", problem.path, "its other copy is sound"))
        elif problem.mend == "rewrite" and problem.path != BEGUN:
            actions.append(Action("write", problem.path, "follows from the layout"))
        elif problem.mend == "drop" and (store.root / problem.path).exists():
            actions.append(Action("delete", problem.path, problem.what))
    for part in redo:
        bad = {p.path for p in report.problems if p.part == part}
        actions.append(Action("delete", store.path(part), f"part {part}"))
        actions += [Action("delete", path, f"part {part}") for path in sorted(bad)]
    if clean:
        actions += [Action("delete", f.path, "left behind") for f in report.leftovers if f.ours]
    return [a for a in dict.fromkeys(actions) if _ours(store, a)]


def repair(report: Report, clean: bool = False) -> list[Action]:
    """Does what `plan_repair` says; returns it.

    Raises:
        DiskFull: no space for a metadata file; what was done before is kept.
    """
    actions = plan_repair(report, clean)
    for action in actions:
        if action.verb == "delete":
            _delete(report.store.root / action.path)
        else:
            _write(report.store, action.path)
    if clean and report.store.known:
        for folder in empty_temporaries(report.store.root):  # their files are gone now
            _delete(folder)
    return actions


def unmended(report: Report) -> list[Problem]:
    """Returns the problems that no repair can touch: a person has to decide."""
    return [problem for problem in report.problems if problem.mend == "none"]


def _ours(store: Store, action: Action) -> bool:
    """Returns whether there is something to do, and in the store itself: behind a link that leads out
    of it lies what is another's."""
    path = store.root / action.path
    there = path.exists() or path.is_symlink()
    inside = stays_inside(store.root, str(PurePosixPath(action.path).parent))
    return inside and (there or action.verb == "write")


def _write(store: Store, path: str) -> None:
    if (store.root / path).is_dir() or (store.root / path).is_symlink():  # where a file should be
        _delete(store.root / path)
    if path == BEGUN and store.info is not None:
        save_begun(store.root, store.info.identity, generations_of(store.info))
    elif store.layout is not None and path in order_paths():
        restore(store.root, store.layout, digest(store.orders) if store.orders else None)
    elif store.layout is not None and store.orders is not None:
        rewrite_metadata(store.root, store.layout, store.orders, path)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():  # where a file should be
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    durable.fsync_folder(path.parent)
