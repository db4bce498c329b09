"""The catalogue of errors, from the classes themselves: `python -m pipeline.error_catalogue`.

Writes ERRORS.md: of each class of storage/errors.py what it means, what brings it about, what to do,
and a message that was provoked for it. A test holds the file to what this makes.
"""

from __future__ import annotations

import inspect
import tempfile
from pathlib import Path
from typing import Final

from pipeline.error_examples import PROVOCATIONS
from storage import errors
from storage.errors import ScholiastError

PATH: Final = Path(__file__).parent / "ERRORS.md"

_HEAD: Final = """\
# Errors

Every failure that a user can bring about ends in one message: what is wrong, where, which two values
disagree, what to do. A traceback comes only with `--debug`. This file is made of the classes of
[`storage/errors.py`](../storage/errors.py) by `python -m pipeline.error_catalogue`; the messages were
provoked for it (`PATH` stands for a folder).

| error | exit code | what it says |
|---|---|---|
"""


def classes() -> list[type[ScholiastError]]:
    """Returns every class of error, in the order of storage/errors.py."""
    found = [
        one
        for one in vars(errors).values()
        if isinstance(one, type) and issubclass(one, ScholiastError)
    ]
    return sorted(found, key=lambda one: inspect.getsourcelines(one)[1])


def provoked(kind: type[ScholiastError]) -> str:
    """Returns a message of a class, as the command line shows it; paths made the same everywhere.

    Raises:
        AssertionError: the provocation brings about something else.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            PROVOCATIONS[kind](Path(folder))
        except ScholiastError as error:
            if type(error) is kind:
                shown = f"error: {error}".replace(folder, "PATH")
                return "\n".join(line.rstrip() for line in shown.splitlines())
            raise AssertionError(
                f"{kind.__name__} expected, {type(error).__name__} found"
            ) from error
    raise AssertionError(f"{kind.__name__} expected, and nothing failed")


def text() -> str:
    """Returns the catalogue as Markdown."""
    rows, sections = [], []
    for kind in classes():
        name = kind.__name__
        meaning = (inspect.getdoc(kind) or "").splitlines()[0]
        rows.append(f"| [{name}](#{name.lower()}) | {_code(kind)} | {meaning} |\n")
        sections.append(
            f"\n## {name}\n{meaning}\n\n**Cause.** {kind.cause}\n\n**Remedy.** {kind.remedy}\n\n"
            f"```text\n{provoked(kind)}\n```\n"
        )
    return _HEAD + "".join(rows) + "".join(sections)


def _code(kind: type[ScholiastError]) -> str:
    return "that rank's" if kind is errors.OtherRank else str(kind.exit_code)


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
    print(PATH)
