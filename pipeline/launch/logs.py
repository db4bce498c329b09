"""What the launched tasks' logs tell: which failed, why as far as that shows, and what to change."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BEGIN, END = "[scholiast] begin", "[scholiast] end"
_NAME = re.compile(r"(?P<step>.+)-(?P<job>\d+)(_(?P<task>\d+))?\.out")
_CODE = re.compile(re.escape(END) + r" code=(\d+)")
_MEMORY = re.compile(
    r"oom[-_ ]?kill|out of memory|OutOfMemoryError|memory is exhausted|Cannot allocate memory", re.I
)
_SLURM = re.compile(r"CANCELLED AT \S+( DUE TO [A-Z ]+)?")
_TAIL, _READ = 12, 1 << 16  # lines that are shown, bytes that are looked at
_SAVED, _KILLED = 75, 137
_SIGNALLED = (None, 138, 143)  # its end was not told, or USR1 or TERM came before it could save


@dataclass(frozen=True)
class Ended:
    """A task that did not do what it was to do.

    Attributes:
        step: such as cache-large.
        task: "7_3" of an array, "7", or "local-3".
        code: exit code, None where the task ended without a word.
        reason, todo: what is known, and what to change.
        log: its log's path.
        tail: the end of it.
    """

    step: str
    task: str
    code: int | None
    reason: str
    todo: str
    log: str
    tail: tuple[str, ...]


def failed_tasks(folder: Path, unfinished: set[str]) -> list[Ended]:
    """Returns the failed tasks of the newest job of each step that is not finished.

    Args:
        folder: RUN_DIR/launch/logs.
        unfinished: names of the steps, such as cache-large; local pools count for any of them.
    """
    queued = _queued()
    found = []
    for step, task, path in _newest(folder):
        if step == "local" or step in unfinished:
            ended = _judge(step, task, path, queued)
            if ended is not None:
                found.append(ended)
    return found


def _newest(folder: Path) -> Iterator[tuple[str, str, Path]]:
    """Yields (step, task, path) of each step's job with the largest number; pools' as they are."""
    jobs: dict[str, int] = {}
    logs: list[tuple[str, int, str, Path]] = []
    for path in sorted(folder.glob("*.out")):
        named = _NAME.fullmatch(path.name)
        if named is None:
            continue
        step, number = named["step"], int(named["job"])
        if step == "local":
            logs.append((step, 0, f"local-{number}", path))
            continue
        task = f"{number}_{named['task']}" if named["task"] else str(number)
        logs.append((step, number, task, path))
        jobs[step] = max(jobs.get(step, 0), number)
    for step, number, task, path in logs:
        if number == jobs.get(step, 0):
            yield step, task, path


def _judge(step: str, task: str, path: Path, queued: set[str] | None) -> Ended | None:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _READ))
        text = file.read().decode(errors="replace")
    last = text[max(0, text.rfind(BEGIN)) :]
    code = _CODE.search(last)
    number = int(code[1]) if code else None
    at_work = queued is None or step == "local" or task in queued  # as far as can be told
    if number in (0, _SAVED) or (number in _SIGNALLED and at_work):
        return None  # done, saved for a requeue, or not ended yet
    reason, todo = _why(step, number, last)
    return Ended(step, task, number, reason, todo, str(path), tuple(last.splitlines()[-_TAIL:]))


def _why(step: str, code: int | None, text: str) -> tuple[str, str]:
    name = step.removeprefix("cache-")
    less = (
        f"lower teachers.{name}.batch_blocks or store.chunk_tokens, or raise "
        f"cluster.teachers.{name}.memory"
        if step.startswith("cache-")
        else "lower train.batch_blocks (and raise train.accumulate) or loss.chunk_bytes, set "
        f"train.gradient_checkpointing: true, or raise cluster.{step}.memory"
    )
    if _MEMORY.search(text):
        return "out of memory", f"{less}; then launch again"
    if code == _KILLED:
        return (
            "killed by signal 9, most often for memory",
            f"if it was memory, {less}; launch again",
        )
    if slurm := _SLURM.search(text):
        return slurm[0].lower(), "launch again: what is finished is kept"
    if code is None:
        return "ended without a word: its node or its script was killed", "launch again"
    return f"exit code {code}", "see the end of its log; mend that and launch again"


def _queued() -> set[str] | None:
    """Returns the tasks in Slurm's queue, "7_3" or "7"; None where no Slurm answers."""
    if shutil.which("squeue") is None:
        return None
    words = ["squeue", "--noheader", "--me", "--array", "--format=%F_%K"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    return {line.strip().removesuffix("_N/A") for line in done.stdout.splitlines()}
