"""The commands that make corpus and caches, and copy them: prepare, cache-teachers, append, push."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.commands.completion import teacher_names
from pipeline.commands.launch import run_task
from pipeline.commands.options import (
    dry_run_option,
    json_option,
    open_workspace,
    run_options,
    tell,
    tell_actions,
)

if TYPE_CHECKING:
    from pipeline.workspace import Workspace


@click.command()
@json_option
@dry_run_option
@run_options
def prepare(
    config: Path, overrides: Sequence[str], quiet: bool, debug: bool, as_json: bool, dry_run: bool
) -> None:
    """Tokenise and pack the corpus.

    \b
    Example: scholiast prepare my.yaml --set corpus.block_length=2048
    """
    from pipeline import dry_run as would

    work, _ = open_workspace(config, overrides, quiet, dry_run)
    if dry_run:
        tell_actions(as_json, would.prepare(work))
        return
    info = work.prepare()
    folder = work.config.corpus_folder
    facts = {
        "corpus": str(folder), "fingerprint": info.fingerprint, "tokens": info.tokens,
        "blocks": info.blocks, "block_length": info.block_length, "parts": info.parts,
    }  # fmt: skip
    tell(
        as_json, facts,
        f"corpus complete: {info.tokens:,} tokens in {info.blocks:,} blocks of {info.block_length} "
        f"({info.parts} parts) in {folder}",
    )  # fmt: skip


@click.command("cache-teachers")
@click.option("--task", type=int, help="Which of several tasks this is, from 0.")
@click.option("--tasks", type=click.IntRange(1), help="Of how many.")
@click.option("--teacher", "teachers", multiple=True, metavar="NAME",
              shell_complete=teacher_names, help="This teacher alone. Repeatable.")  # fmt: skip
@json_option
@dry_run_option
@run_options
def cache_teachers(
    config: Path, overrides: Sequence[str], quiet: bool, debug: bool, as_json: bool,
    dry_run: bool, task: int | None, tasks: int | None, teachers: Sequence[str],
) -> None:  # fmt: skip
    """Run each teacher once over the corpus and store its notes.

    Prepares the corpus first if it is not prepared. Finished parts are kept. Any number of tasks may work
    on the same parts: each does what no other is at work on. Which of how many it is a task also learns
    from a Slurm array, an indexed Kubernetes Job or torchrun; without any it ends when all is done.

    \b
    Example: scholiast cache-teachers my.yaml --set device=cuda:1
      scholiast cache-teachers my.yaml --task 3 --tasks 8 --teacher large
    """
    from pipeline import dry_run as would
    from pipeline.tasks import find_task

    work, _ = open_workspace(config, overrides, quiet, dry_run)
    found = find_task(task, tasks, os.environ)
    if dry_run:
        share = f", shared out among {found.count} tasks" if found else ""
        tell_actions(as_json, would.cache_teachers(work, teachers, share))
    elif found is None:
        tell(as_json, *_cache_teachers(work, teachers))
    else:
        run_task(work, found, teachers, as_json)


def _cache_teachers(work: Workspace, teachers: Sequence[str] = ()) -> tuple[dict[str, Any], str]:
    """Does stage one; returns what it came to, for programs and for people."""
    from pipeline.console import human_bytes

    jobs = work.cache_teachers(teachers)
    costs = work.cache_costs(jobs)
    size = sum(cost["bytes"] for cost in costs.values())
    per_token = size / sum(cost["tokens"] for cost in costs.values())
    folder = work.config.cache_folder
    facts = {"cache": str(folder), "teachers": costs}
    return facts, (
        f"cache complete: {len(jobs)} teachers, {human_bytes(size)}, {per_token:.0f} bytes per token "
        f"and teacher, in {folder}"
    )


@click.command()
@json_option
@dry_run_option
@run_options
def append(
    config: Path, overrides: Sequence[str], quiet: bool, debug: bool, as_json: bool, dry_run: bool
) -> None:
    """Add blocks or teachers to a finished cache; what is there is not touched.

    Sources that were added after the last one of corpus.sources are prepared into parts of their own,
    then every teacher annotates the parts it has not: added teachers all of them.

    \b
    Example: scholiast append my.yaml
    """
    from pipeline import dry_run as would
    from pipeline.append import append_sources

    work, _ = open_workspace(config, overrides, quiet, dry_run)
    if dry_run:
        tell_actions(as_json, would.append(work))
        return
    info, added = append_sources(work)
    grown = f"corpus grown: {added:,} blocks added, {info.blocks:,} in all"
    if not added:
        grown = "the configuration adds no sources: the corpus stays as it is"
    facts, cached = _cache_teachers(work)
    tell(as_json, {"added_blocks": added, "blocks": info.blocks, **facts}, f"{grown}\n{cached}")


@click.command()
@json_option
@dry_run_option
@run_options
@click.argument("url")
@click.option("--verify", "check", is_flag=True,
              help="Read what is there already, and send again what has other bytes.")  # fmt: skip
def push(
    config: Path, url: str, overrides: Sequence[str], quiet: bool, debug: bool, as_json: bool,
    dry_run: bool, check: bool,
) -> None:  # fmt: skip
    """Copy the finished corpus and caches to a remote store.

    What is there already with the right size is skipped. Then train anywhere with corpus_dir:
    URL/corpus and cache_dir: URL/cache.

    \b
    Example: scholiast push my.yaml s3://bucket/prefix
    """
    from pipeline.console import human_bytes
    from pipeline.dry_run import Action
    from pipeline.publish import publish

    work, _ = open_workspace(config, overrides, quiet, dry_run)
    place = url.rstrip("/")
    sent = publish(work, url, check, dry_run)
    if dry_run:
        would = [
            Action(f"send {name}: {human_bytes(size)}", (f"{place}/{name}",))
            for name, size in sent.items()
        ]
        tell_actions(as_json, would)
        return
    lines = [
        f"pushed {name}: {human_bytes(size)} sent to {place}/{name}" for name, size in sent.items()
    ]
    tell(as_json, {"url": place, "bytes_sent": sent}, "\n".join(lines))
