"""What licence a model's own files state: nothing is looked up, nothing is guessed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

NOT_STATED: Final = "not stated"
_FILES = ("LICENSE*", "LICENCE*", "COPYING*")
_MOST = 1 << 20  # characters of a README that are looked at


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
        lines = _text(path).splitlines()
        first = next((line.strip(" \t#*=-") for line in lines if line.strip(" \t#*=-")), "")
        return Licence(first[:80] or path.name, path.name)
    return Licence()


def _of_metadata(said: dict[str, Any], source: str) -> Licence | None:
    named = said.get("license")
    if isinstance(named, list):
        named = ", ".join(map(str, named))
    if not isinstance(named, str) or not named.strip():
        return None
    name = named.strip()
    if name == "other":  # the hub's word for one without an identifier
        return Licence(str(said.get("license_name") or name), source)
    return Licence(name, source, re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name) is not None)


def _front_matter(path: Path) -> dict[str, Any]:
    """Returns the YAML between the first two lines of dashes; empty if there is none."""
    import yaml

    found = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", _text(path), re.DOTALL)
    try:
        said = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        return {}
    return said if isinstance(said, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(_text(path))
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(_MOST)
    except OSError:
        return ""
