"""`scholiast completion`, and what a shell is offered for configurations, teachers and students."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import click
from click.shell_completion import CompletionItem, get_completion_class, split_arg_string

PROGRAM: Final = "scholiast"
VARIABLE: Final = "_SCHOLIAST_COMPLETE"
_MOST = 100  # configurations that are offered at once


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that has a shell complete commands, options, configurations and names.

    \b
    Example: scholiast completion bash > ~/.local/share/bash-completion/completions/scholiast
      scholiast completion zsh > ~/.zfunc/_scholiast        (a folder of $fpath)
      scholiast completion fish > ~/.config/fish/completions/scholiast.fish
    """
    found = get_completion_class(shell)
    assert found is not None  # click has all three
    click.echo(found(ctx.find_root().command, {}, PROGRAM, VARIABLE).source())


def config_files(
    context: click.Context, option: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Offers the YAML files that begin so, here and two folders deep; without any, whatever is there."""
    begun = glob.escape(incomplete)
    patterns = (f"{begun}*{deeper}.y*ml" for deeper in ("", "/*", "/*/*"))
    found = [path for pattern in patterns for path in sorted(glob.glob(pattern))]
    return [CompletionItem(path) for path in found[:_MOST]] or [
        CompletionItem(incomplete, type="file")
    ]


def teacher_names(
    context: click.Context, option: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Offers the teachers of the configuration on the command line."""
    names = [name for config in _configs() for name in config.get("teachers") or ()]
    return [CompletionItem(name) for name in names if str(name).startswith(incomplete)]


def student_names(
    context: click.Context, option: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Offers the students that a run can have, and those that it has."""
    names = {"fused"}
    for config in _configs():
        if (config.get("train") or {}).get("baseline"):
            names.add("cross_entropy")
        names |= {path.name for path in Path(str(config.get("run_dir"))).glob("students/*/")}
    return [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]


def _configs() -> Iterator[dict[str, Any]]:
    """Yields what the configurations on the line being completed say, if it can be read at all."""
    import yaml

    # Not from the context: an option that still lacks its value keeps click from parsing what follows.
    for word in split_arg_string(os.environ.get("COMP_WORDS", "")):
        if word.endswith((".yaml", ".yml")):
            try:
                said = yaml.safe_load(Path(word).expanduser().read_text())
            except (OSError, ValueError, yaml.YAMLError):
                continue
            if isinstance(said, dict):
                yield said
