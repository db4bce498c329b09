"""What the commands of a run have in common: their options, and how a run is opened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from pipeline.console import Console
    from pipeline.workspace import Workspace

F = TypeVar("F", bound=Callable[..., Any])


def common_options(command: F) -> F:
    """--set, --quiet and --debug: the same for every command."""
    decorators: list[Callable[[F], F]] = [
        click.option("--debug", is_flag=True, help="Show tracebacks."),
        click.option("--quiet", "-q", is_flag=True, help="No progress, only results and errors."),
        click.option(
            "--set", "overrides", multiple=True, metavar="KEY=VALUE",
            help="Lay a value over the configuration, e.g. --set train.lr=3e-4. Repeatable.",
        ),
    ]  # fmt: skip
    for decorator in decorators:
        command = decorator(command)
    return command


def run_options(command: F) -> F:
    """CONFIG and the common options."""
    config = click.argument("config", type=click.Path(dir_okay=False, path_type=Path))
    return config(common_options(command))


def json_option(command: F) -> F:
    """--json, for commands that print results."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def open_workspace(
    config: Path, overrides: Sequence[str], quiet: bool
) -> tuple[Workspace, Console]:
    """Reads the configuration and opens its workspace."""
    from pipeline.config import load_config
    from pipeline.console import Console
    from pipeline.workspace import Workspace

    console = Console(quiet)
    click.get_current_context().find_root().obj = console
    return Workspace(load_config(config, overrides), console), console
