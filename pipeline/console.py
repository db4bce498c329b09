"""What the terminal shows: a progress bar with rate and time left, plain lines without a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from pipeline.terminal import harmless

_LINE_EVERY = 15.0  # seconds between plain lines


class Console:
    """Progress and tables on standard error and output. Implements `stages.progress.Progress`."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr.isatty() and not quiet
        self._bar: Any = None
        self._label, self._unit, self._total, self._done = "", "", 0, 0
        self._first, self._begun, self._told = 0, 0.0, 0.0
        self._numbers: dict[str, float] = {}

    def start(self, label: str, total: int, unit: str, done: int = 0) -> None:
        self._label, self._unit, self._total = harmless(label), unit, total
        self._done = self._first = done
        self._begun = self._told = time.monotonic()
        self._numbers = {}
        if self._terminal:
            self._open_bar()
        elif not self._quiet:
            self._line(f"{label}: {done:,} of {total:,} {unit}s done")

    def advance(self, amount: int, **numbers: float) -> None:
        self._done += amount
        self._numbers = numbers
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, state=self._state())
        elif not self._quiet and time.monotonic() - self._told > _LINE_EVERY:
            self._told = time.monotonic()
            self._line(
                f"{self._label}: {self._done:,} of {self._total:,} {self._unit}s, {self._state()}"
            )

    def finish(self) -> None:
        seconds = time.monotonic() - self._begun
        self.stop_bar()
        if not self._quiet:
            self._line(f"{self._label}: done in {duration(seconds)}, {self._rate()}")

    def stop_bar(self) -> None:
        """Takes the bar away and gives the cursor back; before an error is shown, too."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, text: str) -> None:
        if not self._quiet:
            self._line(text)

    def table(
        self, headers: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)
    ) -> None:
        """Prints a table on standard output; the columns in `left` to the left, others right."""
        from rich.console import Console as Rich
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for i, header in enumerate(headers):
            table.add_column(Text(harmless(header)), justify="left" if i in left else "right")
        for row in rows:
            table.add_row(*(Text(harmless(cell)) for cell in row))
        width = None if sys.stdout.isatty() else 200
        Rich(width=width, highlight=False).print(table)

    def _open_bar(self) -> None:
        from rich import progress
        from rich.console import Console as Rich

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}", markup=False), progress.BarColumn(),
            progress.TaskProgressColumn(), progress.TextColumn("{task.fields[state]}"),
            console=Rich(stderr=True), transient=True,
        )  # fmt: skip
        self._bar.start()
        self._task = self._bar.add_task(
            self._label, total=self._total, completed=self._done, state=""
        )

    def _rate(self) -> str:
        rate = (self._done - self._first) / max(time.monotonic() - self._begun, 1e-9)
        return f"{rate:,.0f} {self._unit}s/s" if rate >= 10 else f"{rate:.2f} {self._unit}s/s"

    def _state(self) -> str:
        rate = (self._done - self._first) / max(time.monotonic() - self._begun, 1e-9)
        left = duration((self._total - self._done) / rate) if rate > 0 else "?"
        shown = ", ".join(f"{k.replace('_per_s', '/s')} {v:,.4g}" for k, v in self._numbers.items())
        return f"{self._rate()}, {left} left" + (f", {shown}" if shown else "")

    def _line(self, text: str) -> None:
        print(harmless(text), file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Returns a length of time for people: 12 s, 3.4 min, 5.6 h."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if seconds < 6000:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def about(count: int, estimated: bool) -> str:
    """Returns a count for people: 1,234, or about 1,234."""
    return f"{'about ' if estimated else ''}{count:,}"


def human_bytes(count: float) -> str:
    """Returns a size in decimal units: 12.3 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return ""
