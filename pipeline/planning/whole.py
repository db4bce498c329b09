"""The whole of a plan as JSON values: steps, arrays, memory, parts, money, what will not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.launch.options import Resources
from pipeline.planning.calibration import STUDENT, device_name
from pipeline.planning.fits import (
    array_warnings,
    context_problems,
    disk_warnings,
    memory_warnings,
    tail_warnings,
)
from pipeline.planning.memory import Peak, student_peak, teacher_peak
from pipeline.planning.pace import Device, Pace
from pipeline.planning.parts import layout_of, tasks_for
from pipeline.planning.rows import PlanRow, make_plan
from pipeline.planning.shapes import student_shape, teacher_shape
from pipeline.start import machine
from pipeline.workspace import Workspace
from storage.errors import ConfigError


@dataclass(frozen=True)
class Asked:
    """What a user says of the machine and its price.

    Attributes:
        flops: bf16 FLOP/s of a GPU that is not here; None: this machine.
        memory: bytes of its memory; None: this device's, unknown with `flops`.
        price: of an hour of a GPU (or of this machine), in any currency.
    """

    flops: float | None = None
    memory: int | None = None
    price: float | None = None


def whole_plan(work: Workspace, asked: Asked, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the plan. Runs nothing.

    Args:
        notes: further warnings.

    Raises:
        ScholiastError: the configuration does not fit what is there.
    """
    pace = Pace(work, Device(asked.flops, gpu=asked.flops is not None))
    rows, facts = make_plan(work, pace=pace)
    device = _device(work, asked)
    steps = [_step(work, row, asked) for row in rows]
    teachers = {
        row.step.removeprefix("cache "): _parts(work, row, facts["blocks_per_part"])
        for row in rows
        if row.step.startswith("cache ")
    }
    peaks, problems = _peaks(work, facts, device, asked)
    peaks = [_with_measured(peak, pace) for peak in peaks]
    warnings = [_in_one_line(problem) for problem in (*context_problems(work), *problems)]
    warnings += tail_warnings(work.config)
    warnings += memory_warnings(peaks, device["memory_bytes"]) + disk_warnings(work, rows)
    for row in rows:
        name = row.step.removeprefix("cache ")
        if name in teachers:
            warnings += array_warnings(work, name, row, teachers[name]["tasks"])
    hours = [step["hours"] for step in steps if step["hours"] is not None]
    totals = {
        "size_bytes": sum(row.size_bytes for row in rows),
        "bytes_left": sum(row.bytes_left for row in rows), "hours": sum(hours),
        "cost": None if asked.price is None else asked.price * sum(hours),
    }  # fmt: skip
    return {
        **facts, "device": device, "steps": steps, "teachers": teachers,
        "memory": [{**asdict(peak), "bytes": peak.bytes} for peak in peaks], "totals": totals,
        "warnings": [*notes, *warnings],
    }  # fmt: skip


def _device(work: Workspace, asked: Asked) -> dict[str, Any]:
    """Returns what the plan is for."""
    if asked.flops is not None:
        name, gpu, count, memory = f"a GPU of {asked.flops:.3g} FLOP/s", True, 1, asked.memory
    else:
        name, gpu = device_name(work)
        count, here = _here(gpu)
        memory = asked.memory or here
    return {"name": name, "gpu": gpu, "count": count, "memory_bytes": memory,
            "flops": asked.flops, "price_per_hour": asked.price}  # fmt: skip


def _here(gpu: bool) -> tuple[int, int | None]:
    """Returns how many devices there are, and the memory of one."""
    if gpu:
        import torch

        return torch.cuda.device_count(), torch.cuda.get_device_properties(0).total_memory
    return 1, machine.memory_bytes()


def _resources(work: Workspace, name: str) -> Resources:
    cluster = work.config.cluster
    return cluster.teachers.get(name, Resources()).over(cluster.defaults)


def _step(work: Workspace, row: PlanRow, asked: Asked) -> dict[str, Any]:
    """Returns a row with the devices it takes, their hours, and the cost."""
    kind, name = row.step.split(" ", 1)
    devices = 1
    if asked.flops is not None and kind == "cache":
        devices = _resources(work, name).gpus or 1
    hours = None
    if row.seconds is not None and kind != "prepare":  # no device takes part in preparing
        hours = devices * row.seconds / 3600.0
    cost = None if hours is None or asked.price is None else hours * asked.price
    return {**asdict(row), "hours": hours, "cost": cost}


def _parts(work: Workspace, row: PlanRow, width: int) -> dict[str, Any]:
    """Returns how a teacher's parts would be shared out."""
    pending, name = row.total - row.done, row.step.removeprefix("cache ")
    tasks = tasks_for(row.seconds, work.config.cluster, pending) if pending else 0
    known = row.seconds is not None and pending > 0
    tokens = width * work.config.corpus.block_length
    largest = max(row.arrays.values(), default=0.0) / max(1, row.total)
    return {
        "parts_left": pending, "part_seconds": (row.seconds or 0.0) / pending if known else None,
        "tasks": tasks, "task_seconds": (row.seconds or 0.0) / tasks if known else None,
        "part_bytes": sum(row.arrays.values()) / max(1, row.total), "shard_bytes": largest,
        "part_bytes_raw": layout_of(work, name, width, width).bytes_per_token_raw() * tokens,
    }  # fmt: skip


def _peaks(
    work: Workspace, facts: dict[str, Any], device: dict[str, Any], asked: Asked
) -> tuple[list[Peak], list[ConfigError]]:
    """Returns the memory of every model that is here, and why the student's cannot be told."""
    gpu, peaks, problems = device["gpu"], [], []
    for name in work.config.teachers:
        shape = teacher_shape(work, name)
        if shape is not None:
            count = device["count"] if asked.flops is None else _resources(work, name).gpus or 1
            peaks.append(teacher_peak(work, name, shape, gpu, facts["blocks_per_part"], count))
    shape = student_shape(work)
    if shape is not None:
        train = work.config.cluster.train
        ranks = train.nodes * (train.ranks or train.over(work.config.cluster.defaults).gpus or 1)
        try:
            peaks.append(student_peak(work, shape, gpu, ranks))
        except (
            ConfigError
        ) as problem:  # a step that the ranks cannot share: another command's refusal
            problems.append(problem)
    return peaks, problems


def _in_one_line(problem: ConfigError) -> str:
    return "; ".join(" ".join(line.split()) for line in str(problem).splitlines())


def _with_measured(peak: Peak, pace: Pace) -> Peak:
    found = pace.measured(peak.what)
    if found is None or (peak.what == STUDENT and peak.ranks > 1):  # measured in one process
        return peak
    return replace(peak, measured=found.peak_bytes)
