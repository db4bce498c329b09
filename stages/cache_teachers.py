"""Stage one: each teacher once over the corpus, one in memory at a time, part by part.

The task is stateless: a part whose manifest stands is skipped, any other is computed and committed.
A thread encodes and writes behind the teacher. Cost: one forward of the teacher per block; memory: the
teacher, one batch's hidden states, one chunk of logits, three batches of notes and two encoded parts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from stages.annotate import PartAnnotator
from stages.behind import Behind
from stages.device import Usage, choose_device
from stages.options import StoreOptions
from stages.progress import Progress
from stages.teacher import TransformersTeacher, require_fit
from stages.teacher_jobs import TeacherJob, append_log
from stages.tokenizer import load_tokenizer, require_same_tokenizer
from storage.blocks import BlockReader
from storage.durable import require_free
from storage.layout import Layout
from storage.orders import IdOrders, learn_orders
from storage.remote import Root
from storage.types import AnyArray, Int64
from storage.writer import CacheWriter

LEARNING_TOKENS = 16_384


def cache_teachers(
    jobs: Sequence[TeacherJob],
    store: StoreOptions,
    corpus_dir: Root,
    tokenizer: Any,
    device_name: str,
    progress: Progress,
) -> None:
    """Computes every pending part of every job.

    Args:
        jobs: from `plan_jobs`.
        store: what is kept, for the chunk size and the compiler.
        corpus_dir: the complete corpus.
        tokenizer: the corpus's tokenizer, which every teacher must share.
        device_name: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        VocabularyMismatch, TeacherError, NonFiniteLogits, DiskFull, CorruptShard: parts finished
            before are kept.
    """
    device = choose_device(device_name)
    waiting = [job for job in jobs if job.pending]
    for job in waiting:  # before the first hour is spent
        theirs = load_tokenizer(
            job.folder, f"teachers.{job.name}.model",
            trust_remote_code=job.options.trust_remote_code,
        )  # fmt: skip
        require_same_tokenizer(tokenizer, theirs, "the corpus", f"teacher {job.name!r}")
        require_free(job.local_root, job.expected_bytes(), f"the cache of teacher {job.name!r}")
    reader = BlockReader(corpus_dir)
    for job in waiting:
        _cache_one(job, store, reader, device, progress)


def _cache_one(
    job: TeacherJob,
    store: StoreOptions,
    reader: BlockReader,
    device: torch.device,
    progress: Progress,
) -> None:
    teacher = TransformersTeacher(job.name, job.folder, job.options, device)
    try:
        require_fit(teacher, job.name, job.layout.vocab_size, job.layout.feature_layers)
        annotator = PartAnnotator(job.name, teacher, job.layout, store.chunk_tokens, store.compile)

        def learn() -> IdOrders:
            progress.say(f"cache {job.name}: learning which ids are usual where")
            blocks = reader.read(learning_blocks(job.layout))
            ids = annotator.heads(blocks, job.options.batch_blocks)
            return learn_orders(ids, job.layout.vocab_size)

        writer = CacheWriter(job.local_root, job.identity, job.layout, learn)
        total = job.layout.blocks * job.layout.block_length
        left = job.layout.blocks_of(job.pending) * job.layout.block_length
        progress.start(f"cache {job.name}", total, "token", total - left)
        with Behind(depth=3) as behind:
            for part in job.pending:
                _do_part(job, part, annotator, writer, reader, device, progress, behind)
        progress.finish()
    finally:
        teacher.close()


def learning_blocks(layout: Layout) -> Int64:
    """Returns the blocks from which a cache's orders of ids are learned, evenly over the corpus.

    They are forwarded once more later: an eighth of a small corpus, LEARNING_TOKENS of a large one.
    Of a corpus that has grown its first generation is taken.
    """
    blocks = layout.until(1).blocks
    tokens = min(LEARNING_TOKENS, blocks * layout.block_length // 8)
    count = max(1, tokens // layout.block_length)
    return np.arange(count) * blocks // count


def _do_part(
    job: TeacherJob,
    part: int,
    annotator: PartAnnotator,
    writer: CacheWriter,
    reader: BlockReader,
    device: torch.device,
    progress: Progress,
    behind: Behind,
) -> None:
    tokens, usage = _tokens(job, part), Usage(device)
    raw = int(job.layout.bytes_per_token_raw() * tokens)
    require_free(job.local_root, raw, f"part {part} of teacher {job.name!r}")
    arrays = annotator.annotate(
        reader.part(part), writer.orders, job.options.batch_blocks, progress.advance, behind.submit
    )
    row = {
        "part": part, "tokens": tokens, "seconds": usage.seconds, "peak_bytes": usage.peak_bytes,
        "device": _device_name(device),
    }  # fmt: skip
    behind.submit(_commit, job, part, arrays, writer, row)


def _commit(
    job: TeacherJob,
    part: int,
    arrays: Mapping[str, AnyArray],
    writer: CacheWriter,
    row: dict[str, Any],
) -> None:
    start = time.perf_counter()
    writer.write_part(part, arrays)
    append_log(job.local_root, {**row, "write_seconds": time.perf_counter() - start})


def _tokens(job: TeacherJob, part: int) -> int:
    first, last = job.layout.part_range(part)
    return (last - first) * job.layout.block_length


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
