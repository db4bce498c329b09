"""`scholiast reproduce`: parses, then calls."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.commands.options import json_option, run_options, tell

if TYPE_CHECKING:
    from pipeline.console import Console
    from pipeline.reproduce.harness import Harness
    from pipeline.reproduce.rows import Row
    from pipeline.reproduce.runs import Task


@click.command()
@click.option("--tables", default="1", show_default=True,
              help="1 approaches, 2 sensitivity, 3 encodings, 4 multi-task.")  # fmt: skip
@click.option("--row", "names", multiple=True, help="Only rows of this name. Repeatable.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1),
              help="Runs of each row.")  # fmt: skip
@click.option("--steps", default=49, show_default=True, type=click.IntRange(1),
              help="Optimizer steps of every row.")  # fmt: skip
@click.option("--task", type=click.IntRange(0),
              help="Which share of the runs is done here, from 0; arrays are recognised.")  # fmt: skip
@click.option("--tasks", type=click.IntRange(1), help="In how many shares the runs are cut.")
@click.option("--folder", default="runs/reproduce", show_default=True,
              type=click.Path(file_okay=False, path_type=Path), help="For runs and results.")  # fmt: skip
@click.option(
    "--dry-run", is_flag=True, help="List the runs, what is done, time left; run nothing."
)
@click.option("--keep", is_flag=True, help="Keep the students' models.")
@click.option("--write-results", "page", type=click.Path(dir_okay=False, path_type=Path),
              help="Run nothing; write this page, plots and raw runs of what is done.")  # fmt: skip
@click.option("--take", "elsewhere", multiple=True,
              type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Count runs finished elsewhere: the JSON beside their page. Repeatable.")  # fmt: skip
@json_option
@run_options
def reproduce(
    config: Path, tables: str, names: Sequence[str], seeds: int, steps: int, task: int | None,
    tasks: int | None, folder: Path, dry_run: bool, keep: bool, page: Path | None,
    elsewhere: Sequence[Path], overrides: Sequence[str], quiet: bool, debug: bool, as_json: bool,
) -> None:  # fmt: skip
    """Make the evidence: train every row of the tables for several seeds, and compare.

    Finished runs are kept and not repeated, and a killed one goes on from its checkpoint. Runs are
    independent: start the command several times, or as an array of tasks, and they share the work.

    \b
    Example: scholiast reproduce pipeline/configs/demo.yaml --tables "1 2" --seeds 5
      sbatch --array=0-7 --wrap "scholiast reproduce pipeline/configs/demo.yaml"
      scholiast reproduce pipeline/configs/demo.yaml --write-results stages/RESULTS.md
    """
    from pipeline.console import Console
    from pipeline.reproduce.harness import Harness
    from pipeline.reproduce.runs import read_runs, share, take_runs, tasks_of
    from pipeline.tasks import find_task

    console = Console(quiet)
    click.get_current_context().find_root().obj = console
    if dry_run and page is not None:
        raise click.BadParameter("a dry run writes no page", param_hint="--write-results")
    place = find_task(task, tasks, os.environ)
    harness = Harness(config, overrides, folder, steps, console)
    rows = chosen(harness, tables, names)
    given = {path: read_runs(path) for path in elsewhere}
    mine = tasks_of(harness, rows, seeds)
    if place is not None:
        mine = share(mine, place.index, place.count)
    if dry_run:
        show_plan(console, harness, mine, set().union(*given.values()), as_json)
        return
    for path, runs in given.items():
        console.say(f"{take_runs(harness, runs, seeds)} runs taken from {path}")
    if page is None:
        busy = perform_all(console, harness, mine, keep)
        if busy:
            console.say(f"{busy} of {len(mine)} runs are being done by other processes")
        page = folder / "RESULTS.md"
    save_results(harness, seeds, page)
    raw = folder / "results.json"
    facts = {"results": str(raw), "page": str(page)}
    tell(as_json, facts, f"raw rows: {raw}\ntables:   {page}")


def chosen(harness: Harness, tables: str, names: Sequence[str]) -> list[Row]:
    """Returns the rows asked for, by the tables' numbers and the rows' names."""
    from pipeline.reproduce.rows import NUMBERS

    numbers = tables.replace(",", " ").split()
    wrong = [number for number in numbers if number not in NUMBERS]
    if wrong or not numbers:
        raise click.BadParameter(f"tables are {', '.join(NUMBERS)}", param_hint="--tables")
    asked = [NUMBERS[number] for number in numbers]
    rows = [row for row in harness.rows if row.table in asked]
    unknown = sorted(set(names) - {row.name for row in rows})
    if unknown:
        known = ", ".join(dict.fromkeys(row.name for row in rows))
        raise click.BadParameter(f"no row {unknown[0]!r}; there are: {known}", param_hint="--row")
    return [row for row in rows if not names or row.name in names]


def perform_all(console: Console, harness: Harness, tasks: Sequence[Task], keep: bool) -> int:
    """Does the runs in turn; returns how many other processes are at work on."""
    from pipeline.reproduce.runs import perform

    busy = 0
    for number, task in enumerate(tasks, 1):
        if not task.done:
            console.say(f"run {number} of {len(tasks)}: {task.folder.name}")
        busy += not perform(harness, task, keep)
    return busy


def show_plan(
    console: Console, harness: Harness, tasks: Sequence[Task], given: Collection[str], as_json: bool
) -> None:
    """Prints the runs, and what is left by the mean time of finished ones of their kind.

    Args:
        given: names of runs that were finished elsewhere, and would be taken.
    """
    from pipeline.console import duration
    from pipeline.reproduce.runs import seconds_by_kind

    seconds = seconds_by_kind(tasks)
    left, unknown, ready, lines, facts = 0.0, 0, 0, [], []
    for task in tasks:
        expected = seconds.get((task.row.kind, harness.steps_of(task.row)))
        done = task.done or task.folder.name in given
        ready += done
        if not done:
            left += expected or 0.0
            unknown += expected is None
        facts.append(
            {"run": task.folder.name, "table": task.row.table, "done": done,
             "seconds_left": None if done else expected}
        )  # fmt: skip
        shown = "–" if expected is None or done else duration(expected)
        lines.append([task.folder.name, task.row.table, "done" if done else "", shown])
    if as_json:
        click.echo(json.dumps({"dry_run": True, "runs": facts}, indent=1))
        return
    console.table(["run", "table", "state", "time left"], lines, left=(0, 1, 2))
    click.echo(f"\n{ready} of {len(tasks)} runs done, {duration(left)} to go on this machine" + (
        f", and {unknown} runs of a kind that has not been timed; caches not counted" if unknown else ""
    ))  # fmt: skip


def save_results(harness: Harness, seeds: int, page: Path) -> None:
    """Writes results.json and about.json of every finished run, and the page with its plots."""
    from pipeline.reproduce.drawings import draw
    from pipeline.reproduce.page import load_results, write_page
    from pipeline.reproduce.runs import collect, describe, finished_runs, require_comparable
    from storage import durable

    require_comparable(harness)
    raw = collect(harness, harness.rows, seeds)
    folder = harness.folder
    durable.write_bytes(folder / "results.json", json.dumps(raw, indent=0).encode())
    about = describe(harness, seeds, page)
    durable.write_bytes(folder / "about.json", json.dumps(about, indent=1).encode())
    runs = json.dumps(finished_runs(harness, seeds), indent=0).encode()
    durable.write_bytes(page.with_suffix(".json"), runs)
    results, about = load_results(folder)
    groups = {(row.table, row.name): row.group for row in harness.rows}
    write_page(results, about, page, draw(results, page.parent, groups))
