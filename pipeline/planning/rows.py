"""What a run will take, before anything runs: blocks, parts, bytes, time, and what is already done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.config import BASELINE, FUSED
from pipeline.planning.calibration import STUDENT
from pipeline.planning.pace import MEASURED, Device, Pace
from pipeline.planning.parts import estimate_tokens, layout_of, training_steps, width_of
from pipeline.planning.shapes import Shape, student_shape, teacher_shape
from pipeline.planning.sizes import bytes_by_array
from pipeline.status import newest_step, steps_of
from pipeline.workspace import Workspace
from stages.part_log import measured
from stages.teacher_jobs import TeacherJob, stored
from storage import manifest
from storage.corpus_info import CorpusInfo, stored_bytes
from storage.fingerprint import tree_bytes

CORPUS_BYTES = 4.0  # of a token's id, document and offset on disk, as measured on prose
_PREPARED = 2e5  # tokens a second


@dataclass(frozen=True)
class PlanRow:
    """One step of the run.

    Attributes:
        step: what it is.
        done, total: parts (or training steps).
        size_bytes: on disk when finished.
        seconds: still to go, on one device; None if nothing is left, or nothing tells.
        basis: where size and time come from.
        arrays: of a teacher: bytes of each array when finished.
        bytes_left: of `size_bytes`, what is not there yet.
        estimated: whether `total` is, the corpus not being packed yet.
    """

    step: str
    done: int
    total: int
    size_bytes: float
    seconds: float | None
    basis: str
    arrays: Mapping[str, float] = field(default_factory=dict)
    bytes_left: float = 0.0
    estimated: bool = False


def make_plan(
    work: Workspace, rate: float | None = None, pace: Pace | None = None
) -> tuple[list[PlanRow], dict[str, Any]]:
    """Returns the rows and the facts (tokens, blocks, parts, their width, whether estimated) of a plan.
    Runs nothing.

    Args:
        rate: bf16 FLOP/s of the device; measured for an instant if not given and needed.
        pace: in place of the rate.

    Raises:
        ScholiastError: the configuration does not fit what is there.
    """
    info, jobs = work.looked_at()
    pace = pace or Pace(work, Device(rate))
    tokens = info.blocks * info.block_length if info else estimate_tokens(work)
    length = work.config.corpus.block_length
    blocks = info.blocks if info else math.ceil(tokens / length)
    width = info.blocks_per_part if info else width_of(work, pace)
    parts = info.parts if info else math.ceil(blocks / width)
    facts = {
        "tokens": tokens, "blocks": blocks, "block_length": length, "parts": parts,
        "blocks_per_part": width, "estimated": info is None,
    }  # fmt: skip
    rows = [_corpus_row(work, info, tokens, parts)]
    known = {job.name: job for job in jobs}
    for name in work.config.teachers:
        if name in known:
            rows.append(_known_teacher(work, known[name], pace))
        else:
            rows.append(
                replace(_new_teacher(work, name, tokens, parts, pace), estimated=info is None)
            )
    rows += _student_rows(work, info, pace)
    return rows, facts


def _corpus_row(work: Workspace, info: CorpusInfo | None, tokens: int, parts: int) -> PlanRow:
    if info is not None:
        size, sampled = stored_bytes(work.config.corpus_folder, info)
        return PlanRow("prepare corpus", parts, parts, size, None, f"done{_of(sampled, parts)}")
    done = len(manifest.listing(work.config.corpus_folder))
    whole = CORPUS_BYTES * tokens
    left = whole * max(0.0, 1.0 - done / max(1, parts))
    basis = "estimate from file sizes"
    return PlanRow("prepare corpus", done, parts, whole, tokens / _PREPARED, basis, {}, left, True)


def _known_teacher(work: Workspace, job: TeacherJob, pace: Pace) -> PlanRow:
    """Returns the row of a teacher over a corpus that is prepared."""
    label, parts, count = f"cache {job.name}", job.layout.parts, len(job.done)
    there = stored(job)
    if not job.pending:
        basis = f"done{_of(there.sampled, parts)}"
        return PlanRow(label, parts, parts, there.bytes, None, basis, there.arrays)
    if job.imported:
        basis = "to be imported further"
        return PlanRow(label, count, parts, there.bytes, None, basis, there.arrays)
    left = job.layout.blocks_of(job.pending) * job.layout.block_length
    log = measured(job.root)
    if job.done and log:
        more = job.layout.blocks / job.layout.blocks_of(job.done)
        arrays = {name: size * more for name, size in there.arrays.items()}
        basis = f"measured on finished parts{_of(there.sampled, count)}"
        seconds, size = left * log.seconds / max(1, log.tokens), there.bytes * more
        return PlanRow(label, count, parts, size, seconds, basis, arrays, size - there.bytes)
    tokens = job.layout.blocks * job.layout.block_length
    shape = teacher_shape(work, job.name)
    assert shape is not None  # a job that is not imported has a model
    arrays, seconds, basis = _expected(
        job.name, bytes_by_array(job.layout), tokens, left, shape, pace
    )
    size = sum(arrays.values())
    return PlanRow(label, count, parts, size, seconds, basis, arrays, size * left / max(1, tokens))


def _new_teacher(work: Workspace, name: str, tokens: int, parts: int, pace: Pace) -> PlanRow:
    """Returns the row of a teacher of which nothing is there yet."""
    length, shape = work.config.corpus.block_length, teacher_shape(work, name)
    each = bytes_by_array(layout_of(work, name, max(1, math.ceil(tokens / length)), 1))
    if shape is None:
        size = sum(each.values()) * tokens
        arrays, basis = {n: b * tokens for n, b in each.items()}, "model not here yet"
        return PlanRow(f"cache {name}", 0, parts, size, None, basis, arrays, size)
    arrays, seconds, basis = _expected(name, each, tokens, tokens, shape, pace)
    size = sum(arrays.values())
    return PlanRow(f"cache {name}", 0, parts, size, seconds, basis, arrays, size)


def _expected(
    name: str, each: Mapping[str, float], tokens: int, left: int, shape: Shape, pace: Pace
) -> tuple[dict[str, float], float, str]:
    """Returns bytes by array of all tokens, the seconds of those left, and the basis of both."""
    rate, basis = pace.tokens_per_s(f"teachers.{name}", 2.0 * shape.parameters)
    if basis == MEASURED:
        found = pace.measured(f"teachers.{name}")
        assert found is not None
        each = found.arrays
    return {array: size * tokens for array, size in each.items()}, left / rate, basis


def _of(sampled: int, parts: int) -> str:
    """Says on how many parts a size rests, unless they are all of them."""
    return "" if sampled == parts else f"; size from {sampled:,} of {parts:,} parts"


def _student_rows(work: Workspace, info: CorpusInfo | None, pace: Pace) -> list[PlanRow]:
    config, rows = work.config, []
    step_tokens = config.train.batch_blocks * config.train.accumulate * config.corpus.block_length
    steps, estimated = training_steps(work, info)
    shape = student_shape(work)
    for name in [FUSED, *([BASELINE] if config.train.baseline else [])]:
        folder = config.run / "students" / name
        there = tree_bytes(folder)
        exported = folder / "model" / "scholiast.json"
        if exported.exists():
            trained = steps_of(exported)
            rows.append(PlanRow(f"train {name}", trained, trained, there, None, "done"))
            continue
        done = newest_step(folder)
        seconds, size, basis = None, 0.0, "model not here yet"
        if shape is not None:
            rate, basis = pace.tokens_per_s(STUDENT, 8.0 * shape.parameters)
            seconds = step_tokens * max(0, steps - done) / rate
            saved = 4.0 * shape.parameters + 8.0 * shape.trainable
            size = saved * config.train.keep_checkpoints + 4.0 * shape.parameters
        left = max(0.0, size - there)
        rows.append(
            PlanRow(f"train {name}", done, steps, size, seconds, basis, {}, left, estimated)
        )
    return rows
