"""`comparison.{html,md,json}`: several runs side by side, as a page. Cost: a second for each run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.reporting import plots
from pipeline.reporting.cells import date
from pipeline.reporting.compare import (
    SHORT,
    STUDENT,
    Comparison,
    Row,
    Run,
    by_corpus,
    compare,
    read_runs,
    rows_of,
    short_name,
)
from pipeline.reporting.page import render, write_files
from pipeline.reporting.plots import LABEL, OVERALL, Line
from pipeline.reporting.report_tables import ENSEMBLE


def write_comparison(folders: Sequence[Path], out: Path) -> tuple[dict[str, Path], Comparison]:
    """Writes comparison.html, .md and .json into `out`.

    Returns:
        "html", "md", "json" → path, and what they show.

    Raises:
        ConfigError: a run is named twice.
        IncompleteCache, CorruptShard: a run is not evaluated, or a file of it is damaged.
    """
    runs = read_runs(folders)
    grouped = by_corpus(runs)
    comparison = compare(runs)
    view = {"runs": runs, "comparison": comparison, "groups": comparison.groups,
            "created": date(datetime.now(UTC).isoformat()),
            "dates": {run.label: date(run.evaluation["created"]) for run in runs}}  # fmt: skip
    page = view | {"plots": [_plots(mine) for mine in grouped.values()]}
    kept = [
        {"label": r.label, "folder": str(r.folder), "curves": r.curves,
         "evaluation": {k: v for k, v in r.evaluation.items() if k != "tokens"}} for r in runs
    ]  # fmt: skip
    every = {"format": 1, "comparison": asdict(comparison), "runs": kept}
    contents = {
        "html": render("compare.html.j2", page, ("sort.js",)),
        "md": render("compare.md.j2", view),
        "json": json.dumps(every, allow_nan=False) + "\n",
    }
    return write_files(out, "comparison", contents), comparison


def _plots(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns the panels of each plot and its legend."""
    lines: dict[str, Line] = {}
    curves: dict[str, Any] = {}
    for run in runs:
        for name, mine in run.curves.items():
            short, dash = SHORT.get(name, (name, "dotted"))
            key = f"{run.label}/{name}"
            curves[key], lines[key] = mine, Line(f"{run.label} · {short}", run.colour, dash)
    domains = list(dict.fromkeys(d for run in runs for d in run.evaluation["domains"]))
    heldout = [OVERALL, *domains] if len(domains) > 1 else domains
    rows = rows_of(runs)
    fused = [row for row in rows if row.kind == "ensemble"]
    level = _perplexities(fused[0], heldout) if len(fused) == 1 else {}
    legend = list(lines.values())
    return {
        "losses": (plots.loss_panels(curves, lines), legend),
        "heldout": (plots.heldout_panels(curves, lines, heldout, level),
                    [*legend, ENSEMBLE] if level else legend),
        "bars": (plots.bar_panels(_bars(runs, rows, heldout), heldout), []),
    }  # fmt: skip


def _bars(
    runs: Sequence[Run], rows: Sequence[Row], domains: Sequence[str]
) -> list[tuple[Line, dict[str, float]]]:
    """Returns how each bar is shown and its length; not of untrained students, in their millions."""
    colours = {run.label: run.colour for run in runs}
    bars = []
    for row in rows:
        if row.kind == "untrained":
            continue
        line = row.line
        if row.kind == STUDENT:
            line = Line(short_name(row, LABEL), colours[row.runs[0]])
        elif len(row.runs) < len(runs):
            line = line._replace(label=f"{line.label} ({', '.join(row.runs)})")
        bars.append((line, _perplexities(row, domains)))
    return bars


def _perplexities(row: Row, domains: Sequence[str]) -> dict[str, float]:
    found = {d: (row.table.get(d) or {}).get("perplexity") for d in domains}
    return {domain: value for domain, value in found.items() if value}
