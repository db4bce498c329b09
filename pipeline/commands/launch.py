"""The commands that lay a run out over many processes, and what one of these tasks says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.commands.options import open_workspace, run_options
from storage.errors import ScholiastError

if TYPE_CHECKING:
    from pipeline.tasks import Task
    from pipeline.workspace import Workspace


def run_task(work: Workspace, task: Task, teachers: Sequence[str]) -> None:
    """Does one task's share of stage one and says what it came to."""
    from stages.shares import Share

    label = f"task {task.index} of {task.count} (from {task.source})"
    work.progress.say(label)
    share = Share(task.index, task.count, task.job, wait=False)
    outcomes = work.cache_share(share, teachers)
    if not any(one.written or one.left for one in outcomes):
        click.echo(f"{label}: nothing to do, every part is finished")
    for one in outcomes:
        left = f"; {len(one.left)} left to tasks that are at work on them" if one.left else ""
        click.echo(f"{label}: {one.teacher}: {len(one.written)} parts written{left}")


@click.group()
def launch() -> None:
    """Lay a run out over many processes: each does what no other has done.

    \b
    Example: scholiast launch slurm my.yaml --submit
    """


@launch.command()
@click.option("--submit", "submitting", is_flag=True, help="Also submit them.")
@click.option("--cache-only", is_flag=True, help="Stage one alone.")
@run_options
def slurm(
    config: Path, overrides: Sequence[str], quiet: bool, debug: bool, submitting: bool,
    cache_only: bool,
) -> None:  # fmt: skip
    """Write Slurm batch scripts for what is missing, into RUN_DIR/launch; --submit submits them.

    An array for each teacher, then the training, then evaluation and report, each after what it needs
    (afterok). What is still in the queue is left there.

    \b
    Example: scholiast launch slurm my.yaml --submit
    """
    from pipeline.launch.slurm import submit, write_scripts
    from pipeline.launch.steps import Call, missing_steps

    work, _ = open_workspace(config, overrides, quiet)
    steps, notes = missing_steps(work, cache_only)
    for note in notes:
        work.progress.say(note)
    if not steps:
        click.echo("nothing is missing: nothing to submit")
        return
    paths = write_scripts(work, steps, Call.here(config, overrides))
    if not submitting:
        for step in steps:
            click.echo(f"{step.name}: {paths[step.name]}")
        return
    for name, told in submit(work, steps, paths).items():
        click.echo(f"{name}: {told}")


@launch.command()
@click.option("--dry-run", is_flag=True, required=True, help="Print the manifests; submit nothing.")
@run_options
def kubernetes(
    config: Path, overrides: Sequence[str], quiet: bool, debug: bool, dry_run: bool
) -> None:
    """Print Kubernetes manifests for what is missing: an indexed Job a teacher, one for each later step.

    \b
    Example: scholiast launch kubernetes my.yaml --dry-run > jobs.yaml
    """
    import yaml

    from pipeline.launch.kubernetes import manifests
    from pipeline.launch.steps import Call, missing_steps

    work, _ = open_workspace(config, overrides, quiet)
    steps, notes = missing_steps(work)
    for note in notes:
        work.progress.say(note)
    made = manifests(work, steps, Call.here(config, overrides))
    click.echo(yaml.safe_dump_all(made, sort_keys=False), nl=False)


@launch.command()
@click.option("--workers", type=click.IntRange(1), required=True, help="Processes.")
@run_options
def local(config: Path, overrides: Sequence[str], quiet: bool, debug: bool, workers: int) -> None:
    """Run stage one in several processes on this machine, each a task; GPUs are dealt out in turn.

    Their output goes to RUN_DIR/launch/logs. SIGTERM and SIGUSR1 are passed on.

    \b
    Example: scholiast launch local my.yaml --workers 8
    """
    from pipeline.launch.local import run_pool
    from pipeline.launch.steps import Call

    work, _ = open_workspace(config, overrides, quiet)
    run_pool(work, Call.here(config, overrides), workers)
    if left := sum(len(job.pending) for job in work.jobs(work.prepare())):
        raise ScholiastError(
            f"the pool has ended, and {left} parts are not finished",
            where=work.config.cache_folder, found="other processes at work on them",
            todo="run the same command again when they have ended",
        )  # fmt: skip
    click.echo(f"cache complete: {len(work.config.teachers)} teachers, {workers} tasks")
