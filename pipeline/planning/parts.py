"""How wide a part should be, and how many tasks should share the parts.

A part is the unit of work: what a kill may cost, what a task takes at a time, one file of each array.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.cache_workspace import CacheWorkspace
from pipeline.demo_text import SIZES
from pipeline.launch.options import ClusterOptions
from pipeline.planning.pace import Device, Pace
from pipeline.planning.shapes import teacher_shape
from stages.corpus_identity import WIDTH, recorded_width
from stages.documents import source_files
from stages.options import SourceOptions
from storage.corpus_info import CorpusInfo
from storage.errors import ConfigError
from storage.layout import Layout

PARTS_OF_A_TASK = 4
"""At least so many parts for each task, where the corpus allows it: else some would wait for the last."""

SHARD_BYTES = 256 << 20
"""Most bytes of the largest array of a part before compression: two encoded parts lie in memory."""

_BYTES_PER_TEXT_TOKEN = 4.0  # UTF-8 bytes a token of English or code takes, for a first estimate


def estimate_tokens(work: CacheWorkspace) -> int:
    """Returns a guess at the corpus's tokens from the sizes of its local files.

    Raises:
        ConfigError: a source is on the hub, and its size not known.
        CorpusError: a source is not there.
    """
    return int(sum(size for _, size in _sizes(work)) / _BYTES_PER_TEXT_TOKEN)


def estimate_train_tokens(work: CacheWorkspace) -> int:
    """Returns a guess at how many of them are trained on, and not held out.

    Raises:
        ConfigError, CorpusError: as `estimate_tokens`.
    """
    kept = (
        size * (1.0 - source.heldout) for source, size in _sizes(work) if source.split == "train"
    )
    return int(sum(kept) / _BYTES_PER_TEXT_TOKEN)


def training_steps(work: CacheWorkspace, info: CorpusInfo | None) -> tuple[int, bool]:
    """Returns (the optimizer steps of a student, whether that is an estimate): exact where the corpus is
    packed or the steps are given.

    Raises:
        ConfigError, CorpusError: as `estimate_tokens`.
    """
    train, length = work.config.train, work.config.corpus.block_length
    if info is not None:
        return train.steps_over(sum(count for _, count in info.ranges("train"))), False
    if train.steps is not None:
        return train.steps, False
    return train.steps_over(max(1, math.ceil(estimate_train_tokens(work) / length))), True


def _sizes(work: CacheWorkspace) -> Iterator[tuple[SourceOptions, int]]:
    """Yields each source and the bytes of its files."""
    for i, source in enumerate(work.config.corpus.sources):
        if source.format == "hub":
            raise ConfigError(
                "the size of a hub source is not known before it is prepared",
                where=f"corpus.sources.{i}", found=source.path,
                todo="run `scholiast prepare` first, then plan",
            )  # fmt: skip
        built = SIZES[work.config.assets] if work.config.assets else None
        if built and source.domain in built.train and not Path(source.path).exists():
            split = built.heldout if source.split == "heldout" else built.train
            yield source, split[source.domain]
        else:
            files = source_files(source, f"corpus.sources.{i}")
            yield source, sum(path.stat().st_size for path in files)


def width_of(work: CacheWorkspace, pace: Pace) -> int:
    """Returns the blocks of a part: the configuration's, else what the corpus that stands or was begun
    has, else what `sized` says."""
    configured = work.config.corpus.blocks_per_part
    return configured or recorded_width(work.config.corpus_folder) or sized(work, pace)


def width_to_prepare(work: CacheWorkspace) -> int:
    """Returns the width that a corpus about to be prepared gets where the configuration leaves it open.

    A calibration of any device will do: the machine that prepares is often not the one that caches.
    """
    return sized(work, Pace(work, Device(any_measured=True)))


def sized(work: CacheWorkspace, pace: Pace) -> int:
    """Returns the blocks of a part, a power of 2: about what the slowest teacher takes
    `cluster.part_minutes` for, but at least PARTS_OF_A_TASK parts a task where there are so many blocks,
    and a largest shard of at most SHARD_BYTES before compression.

    Teachers whose models are not here say nothing; if none is, it is `corpus_identity.WIDTH`.
    """
    config, length = work.config, work.config.corpus.block_length
    rates = []
    for name in config.teachers:
        shape = teacher_shape(work, name)
        if shape is not None:
            rates.append(pace.tokens_per_s(f"teachers.{name}", 2.0 * shape.parameters)[0])
    limits = [60.0 * config.cluster.part_minutes * min(rates) / length if rates else float(WIDTH)]
    limits.append(SHARD_BYTES / _largest_array(work))
    if all(source.format != "hub" for source in config.corpus.sources):
        tokens = estimate_tokens(work)
        seconds = tokens / min(rates) if rates else None
        tasks = tasks_for(seconds, config.cluster)
        limits.append(tokens / length / (PARTS_OF_A_TASK * tasks))
    return 1 << max(0, int(math.log2(max(1.0, min(limits)))))


def _largest_array(work: CacheWorkspace) -> float:
    """Returns the bytes of a block in the largest array of any teacher, before compression."""
    layouts = [layout_of(work, name, 1, 1) for name in work.config.teachers]
    return max(
        float(np.dtype(spec.dtype).itemsize * np.prod(spec.shape[1:], dtype=np.int64))
        for layout in layouts
        for spec in layout.arrays().values()
    )


def layout_of(work: CacheWorkspace, name: str, blocks: int, width: int) -> Layout:
    """Returns what a teacher's cache will store, from its configuration alone if it is here."""
    corpus, store, options = work.config.corpus, work.config.store, work.config.teachers[name]
    shape = teacher_shape(work, name)
    vocab = shape.vocab if shape and shape.vocab else 1 << 17
    return Layout(
        blocks, width, corpus.block_length, vocab, store.preset, min(store.entries, vocab),
        store.temperatures, options.feature_layers, store.segments if options.feature_layers else 1,
        shape.hidden if shape else 4096, store.drawn, store.top_p, store.seed, (), store.pooling,
    )  # fmt: skip


def tasks_for(seconds: float | None, cluster: ClusterOptions, pending: int | None = None) -> int:
    """Returns how many tasks a teacher's array has: `cluster.tasks`, else so many that each takes about
    `cluster.task_minutes`; never more than there are parts, or than an array may have.

    Args:
        seconds: of all that is left, on one device; None where nothing tells: then one task.
        pending: parts that are left, if they are known.
    """
    tasks = cluster.tasks or math.ceil((seconds or 0.0) / (60.0 * cluster.task_minutes))
    most = cluster.max_array if pending is None else min(pending, cluster.max_array)
    return max(1, min(tasks, most))
