"""`scholiast report`: one run's report, or several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from pipeline.commands.options import common_options
from storage.errors import ConfigError, IncompleteCache

_ONE, _SEVERAL = "RUN/report", "report"


@click.command()
@common_options
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path),
    help=f"Folder to write to; {_ONE} for one run, ./{_SEVERAL} for several if not given.",
)  # fmt: skip
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
def report(
    runs: Sequence[Path], overrides: Sequence[str], out: Path | None, quiet: bool, debug: bool
) -> None:
    """Write the report of an evaluated run, or compare several (HTML, Markdown, JSON).

    RUN is a configuration or the folder of a run.

    \b
    Example: scholiast report my.yaml
      scholiast report runs/a runs/b runs/c --out runs/compared
    """
    folders = [run_folder(run, overrides) for run in runs]
    if len(folders) > 1:
        _compare(folders, out or Path(_SEVERAL))
    else:
        _report(folders[0], out)


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


def _report(folder: Path, out: Path | None) -> None:
    from pipeline.console import Console
    from pipeline.report import summary, write_report
    from pipeline.report_tables import read_evaluation

    files = write_report(folder, out)
    table = summary(read_evaluation(folder))
    Console().table(table.headers, table.rows)
    click.echo(f"\n{table.verdict}\n")
    if table.note:
        click.echo(f"{table.note}\n")
    for kind, path in files.items():
        click.echo(f"report ({kind}):  {path}")
    for path in sorted((folder / "students").glob("*/model")):
        click.echo(f"student:        {path}")


def _compare(folders: Sequence[Path], out: Path) -> None:
    from pipeline.compare_page import write_comparison
    from pipeline.console import Console

    files, comparison = write_comparison(folders, out)
    for group in comparison.groups:
        click.echo(f"corpus {group.corpus[:12]}: {', '.join(group.runs)}")
        Console().table(group.table.headers, group.table.rows, left=(0, 1))
        click.echo("")
    click.echo(f"{comparison.verdict}\n")
    for kind, path in files.items():
        click.echo(f"comparison ({kind}):  {path}")
