"""The commands that make students: train-student, export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.commands.completion import student_names
from pipeline.commands.group import first_rank
from pipeline.commands.options import (
    dry_run_option,
    json_option,
    open_workspace,
    run_options,
    tell,
    tell_actions,
)

if TYPE_CHECKING:
    from pipeline.dry_run import Action
    from pipeline.workspace import Workspace


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
@click.option("--student", default="fused", show_default=True, shell_complete=student_names,
              help="Which student.")  # fmt: skip
@click.option("--step", type=click.IntRange(1), help="Which checkpoint; the newest if not given.")
@click.option("--push-to-hub", "repository", metavar="ORG/NAME",
              help="Also make this repository on the hub, and upload the model to it.")  # fmt: skip
@click.option("--private", is_flag=True, help="Make it a private one.")
@json_option
@dry_run_option
@run_options
@click.argument("folder", type=click.Path(path_type=Path))
def export(
    config: Path, folder: Path, overrides: Sequence[str], quiet: bool, debug: bool, as_json: bool,
    dry_run: bool, student: str, step: int | None, repository: str | None, private: bool,
) -> None:  # fmt: skip
    """Save a student from one of its checkpoints as an ordinary model, with a model card.

    What the hub needs (a token, a name that is free) is asked for before anything is written. The last
    line is the command by which llama.cpp makes a GGUF file of it.

    \b
    Example: scholiast export my.yaml models/after-400 --step 400
      scholiast export my.yaml models/mine --push-to-hub me/mine --private
    """
    from pipeline.gguf import conversion
    from pipeline.hub import push_model, require_new

    if private and repository is None:
        raise click.UsageError("--private goes with --push-to-hub")
    work, _ = open_workspace(config, overrides, quiet, dry_run)
    if repository is not None:
        work.exportable(
            student, step, folder
        )  # the hub is asked last, and before anything is written
        require_new(repository)
    if dry_run:
        tell_actions(as_json, _would_export(work, student, step, folder, repository, private))
        return
    step = work.export(student, step, folder)
    lines = [f"student after step {step}: {folder}"]
    url = None if repository is None else push_model(folder, repository, private)
    if url is not None:
        lines.append(f"uploaded: {url}")
    architecture, command = conversion(folder, str(folder), folder.name)
    hint = command or f"llama.cpp's converter is not known to take {architecture}"
    facts = {
        "student": student, "step": step, "folder": str(folder), "repository": url, "gguf": command,
    }  # fmt: skip
    tell(as_json, facts, "\n".join([*lines, f"GGUF, in a checkout of llama.cpp: {hint}"]))


def _would_export(
    work: Workspace, student: str, step: int | None, folder: Path, repository: str | None,
    private: bool,
) -> list[Action]:  # fmt: skip
    from pipeline.dry_run import Action
    from pipeline.hub import address

    _, step = work.exportable(student, step, folder)
    actions = [
        Action(f"save student {student!r} after step {step}, with a model card", (str(folder),))
    ]
    if repository is not None:
        kind = "private" if private else "public"
        actions.append(Action(f"make a {kind} repository and upload it", (address(repository),)))
    return actions
