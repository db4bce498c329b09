"""The commands that lay a run out over many processes, and what one of these tasks says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

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
