"""`scholiast report`: one run's report, or several runs side by side."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from pipeline.commands.completion import config_files
from pipeline.commands.options import (
    common_options,
    dry_run_option,
    json_option,
    tell_actions,
)
from storage.errors import ConfigError, IncompleteCache

_ONE, _SEVERAL = "RUN/report", "report"


@click.command()
@json_option
@dry_run_option
@common_options
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path),
    help=f"Folder to write to; {_ONE} for one run, ./{_SEVERAL} for several if not given.",
)  # fmt: skip
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path),
                shell_complete=config_files)  # fmt: skip
def report(
    runs: Sequence[Path], overrides: Sequence[str], out: Path | None, quiet: bool, debug: bool,
    as_json: bool, dry_run: bool,
) -> None:  # fmt: skip
    """Write the report of an evaluated run, or compare several (HTML, Markdown, JSON).

    RUN is a configuration or the folder of a run.

    \b
    Example: scholiast report my.yaml
      scholiast report runs/a runs/b runs/c --out runs/compared
    """
    folders = [run_folder(run, overrides) for run in runs]
    several = len(folders) > 1
    out = out or (Path(_SEVERAL) if several else folders[0] / "report")
    if dry_run:
        _tell_dry_run(as_json, folders, out)
    elif several:
        _compare(folders, out, as_json)
    else:
        _report(folders[0], out, as_json)


def _tell_dry_run(as_json: bool, folders: Sequence[Path], out: Path) -> None:
    from pipeline.dry_run import Action
    from pipeline.reporting.report_tables import read_evaluation

    for folder in folders:
        read_evaluation(folder)
    stem = "comparison" if len(folders) > 1 else "report"
    what = f"write the {stem} of {', '.join(map(str, folders))}"
    places = tuple(str(out / f"{stem}.{kind}") for kind in ("html", "md", "json"))
    tell_actions(as_json, [Action(what, places)])


def run_folder(run: Path, overrides: Sequence[str]) -> Path:
    """Returns the folder of a run that is named by itself or by its configuration.

    Raises:
        ConfigError: neither, a wrong configuration, or overrides of a folder.
        IncompleteCache: it has not been evaluated.
    """
    from pipeline.config import load_config

    if run.is_dir():
        if overrides:
            raise ConfigError(
                "--set goes with a configuration, not with a folder", where=run,
                todo="name the configuration of the run, or leave --set out",
            )  # fmt: skip
        folder = run
        if not any((run / name).exists() for name in ("evaluation.json", "students", "cache")):
            raise ConfigError(
                "the folder is not a run's", where=run,
                expected="students/ and evaluation.json", found="neither",
                todo="name a run_dir or a configuration",
            )  # fmt: skip
    else:
        folder = load_config(run, overrides).run
    if not (folder / "evaluation.json").exists():
        raise IncompleteCache(
            "the run has not been evaluated", where=folder / "evaluation.json",
            todo="run `scholiast evaluate` with the run's configuration",
        )  # fmt: skip
    return folder


def _report(folder: Path, out: Path, as_json: bool) -> None:
    from pipeline.console import Console
    from pipeline.reporting.report import summary, write_report
    from pipeline.reporting.report_tables import read_evaluation

    files = write_report(folder, out)
    table = summary(read_evaluation(folder))
    students = sorted((folder / "students").glob("*/model"))
    if as_json:
        facts = {
            "files": {kind: str(path) for kind, path in files.items()},
            "students": [str(path) for path in students],
            "summary": asdict(table),
        }
        click.echo(json_module.dumps(facts, indent=1))
        return
    Console().table(table.headers, table.rows)
    click.echo(f"\n{table.verdict}\n")
    if table.note:
        click.echo(f"{table.note}\n")
    for kind, path in files.items():
        click.echo(f"report ({kind}):  {path}")
    for path in students:
        click.echo(f"student:        {path}")


def _compare(folders: Sequence[Path], out: Path, as_json: bool) -> None:
    from pipeline.console import Console
    from pipeline.reporting.compare_page import write_comparison

    files, comparison = write_comparison(folders, out)
    if as_json:
        written = {kind: str(path) for kind, path in files.items()}
        facts = {"files": written, "comparison": asdict(comparison)}
        click.echo(json_module.dumps(facts, indent=1))
        return
    for group in comparison.groups:
        click.echo(f"corpus {group.corpus[:12]}: {', '.join(group.runs)}")
        Console().table(group.table.headers, group.table.rows, left=(0, 1))
        click.echo("")
    click.echo(f"{comparison.verdict}\n")
    for kind, path in files.items():
        click.echo(f"comparison ({kind}):  {path}")
