"""What of a run is done, from what lies on disk; runs nothing and takes a moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.workspace import BASELINE, FUSED, Workspace
from storage import manifest


def read_status(work: Workspace) -> list[dict[str, Any]]:
    """Returns a row a step: {step, state, done, total}; state is done, partial or waiting.

    Raises:
        StaleCache, CorruptShard, MissingShard: what lies there is not usable.
    """
    config, rows = work.config, []
    info, jobs = work.looked_at()
    if info is None:
        done = len(manifest.listing(config.corpus_folder))
        rows.append(_row("prepare corpus", done, 0))
    else:
        rows.append(_row("prepare corpus", info.parts, info.parts))
    known = {job.name: (len(job.done), job.layout.parts) for job in jobs}
    rows += [_row(f"cache {name}", *known.get(name, (0, 0))) for name in config.teachers]
    for name in [FUSED, *([BASELINE] if config.train.baseline else [])]:
        folder = config.run / "students" / name
        done, total = newest_step(folder), 0
        finished = folder / "model" / "scholiast.json"
        if finished.exists():
            done = total = int(json.loads(finished.read_text())["steps"])
        rows.append(_row(f"train {name}", done, total))
    evaluated = int((config.run / "evaluation.json").exists())
    rows.append(_row("evaluate", evaluated, 1))
    rows.append(_row("report", int((config.run / "report" / "report.html").exists()), 1))
    return rows


def _row(step: str, done: int, total: int) -> dict[str, Any]:
    state = "done" if total and done == total else "partial" if done else "waiting"
    return {"step": step, "state": state, "done": done, "total": total}


def newest_step(folder: Path) -> int:
    """Returns the step of a training's newest checkpoint, 0 if there is none."""
    try:
        return int((folder / "checkpoints" / "latest").read_text().rsplit("-", 1)[1])
    except (OSError, ValueError, IndexError):
        return 0
