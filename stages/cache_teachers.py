"""Stage one: each teacher once over the corpus, one in memory at a time, part by part.

The task is stateless: a part whose manifest stands is skipped, any other is computed and committed,
unless another task has a lease on it (shares.py). SIGTERM and SIGUSR1 end it after the part, or within
a grace. A teacher is loaded when its first part is taken.
A thread encodes and writes behind the teacher. Cost: one forward of the teacher per block; memory: the
teacher, one batch's hidden states, one chunk of logits, three batches of notes and two encoded parts.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from stages.annotate import PartAnnotator
from stages.behind import Behind
from stages.chunk_sizes import notes_rows
from stages.device import Usage, device_of_task
from stages.options import StoreOptions
from stages.part_log import append_log
from stages.progress import Progress
from stages.shares import Claims, Dropped, Grace, Outcome, Share
from stages.stop import StopSignals, names
from stages.teacher import TransformersTeacher, require_fit
from stages.teacher_jobs import TeacherJob, learning_blocks
from stages.tokenizer import load_tokenizer, require_same_tokenizer
from storage.blocks import BlockReader
from storage.durable import require_free
from storage.errors import Stopped
from storage.holders import Holder
from storage.leases import Leases
from storage.orders import IdOrders, learn_orders
from storage.remote import Root
from storage.types import AnyArray
from storage.writer import CacheWriter


def cache_teachers(
    jobs: Sequence[TeacherJob],
    store: StoreOptions,
    corpus_dir: Root,
    tokenizer: Any,
    device_name: str,
    progress: Progress,
    share: Share | None = None,
) -> list[Outcome]:
    """Computes the pending parts of every job that no other task is at work on.

    Args:
        jobs: from `plan_jobs`.
        store: what is kept, for the chunk size and the compiler.
        corpus_dir: the complete corpus.
        tokenizer: the corpus's tokenizer, which every teacher must share.
        device_name: "auto", "cpu", "cuda" or "cuda:N".
        progress: who is told.
        share: this task's place among others; if not given it is the only one, and ends when all
            parts are done.

    Returns:
        What was done with each teacher that had pending parts.

    Raises:
        VocabularyMismatch, TeacherError, NonFiniteLogits, DiskFull, CorruptShard, FailingFolder: parts
            finished before are kept.
        Stopped: by SIGTERM or SIGUSR1; finished parts are kept.
    """
    share = share or Share()
    waiting = [job for job in jobs if job.pending]
    for job in waiting:  # before the first hour is spent
        theirs = load_tokenizer(
            job.folder, f"teachers.{job.name}.model",
            trust_remote_code=job.options.trust_remote_code,
        )  # fmt: skip
        require_same_tokenizer(tokenizer, theirs, "the corpus", f"teacher {job.name!r}")
        require_free(
            job.local_root, job.expected_bytes(), f"the cache of teacher {job.name!r}",
            store.smaller(bool(job.layout.feature_layers)),
        )  # fmt: skip
    work = _Work(store, BlockReader(corpus_dir), device_of_task(device_name), progress, share)
    outcomes: list[Outcome] = []
    with StopSignals() as stop:
        for job in waiting:
            outcomes.append(_cache_one(job, work, stop))
            if told := names(stop.flags()):
                raise _stopped(told, outcomes)
    return outcomes


def _stopped(told: str, outcomes: Sequence[Outcome]) -> Stopped:
    written = sum(len(one.written) for one in outcomes)
    dropped = [f"part {part} of {one.teacher}" for one in outcomes for part in one.dropped]
    given_up = f", {' and '.join(dropped)} given up" if dropped else ""
    return Stopped(
        f"stopped by {told}: {written} parts written{given_up}",
        todo="run the same command again to go on",
    )


@dataclass(frozen=True)
class _Work:
    """What is the same for every teacher."""

    store: StoreOptions
    reader: BlockReader
    device: torch.device
    progress: Progress
    share: Share


def _cache_one(job: TeacherJob, work: _Work, stop: StopSignals) -> Outcome:
    outcome, share = Outcome(job.name), work.share
    holder = Holder.here(share.job, share.lifetime)
    with Leases(job.local_root, holder) as leases:
        claims = iter(Claims(job, leases, share, stop, outcome, work.progress.say))
        first = next(claims, None)
        if first is not None:  # no model is loaded for nothing
            _PartWriter(job, work, stop, leases, outcome).run(chain([first], claims))
    return outcome


class _PartWriter:
    """One teacher, loaded, and the parts that it is given."""

    def __init__(
        self, job: TeacherJob, work: _Work, stop: StopSignals, leases: Leases, outcome: Outcome
    ) -> None:
        self._job, self._work, self._stop = job, work, stop
        self._leases, self._outcome = leases, outcome

    def run(self, parts: Iterable[int]) -> None:
        """Does the parts, one behind the other."""
        job, store, progress = self._job, self._work.store, self._work.progress
        teacher = TransformersTeacher(job.name, job.folder, job.options, self._work.device)
        try:
            require_fit(teacher, job.name, job.layout.vocab_size, job.layout.feature_layers)
            chunk = notes_rows(teacher.head_rows, teacher.device.type, store.chunk_tokens)
            annotator = PartAnnotator(job.name, teacher, job.layout, chunk, store.compile)
            writer = CacheWriter(
                job.local_root, job.identity, job.layout, lambda: self._learn(annotator)
            )
            total = job.layout.blocks * job.layout.block_length
            left = job.layout.blocks_of(job.pending) * job.layout.block_length
            progress.start(f"cache {job.name}", total, "token", total - left)
            with Behind(depth=3) as behind:
                for part in parts:
                    if not self._do(part, annotator, writer, behind):
                        break
            progress.finish()
        finally:
            teacher.close()

    def _learn(self, annotator: PartAnnotator) -> IdOrders:
        job, progress = self._job, self._work.progress
        blocks = self._work.reader.read(learning_blocks(job.layout))
        label = f"cache {job.name}, learning which ids are usual where"
        progress.start(label, blocks.inputs.size, "token")
        heads = annotator.heads(blocks, job.options.batch_blocks, progress.advance)
        progress.finish()
        return learn_orders(heads, job.layout.vocab_size)

    def _do(self, part: int, annotator: PartAnnotator, writer: CacheWriter, behind: Behind) -> bool:
        """Computes one part; returns whether it was not given up."""
        job, work = self._job, self._work
        tokens, usage = _tokens(job, part), Usage(work.device)
        grace = Grace(self._stop, work.share.grace, tokens)

        def advance(count: int) -> None:
            work.progress.advance(count)
            grace.advance(count)

        try:
            raw = int(job.layout.bytes_per_token_raw() * tokens)
            less = work.store.smaller(bool(job.layout.feature_layers))
            require_free(job.local_root, raw, f"part {part} of teacher {job.name!r}", less)
            arrays = annotator.annotate(
                work.reader.part(part), writer.orders, job.options.batch_blocks, advance,
                behind.submit,
            )  # fmt: skip
        except Dropped:
            self._outcome.dropped.append(part)
            self._leases.drop(part)
            return False
        except Exception as error:
            self._leases.fail(part, str(error))
            raise
        row = {
            "part": part, "tokens": tokens, "seconds": usage.seconds,
            "peak_bytes": usage.peak_bytes, "device": _device_name(work.device),
        }  # fmt: skip
        behind.submit(self._commit, part, arrays, writer, row)
        return True

    def _commit(
        self, part: int, arrays: Mapping[str, AnyArray], writer: CacheWriter, row: dict[str, Any]
    ) -> None:
        start, job = time.perf_counter(), self._job
        try:
            writer.write_part(part, arrays)
            append_log(job.local_root, {**row, "write_seconds": time.perf_counter() - start})
        except Exception as error:
            # The error is raised later, maybe only after a wait for others, who may wait for these.
            self._leases.fail(part, str(error))
            self._leases.abandon()
            raise
        self._outcome.written.append(part)
        self._leases.release(part)


def _tokens(job: TeacherJob, part: int) -> int:
    first, last = job.layout.part_range(part)
    return (last - first) * job.layout.block_length


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
