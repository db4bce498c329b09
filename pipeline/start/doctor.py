"""`scholiast doctor`: whether machine, folders, models and text are ready, before anything runs."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.commands.completion import config_files
from pipeline.commands.options import common_options, json_option

if TYPE_CHECKING:
    from pipeline.start.checks import Check

_COLOURS = {"ok": "green", "warn": "yellow", "bad": "red"}


@click.command()
@click.option(
    "--load",
    is_flag=True,
    help="Also load each model to check its head and attention; may be slow.",
)
@json_option
@common_options
@click.argument("config", required=False, type=click.Path(dir_okay=False, path_type=Path),
                shell_complete=config_files)  # fmt: skip
@click.pass_context
def doctor(
    context: click.Context, config: Path | None, overrides: Sequence[str], quiet: bool, debug: bool,
    as_json: bool, load: bool,
) -> None:  # fmt: skip
    """Look at versions, devices, folders and limits; with CONFIG also at that run's models and text.

    Takes a few seconds and leaves nothing behind. Exit code 1 if anything is bad; --quiet shows only
    what is not ok.

    \b
    Example: scholiast doctor my.yaml --set run_dir=/scratch/run
    """
    from pipeline.cache_workspace import quiet_transformers
    from pipeline.config import load_config
    from pipeline.start import checks
    from pipeline.start.run_checks import check_run

    run = load_config(config, overrides) if config else None
    quiet_transformers()
    found = [*checks.versions(), *checks.devices(run.device if run else "auto"), *checks.limits()]
    found.append(checks.hub_cache())
    found += check_run(run, load=load) if run else checks.folder(Path(), "this folder")
    state = checks.worst(found)
    if as_json:
        click.echo(
            json_module.dumps({"state": state, "checks": [asdict(c) for c in found]}, indent=1)
        )
    else:
        _show([check for check in found if not quiet or check.state != checks.OK])
        counts = {s: sum(check.state == s for check in found) for s in _COLOURS}
        click.echo("\n" + ", ".join(f"{count} {s}" for s, count in counts.items()))
    if state == checks.BAD:
        context.exit(1)


def _show(found: Sequence[Check]) -> None:
    """Prints a line a check by area, and what to do below those that are not ok."""
    width = max((len(check.name) for check in found), default=0)
    areas = list(dict.fromkeys(check.area for check in found))
    for area in areas:
        click.echo(click.style(f"\n{area}", bold=True))
        for check in (one for one in found if one.area == area):
            state = click.style(f"{check.state:<4}", fg=_COLOURS[check.state])
            click.echo(f"  {state}  {check.name:<{width}}  {check.found}")
            if check.todo:
                click.echo(f"        {'':<{width}}  to do: {check.todo}")
