"""An instruction task that anyone can build: say what a function of Python's library does.

A row is a chat: the user shows a function without its docstring, the assistant gives the docstring's
first paragraph; only the assistant's tokens are targets. The functions come from packages that the
demonstration's text does not touch, sorted by their hash; another Python gives other functions. Held
out are whole functions, and no docstring stands in both parts.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from storage import durable

DOMAIN: Final = "docstrings"
PACKAGES: Final = (
    "asyncio", "email", "http", "importlib", "json", "logging", "multiprocessing", "unittest", "urllib",
    "xml",
)  # fmt: skip
LONGEST_SOURCE, SHORTEST, LONGEST = 600, 30, 300  # characters of a function, of a docstring
REQUEST = "What does this Python function do? Answer with its docstring.\n\n"

Chat = list[dict[str, str]]


class Size(NamedTuple):
    """How many chats there are, and the steps that the mix takes for one of the text alone."""

    heldout: int
    train: int
    longer: float


SIZES: Final = {"demo": Size(40, 100, 5 / 3), "demo-large": Size(100, 900, 4 / 3)}
"""By the text they are mixed with (assets); other text gets the smaller."""


def build(folder: Path, size: Size) -> None:
    """Writes train.jsonl and heldout.jsonl, one {"messages": chat} a line, unless they are there."""
    chats = list(_distinct())
    for name, chosen in (
        ("heldout", chats[: size.heldout]),
        ("train", chats[size.heldout : size.heldout + size.train]),
    ):  # fmt: skip
        lines = [json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in chosen]
        if not (folder / f"{name}.jsonl").exists():
            durable.write_bytes(folder / f"{name}.jsonl", "".join(lines).encode())


def sources(folder: Path) -> list[dict[str, Any]]:
    """Returns the task as entries of corpus.sources."""
    return [
        {"domain": DOMAIN, "split": split, "format": "jsonl", "path": f"{folder}/{split}.jsonl",
         "messages_field": "messages"}
        for split in ("train", "heldout")
    ]  # fmt: skip


def _distinct() -> Iterator[Chat]:
    """Yields chats in the order of their functions' hashes, each docstring once."""
    found = sorted(_functions(), key=lambda pair: hashlib.sha256(pair[0].encode()).digest())
    seen: set[str] = set()
    for source, docstring in found:
        if docstring not in seen:
            seen.add(docstring)
            yield [
                {"role": "user", "content": REQUEST + source},
                {"role": "assistant", "content": docstring},
            ]


def _functions() -> Iterator[tuple[str, str]]:
    """Yields (source without docstring, first paragraph of the docstring)."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for package in PACKAGES:
        for path in sorted((library / package).rglob("*.py")):
            if "test" not in path.relative_to(library).parts:
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                        yield from _task(node)


def _task(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[tuple[str, str]]:
    docstring = inspect.cleandoc(ast.get_docstring(node) or "").split("\n\n")[0]
    if not SHORTEST <= len(docstring) <= LONGEST or len(node.body) < 2:
        return
    node.body = node.body[1:]
    source = ast.unparse(node)
    if len(source) <= LONGEST_SOURCE:
        yield source, docstring
