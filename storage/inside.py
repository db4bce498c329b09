"""Paths that other files name: below their folder, and really there."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from storage.errors import CorruptShard
from storage.remote import Root


def is_below(name: str) -> bool:
    """Returns whether a path names something below the folder that it is relative to."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and "\0" not in name


def stays_inside(root: Path, name: str) -> bool:
    """Returns whether what a path below `root` names lies there: no link on its way leads out.

    `root` itself may be a link, and lie behind links.
    """
    try:
        return (root / name).resolve().is_relative_to(root.resolve())
    except RuntimeError:  # a link to itself
        return False


def require_inside(root: Root, name: str) -> None:
    """Refuses a file below a folder that is really elsewhere.

    Raises:
        CorruptShard: a link on its way leads out.
    """
    if isinstance(root, Path) and not stays_inside(root, name):
        raise CorruptShard(
            "a link leads out of the folder", where=root / name,
            todo="put the file itself there, or take the link away and run `scholiast repair`",
        )  # fmt: skip
