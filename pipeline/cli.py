"""The command line: each command parses, then calls. Heavy imports happen inside the commands."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from pathlib import Path

import click

from pipeline.commands.completion import completion
from pipeline.commands.data import append, cache_teachers, prepare, push
from pipeline.commands.group import EPILOG, ScholiastGroup
from pipeline.commands.launch import launch
from pipeline.commands.options import json_option, open_workspace, run_options
from pipeline.commands.report import report
from pipeline.commands.results import evaluate, generate
from pipeline.commands.stores import inspect, repair, verify
from pipeline.commands.students import export, train_student
from pipeline.exchange.command import export_cache, import_cache
from pipeline.planning.command import plan
from pipeline.reproduce.command import reproduce
from pipeline.start.doctor import doctor
from pipeline.start.init import init


@click.group(
    cls=ScholiastGroup, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG
)
@click.version_option(package_name="scholiast", message="scholiast %(version)s")
def main() -> None:
    """Distil several teachers into one small student, one model in memory at a time.

    \b
    init            a configuration for your teachers, text, student and machine
    doctor          whether machine, folders, models and text are ready
    plan            bytes, hours, memory of what is to come; status: how far it is
    prepare         documents → packed token blocks
    cache-teachers  each teacher once over the blocks → sparse notes on disk
    append          more sources or teachers, without touching what is there
    train-student   the student on the teachers' fused notes
    evaluate        held-out figures; generate: what a student writes
    report          HTML, Markdown and JSON of them; of several runs: a comparison
    export, push    a student to give away; caches to a remote store
    launch          the whole of it on a cluster
    import          another tool's capture as a teacher's cache; export-cache: the other way
    verify, repair  every byte checked, bad parts dropped; inspect: what a cache holds
    reproduce       the method's evidence: many small runs, compared over several seeds

    Every command can be interrupted and run again: it goes on where it stopped (evaluate begins anew).

    \b
    Example:
      scholiast plan pipeline/configs/demo.yaml
      scholiast cache-teachers pipeline/configs/demo.yaml
      scholiast train-student pipeline/configs/demo.yaml
    """


@main.command()
@json_option
@run_options
def status(config: Path, overrides: Sequence[str], quiet: bool, debug: bool, as_json: bool) -> None:
    """Say what is done, who is at work and which launched tasks failed, with the end of their logs.

    \b
    Example: scholiast status my.yaml
    """
    from pipeline.status import read_status
    from pipeline.status_text import show_status

    work, console = open_workspace(config, overrides, quiet)
    rows = read_status(work)
    if as_json:
        click.echo(json_module.dumps(rows, indent=1))
    else:
        show_status(console, rows)


for _command in (
    init, doctor, plan, prepare, cache_teachers, append, train_student, export, push, evaluate, generate,
    report, verify, repair, inspect, import_cache, export_cache, launch, reproduce, completion,
):  # fmt: skip
    main.add_command(_command)


if __name__ == "__main__":
    main()
