"""Cells of the reports' tables: numbers as people read them, with what a page sorts them by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from pipeline.reporting.plots import perplexity

NONE: Final = "–"


class Cell(str):
    """The text of a number, the number itself, and an interval around it as text ("" for none)."""

    value: float | None
    interval: str

    def __new__(cls, text: str, value: float | None = None, interval: str = "") -> Cell:
        cell = super().__new__(cls, text)
        cell.value, cell.interval = value, interval
        return cell

    @property
    def key(self) -> str:
        """What a page sorts by: a number as JavaScript reads it, or "" for none."""
        if self.value is None or math.isnan(self.value):
            return ""
        return "Infinity" if math.isinf(self.value) else repr(float(self.value))


@dataclass(frozen=True)
class Table:
    """A table as shown: the first cell of a row names it. A header's line break is kept."""

    headers: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Metric:
    """A held-out figure of a model.

    Attributes:
        label: with its unit; "\\n" where it may break.
        digits: after the point; None: as a perplexity is written.
        scale: what the value is multiplied by when shown.
    """

    label: str
    digits: int | None
    scale: float = 1.0

    def cell(self, row: Any, key: str) -> Cell:
        """Returns a row's value under `key` and its interval, where the row has them."""
        row = row or {}
        value, bounds = row.get(key), (row.get("intervals") or {}).get(key)
        return Cell(self._text(value), value, self._interval(bounds))

    def _text(self, value: float | None) -> str:
        if self.digits is None:
            return perplexity(value)
        return _fixed(value, self.digits, self.scale)

    def _interval(self, bounds: Sequence[float | None] | None) -> str:
        if bounds is None or None in bounds:
            return ""
        low, high = (self._text(bound) for bound in bounds)
        return f"{low}–{high}"


# No line breaks in these labels but where they stand.
METRICS: Final = {
    "perplexity": Metric("perplexity", None),
    "bits_per_byte": Metric("bits\nper\N{NO-BREAK SPACE}byte", 3),
    "kd": Metric("distillation\nloss,\N{NO-BREAK SPACE}nats", 3),
    "accuracy": Metric("top-1\naccuracy,\N{NO-BREAK SPACE}%", 1, 100),
    "agreement": Metric("agrees\N{NO-BREAK SPACE}with\nfused,\N{NO-BREAK SPACE}%", 1, 100),
    "ece": Metric("calibration\nerror,\N{NO-BREAK SPACE}%", 1, 100),
}
GENERATION: Final = {
    "bleu": Metric("BLEU", 1),
    "chrf": Metric("chrF", 1),
    "rouge_l": Metric("ROUGE\N{NON-BREAKING HYPHEN}L", 1, 100),
    "distinct_1": Metric("distinct-1", 3),
    "distinct_2": Metric("distinct-2", 3),
}


def _fixed(value: float | None, digits: int, scale: float = 1.0) -> str:
    return NONE if value is None or math.isnan(value) else f"{value * scale:,.{digits}f}"


def fixed(value: float | None, digits: int) -> Cell:
    """Returns a number with so many digits after the point."""
    return Cell(_fixed(value, digits), value)


def count(value: float | None) -> Cell:
    """Returns e.g. 41,234 or 22.3."""
    if value is None:
        return Cell(NONE)
    return Cell(f"{value:,.{0 if value >= 100 or value % 1 == 0 else 1}f}", value)


def size(value: float | None) -> Cell:
    """Returns bytes as e.g. 13.5 MB or 2.35 GB."""
    if value is None:
        return Cell(NONE)
    text = f"{value / 1e9:,.2f} GB" if value >= 999.5e6 else f"{value / 1e6:,.1f} MB"
    return Cell(text, value)


def time(seconds: float) -> Cell:
    """Returns e.g. 12.3 s, 31 min, 5 h 02 min."""
    if seconds < 99.95:
        return Cell(f"{seconds:.1f} s", seconds)
    minutes = round(seconds / 60)
    text = f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"
    return Cell(text, seconds)


def date(created: str) -> str:
    """Returns an ISO time as e.g. 23 November 2026, 21:00 UTC."""
    return datetime.fromisoformat(created).astimezone(UTC).strftime("%-d %B %Y, %H:%M UTC")
