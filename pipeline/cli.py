"""The command line: each command parses, then calls. Heavy imports happen inside the commands."""

from __future__ import annotations

import json as json_module
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cache_commands import inspect, repair, verify
from pipeline.command_options import json_option, open_workspace, run_options
from pipeline.launch_commands import launch, run_task
from pipeline.report_command import report
from pipeline.reproduce.command import reproduce
from pipeline.result_commands import evaluate, generate
from pipeline.terminal import harmless
from storage.errors import ScholiastError, Stopped

if TYPE_CHECKING:
    from pipeline.workspace import Workspace

INTERRUPTED = 130
MOST_FILES = 65_536


class ScholiastGroup(click.Group):
    """Shows errors as one message without a traceback, unless --debug is given."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        self._debug = "--debug" in (kwargs.get("args") or sys.argv)
        allow_open_files()
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return self._invoke_with_bar(ctx)
        except KeyboardInterrupt:
            click.echo(
                "\ninterrupted; what is finished is kept: run the same command again to go on",
                err=True,
            )
            ctx.exit(INTERRUPTED)
        except Stopped as stopped:
            if _first_rank():
                click.echo(harmless(stopped), err=True)
            ctx.exit(stopped.exit_code)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if self._debug:
                raise
            click.echo(harmless(f"error: {_message(error)}"), err=True)
            ctx.exit(error.exit_code if isinstance(error, ScholiastError) else 1)

    def _invoke_with_bar(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        finally:  # a bar left open would hide the cursor and run into the message
            if ctx.obj is not None:
                ctx.obj.stop_bar()


def allow_open_files() -> None:
    """Takes as many descriptors as the system allows: readers keep a shard of each array open, of each
    part in the order's window and each teacher, and the usual 1,024 would have them opened again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _first_rank() -> bool:
    """Returns whether this process speaks for all ranks of a training."""
    return os.environ.get("RANK", "0") == "0"


def _message(error: Exception) -> str:
    if isinstance(error, ScholiastError):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, without importing torch
        return (
            "the device's memory is exhausted\n"
            "  to do:     lower teachers.NAME.batch_blocks or train.batch_blocks (and raise "
            "train.accumulate),\n             store.chunk_tokens or loss.chunk_bytes, or set "
            "train.gradient_checkpointing: true"
        )
    if isinstance(error, OSError):
        return f"{error.strerror or error}: {error.filename or ''}\n  to do:     check that path"
    return (
        f"unexpected {type(error).__name__}: {error}\n"
        "  to do:     run again with --debug for the traceback, and report it"
    )


@click.group(cls=ScholiastGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="scholiast", message="scholiast %(version)s")
def main() -> None:
    """Distil several teachers into one small student, one model in memory at a time.

    \b
    prepare         documents → packed token blocks
    cache-teachers  each teacher once over the blocks → sparse notes on disk
    append          more sources or teachers, without touching what is there
    train-student   the student on the teachers' fused notes
    evaluate        held-out figures
    report          HTML, Markdown and JSON of them; of several runs: a comparison
    launch          the whole of it on a cluster; status: how far it is
    verify, repair  every byte checked, bad parts dropped; inspect: what a cache holds
    reproduce       the method's evidence: many small runs, compared over several seeds

    Every command can be interrupted and run again: it goes on where it stopped.

    \b
    Example:
      scholiast plan pipeline/configs/demo.yaml
      scholiast cache-teachers pipeline/configs/demo.yaml
      scholiast train-student pipeline/configs/demo.yaml
    """


@main.command()
@run_options
def prepare(config: Path, overrides: Sequence[str], quiet: bool, debug: bool) -> None:
    """Tokenise and pack the corpus.

    \b
    Example: scholiast prepare my.yaml --set corpus.block_length=2048
    """
    work, _ = open_workspace(config, overrides, quiet)
    info = work.prepare()
    click.echo(
        f"corpus complete: {info.tokens:,} tokens in {info.blocks:,} blocks of {info.block_length} "
        f"({info.parts} parts) in {work.config.corpus_folder}"
    )


@main.command("cache-teachers")
@click.option("--task", type=int, help="Which of several tasks this is, from 0.")
@click.option("--tasks", type=click.IntRange(1), help="Of how many.")
@click.option("--teacher", "teachers", multiple=True, metavar="NAME",
              help="This teacher alone. Repeatable.")  # fmt: skip
@run_options
def cache_teachers(
    config: Path, overrides: Sequence[str], quiet: bool, debug: bool, task: int | None,
    tasks: int | None, teachers: Sequence[str],
) -> None:  # fmt: skip
    """Run each teacher once over the corpus and store its notes.

    Prepares the corpus first if it is not prepared. Finished parts are kept. Any number of tasks may work
    on the same parts: each does what no other is at work on. Which of how many it is a task also learns
    from a Slurm array, an indexed Kubernetes Job or torchrun; without any it ends when all is done.

    \b
    Example: scholiast cache-teachers my.yaml --set device=cuda:1
      scholiast cache-teachers my.yaml --task 3 --tasks 8 --teacher large
    """
    from pipeline.tasks import find_task

    work, _ = open_workspace(config, overrides, quiet)
    found = find_task(task, tasks, os.environ)
    if found is None:
        _cache_teachers(work, teachers)
    else:
        run_task(work, found, teachers)


def _cache_teachers(work: Workspace, teachers: Sequence[str] = ()) -> None:
    from pipeline.console import human_bytes

    jobs = work.cache_teachers(teachers)
    costs = work.cache_costs(jobs)
    size = sum(cost["bytes"] for cost in costs.values())
    per_token = size / sum(cost["tokens"] for cost in costs.values())
    click.echo(
        f"cache complete: {len(jobs)} teachers, {human_bytes(size)}, {per_token:.0f} bytes per token "
        f"and teacher, in {work.config.cache_folder}"
    )


@main.command()
@run_options
def append(config: Path, overrides: Sequence[str], quiet: bool, debug: bool) -> None:
    """Add blocks or teachers to a finished cache; what is there is not touched.

    Sources that were added after the last one of corpus.sources are prepared into parts of their own,
    then every teacher annotates the parts it has not: added teachers all of them.

    \b
    Example: scholiast append my.yaml
    """
    from pipeline.append import append_sources

    work, _ = open_workspace(config, overrides, quiet)
    info, added = append_sources(work)
    if added:
        click.echo(f"corpus grown: {added:,} blocks added, {info.blocks:,} in all")
    else:
        click.echo("the configuration adds no sources: the corpus stays as it is")
    _cache_teachers(work)


@main.command("train-student")
@run_options
def train_student(config: Path, overrides: Sequence[str], quiet: bool, debug: bool) -> None:
    """Train the student on the fused notes of the teachers.

    Needs a complete cache. Goes on from the newest checkpoint, on any number of ranks. SIGTERM and
    SIGUSR1 end it after the step, with everything saved and exit code 75.

    \b
    Example: scholiast train-student my.yaml --set loss.alpha=1.0 --set run_dir=runs/kd-only
      torchrun --nproc-per-node 8 --signals-to-handle SIGTERM,SIGINT,SIGUSR1 \
        -m pipeline.cli train-student my.yaml --set train.parallel=fsdp
    """
    work, _ = open_workspace(config, overrides, quiet)
    runs = work.train_students()
    for run in runs.values() if _first_rank() else ():
        click.echo(f"student trained: {run.steps} steps, in {run.model_folder}")


@main.command()
@click.option("--student", default="fused", show_default=True, help="Which student.")
@click.option("--step", type=click.IntRange(1), help="Which checkpoint; the newest if not given.")
@run_options
@click.argument("folder", type=click.Path(path_type=Path))
def export(
    config: Path, folder: Path, overrides: Sequence[str], quiet: bool, debug: bool, student: str,
    step: int | None,
) -> None:  # fmt: skip
    """Save a student from one of its checkpoints as an ordinary model.

    \b
    Example: scholiast export my.yaml models/after-400 --step 400
    """
    work, _ = open_workspace(config, overrides, quiet)
    step = work.export(student, step, folder)
    click.echo(f"student after step {step}: {folder}")


@main.command()
@run_options
@click.argument("url")
@click.option("--verify", "check", is_flag=True,
              help="Read what is there already, and send again what has other bytes.")  # fmt: skip
def push(
    config: Path, url: str, overrides: Sequence[str], quiet: bool, debug: bool, check: bool
) -> None:
    """Copy the finished corpus and caches to a remote store.

    What is there already with the right size is skipped. Then train anywhere with corpus_dir:
    URL/corpus and cache_dir: URL/cache.

    \b
    Example: scholiast push my.yaml s3://bucket/prefix
    """
    from pipeline.console import human_bytes
    from pipeline.publish import publish

    work, _ = open_workspace(config, overrides, quiet)
    for name, size in publish(work, url, check).items():
        click.echo(f"pushed {name}: {human_bytes(size)} sent to {url.rstrip('/')}/{name}")


@main.command()
@json_option
@run_options
def plan(config: Path, overrides: Sequence[str], quiet: bool, debug: bool, as_json: bool) -> None:
    """Say what a run will take and what is already done, before anything runs.

    \b
    Example: scholiast plan my.yaml --set store.k=32
    """
    from dataclasses import asdict

    from pipeline.console import duration, human_bytes
    from pipeline.plan import make_plan

    work, console = open_workspace(config, overrides, quiet)
    rows, facts = make_plan(work)
    if as_json:
        click.echo(json_module.dumps({**facts, "steps": [asdict(row) for row in rows]}, indent=1))
        return
    about = "about " if facts["estimated"] else ""
    click.echo(
        f"{about}{facts['tokens']:,} tokens in {facts['blocks']:,} blocks, {facts['parts']:,} parts\n"
    )
    console.table(
        ["step", "done", "of", "on disk", "time left", "basis"],
        [
            [
                row.step, f"{row.done:,}", f"{row.total:,}", human_bytes(row.size_bytes),
                "–" if row.seconds is None else duration(row.seconds), row.basis,
            ]
            for row in rows
        ],
    )  # fmt: skip
    total = sum(row.seconds or 0.0 for row in rows)
    size = human_bytes(sum(row.size_bytes for row in rows))
    click.echo(f"\nin all: {size} on disk, {duration(total)} to go on this machine")


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


for _command in (evaluate, generate, report, verify, repair, inspect, launch, reproduce):
    main.add_command(_command)


if __name__ == "__main__":
    main()
