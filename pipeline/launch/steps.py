"""What of a run is missing, as jobs that a scheduler can run: who waits for whom, and how many tasks."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.console import duration
from pipeline.launch.options import Resources
from pipeline.planning.fits import context_problems, shorter_parts
from pipeline.planning.pace import Device, Pace
from pipeline.planning.parts import sized, tasks_for
from pipeline.planning.rows import PlanRow, make_plan
from pipeline.workspace import Workspace
from stages.corpus_identity import recorded_width
from storage.errors import ConfigError

_LONG_PART, _SHORT_PART = 1800.0, 5.0  # seconds


@dataclass(frozen=True)
class Step:
    """A job.

    Attributes:
        name: such as cache-large; the script's name as well.
        command: words after `scholiast`, without the configuration.
        resources: what it asks for.
        after: names of the steps that must have succeeded.
        tasks: how many tasks of an array; 0 for a job that is none.
        nodes, ranks: of stage two: ranks of each node.
        pending: parts that are left, of stage one.
    """

    name: str
    command: tuple[tuple[str, ...], ...]
    resources: Resources
    after: tuple[str, ...] = ()
    tasks: int = 0
    nodes: int = 1
    ranks: int = 1
    pending: int = 0


@dataclass(frozen=True)
class Call:
    """How a job calls this run's commands.

    Attributes:
        config, overrides: the command line's.
        folder: where paths of the configuration are relative to.
    """

    config: Path
    overrides: tuple[str, ...]
    folder: Path

    @classmethod
    def here(cls, config: Path, overrides: Sequence[str]) -> Call:
        return cls(config.resolve(), tuple(overrides), Path.cwd())

    def arguments(self, command: Sequence[str]) -> list[str]:
        """Returns the words after `scholiast`."""
        sets = [word for text in self.overrides for word in ("--set", text)]
        return [*command, str(self.config), *sets]

    def text(self, work: Workspace, step: Step, command: Sequence[str]) -> str:
        """Returns the shell's line, in the step's image if it has one."""
        image, own = step.resources.image, work.config.cluster.command
        words = shlex.join(self.arguments(command))
        if image is None:
            return f"{own or shlex.join([sys.executable, '-m', 'pipeline.cli'])} {words}"
        gpu = "--nv " if step.resources.gpus else ""
        inside = f"apptainer exec {gpu}--bind {shlex.quote(str(self.folder))} {shlex.quote(image)}"
        return f"{inside} {own or 'scholiast'} {words}"


def missing_steps(work: Workspace, cache_only: bool = False) -> tuple[list[Step], list[str]]:
    """Returns the steps that are not done, in order, and notes for the user.

    Args:
        cache_only: no later ones than stage one's.

    Raises:
        ConfigError: how many tasks there should be cannot be told, or blocks are longer than a model's
            context.
    """
    for problem in context_problems(work):
        raise problem
    cluster, run = work.config.cluster, work.config.run
    rows = {row.step: row for row in make_plan(work, cluster.flops)[0]}
    steps: list[Step] = []
    notes: list[str] = []
    info, _ = work.looked_at()
    prepared = ("prepare",) if info is None else ()
    if info is None:
        resources = cluster.prepare.over(cluster.defaults)
        steps.append(Step("prepare", (("prepare", *_width(work)),), resources))
    for name in work.config.teachers:
        row = rows[f"cache {name}"]
        if row.done < row.total or info is None:
            steps.append(_cache_step(work, name, row, notes, prepared))
    if cache_only:
        return steps, notes
    before = tuple(step.name for step in steps)
    trained = [row for step, row in rows.items() if step.startswith("train ")]
    if any(row.seconds is not None or row.done < row.total for row in trained):
        train = cluster.train.over(cluster.defaults)
        ranks = cluster.train.ranks or train.gpus or 1
        steps.append(
            Step("train", (("train-student",),), train, before, 0, cluster.train.nodes, ranks)
        )
    reported = (run / "evaluation.json").exists() and (run / "report/report.html").exists()
    if not reported or steps:
        resources = cluster.evaluate.over(cluster.defaults)
        commands = (("evaluate",), ("report",))
        after = ("train",) if any(step.name == "train" for step in steps) else before
        steps.append(Step("evaluate", commands, resources, after))
    return steps, notes


def _width(work: Workspace) -> tuple[str, ...]:
    """Returns what tells the job that prepares how wide a part is: it may run where no GPU is, and would
    size the parts for that. Nothing where the configuration or a begun corpus says it."""
    root = work.config.corpus_folder
    if work.config.corpus.blocks_per_part is not None or recorded_width(root) is not None:
        return ()
    width = sized(work, Pace(work, Device(work.config.cluster.flops)))
    return ("--set", f"corpus.blocks_per_part={width}")


def _cache_step(
    work: Workspace, name: str, row: PlanRow, notes: list[str], after: tuple[str, ...]
) -> Step:
    cluster, pending = work.config.cluster, row.total - row.done
    if cluster.tasks is None and row.seconds is None:
        raise ConfigError(
            f"nothing tells how long teacher {name!r} will take: its model is not here yet",
            where="cluster.tasks", todo="set it, or download the model first",
        )  # fmt: skip
    tasks = tasks_for(row.seconds, cluster, pending)
    resources = cluster.teachers.get(name, Resources()).over(cluster.defaults)
    if row.seconds is not None:
        limit = resources.seconds and resources.seconds - cluster.warning
        notes.extend(_advice(work, name, row.seconds, pending, tasks, limit))
    command = ("cache-teachers", "--teacher", name)
    return Step(f"cache-{name}", (command,), resources, after, tasks, pending=pending)


def _advice(
    work: Workspace, name: str, seconds: float, pending: int, tasks: int, limit: float | None
) -> list[str]:
    """Returns what a user should know of how the work is cut: parts are the corpus's. Where their width
    was left open there is nothing to advise but what the time limit forbids.

    Args:
        name: the teacher's.
        seconds: of all that is pending.
        pending: parts.
        tasks: of the array.
        limit: seconds until a task is told to save.
    """
    each, chosen = seconds / max(1, pending), work.config.corpus.blocks_per_part is not None
    told = [
        f"cache {name}: {pending:,} parts of about {duration(each)} in {tasks} tasks of about "
        f"{duration(seconds / tasks)}"
    ]
    if chosen and each > _LONG_PART:
        told.append(f"  a part is what a kill may cost: {shorter_parts(work)}")
    if limit is not None and each > limit:
        told.append(
            f"  a task would be told to save before it has finished a part: raise "
            f"cluster.teachers.{name}.time, or {shorter_parts(work)}"
        )
    if chosen and each < _SHORT_PART and pending > 1000:
        told.append("  parts are short: prepare with more corpus.blocks_per_part, or leave it out")
    return told


def launch_folder(work: Workspace) -> Path:
    """Returns the folder of scripts and logs, made if need be."""
    folder = (work.config.run / "launch").absolute()
    os.makedirs(folder / "logs", exist_ok=True)
    return folder
