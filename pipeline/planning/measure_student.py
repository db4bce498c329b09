"""A few real steps of the student: forward, loss, backward, optimizer, on targets made up in the
configured shape."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import torch

from pipeline.planning import calibration
from pipeline.planning.calibration import Measured, device_name
from pipeline.planning.parts import layout_of
from pipeline.planning.shapes import student_shape, teacher_shape
from pipeline.workspace import Workspace
from stages.batches import Batch, gold_batch, segment_means
from stages.device import Usage, choose_device, resident_bytes
from stages.fusion import NoteRows, fuse
from stages.layer_pairs import Pair, resolve_pairs
from stages.optimizer import make_optimizer
from stages.parallel import ParallelStudent
from stages.ranks import Ranks
from stages.student import DistilledStudent, build_student
from stages.tokenizer import vocab_size
from storage.types import TokenBlocks

SECONDS = 5.0  # of steps, about
_MOST_STEPS = 3
_MOST_BATCHES = 2  # of a step: with two, gradients are there in a forward as they are with more


def measure_student(work: Workspace, blocks: TokenBlocks) -> Measured:
    """Measures micro-batches and optimizer steps apart, in one process; a step of the configuration is
    `train.accumulate` of the one and one of the other."""
    config, device = work.config, choose_device(work.config.device)
    train, base = config.train, resident_bytes(device)
    model = build_student(
        config.student, work.student_folder(), torch.device("cpu"), config.train.seed
    )
    sizes = {name: layout_of(work, name, 1, 1).hidden_size for name in config.fused_teachers}
    pairs = _pairs(work)
    bf16 = train.precision == "bf16"
    student = DistilledStudent(model, config.loss, bf16, pairs, sizes, train.seed)
    ranks = Ranks(device)
    parallel = ParallelStudent(student, ranks, train)
    optimizer = make_optimizer(student, train)
    vocab = vocab_size(work.tokenizer())
    micro = min(train.accumulate, _MOST_BATCHES)
    batches = [_batch(work, blocks, i, vocab, pairs, sizes).to(device) for i in range(micro)]
    student.train()
    usage, begun = Usage(device), time.perf_counter()
    passes: list[float] = []
    updates: list[float] = []
    for step in range(_MOST_STEPS + 1):
        if step > 1 and time.perf_counter() - begun > SECONDS:
            break
        if step == 1:  # the first one warms up
            passes, updates, begun = [], [], time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        for batch in batches:
            start = time.perf_counter()
            loss = parallel(batch, batch.rows * micro, 1, config.loss.alpha)
            parallel.backward(loss.total, last=True)
            float(loss.ce)  # waits for a GPU
            passes.append(time.perf_counter() - start)
        start = time.perf_counter()
        float(parallel.clip(train.clip))
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        updates.append(time.perf_counter() - start)
    peak = usage.peak_bytes
    tokens = len(passes) * train.batch_blocks * config.corpus.block_length
    of_step = train.accumulate * float(np.mean(passes)) + float(np.mean(updates))
    rate = train.accumulate * train.batch_blocks * config.corpus.block_length / of_step
    name, gpu = device_name(work)
    return Measured(
        calibration.student_identity(work), name, gpu, tokens, rate, peak, base, {}
    )  # fmt: skip


def _pairs(work: Workspace) -> list[Pair]:
    config = work.config
    stored = {name: config.teachers[name].feature_layers for name in config.fused_teachers}
    depths = {}
    for name in stored:
        shape = teacher_shape(work, name)
        depths[name] = shape.layers if shape else 1
    ours = student_shape(work)
    return resolve_pairs(config.loss.features, stored, depths, ours.layers if ours else 1)


def _batch(
    work: Workspace, blocks: TokenBlocks, number: int, vocab: int, pairs: list[Pair],
    sizes: dict[str, int],
) -> Batch:  # fmt: skip
    """Returns a micro-batch of some blocks with fused targets of the configured shape."""
    config, count = work.config, work.config.train.batch_blocks
    batch = gold_batch(cyclic(blocks, number * count, count), np.zeros(count, np.int64))
    notes = {
        name: _notes(work, batch.rows, vocab, seed)
        for seed, name in enumerate(config.fused_teachers)
    }
    uniform = torch.full((len(notes), batch.rows), 1.0 / len(notes))
    target = fuse(
        notes, config.store.temperatures, vocab, config.loss.temperature, config.fusion,
        config.loss.tail(config.store.drawn), batch.gold, batch.row_sequence, uniform,
    )  # fmt: skip
    segments = config.store.segments
    generator = torch.Generator().manual_seed(number)
    return replace(
        batch, target=target,
        features={
            (teacher, layer): torch.randn(count, segments, sizes[teacher], generator=generator)
            for _, teacher, layer in pairs
        },
        segment_weights={
            name: segment_means(row, batch.scored, segments)
            for name, row in zip(notes, target.teacher_weights, strict=True)
        },
    )  # fmt: skip


def _notes(work: Workspace, rows: int, vocab: int, seed: int) -> NoteRows:
    """Returns made-up notes: ids at random, a head whose probabilities fall as 1/rank, a tail of 0.1."""
    store, fusion = work.config.store, work.config.fusion
    k = min(fusion.k or store.entries, vocab)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(vocab, (rows, 1), generator=generator)
    stride = max(1, vocab // k)
    rank = torch.arange(k)
    head = 0.9 / (rank + 1.0) / (1.0 / (rank + 1.0)).sum()
    drawn = None
    if store.drawn:
        drawn = torch.randint(vocab, (rows, store.drawn), generator=generator)
    tail = torch.full((rows,), float(np.log(0.1)))
    log_z = [torch.full((rows,), float((head ** (1.0 / t)).sum().mul(1.2).log()))
             for t in store.temperatures]  # fmt: skip
    return NoteRows(
        ids=(first + rank * stride) % vocab, logprobs=head.log().repeat(rows, 1),
        entropy=3.0 + 0.1 * torch.rand(rows, generator=generator), log_tail=tail,
        log_z=torch.stack(log_z, -1) if log_z else torch.zeros(rows, 0), gold_logprob=tail,
        draw_ids=drawn, draw_logprobs=None if drawn is None else torch.full(drawn.shape, -9.0),
    )  # fmt: skip


def cyclic(blocks: TokenBlocks, first: int, count: int) -> TokenBlocks:
    """Returns `count` blocks from the first on, around, with ids of their own from 0."""
    rows = (first + np.arange(count)) % len(blocks.block_ids)
    return TokenBlocks(
        np.arange(count), blocks.tokens[rows], blocks.document[rows], blocks.offset[rows],
        blocks.loss_mask[rows],
    )  # fmt: skip
