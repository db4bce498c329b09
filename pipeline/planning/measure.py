"""`scholiast plan --measure`: each model alone, for seconds, on this machine, with the stages' own code.

A teacher reads a few of the corpus's blocks at its configured batch and its notes are encoded into a
cache that is thrown away; the student takes a few optimizer steps on targets of the configured shape.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from pipeline.planning import calibration
from pipeline.planning.calibration import STUDENT, Measured, device_name
from pipeline.planning.measure_student import cyclic, measure_student
from pipeline.planning.parts import layout_of
from pipeline.workspace import Workspace
from stages.annotate import PartAnnotator
from stages.behind import Behind
from stages.chunk_sizes import notes_rows
from stages.corpus import first_blocks
from stages.device import Usage, choose_device, resident_bytes
from stages.model_files import at_hand, locate
from stages.teacher import TransformersTeacher, require_fit
from stages.tokenizer import load_tokenizer, require_same_tokenizer, vocab_size
from storage.blocks import BlockReader
from storage.orders import learn_orders
from storage.types import TokenBlocks
from storage.writer import CacheWriter

SECONDS = 4.0  # of a teacher's reading, about
_MOST_BATCHES = 8


def measure(work: Workspace, say: Callable[[str], None]) -> list[str]:
    """Measures every model that is here, one after the other, and keeps the results in
    RUN_DIR/calibration.json; returns what could not be measured, as texts for the user.

    Raises:
        ScholiastError: a source, a tokenizer or a model cannot be read.
    """
    config, untold = work.config, []
    work._setup_torch()
    teachers = {
        f"teachers.{name}": options
        for name, options in config.teachers.items()
        if at_hand(options.model, options.revision)
    }
    untold += [f"{key} was not measured: its model is not here yet"
               for key in (f"teachers.{n}" for n in config.teachers) if key not in teachers]  # fmt: skip
    corpus = config.corpus
    if not work.there(corpus.tokenizer, corpus.tokenizer_revision, weights=False):
        return [*untold, "nothing was measured: the tokenizer is not here yet"]
    largest = max(options.batch_blocks for options in config.teachers.values())
    blocks = sample(work, (_MOST_BATCHES + 1) * largest)
    tasks: dict[str, Callable[[], Measured]] = {
        key: lambda key=key: measure_teacher(work, key.removeprefix("teachers."), blocks)  # type: ignore[misc]
        for key in teachers
    }
    student = config.student
    if student.model is None or work.there(student.model, student.revision):
        tasks[STUDENT] = lambda: measure_student(work, blocks)
    else:
        untold.append("the student was not measured: its model is not here yet")
    for key, task in tasks.items():
        say(f"measuring {key}")
        try:
            calibration.save(work, {key: task()})
        except torch.OutOfMemoryError:
            untold.append(f"{key} did not fit into this device's memory when it was measured")
        _give_back()
    return untold


def _give_back() -> None:
    """Gives the memory of what was measured back, so that it does not count as the next model's: glibc
    keeps what its threads' arenas have freed, and cannot use it for another thread."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # another C library keeps less, or has none
        ctypes.CDLL(None).malloc_trim(0)


def sample(work: Workspace, count: int) -> TokenBlocks:
    """Returns up to `count` blocks of the corpus: spread over it if it is prepared, else the sources'
    beginnings."""
    info = work.prepared()
    if info is None:
        return first_blocks(work.config.corpus, count)
    ids = info.block_ids("train")
    chosen = np.unique(np.linspace(0, len(ids) - 1, min(count, len(ids))).astype(np.int64))
    return BlockReader(work.config.corpus_folder).read(ids[chosen])


def measure_teacher(work: Workspace, name: str, blocks: TokenBlocks) -> Measured:
    """Measures the reading of some blocks by one teacher: forward, head, notes, encoding behind it.

    The orders of ids are learned from the first batch and the rest is measured, so bytes are those of
    text that the orders have not seen, learned from less of it than a real cache does.
    """
    config, options = work.config, work.config.teachers[name]
    key, device = f"teachers.{name}.model", choose_device(config.device)
    folder = locate(options.model, options.revision, key)
    tokenizer = work.tokenizer()
    theirs = load_tokenizer(folder, key, trust_remote_code=options.trust_remote_code)
    require_same_tokenizer(tokenizer, theirs, "the corpus", f"teacher {name!r}")
    vocab = vocab_size(tokenizer)
    base = resident_bytes(device)
    teacher = TransformersTeacher(name, folder, options, device)
    try:
        require_fit(teacher, name, vocab, options.feature_layers)
        layout = replace(
            layout_of(work, name, 1, 1), vocab_size=vocab, k=min(config.store.entries, vocab)
        )
        batch, store = options.batch_blocks, config.store
        chunk = notes_rows(teacher.head_rows, teacher.device.type, store.chunk_tokens)
        annotator = PartAnnotator(name, teacher, layout, chunk, store.compile)
        learned = cyclic(blocks, 0, batch)
        begun = time.perf_counter()
        orders = learn_orders(annotator.heads(learned, batch), vocab)
        several = int(SECONDS / max(time.perf_counter() - begun, 1e-3))
        count = batch * max(1, min(several, _MOST_BATCHES))
        read = cyclic(blocks, batch, count)
        layout = replace(layout, blocks=count, blocks_per_part=count)
        annotator = PartAnnotator(name, teacher, layout, chunk, store.compile)
        usage = Usage(device)
        with Behind(depth=3) as behind:
            arrays = annotator.annotate(read, orders, batch, lambda _: None, behind.submit)
        seconds, peak = usage.seconds, usage.peak_bytes
    finally:
        teacher.close()
    tokens = count * layout.block_length
    with TemporaryDirectory(prefix="scholiast-plan-") as folder_of_cache:
        writer = CacheWriter(Path(folder_of_cache) / name, {"corpus": ""}, layout, lambda: orders)
        written = writer.write_part(0, arrays)
    sizes: dict[str, float] = {}
    for path, (size, _) in written.objects.items():
        array = path.split("/")[1]
        sizes[array] = sizes.get(array, 0.0) + size / tokens
    device_is, gpu = device_name(work)
    return Measured(
        calibration.teacher_identity(work, name), device_is, gpu, tokens, tokens / seconds, peak, base,
        sizes,
    )  # fmt: skip
