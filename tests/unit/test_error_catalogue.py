"""The catalogue of errors is what the classes say, and each message is one that they give."""

from __future__ import annotations

from pipeline.error_catalogue import PATH, classes, text
from pipeline.error_examples import PROVOCATIONS
from storage import errors


def test_every_class_says_cause_and_remedy_and_has_a_provocation() -> None:
    assert classes()[0] is errors.ScholiastError and len(classes()) > 10
    for kind in classes():
        assert {"cause", "remedy"} <= vars(kind).keys(), kind
        assert all(one.endswith(".") for one in (kind.cause, kind.remedy)), kind
    assert list(PROVOCATIONS) == classes()


def test_the_file_is_current() -> None:
    assert PATH.read_text() == text(), "run `python -m pipeline.error_catalogue`"
