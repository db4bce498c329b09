"""What licence a model's own files state: nothing is looked up, nothing is guessed.

A model from elsewhere may hold anything: a link to a file of ours, whose first line would be published
with the student; text that no parser ends with. What is not sound is taken for not there, for this is
asked when the training is over.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pipeline.yaml_text import load_yaml
from storage.checked import parse

NOT_STATED: Final = "not stated"
_FILES = ("LICENSE*", "LICENCE*", "COPYING*")
_MOST = 1 << 20  # characters of a README that are looked at
_LONGEST = 80  # characters of a name


@dataclass(frozen=True)
class Licence:
    """A licence as a model's files give it.

    Attributes:
        name: the hub's identifier (apache-2.0), a name, the first line of a licence's text; or
            NOT_STATED.
        source: the file that says so; empty if none does.
        identifier: whether the name can stand as `license` in a model card's metadata.
    """

    name: str = NOT_STATED
    source: str = ""
    identifier: bool = False


def stated(folder: Path) -> Licence:
    """Returns the licence that the files of a model's folder state.

    Asked in this order: `license` in the front matter of README.md, `license` in config.json, the
    first line of a file named LICENSE.
    """
    front = _front_matter(folder / "README.md")
    if found := _of_metadata(front, "README.md"):
        return found
    if found := _of_metadata(_json(folder / "config.json"), "config.json"):
        return found
    for path in sorted(path for pattern in _FILES for path in folder.glob(pattern)):
        if (text := _text(path)) is None:
            continue
        bare = (line.strip(" \t#*=-") for line in text.splitlines())
        return Licence(next(filter(None, bare), path.name)[:_LONGEST], path.name)
    return Licence()


def _of_metadata(said: dict[str, Any], source: str) -> Licence | None:
    named = said.get("license")
    if isinstance(named, list):
        named = ", ".join(map(str, named))
    if not isinstance(named, str) or not named.strip():
        return None
    name = " ".join(named.split())[:_LONGEST]
    if name == "other":  # the hub's word for one without an identifier
        own = said.get("license_name")
        return Licence(own[:_LONGEST] if isinstance(own, str) and own else name, source)
    return Licence(name, source, re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name) is not None)


def _front_matter(path: Path) -> dict[str, Any]:
    """Returns the YAML between the first two lines of dashes; empty if there is none."""
    first, *lines = (_text(path) or "").removeprefix("\ufeff").split("\n")
    ends = (i for i, line in enumerate(lines) if line.rstrip() == "---")
    end = next(ends, None) if first.rstrip() == "---" else None
    if end is None:
        return {}
    try:
        said = load_yaml("\n".join(lines[:end]))
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        said = parse((_text(path) or "").encode())
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _text(path: Path) -> str | None:
    """Returns the beginning of a model's file; None if it is no file of the model, or cannot be read."""
    try:
        real, folder = path.resolve(strict=True), path.parent.resolve(strict=True)
        if not real.is_file() or not any(real.is_relative_to(own) for own in _own(folder)):
            return None
        with real.open(encoding="utf-8", errors="replace") as file:
            return file.read(_MOST)
    except (OSError, RuntimeError):  # a link to itself is either
        return None


def _own(folder: Path) -> tuple[Path, ...]:
    """Returns where a model's files lie: of a snapshot of the hub also where its links lead."""
    blobs = folder.parent.parent / "blobs"
    return (folder, blobs) if folder.parent.name == "snapshots" else (folder,)
