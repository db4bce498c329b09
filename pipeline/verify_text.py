"""What `scholiast verify` and `scholiast repair` print."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from pipeline.console import Console, duration, human_bytes
from pipeline.terminal import harmless
from storage.repair import Action
from storage.verify import Report

_LISTED = 20  # leftovers shown by name


def report_json(report: Report) -> dict[str, Any]:
    """Returns a report as JSON values."""
    return {
        "root": str(report.store.root), "kind": report.store.kind, "sound": report.sound,
        "parts": report.store.parts, "parts_checked": report.checked, "objects": report.objects,
        "bytes": report.bytes, "seconds": report.seconds, "deep": report.deep,
        "problems": [asdict(problem) for problem in report.problems],
        "missing_parts": list(report.missing),
        "leftovers": [asdict(leftover) for leftover in report.leftovers],
    }  # fmt: skip


def show_reports(reports: Mapping[str, Report], console: Console) -> None:
    """Prints what was checked, what is bad, and what nothing vouches for."""
    console.table(
        ["what", "parts", "of", "files", "bytes", "time", "bad", "not done"],
        [
            [
                name, f"{r.checked:,}", "?" if r.store.parts is None else f"{r.store.parts:,}",
                f"{r.objects:,}", human_bytes(r.bytes), duration(r.seconds),
                f"{len(r.problems):,}", f"{len(r.missing):,}",
            ]
            for name, r in reports.items()
        ],
    )  # fmt: skip
    for name, report in reports.items():
        for problem in report.problems:
            part = "" if problem.part is None else f"part {problem.part}, "
            click.echo(harmless(f"bad: {name}, {part}{problem.path}: {problem.what}"))
    for name, report in reports.items():
        if report.leftovers:
            size = human_bytes(sum(x.bytes for x in report.leftovers))
            count = len(report.leftovers)
            click.echo(
                f"not read, harmless: {name}, {count:,} files, {size}, that nothing vouches for"
            )
            for leftover in report.leftovers[:_LISTED]:
                click.echo(harmless(f"  {human_bytes(leftover.bytes)}  {leftover.path}"))
            if count > _LISTED:
                click.echo(f"  and {count - _LISTED:,} more (--json lists all)")


def arguments(target: Path, overrides: Sequence[str]) -> str:
    """Returns CACHE and --set as they were given, to be typed again."""
    return shlex.join([str(target), *(text for one in overrides for text in ("--set", one))])


def verdict(reports: Mapping[str, Report], target: str) -> str:
    """Returns the last line: sound or not, and what to do with `target` (see `arguments`)."""
    if any(p.mend != "none" for report in reports.values() for p in report.problems):
        return f"to do: scholiast repair {target}, which drops what is bad"
    if not all(report.sound for report in reports.values()):
        return "to do: nothing that `scholiast repair` could do; see what is said above"
    return "sound" if all(r.complete for r in reports.values()) else "sound, but not complete"


def next_command(report: Report) -> str | None:
    """Returns the command that makes anew what a repair drops."""
    if not any(problem.mend in ("redo", "drop") for problem in report.problems):
        return None
    return "cache-teachers" if report.store.kind == "cache" else "prepare"


def show_actions(
    reports: Mapping[str, Report], actions: Mapping[str, Sequence[Action]], dry_run: bool,
    config: str | None,
) -> None:  # fmt: skip
    """Prints what a repair did or would do, and what to run next (with `config`, if it is known)."""
    verbs = {"delete": "would delete", "write": "would write"} if dry_run else {
        "delete": "deleted", "write": "wrote"}  # fmt: skip
    for name, report in reports.items():
        for action in actions[name]:
            click.echo(harmless(f"{verbs[action.verb]}: {name}, {action.path} ({action.why})"))
        for problem in report.problems:
            if problem.mend == "none":
                click.echo(harmless(f"left alone: {name}, {problem.path}: {problem.what}"))
    if not any(actions.values()) and all(report.sound for report in reports.values()):
        click.echo("sound: nothing to repair")
    commands = {command for report in reports.values() if (command := next_command(report))}
    for command in sorted(commands, reverse=True):  # prepare comes before cache-teachers
        run = f"scholiast {command} {config}" if config else (
            f"scholiast {command} with the run's configuration")  # fmt: skip
        click.echo(f"to do: {run}, which makes anew what is missing")
