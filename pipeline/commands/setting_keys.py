"""The keys and values that a shell is offered after --set: from configs/schema.json, which takes
milliseconds to read, and not from the models behind it, which take half a second to import."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

_SCHEMA: Final = Path(__file__).resolve().parents[1] / "configs" / "schema.json"
_SECTION, _VALUE = ".", "="


def offered(begun: str, configs: Sequence[Any]) -> list[str]:
    """Returns what may follow --set: the keys of the section that is begun, each with what comes next
    ("train." opens a section, "train.lr=" wants a value), or after "=" the values of a key that has few.

    Args:
        begun: what is typed of KEY=VALUE.
        configs: what the configurations on the line say; they name teachers and count list items.
    """
    key, equals, value = begun.partition(_VALUE)
    *path, last = key.split(_SECTION)
    if equals:
        found = [f"{key}={one}" for one in _values(_at([*path, last], configs)[0])]
        return [one for one in found if one.startswith(f"{key}={value}")]
    here, said = _at(path, configs)
    names = {name: _kinds(node) for name, node in _children(here, said, configs).items()}
    return [
        _SECTION.join([*path, name]) + ending
        for name, kinds in names.items()
        if name.startswith(last)
        for ending in _endings(kinds)
    ]


def _at(path: Sequence[str], configs: Sequence[Any]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Returns what may stand at a place, and what the configurations have there."""
    here, said = _kinds(_schema()), list(configs)
    for name in path:
        here = _kinds(_children(here, said, configs).get(name, {}))
        said = [inner for one in said for inner in _inside(one, name)]
    return here, said


def _children(
    here: Sequence[dict[str, Any]], said: Sequence[Any], configs: Sequence[Any]
) -> dict[str, dict[str, Any]]:
    """Returns the names that may follow and what stands behind each."""
    found: dict[str, dict[str, Any]] = {}
    for kind in here:
        found |= kind.get("properties", {})
        if kind.get("additionalProperties"):  # the keys of every mapping are teachers
            names = [name for one in configs for name in _mapping(one, "teachers")]
            found |= {str(name): kind["additionalProperties"] for name in names}
        if _of_sections(kind):
            count = max((len(one) for one in said if isinstance(one, list)), default=0)
            found |= {str(i): kind["items"] for i in range(max(1, count))}
    return found


def _endings(kinds: Sequence[dict[str, Any]]) -> Iterator[str]:
    opens = [
        bool({"properties", "additionalProperties"} & set(k)) or _of_sections(k) for k in kinds
    ]
    if any(opens):
        yield _SECTION
    if not all(opens):
        yield _VALUE


def _values(kinds: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the words of a choice, and the two of a truth value."""
    found: list[str] = []
    for kind in kinds:
        found += [str(one) for one in kind.get("enum", [])]
        found += [str(kind["const"])] if "const" in kind else []
        found += ["true", "false"] if kind.get("type") == "boolean" else []
    return found


def _kinds(node: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the alternatives of a schema's node, references followed; null is none."""
    if "$ref" in node:
        return _kinds(_schema()["$defs"][node["$ref"].rsplit("/", 1)[1]])
    several = node.get("anyOf") or node.get("oneOf")
    if several:
        return [kind for one in several for kind in _kinds(one)]
    return [] if node.get("type") == "null" else [node]


def _of_sections(kind: dict[str, Any]) -> bool:
    """Returns whether it is a list of what has keys itself, such as corpus.sources."""
    return "$ref" in kind.get("items", {})


def _inside(said: Any, name: str) -> list[Any]:
    if isinstance(said, dict):
        return [said[name]] if name in said else []
    if isinstance(said, list) and name.isdecimal():
        return said[int(name) :][:1]
    return []


def _mapping(said: Any, name: str) -> dict[Any, Any]:
    inner = said.get(name) if isinstance(said, dict) else None
    return inner if isinstance(inner, dict) else {}


@cache
def _schema() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(_SCHEMA.read_text(encoding="utf-8"))
    return read
