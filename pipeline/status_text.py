"""What `scholiast status` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from pipeline.console import Console, about, duration
from pipeline.terminal import harmless

_SHOWN = 3  # failed tasks of a step whose logs are shown


def show_status(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """Prints a row a step, then the failed tasks.

    Args:
        rows: from `read_status`.
    """
    busy = any(row.get("running") or row.get("stale") or row.get("failed") for row in rows)
    headers = ["step", "state", "done", "of", *(["running", "stale", "failed"] if busy else [])]
    headers += ["tokens/s", "time left"]
    console.table(headers, [_cells(row, busy) for row in rows])
    for row in rows:
        failed = row.get("failed_tasks", [])
        for ended in failed[:_SHOWN]:
            code = "no exit code" if ended["code"] is None else f"exit code {ended['code']}"
            told = f"\n{ended['step']}: task {ended['task']} failed: {ended['reason']} ({code})"
            told += f"\n  to do:     {ended['todo']}\n  log:       {ended['log']}, which ends with"
            click.echo(harmless("\n".join([told, *(f"    {line}" for line in ended["tail"])])))
        if len(failed) > _SHOWN:
            click.echo(f"\n{failed[0]['step']}: {len(failed) - _SHOWN} more tasks failed")


def _cells(row: dict[str, Any], busy: bool) -> list[str]:
    rate, left = row.get("tokens_per_s"), row.get("seconds_left")
    counts = [f"{row[key]:,}" if key in row else "" for key in ("running", "stale", "failed")]
    return [
        row["step"], row["state"], f"{row['done']:,}",
        about(row["total"], row.get("estimated", False)) if row["total"] else "?",
        *(counts if busy else []),
        f"{rate:,.0f}" if rate else "", duration(left) if left else "",
    ]  # fmt: skip
