"""The commands that make students: train-student, export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from pipeline.commands.group import first_rank
from pipeline.commands.options import (
    dry_run_option,
    json_option,
    open_workspace,
    run_options,
    tell,
    tell_actions,
)


@click.command("train-student")
@json_option
@dry_run_option
@run_options
def train_student(
    config: Path, overrides: Sequence[str], quiet: bool, debug: bool, as_json: bool, dry_run: bool
) -> None:
    """Train the student on the fused notes of the teachers.

    Needs a complete cache. Goes on from the newest checkpoint, on any number of ranks. SIGTERM and
    SIGUSR1 end it after the step, with everything saved and exit code 75.

    \b
    Example: scholiast train-student my.yaml --set loss.alpha=1.0 --set run_dir=runs/kd-only
      torchrun --nproc-per-node 8 --signals-to-handle SIGTERM,SIGINT,SIGUSR1 \
        -m pipeline.cli train-student my.yaml --set train.parallel=fsdp
    """
    from pipeline import dry_run as would

    work, _ = open_workspace(config, overrides, quiet, dry_run)
    if dry_run:
        tell_actions(as_json, would.train_student(work))
        return
    runs = work.train_students()
    facts = {n: {"steps": run.steps, "model": str(run.model_folder)} for n, run in runs.items()}
    lines = [f"student trained: {run.steps} steps, in {run.model_folder}" for run in runs.values()]
    if first_rank():
        tell(as_json, {"students": facts}, "\n".join(lines))


@click.command()
@click.option("--student", default="fused", show_default=True, help="Which student.")
@click.option("--step", type=click.IntRange(1), help="Which checkpoint; the newest if not given.")
@json_option
@dry_run_option
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
