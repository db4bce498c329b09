"""What the commands of a run have in common: their options, how a run is opened, how results are told."""

from __future__ import annotations

import json as json_module
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pipeline.commands.completion import config_files, settings

if TYPE_CHECKING:
    from pipeline.console import Console
    from pipeline.dry_run import Action
    from pipeline.workspace import Workspace

F = TypeVar("F", bound=Callable[..., Any])


def common_options(command: F) -> F:
    """--set, --quiet and --debug: the same for every command."""
    decorators: list[Callable[[F], F]] = [
        click.option("--debug", is_flag=True, help="Show tracebacks."),
        click.option("--quiet", "-q", is_flag=True, help="No progress, only results and errors."),
        click.option(
            "--set", "overrides", multiple=True, metavar="KEY=VALUE", shell_complete=settings,
            help="Lay a value over the configuration, e.g. --set train.lr=3e-4. Repeatable.",
        ),
    ]  # fmt: skip
    for decorator in decorators:
        command = decorator(command)
    return command


def run_options(command: F) -> F:
    """CONFIG and the common options."""
    config = click.argument(
        "config", type=click.Path(dir_okay=False, path_type=Path), shell_complete=config_files
    )
    return config(common_options(command))


def json_option(command: F) -> F:
    """--json, for commands that print results."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def dry_run_option(command: F) -> F:
    """--dry-run, for commands that write."""
    return click.option(
        "--dry-run", is_flag=True, help="Say what would be done and written, and change nothing."
    )(command)


def open_workspace(
    config: Path, overrides: Sequence[str], quiet: bool, dry_run: bool = False
) -> tuple[Workspace, Console]:
    """Reads the configuration and opens its workspace.

    Args:
        dry_run: whether nothing may be written, not even remembered hashes.
    """
    from pipeline.config import load_config
    from pipeline.console import Console
    from pipeline.workspace import Workspace

    console = Console(quiet)
    click.get_current_context().find_root().obj = console
    return Workspace(load_config(config, overrides), console, not dry_run), console


def tell(as_json: bool, facts: Mapping[str, Any], text: str) -> None:
    """Prints a result: as JSON for programs, or as text for people."""
    click.echo(json_module.dumps(facts, indent=1) if as_json else text)


def tell_actions(as_json: bool, actions: Sequence[Action]) -> None:
    """Prints what a command would do."""
    from dataclasses import asdict

    facts = {"dry_run": True, "actions": [asdict(action) for action in actions]}
    tell(as_json, facts, "\n".join(str(action) for action in actions))
