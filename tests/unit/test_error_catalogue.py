"""The catalogue of errors is what the classes say, and each message is one that they give."""

from __future__ import annotations

import ast
from pathlib import Path

from pipeline.error_catalogue import PATH, classes, text
from pipeline.error_examples import PROVOCATIONS
from storage import errors


def test_every_class_says_cause_and_remedy_and_has_a_provocation() -> None:
    assert classes()[0] is errors.ScholiastError and len(classes()) > 10
    for kind in classes():
        assert {"cause", "remedy"} <= vars(kind).keys(), kind
        assert all(one.endswith(".") for one in (kind.cause, kind.remedy)), kind
    assert list(PROVOCATIONS) == classes()


def test_no_other_file_has_errors_of_its_own() -> None:
    """Else the catalogue would lack them."""
    top, names, elsewhere = (
        Path(errors.__file__).parents[1],
        {one.__name__ for one in classes()},
        [],
    )
    for path in (
        one for part in ("pipeline", "stages", "storage") for one in (top / part).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            bases = node.bases if isinstance(node, ast.ClassDef) else ()
            if path != Path(errors.__file__) and names & {
                ast.unparse(b).split(".")[-1] for b in bases
            }:
                elsewhere.append(f"{path}: {ast.unparse(node).splitlines()[0]}")
    assert not elsewhere


def test_the_file_is_current() -> None:
    assert PATH.read_text() == text(), "run `python -m pipeline.error_catalogue`"
