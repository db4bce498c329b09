"""Renders the reports' templates. Nothing of a corpus or of a name becomes markup or script.

The page asks for nothing from outside and runs only its own scripts: a content security policy lists
their hashes. Data for a script stands in JSON without any <, > or &.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pipeline.reporting.cells import count
from storage import durable

_TEMPLATES: Final = Path(__file__).parent / "templates"


def write_files(folder: Path, stem: str, contents: Mapping[str, str]) -> dict[str, Path]:
    """Writes folder/stem.KIND for each kind of content; returns kind → path."""
    paths = {kind: folder / f"{stem}.{kind}" for kind in contents}
    for kind, text in contents.items():
        # Text of a corpus may hold half a surrogate pair; the report is not to fail on it.
        durable.write_bytes(paths[kind], text.encode("utf-8", errors="replace"))
    return paths


def render(template: str, view: Mapping[str, Any], scripts: Sequence[str] = ()) -> str:
    """Returns a template laid out.

    Args:
        template: a file of templates/; what ends in .html.j2 is escaped as HTML.
        view: its variables.
        scripts: files of templates/ that the page runs.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=template.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "md": _markdown,
        "code": _code,
        "fence": _fence,
        "count": count,
        "island": island,
    }
    code = [(_TEMPLATES / name).read_text() for name in scripts]
    policy = " ".join(_hash_source(text) for text in code) or "'none'"
    return environment.get_template(template).render({**view, "scripts": code, "policy": policy})


def island(value: Any) -> str:
    """Returns JSON that can stand in a <script type="application/json">, whatever texts it holds."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)  # ASCII alone
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _hash_source(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _markdown(text: object) -> str:
    """Returns text as it can stand in a Markdown line or table cell: nothing in it is markup."""
    line = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    line = re.sub(r"([\\`*\[\]|#>~])", r"\\\1", line)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", line)


def _code(text: object) -> str:
    """Returns text as code within a line; a backtick in it would end that."""
    return f"`{' '.join(str(text).replace('`', chr(39)).split())}`"


def _fence(text: str) -> str:
    """Returns text as a block of code, behind a fence longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text.rstrip()}\n{fence}"
