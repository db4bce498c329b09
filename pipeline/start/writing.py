"""A configuration as commented YAML that people like to read and go on editing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

Comments = Mapping[str, str]
"""Dotted key → what its line says after the `#`."""

_WIDTH = 104
_COLUMN = 34  # where comments begin, if the line leaves room


def render(config: Mapping[str, Any], comments: Comments, header: Sequence[str]) -> str:
    """Returns YAML text that reads back as `config`.

    Sections are laid out line by line; items of lists and teachers each take one line.

    Args:
        comments: those of keys that are not there are left out.
        header: comment lines at the top.
    """
    lines = [f"# {line}".rstrip() for line in header]
    before_section = False
    for key, value in config.items():
        section = isinstance(value, Mapping)
        if section or before_section:
            lines.append("")
        before_section = section
        lines += _entry(key, value, comments, key, 0)
    return "\n".join(lines) + "\n"


def _entry(key: str, value: Any, comments: Comments, path: str, depth: int) -> Iterator[str]:
    pad, inner = "  " * depth, f"{path}."
    opened = isinstance(value, Mapping) and (
        depth == 0 or any(name.startswith(inner) for name in comments)
    )
    if opened:
        yield from _commented(f"{pad}{_flow(key)}:", comments.get(path))
        for name, one in value.items():
            yield from _entry(name, one, comments, f"{inner}{name}", depth + 1)
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        yield from _commented(f"{pad}{_flow(key)}:", comments.get(path))
        for i, one in enumerate(value):
            yield from _commented(f"{pad}  - {_flow(one)}", comments.get(f"{inner}{i}"))
    else:
        yield from _commented(f"{pad}{_flow(key)}: {_flow(value)}", comments.get(path))


def _commented(line: str, comment: str | None) -> Iterator[str]:
    if comment is None:
        yield line
        return
    wide = f"{line:<{_COLUMN}} # {comment}"
    if len(wide) <= _WIDTH:
        yield wide
        return
    indent = line[: len(line) - len(line.lstrip())]
    yield f"{indent}# {comment}"
    yield line


def _flow(value: Any) -> str:
    text = _dump(value, plain=True)
    if set(text) & set("\x85\u2028\u2029"):  # breaks of lines, which YAML would read back as spaces
        text = _dump(value, plain=False)
    return text.removesuffix("\n").removesuffix("\n...")


def _dump(value: Any, plain: bool) -> str:
    text: str = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, allow_unicode=plain, width=10**6
    )
    return text
