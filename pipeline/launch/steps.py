"""What of a run is missing, as jobs that a scheduler can run: who waits for whom, and how many tasks."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.console import duration
from pipeline.launch.options import Resources
from pipeline.plan import PlanRow, make_plan
from pipeline.workspace import Workspace
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
        ConfigError: how many tasks there should be cannot be told.
    """
    cluster, run = work.config.cluster, work.config.run
    rows = {row.step: row for row in make_plan(work, cluster.flops)[0]}
    steps: list[Step] = []
    notes: list[str] = []
    info, _ = work.looked_at()
    prepared = ("prepare",) if info is None else ()
    if info is None:
        resources = cluster.prepare.over(cluster.defaults)
        steps.append(Step("prepare", (("prepare",),), resources))
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
        trains = any(step.name == "train" for step in steps)
        steps.append(Step("evaluate", commands, resources, ("train",) if trains else before))
    return steps, notes


def _cache_step(
    work: Workspace, name: str, row: PlanRow, notes: list[str], after: tuple[str, ...]
) -> Step:
    cluster, pending = work.config.cluster, row.total - row.done
    if cluster.tasks is None and row.seconds is None:
        raise ConfigError(
            f"nothing tells how long teacher {name!r} will take: its model is not here yet",
            where="cluster.tasks", todo="set it, or download the model first",
        )  # fmt: skip
    tasks = cluster.tasks or math.ceil((row.seconds or 0.0) / (60.0 * cluster.task_minutes))
    tasks = max(1, min(tasks, pending, cluster.max_array))
    if row.seconds is not None:
        notes.extend(_advice(name, row.seconds, pending, tasks))
    resources = cluster.teachers.get(name, Resources()).over(cluster.defaults)
    command = ("cache-teachers", "--teacher", name)
    return Step(f"cache-{name}", (command,), resources, after, tasks, pending=pending)


def _advice(name: str, seconds: float, pending: int, tasks: int) -> list[str]:
    """Returns what a user should know of how the work is cut: parts are the corpus's."""
    each = seconds / max(1, pending)
    told = [
        f"cache {name}: {pending:,} parts of about {duration(each)} in {tasks} tasks of about "
        f"{duration(seconds / tasks)}"
    ]
    if each > _LONG_PART:
        told.append("  a part is what a kill may cost: prepare with fewer corpus.blocks_per_part")
    if each < _SHORT_PART and pending > 1000:
        told.append("  parts are short: prepare with more corpus.blocks_per_part")
    return told


def launch_folder(work: Workspace) -> Path:
    """Returns the folder of scripts and logs, made if need be."""
    folder = (work.config.run / "launch").absolute()
    os.makedirs(folder / "logs", exist_ok=True)
    return folder
