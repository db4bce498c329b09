"""What of a run is done and who is at work, from what lies on disk; runs nothing and takes a moment."""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.config import BASELINE, FUSED
from pipeline.launch.logs import failed_tasks
from pipeline.planning.parts import estimate_tokens, training_steps
from pipeline.workspace import Workspace
from stages.corpus_identity import recorded_width
from stages.part_log import measured
from stages.teacher_jobs import TeacherJob
from storage import manifest
from storage.checked import parse, read_bounded
from storage.corpus_info import CorpusInfo
from storage.errors import CheckpointError, ConfigError, CorpusError
from storage.leases import failures, leases


def read_status(work: Workspace) -> list[dict[str, Any]]:
    """Returns a row a step: {step, state, done, total, estimated}; state is done, running (a teacher that
    a task is at work on), partial or waiting, and total, the same as a plan's, is estimated until the
    corpus is packed, and 0 where nothing tells.

    A teacher's row also has, in parts, running (leased), stale (its task gave no sign of life for long)
    and failed; tasks at work; tokens_per_s of all of them and seconds_left, None where nothing tells. A
    row has failed_tasks where launched tasks failed (see `launch.logs.Ended`).

    Raises:
        StaleCache, CorruptShard, MissingShard: what lies there is not usable.
    """
    config, rows = work.config, []
    info, jobs = work.looked_at()
    parts = info.parts if info else _parts(work)
    if info is None:
        rows.append(_open_row("prepare corpus", len(manifest.listing(config.corpus_folder)), parts))
    else:
        rows.append(_row("prepare corpus", parts, parts))
    known = {job.name: job for job in jobs}
    rows += [_teacher_row(name, known.get(name), parts, info is None) for name in config.teachers]
    for name in [FUSED, *([BASELINE] if config.train.baseline else [])]:
        folder = config.run / "students" / name
        finished = folder / "model" / "scholiast.json"
        if finished.exists():
            steps = steps_of(finished)
            rows.append(_row(f"train {name}", steps, steps))
        else:
            rows.append(_open_row(f"train {name}", newest_step(folder), *_steps(work, info)))
    evaluated = int((config.run / "evaluation.json").exists())
    rows.append(_row("evaluate", evaluated, 1))
    rows.append(_row("report", int((config.run / "report" / "report.html").exists()), 1))
    _add_failures(rows, config.run / "launch" / "logs")
    return rows


def _steps(work: Workspace, info: CorpusInfo | None) -> tuple[int, bool]:
    try:
        return training_steps(work, info)
    except (ConfigError, CorpusError):  # a source that is not here
        return 0, False


def _parts(work: Workspace) -> int:
    """Returns about how many parts a corpus that is not packed will have, 0 where nothing tells."""
    corpus = work.config.corpus
    width = corpus.blocks_per_part or recorded_width(work.config.corpus_folder)
    if not width:
        return 0
    try:
        return math.ceil(math.ceil(estimate_tokens(work) / corpus.block_length) / width)
    except (ConfigError, CorpusError):
        return 0


def _teacher_row(name: str, job: TeacherJob | None, parts: int, estimated: bool) -> dict[str, Any]:
    if job is None:
        return _open_row(f"cache {name}", 0, parts, estimated)
    row = _row(f"cache {name}", len(job.done), job.layout.parts)
    held, failed = [], 0
    if job.pending and isinstance(job.root, Path):
        pending = set(job.pending)
        held = [lease for lease in leases(job.root) if lease.part in pending]
        failed = len(pending & set(failures(job.root)))
    fresh = [lease for lease in held if not lease.expired]
    tasks = len({lease.holder.token for lease in fresh if lease.holder})
    log = measured(job.root)
    rate = log.tokens / log.seconds * max(1, tasks) if log and job.pending else None
    left = job.layout.blocks_of(job.pending) * job.layout.block_length
    if fresh:
        row["state"] = "running"
    return {
        **row, "running": len(fresh), "stale": len(held) - len(fresh), "failed": failed, "tasks": tasks,
        "tokens_per_s": rate, "seconds_left": left / rate if rate else None,
    }  # fmt: skip


def _add_failures(rows: list[dict[str, Any]], logs: Path) -> None:
    unfinished = {row["step"]: row for row in rows if row["state"] != "done"}
    steps = {name.replace(" ", "-"): name for name in unfinished}
    if any(name.startswith("train ") for name in unfinished):
        steps["train"] = next(name for name in unfinished if name.startswith("train "))
    cached = [row for name, row in unfinished.items() if name.startswith("cache ")]
    for ended in failed_tasks(logs, set(steps)):
        if ended.step in steps:
            row = unfinished[steps[ended.step]]
        elif cached:  # a local pool works on any teacher
            row = cached[0]
        else:
            continue
        row.setdefault("failed_tasks", []).append(asdict(ended))


def _row(step: str, done: int, total: int) -> dict[str, Any]:
    state = "done" if total and done == total else "partial" if done else "waiting"
    return {"step": step, "state": state, "done": done, "total": total, "estimated": False}


def _open_row(step: str, done: int, total: int, estimated: bool = True) -> dict[str, Any]:
    """Returns the row of a step that is not done, however much is: a student may lack its export, and a
    total be a guess (0: none)."""
    state = "partial" if done else "waiting"
    estimated = estimated and total > 0
    return {"step": step, "state": state, "done": done, "total": total, "estimated": estimated}


def steps_of(path: Path) -> int:
    """Returns how many steps an exported student was trained for.

    Raises:
        CheckpointError: its scholiast.json does not say.
    """
    with contextlib.suppress(OSError, ValueError):
        facts = parse(read_bounded(path))
        if isinstance(facts, dict) and isinstance(facts.get("steps"), int):
            return int(facts["steps"])
    raise CheckpointError(
        "what the model was made from cannot be read", where=path,
        todo=f"delete {path.parent}, and run `scholiast train-student` again",
    )  # fmt: skip


def newest_step(folder: Path) -> int:
    """Returns the step of a training's newest checkpoint, 0 if there is none."""
    try:
        return int((folder / "checkpoints" / "latest").read_text().rsplit("-", 1)[1])
    except (OSError, ValueError, IndexError):
        return 0
