"""The commands that lay a run out over many processes, and what one of these tasks says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.commands.group import HintingGroup
from pipeline.commands.options import (
    dry_run_option,
    json_option,
    open_workspace,
    run_options,
    tell,
    tell_actions,
)
from storage.errors import ScholiastError

if TYPE_CHECKING:
    from pipeline.dry_run import Action
    from pipeline.launch.steps import Call, Step
    from pipeline.tasks import Task
    from pipeline.workspace import Workspace

_NOTHING = "nothing is missing"


def run_task(work: Workspace, task: Task, teachers: Sequence[str], as_json: bool) -> None:
    """Does one task's share of stage one and says what it came to."""
    from stages.shares import Share

    label = f"task {task.index} of {task.count} (from {task.source})"
    work.progress.say(label)
    share = Share(task.index, task.count, task.job, wait=False)
    outcomes = work.cache_share(share, teachers)
    facts = {
        "task": task.index, "tasks": task.count, "source": task.source,
        "teachers": [
            {"teacher": one.teacher, "written": one.written, "left": one.left} for one in outcomes
        ],
    }  # fmt: skip
    lines = []
    if not any(one.written or one.left for one in outcomes):
        lines.append(f"{label}: nothing to do, every part is finished")
    for one in outcomes:
        left = f"; {len(one.left)} left to tasks that are at work on them" if one.left else ""
        lines.append(f"{label}: {one.teacher}: {len(one.written)} parts written{left}")
    tell(as_json, facts, "\n".join(lines))


@click.group(cls=HintingGroup)
def launch() -> None:
    """Lay a run out over many processes: each does what no other has done.

    \b
    Example: scholiast launch slurm my.yaml --submit
    """


def _call(work: Workspace, config: Path, overrides: Sequence[str]) -> Call:
    """Returns how jobs call; what this machine chose (auto) is said, so that all nodes do the same."""
    from pipeline.config import settled
    from pipeline.launch.steps import Call

    told = settled(config, overrides)
    if told:
        options = " ".join(f"--set {text}" for text in told)
        work.progress.say(
            f"auto is what this machine takes: {options} (for other nodes give other ones, here and to "
            "later commands)"
        )
    return Call.here(config, [*overrides, *told])


@launch.command()
@click.option("--submit", "submitting", is_flag=True, help="Also submit them.")
@click.option("--cache-only", is_flag=True, help="Stage one alone.")
@json_option
@dry_run_option
@run_options
def slurm(
    config: Path, overrides: Sequence[str], quiet: bool, debug: bool, as_json: bool, dry_run: bool,
    submitting: bool, cache_only: bool,
) -> None:  # fmt: skip
    """Write Slurm batch scripts for what is missing, into RUN_DIR/launch; --submit submits them.

    An array for each teacher, then the training, then evaluation and report, each after what it needs
    (afterok). What is still in the queue is left there.

    \b
    Example: scholiast launch slurm my.yaml --submit
    """
    from pipeline.dry_run import done
    from pipeline.launch.slurm import submit, write_scripts
    from pipeline.launch.steps import missing_steps

    work, _ = open_workspace(config, overrides, quiet, dry_run)
    steps, notes = missing_steps(work, cache_only)
    for note in notes:
        work.progress.say(note)
    if dry_run:
        would = [_would_launch(work, step, submitting) for step in steps]
        tell_actions(as_json, would or [done(_NOTHING)])
        return
    paths = write_scripts(work, steps, _call(work, config, overrides)) if steps else {}
    told = submit(work, steps, paths) if submitting and steps else {}
    facts = {
        step.name: {"script": str(paths[step.name]), "tasks": step.tasks, "after": step.after,
                    "submitted": told.get(step.name)}
        for step in steps
    }  # fmt: skip
    lines = [f"{name}: {told.get(name, path)}" for name, path in paths.items()]
    tell(as_json, {"steps": facts}, "\n".join(lines) or f"{_NOTHING}: nothing to submit")


def _would_launch(work: Workspace, step: Step, submitting: bool) -> Action:
    """Returns what `launch slurm` would do with a step."""
    from pipeline.dry_run import Action

    jobs = f"an array of {step.tasks} tasks" if step.tasks else "one job"
    after = f", after {' and '.join(step.after)}" if step.after else ""
    path = work.config.run / "launch" / f"{step.name}.sbatch"
    verb = "write and submit" if submitting else "write"
    return Action(f"{verb} {step.name}: {jobs}{after}", (str(path.absolute()),))


@launch.command()
@click.option("--dry-run", is_flag=True, required=True, help="Print the manifests; submit nothing.")
@json_option
@run_options
def kubernetes(
    config: Path, overrides: Sequence[str], quiet: bool, debug: bool, as_json: bool, dry_run: bool
) -> None:
    """Print Kubernetes manifests for what is missing: an indexed Job a teacher, one for each later step.

    \b
    Example: scholiast launch kubernetes my.yaml --dry-run > jobs.yaml
    """
    import json

    import yaml

    from pipeline.launch.kubernetes import manifests
    from pipeline.launch.steps import missing_steps

    work, _ = open_workspace(config, overrides, quiet, dry_run)
    steps, notes = missing_steps(work)
    for note in notes:
        work.progress.say(note)
    made = manifests(work, steps, _call(work, config, overrides))
    if as_json:
        click.echo(json.dumps({"apiVersion": "v1", "kind": "List", "items": made}, indent=1))
    else:
        click.echo(yaml.safe_dump_all(made, sort_keys=False), nl=False)


@launch.command()
@click.option("--workers", type=click.IntRange(1), required=True,
              help="Processes at work at once, each a task of stage one.")  # fmt: skip
@json_option
@dry_run_option
@run_options
def local(
    config: Path, overrides: Sequence[str], quiet: bool, debug: bool, as_json: bool, dry_run: bool,
    workers: int,
) -> None:  # fmt: skip
    """Run stage one in several processes on this machine, each a task; GPUs are dealt out in turn.

    Their output goes to RUN_DIR/launch/logs. SIGTERM and SIGUSR1 are passed on.

    \b
    Example: scholiast launch local my.yaml --workers 8
    """
    from pipeline import dry_run as would
    from pipeline.launch.local import run_pool

    work, _ = open_workspace(config, overrides, quiet, dry_run)
    if dry_run:
        actions = would.cache_teachers(work, share=f", in {workers} processes")
        logs = would.Action("keep the tasks' output", (str(work.config.run / "launch" / "logs"),))
        tell_actions(as_json, [*actions, logs])
        return
    run_pool(work, _call(work, config, overrides), workers)
    if left := sum(len(job.pending) for job in work.jobs(work.prepare())):
        raise ScholiastError(
            f"the pool has ended, and {left} parts are not finished",
            where=work.config.cache_folder, found="other processes at work on them",
            todo="run the same command again when they have ended",
        )  # fmt: skip
    facts = {
        "cache": str(work.config.cache_folder), "teachers": list(work.config.teachers),
        "tasks": workers,
    }  # fmt: skip
    tell(as_json, facts, f"cache complete: {len(work.config.teachers)} teachers, {workers} tasks")
