"""What a run will take, before anything runs: blocks, parts, bytes, time, and what is already done."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import BASELINE, FUSED
from pipeline.status import newest_step
from pipeline.workspace import Workspace
from stages.documents import source_files
from stages.model_files import (
    context_length,
    hidden_size,
    locate,
    parameters,
    parameters_of,
    read_config,
)
from stages.teacher_jobs import COMPRESSION, TeacherJob, measured, stored
from storage import manifest
from storage.corpus_info import CorpusInfo, stored_bytes
from storage.errors import ConfigError
from storage.fingerprint import tree_bytes
from storage.layout import Layout

_BYTES_PER_TEXT_TOKEN = 4.0  # UTF-8 bytes a token of English or code takes, for a first estimate
_EFFICIENCY = 0.3  # of the matrix products' rate that a forward reaches, for a first estimate


@dataclass(frozen=True)
class PlanRow:
    """One step of the run.

    Attributes:
        step: what it is.
        done, total: parts (or training steps).
        size_bytes: on disk when finished.
        seconds: still to go; None if nothing is left.
        basis: where size and time come from.
    """

    step: str
    done: int
    total: int
    size_bytes: float
    seconds: float | None
    basis: str


def make_plan(work: Workspace, rate: float | None = None) -> tuple[list[PlanRow], dict[str, Any]]:
    """Returns the rows and the facts (tokens, blocks, whether estimated) of a plan. Runs nothing.

    Args:
        rate: bf16 FLOP/s of the device; measured for half a second if not given and needed.

    Raises:
        ScholiastError: the configuration does not fit what is there.
    """
    info, jobs = work.looked_at()
    tokens = info.blocks * info.block_length if info else _estimate_tokens(work)
    length = work.config.corpus.block_length
    blocks = info.blocks if info else math.ceil(tokens / length)
    parts = info.parts if info else math.ceil(blocks / work.config.corpus.blocks_per_part)
    facts = {"tokens": tokens, "blocks": blocks, "parts": parts, "estimated": info is None}
    rows = [_corpus_row(work, info, tokens, parts)]
    pace = _Pace(work, rate)
    for name in work.config.teachers:
        job = next((j for j in jobs if j.name == name), None)
        rows.append(_teacher_row(work, name, job, tokens, parts, pace))
    rows += _student_rows(work, info, tokens, pace)
    return rows, facts


class _Pace:
    """How fast the device multiplies: asked for at most once."""

    def __init__(self, work: Workspace, rate: float | None) -> None:
        self._work, self._rate = work, rate

    def seconds(self, flops: float) -> float:
        if self._rate is None:
            self._rate = measure_flops(self._work.config.device)
        return flops / (self._rate * _EFFICIENCY)


def measure_flops(device_name: str) -> float:
    """Returns the device's bf16 matrix-product rate in FLOP/s, measured for half a second."""
    import torch

    from stages.device import choose_device

    device = choose_device(device_name)
    n = 4096 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).bfloat16()
    count, elapsed = 0, 0.0
    a @ a
    start = time.perf_counter()
    while elapsed < 0.5:
        for _ in range(4):
            a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        count += 4
        elapsed = time.perf_counter() - start
    return 2.0 * n**3 * count / elapsed


def _estimate_tokens(work: Workspace) -> int:
    """Returns a guess at the corpus's tokens from the sizes of its local files."""
    size = 0
    for i, source in enumerate(work.config.corpus.sources):
        if source.format == "hub":
            raise ConfigError(
                "the size of a hub source is not known before it is prepared",
                where=f"corpus.sources.{i}", found=source.path,
                todo="run `scholiast prepare` first, then plan",
            )  # fmt: skip
        if work.config.assets == "demo" and not Path(source.path).exists():
            size += 11_000 if source.split == "heldout" else 33_000  # what the demo builds
        else:
            size += sum(p.stat().st_size for p in source_files(source, f"corpus.sources.{i}"))
    return int(size / _BYTES_PER_TEXT_TOKEN)


def _corpus_row(work: Workspace, info: CorpusInfo | None, tokens: int, parts: int) -> PlanRow:
    if info is not None:
        size, sampled = stored_bytes(work.config.corpus_folder, info)
        return PlanRow("prepare corpus", parts, parts, size, None, f"done{_of(sampled, parts)}")
    done = len(manifest.listing(work.config.corpus_folder))
    return PlanRow(
        "prepare corpus", done, parts, 4.0 * tokens, tokens / 2e5, "estimate from file sizes"
    )


def _teacher_row(
    work: Workspace, name: str, job: TeacherJob | None, tokens: int, parts: int, pace: _Pace
) -> PlanRow:
    options = work.config.teachers[name]
    label = f"cache {name}"
    if not (work.imported(name) or work.there(options.model, options.revision)):
        raw = 300.0 * COMPRESSION * work.config.store.entries / 64
        return PlanRow(label, 0, parts, raw * tokens, None, "model not here yet")
    if job is not None and not job.pending:
        whole = stored(job)
        return PlanRow(label, parts, parts, whole.bytes, None, f"done{_of(whole.sampled, parts)}")
    if job is not None and job.imported:
        whole = stored(job)
        return PlanRow(label, len(job.done), parts, whole.bytes, None, "to be imported further")
    left = tokens
    if job is not None:
        left = job.layout.blocks_of(job.pending) * job.layout.block_length
    log = measured(work.config.cache_folder / name)
    if job is not None and job.done and log:
        seconds, so_far = left * log.seconds / max(1, log.tokens), stored(job)
        final = so_far.bytes * job.layout.blocks // job.layout.blocks_of(job.done)
        basis = f"measured on finished parts{_of(so_far.sampled, len(job.done))}"
        return PlanRow(label, len(job.done), parts, final, seconds, basis)
    folder = locate(options.model, options.revision, f"teachers.{name}.model")
    layout = job.layout if job else _layout(work, folder, name, tokens)
    seconds = pace.seconds(2.0 * parameters(folder, f"teachers.{name}.model") * left)
    size = layout.bytes_per_token_raw() * COMPRESSION * tokens
    return PlanRow(label, 0, parts, size, seconds, "estimate from parameters")


def _of(sampled: int, parts: int) -> str:
    """Says on how many parts a size rests, unless they are all of them."""
    return "" if sampled == parts else f"; size from {sampled:,} of {parts:,} parts"


def _layout(work: Workspace, folder: Path, name: str, tokens: int) -> Layout:
    key, corpus, store = f"teachers.{name}.model", work.config.corpus, work.config.store
    config = read_config(folder, key)
    longest = context_length(config)
    if longest is not None and corpus.block_length > longest:
        raise ConfigError(
            f"blocks are longer than the context of teacher {name!r}", where="corpus.block_length",
            expected=f"at most {longest}", found=corpus.block_length,
            todo="choose shorter blocks, or leave this teacher out",
        )  # fmt: skip
    return Layout(
        math.ceil(tokens / corpus.block_length), corpus.blocks_per_part, corpus.block_length,
        int(config.get("vocab_size") or 1 << 17), store.preset,
        store.entries, store.temperatures, work.config.teachers[name].feature_layers,
        store.segments, hidden_size(config), store.drawn, store.top_p, store.seed, (), store.pooling,
    )  # fmt: skip


def _student_rows(
    work: Workspace, info: CorpusInfo | None, tokens: int, pace: _Pace
) -> list[PlanRow]:
    config, rows = work.config, []
    train = sum(n for _, n in info.ranges("train")) * info.block_length if info else tokens
    step_tokens = config.train.batch_blocks * config.train.accumulate * config.corpus.block_length
    steps = config.train.steps or math.ceil(train * (config.train.epochs or 1) / step_tokens)
    student = config.student
    built = student.model is None or work.there(student.model, student.revision)
    count = _student_parameters(work) if built else 0
    for name in [FUSED, *([BASELINE] if config.train.baseline else [])]:
        folder = config.run / "students" / name
        if (folder / "model" / "scholiast.json").exists():
            rows.append(PlanRow(f"train {name}", steps, steps, tree_bytes(folder), None, "done"))
            continue
        done = newest_step(folder)
        seconds = pace.seconds(8.0 * count * step_tokens * (steps - done)) if built else None
        size = 12.0 * count * config.train.keep_checkpoints + 4.0 * count
        basis = "estimate from parameters" if built else "model not here yet"
        rows.append(PlanRow(f"train {name}", done, steps, size, seconds, basis))
    return rows


def _student_parameters(work: Workspace) -> int:
    """Returns about how many parameters the student has: the kept share of the layers' own."""
    options, folder = work.config.student, work.student_folder()
    config = read_config(folder, "student")
    if options.model is None:
        return parameters_of(config)
    total = parameters(folder, "student.model")
    layers = int(config.get("num_hidden_layers") or 0)
    if not options.keep_layers or not layers:
        return total
    tied = 1 if config.get("tie_word_embeddings", True) else 2
    outside = min(total, int(config.get("vocab_size", 0)) * hidden_size(config) * tied)
    return outside + (total - outside) * len(options.keep_layers) // layers
