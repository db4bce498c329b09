"""The commands that show what a training came to: evaluate, generate."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from pipeline.commands.completion import student_names
from pipeline.commands.options import (
    dry_run_option,
    json_option,
    open_workspace,
    run_options,
    tell,
    tell_actions,
)
from pipeline.terminal import for_output


def _named_folders(
    context: click.Context, option: click.Parameter, values: Sequence[str]
) -> dict[str, Path]:
    """Returns NAME=FOLDER options as a dict."""
    found: dict[str, Path] = {}
    for value in values:
        name, equals, folder = value.partition("=")
        if not (name and equals and folder):
            raise click.BadParameter(f"{value!r} is not NAME=FOLDER", context, option)
        if name in found:
            raise click.BadParameter(f"the name {name!r} is given twice", context, option)
        found[name] = Path(folder)
    return found


@click.command()
@json_option
@dry_run_option
@click.option(
    "--model", "models", multiple=True, metavar="NAME=FOLDER", callback=_named_folders,
    help="Also measure an exported model with the corpus's tokenizer. Repeatable.",
)  # fmt: skip
@run_options
def evaluate(
    config: Path, overrides: Sequence[str], quiet: bool, debug: bool, as_json: bool,
    dry_run: bool, models: dict[str, Path],
) -> None:  # fmt: skip
    """Measure teachers, their ensemble and the students on the held-out blocks.

    \b
    Example: scholiast evaluate my.yaml --model other=models/other --json > figures.json
    """
    from pipeline import dry_run as would
    from pipeline.reporting.plots import OVERALL
    from pipeline.reporting.report import summary
    from pipeline.reporting.report_tables import generation, overall, several

    work, console = open_workspace(config, overrides, quiet, dry_run)
    if dry_run:
        tell_actions(as_json, would.evaluate(work, models))
        return
    result = work.evaluate(models)
    if as_json:
        click.echo(json_module.dumps(result, indent=1))
        return
    table = summary(result)
    console.table(table.headers, table.rows)
    written = {title: found[OVERALL] for title, found in generation(result).items()}
    head = "over all domains" if several(result) else "all held-out figures"
    for title, more in {head: overall(result), **written}.items():
        click.echo(f"\n{title}")
        console.table(more.headers, more.rows)
    click.echo("\n" + "\n".join(text for text in (table.note, table.verdict) if text))


@click.command()
@click.option("--prompt", "-p", help="Text to continue; read from standard input if not given.")
@click.option("--student", default="fused", show_default=True, shell_complete=student_names,
              help="Which trained student.")  # fmt: skip
@click.option("--new-tokens", default=80, show_default=True, type=click.IntRange(1),
              help="Tokens of the continuation.")  # fmt: skip
@click.option(
    "--temperature", default=0.0, show_default=True, type=click.FloatRange(0.0), help="0 is greedy."
)
@click.option("--seed", default=0, show_default=True, help="Of a sampled continuation.")
@json_option
@run_options
def generate(
    config: Path, overrides: Sequence[str], quiet: bool, debug: bool, as_json: bool,
    prompt: str | None, student: str, new_tokens: int, temperature: float, seed: int,
) -> None:  # fmt: skip
    """Show what a trained student writes after a prompt.

    \b
    Example: scholiast generate my.yaml -p "In the beginning" --temperature 0.8
    """
    work, _ = open_workspace(config, overrides, quiet)
    text = prompt if prompt is not None else sys.stdin.read()
    continuation = work.generate(student, text, new_tokens, temperature, seed)
    facts = {
        "student": student, "prompt": text, "continuation": continuation, "new_tokens": new_tokens,
        "temperature": temperature, "seed": seed,
    }  # fmt: skip
    tell(as_json, facts, for_output(text + continuation))
