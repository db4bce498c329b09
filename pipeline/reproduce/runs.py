"""Independent runs: each (row, seed) a folder, finished when its figures stand, done by one process."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.config import FUSED
from pipeline.reporting.report import read_metrics
from pipeline.reproduce.figures import figures_of, notes_figures
from pipeline.reproduce.harness import Harness
from pipeline.reproduce.rows import COMMON, EVALUATION, NUMBERS, PINNED, Row
from pipeline.workspace import Workspace
from storage import durable
from storage.errors import ConfigError
from storage.fingerprint import fingerprint

FIGURES = "figures.json"
PACKAGES = ("scholiast", "torch", "transformers")
_ALWAYS = {"seconds", "machine", "steps", "learned_from"}
TRAINED = (
    "batch_blocks", "accumulate", "lr", "schedule", "warmup", "decay", "min_lr_ratio", "weight_decay",
    "betas", "clip", "precision",
)  # fmt: skip
"""What of `train` decides a student, the steps and the seed apart."""


@dataclass(frozen=True)
class Task:
    """One run: a row (the first of those that share it) and a seed.

    Attributes:
        folder: where it is kept.
    """

    row: Row
    seed: int
    folder: Path

    @property
    def done(self) -> bool:
        return (self.folder / FIGURES).exists()


def tasks_of(harness: Harness, rows: Sequence[Row], seeds: int) -> list[Task]:
    """Returns the runs of these rows, each once: all rows of the first seed, then of the next."""
    found: dict[Path, Task] = {}
    for seed in range(seeds):
        for row in rows:
            if seed == 0 or row.seeded:
                folder = harness.run_folder(row, seed)
                found.setdefault(folder, Task(row, seed, folder))
    return list(found.values())


def share(tasks: Sequence[Task], index: int, count: int) -> list[Task]:
    """Returns one process's share; the same whenever it asks, so that shares never overlap."""
    return list(tasks[index::count])


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Says whether this process alone may work in a folder; the kernel drops a dead one's claim."""
    durable.make_folder(folder)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def perform(harness: Harness, task: Task, keep: bool) -> bool:
    """Does what is left of a run; returns False if another process is at it.

    Args:
        keep: leave the student's model where it is.

    Raises:
        Stopped: by SIGTERM or SIGUSR1, with everything saved.
        ScholiastError: anything that training or evaluation cannot do.
    """
    with claimed(task.folder) as mine:
        if not mine:
            return False
        if not task.done:
            _measure(harness, task)
        students = task.folder / "students" / FUSED
        for part in ("checkpoints", *(() if keep else ("model",))):
            shutil.rmtree(students / part, ignore_errors=True)
    return True


def _measure(harness: Harness, task: Task) -> None:
    row, begun = task.row, time.monotonic()
    work, yardstick = harness.workspace(row, task.seed), harness.yardstick(row.mixed)
    harness.prepare(row, work)
    learned_from = origin_of(yardstick)
    require_one_origin(harness, row.mixed, learned_from)
    started, resumed = time.monotonic(), (task.folder / "students").exists()
    if row.kind == "notes":
        metrics = notes_figures(work, row.notes_of)
    else:
        train_online(work) if row.kind == "online" else work.train_students()
        metrics = figures_of(yardstick, task.folder / "students" / FUSED / "model")
        metrics |= _costs(work, row, task.folder / "students" / FUSED / "metrics.jsonl")
    whole = time.monotonic() - started
    figures = {
        "row": row.name, "kind": row.kind, "seed": task.seed, "steps": harness.steps_of(row),
        "metrics": metrics, "learned_from": learned_from,
        "seconds": None if resumed else whole, "preparing_seconds": started - begun,
        "machine": machine(work),
    }  # fmt: skip
    durable.write_bytes(task.folder / FIGURES, json.dumps(figures, indent=1).encode())


def origin_of(yardstick: Workspace) -> dict[str, Any]:
    """Returns what makes runs comparable: the text, the teachers' notes (of these weights, by this
    precision), and how every student is trained."""
    info, jobs = yardstick.finished_jobs()
    train = yardstick.config.train.model_dump(mode="json")
    return {
        "corpus": info.fingerprint,
        "caches": {job.name: fingerprint(job.identity) for job in jobs},
        **{name: train[name] for name in TRAINED},
    }


def require_one_origin(harness: Harness, mixed: bool, ours: Mapping[str, Any]) -> None:
    """Refuses finished runs that learned from something else, as their differences would mean nothing.

    Args:
        mixed: those on the mix, or those on the corpus alone.
        ours: of `origin_of`.

    Raises:
        ConfigError: names the first such run, and what is not the same.
    """
    for row, folder in harness.folders():
        if row.mixed != mixed or not (folder / FIGURES).exists():
            continue
        theirs = json.loads((folder / FIGURES).read_text()).get("learned_from", {})
        differ = [name for name in ours if theirs.get(name) != ours[name]]
        if differ:
            raise ConfigError(
                f"a finished run cannot be compared with those made here: {', '.join(differ)} differ",
                where=folder, expected={name: ours[name] for name in differ},
                found={name: theirs.get(name) for name in differ},
                todo="give another --folder, or delete this run; runs taken from elsewhere "
                "need the same text, models, precision and schedule",
            )  # fmt: skip


def _costs(work: Workspace, row: Row, log: Path) -> dict[str, float]:
    """Returns seconds of training and, of a cached row, bytes a token and teacher."""
    last = read_metrics(log)[-1]
    found = {"training_seconds": float(last["seconds"])}
    if row.kind == "cached" and work.config.loss.alpha:
        costs = work.cache_costs(work.finished_jobs()[1])
        sizes = [costs[name]["bytes_per_token"] for name in work.config.fused_teachers]
        found["bytes_per_token"] = sum(sizes) / len(sizes)
    return found


def train_online(work: Workspace) -> None:
    """Trains a student with its teachers beside it, by the Trainer that the cached ones have."""

    from pipeline.reproduce.online import OnlineStudent
    from stages.device import choose_device
    from stages.model_files import locate
    from stages.ranks import Ranks
    from stages.run import finished
    from stages.stop import StopSignals
    from stages.student import build_student
    from stages.teacher import TransformersTeacher
    from stages.train_student import Trainer

    config, (info, jobs) = work.config, work.finished_jobs()
    run = work.runs(info, jobs)[FUSED]
    if finished(run):
        return
    work._setup_torch()
    device = choose_device(config.device)
    model = build_student(config.student, work.student_folder(), device, run.train.seed)
    teachers = [
        TransformersTeacher(
            name, locate(options.model, options.revision, f"teachers.{name}.model"), options, device
        )
        for name, options in config.teachers.items()
    ]
    bf16 = run.train.precision == "bf16"
    student = OnlineStudent(model, run.loss, bf16, teachers, config.fusion.tau, info.vocab_size)
    with StopSignals() as stop:
        Trainer(
            run, student, work._student_tokenizer(), work.batch_reader(False), work.heldout_reader(),
            work.progress, Ranks(device), stop,
        ).train()  # fmt: skip


def machine(work: Workspace) -> dict[str, Any]:
    """Returns what figures of time belong to: processor, threads, versions."""
    import torch

    return {
        "processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "device": work.config.device, "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }  # fmt: skip


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def read_figures(task: Task) -> dict[str, Any]:
    """Returns what a finished run found."""
    found: dict[str, Any] = json.loads((task.folder / FIGURES).read_text())
    return found


def require_comparable(harness: Harness) -> None:
    """Refuses to compare finished runs of which some learned from something else.

    Raises:
        ConfigError
    """
    for mixed in (False, True):
        done = [f for row, f in harness.folders() if row.mixed == mixed and (f / FIGURES).exists()]
        if done:
            first = json.loads((done[0] / FIGURES).read_text()).get("learned_from")
            require_one_origin(harness, mixed, first or {"corpus": "told by no run of before"})


def collect(harness: Harness, rows: Sequence[Row], seeds: int) -> list[dict[str, Any]]:
    """Returns the raw rows {table, row, seed, metric, value} of every finished run."""
    raw = []
    for row in rows:
        for seed in range(seeds if row.seeded else 1):
            task = Task(row, seed, harness.run_folder(row, seed))
            if task.done:
                raw += [
                    {"table": row.table, "row": row.name, "seed": seed, "metric": m, "value": v}
                    for m, v in read_figures(task)["metrics"].items()
                ]
    return raw


def finished_runs(harness: Harness, seeds: int) -> list[dict[str, Any]]:
    """Returns {run: folder's name, figures: what it found} of every finished run."""
    tasks = tasks_of(harness, harness.rows, seeds)
    return [{"run": t.folder.name, "figures": read_figures(t)} for t in tasks if t.done]


def read_runs(path: Path) -> dict[str, dict[str, Any]]:
    """Returns run's name → figures of a file of `finished_runs`.

    Raises:
        ConfigError: the file is none of these.
    """
    try:
        read = json.loads(path.read_text())
        given = {one["run"]: one["figures"] for one in read}
        whole = isinstance(read, list) and all(
            isinstance(figures["metrics"], dict) and _ALWAYS <= set(figures)
            and all(isinstance(value, int | float) for value in figures["metrics"].values())
            for figures in given.values()
        )  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError):
        whole = False
    if not whole:
        raise ConfigError(
            "finished runs cannot be read", where=path, expected="the JSON that --write-results writes",
            todo="name the file beside another machine's page",
        )  # fmt: skip
    return given


def take_runs(harness: Harness, given: Mapping[str, dict[str, Any]], seeds: int) -> int:
    """Takes runs that were finished elsewhere; those of other settings or seeds are no runs of ours.
    That they learned from the same is looked at when there is one of ours to compare with.

    Returns:
        How many were taken; what is finished here stays as it is.
    """
    taken = 0
    for task in tasks_of(harness, harness.rows, seeds):
        if task.folder.name not in given or task.done:
            continue
        with claimed(task.folder) as mine:
            if mine:
                found = json.dumps(given[task.folder.name], indent=1).encode()
                durable.write_bytes(task.folder / FIGURES, found)
                taken += 1
    return taken


def seconds_by_kind(tasks: Collection[Task]) -> dict[tuple[str, int], float]:
    """Returns the mean seconds of finished, uninterrupted runs by (kind, steps)."""
    found: dict[tuple[str, int], list[float]] = {}
    for task in tasks:
        if task.done and (figures := read_figures(task))["seconds"] is not None:
            found.setdefault((figures["kind"], figures["steps"]), []).append(figures["seconds"])
    return {key: sum(each) / len(each) for key, each in found.items()}


def describe(harness: Harness, seeds: int, page: Path) -> dict[str, Any]:
    """Returns what the results on a page belong to: commands, settings by row, machines, versions."""
    tasks = [task for task in tasks_of(harness, harness.rows, seeds) if task.done]
    tables = [n for n, name in NUMBERS.items() if any(name == task.row.table for task in tasks)]
    more = "".join(f" --set {text}" for text in harness.overrides)
    machines = [read_figures(task)["machine"] for task in tasks]
    return {
        "config": str(harness.config), "steps": harness.steps, "seeds": seeds, "runs": len(tasks),
        "mixed_steps": round(harness.steps * harness.chats.longer),
        "commands": [
            f'scholiast reproduce {harness.config} --tables "{" ".join(tables)}" --seeds {seeds} '
            f"--steps {harness.steps}{more}",
            f"scholiast reproduce {harness.config} --seeds {seeds} --steps {harness.steps}{more} "
            f"--write-results {page}",
        ],
        "common": [*PINNED, *COMMON, *EVALUATION],
        "rows": [
            {"table": row.table, "row": row.name, "settings": settings_of(row)} for row in harness.rows
        ],
        "gold": {row.name: row.gold for row in harness.rows if row.gold},
        "machines": [one for i, one in enumerate(machines) if one not in machines[:i]],
    }  # fmt: skip


def settings_of(row: Row) -> list[str]:
    """Returns a row's settings as a reader would type them."""
    more = ["teachers.weak: the weak teacher"] if row.weak else []
    more += ["corpus: the mix with the instruction task"] if row.mixed else []
    more += {"online": ["teachers in memory, whole distributions"], "notes": ["no training"]}.get(
        row.kind, []
    )
    return [*row.overrides, *more]
