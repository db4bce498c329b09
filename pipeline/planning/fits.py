"""What of a plan will not fit: told before anything runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from pipeline.cache_workspace import CacheWorkspace
from pipeline.config import RunConfig
from pipeline.console import duration, human_bytes
from pipeline.launch.options import Resources
from pipeline.planning.memory import Peak
from pipeline.planning.rows import PlanRow
from pipeline.planning.shapes import student_shape, teacher_shape
from pipeline.workspace import Workspace
from storage.codec import PRESETS
from storage.errors import ConfigError

_NEARLY = 0.9  # of a device's memory, from which an estimate leaves no room


def context_problems(work: Workspace) -> list[ConfigError]:
    """Returns an error for each model that was made for shorter blocks."""
    length, problems = work.config.corpus.block_length, []
    shapes = {f"teacher {name!r}": teacher_shape(work, name) for name in work.config.teachers}
    for what, shape in {**shapes, "the student": student_shape(work)}.items():
        if shape is not None and shape.context is not None and length > shape.context:
            problems.append(ConfigError(
                f"blocks are longer than the context of {what}", where="corpus.block_length",
                expected=f"at most {shape.context}", found=length,
                todo="choose shorter blocks, or leave this model out",
            ))  # fmt: skip
    return problems


def memory_warnings(peaks: Sequence[Peak], memory: int | None) -> list[str]:
    """Returns a text for each model that needs more than there is, or nearly as much.

    Args:
        memory: of the device, in bytes; None if it is not known.
    """
    if memory is None:
        return []
    told = []
    for peak in peaks:
        needed = peak.measured or peak.bytes
        basis = "measured" if peak.measured else "estimated"
        if needed <= _NEARLY * memory:
            continue
        verb = "does not fit" if needed > memory else "leaves little room"
        largest = ", ".join(f"{name} {human_bytes(size)}" for name, size in _first(peak))
        told.append(
            f"memory: {peak.what} {verb}: {human_bytes(needed)} {basis}, and the device has "
            f"{human_bytes(memory)} (largest: {largest}); {_remedy(peak)}"
        )
    return told


def _first(peak: Peak) -> list[tuple[str, int]]:
    return list(peak.terms.items())[:3]


def _remedy(peak: Peak) -> str:
    if peak.what == "student":
        return (
            "lower train.batch_blocks (and raise train.accumulate), or loss.chunk_bytes, set "
            "train.gradient_checkpointing, or train.parallel: fsdp with more ranks"
        )
    return (
        f"lower {peak.what}.batch_blocks or store.chunk_tokens, or set {peak.what}.device_map: auto"
    )


def disk_warnings(work: CacheWorkspace, rows: Sequence[PlanRow]) -> list[str]:
    """Returns a text for each file system that has not the space for what is still to come."""
    config = work.config
    less = config.store.smaller(any(t.feature_layers for t in config.teachers.values()))
    places = {"prepare": config.corpus_folder, "cache": config.cache_folder, "train": config.run}
    needed: dict[int, float] = {}
    where: dict[int, Path] = {}
    for row in rows:
        place = places[row.step.split()[0]]
        if not isinstance(place, Path):
            continue  # a store; it is written by `push` alone
        folder = place.absolute()
        while not folder.exists():
            folder = folder.parent
        system = os.stat(folder).st_dev
        where.setdefault(system, folder)
        needed[system] = needed.get(system, 0.0) + row.bytes_left
    return [
        f"disk: {human_bytes(size)} are still to be written below {where[system]}, and "
        f"{human_bytes(shutil.disk_usage(where[system]).free)} are free: name a larger disk with "
        f"run_dir, corpus_dir or cache_dir, or store less ({less})"
        for system, size in needed.items()
        if size > shutil.disk_usage(where[system]).free
    ]


def tail_problem(config: RunConfig) -> tuple[str, str] | None:
    """Returns (what is so, the remedy) where the loss has one bucket for all but a head that is small for
    the sake of draws; None where it is not so."""
    store, loss = config.store, config.loss
    if store.preset != "compact" or loss.tail(store.drawn) != "bucket":
        return None
    most = PRESETS["balanced"].k
    if store.entries >= most:
        return None
    unused = f", and the {store.drawn} draws are not used" if store.drawn else ""
    return (
        f"with loss.divergence {loss.divergence} and loss.target {loss.target} one bucket stands for all "
        f"but {store.entries} entries a token{unused}",
        f"set store.preset: balanced before anything is cached: it keeps {most}",
    )


def tail_warnings(config: RunConfig) -> list[str]:
    """Returns a text where the loss sees less of the teachers than it could."""
    found = tail_problem(config)
    return [] if found is None else [f"loss: {'; '.join(found)}"]


def array_warnings(work: CacheWorkspace, name: str, row: PlanRow, tasks: int) -> list[str]:
    """Returns a text where an array of `cluster.max_array` tasks means tasks longer than wanted, or than
    the time limit allows a part."""
    cluster, pending = work.config.cluster, row.total - row.done
    if row.seconds is None or not pending:
        return []
    told = []
    wanted = 60.0 * cluster.task_minutes
    longest = row.seconds / tasks
    if cluster.tasks is None and tasks == cluster.max_array and longest > 1.5 * wanted:
        told.append(
            f"array: {name} would want {row.seconds / wanted:,.0f} tasks and an array has at most "
            f"{tasks:,} (cluster.max_array): each takes about {duration(longest)}"
        )
    limit = cluster.teachers.get(name, Resources()).over(cluster.defaults).seconds
    each = row.seconds / pending
    if limit is not None and each > limit - cluster.warning:
        told.append(
            f"array: a part of {name} takes about {duration(each)}, and its tasks are told to save after "
            f"{duration(limit - cluster.warning)}: raise cluster.teachers.{name}.time, or "
            f"{shorter_parts(work)}"
        )
    return told


def shorter_parts(work: CacheWorkspace) -> str:
    """Returns what makes parts shorter, as advice."""
    if work.config.corpus.blocks_per_part is None:
        return "prepare into another corpus_dir with a smaller cluster.part_minutes"
    return "prepare with fewer corpus.blocks_per_part"
