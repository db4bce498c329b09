"""The commands that make corpus and caches, and copy them: prepare, cache-teachers, append, push."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.commands.launch import run_task
from pipeline.commands.options import open_workspace, run_options

if TYPE_CHECKING:
    from pipeline.workspace import Workspace


@click.command()
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


@click.command("cache-teachers")
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


@click.command()
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


@click.command()
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
