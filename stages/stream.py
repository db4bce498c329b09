"""Each optimizer step's batches on one rank, read ahead of the step that trains.

The order is one for all ranks. A step takes the next world × accumulate × batch_blocks samples of it,
both numbers per rank (`shared_out` says how a configured step is cut); counted from the step's first,
micro-batch a of rank r is

    samples [(a·world + r)·batch_blocks, (a·world + r + 1)·batch_blocks)

so the ranks' micro-batches, taken in turn, are the order itself, whatever their number. A position
counts samples of all ranks: it may be resumed with another number of them.

Reading ahead is done by one thread, or by forked worker processes that return the same bits: which
batch a worker reads is arithmetic too, and batches are handed out in order. Cost: a worker keeps two
micro-batches ready, more where a step has more. The fallback is no worker.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from stages.batches import Batch, BatchReader
from stages.order import BlockOrder, Position
from stages.prefetch import Prefetcher
from stages.stop import ignore_in_worker
from storage.errors import ConfigError, ScholiastError
from storage.types import Int64


@dataclass(frozen=True)
class Share:
    """What one rank takes of every step.

    Attributes:
        batch_blocks, accumulate: blocks of a micro-batch, micro-batches of a step, per rank.
        rank, world: which of how many.
    """

    batch_blocks: int
    accumulate: int
    rank: int = 0
    world: int = 1

    @property
    def samples(self) -> int:
        """Samples that a step takes, of all ranks together."""
        return self.world * self.accumulate * self.batch_blocks

    def of_step(self, order: BlockOrder, position: Position) -> list[Int64]:
        """Returns the block ids of this rank's micro-batches of the step at a position."""
        ids, _ = order.take(position, self.samples)
        return list(ids.reshape(self.accumulate, self.world, -1)[:, self.rank])


def shared_out(batch_blocks: int, accumulate: int, world: int) -> tuple[int, int]:
    """Returns (batch_blocks, accumulate) of each rank for a step of batch_blocks × accumulate blocks.

    Where the ranks divide `accumulate` they take the very batches that one process takes; otherwise
    smaller ones, the largest of at most `batch_blocks` that come out even.

    Raises:
        ConfigError: the step's blocks do not come out even.
    """
    mine, rest = divmod(batch_blocks * accumulate, world)
    if rest:
        raise ConfigError(
            "a step cannot be shared out evenly among the ranks", where="train.accumulate",
            expected=f"batch_blocks × accumulate a multiple of {world} (ranks)",
            found=f"{batch_blocks} × {accumulate}",
            todo=f"set train.accumulate to a multiple of {world} (it counts the batches of all "
            "ranks), or start fewer ranks",
        )  # fmt: skip
    blocks = next(b for b in range(min(batch_blocks, mine), 0, -1) if mine % b == 0)
    return blocks, mine // blocks


def steps_of_batches(
    reader: BatchReader,
    order: BlockOrder,
    position: Position,
    batch_blocks: int,
    accumulate: int,
    *,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    fetch_threads: int = 0,
) -> Generator[tuple[list[Batch], Position], None, None]:
    """Yields each optimizer step's batches on one rank and the position after it, read ahead.

    Args:
        position: of the first step, in samples of all ranks.
        batch_blocks, accumulate: blocks of a micro-batch, micro-batches of a step, per rank.
        workers: processes that read; 0 is a thread of this one.
        fetch_threads: threads that fetch remote parts ahead.

    Raises:
        ScholiastError: what reading raises, whoever reads; or a worker died.
    """
    share = Share(batch_blocks, accumulate, rank, world)
    ahead = _by_workers if workers else _by_thread
    # An order of its own: the readers' is used in another thread, and remembers its window.
    fetcher = Prefetcher(reader, order.copy(), fetch_threads)
    with (
        contextlib.closing(ahead(reader, order, position, share, workers)) as batches,
        contextlib.closing(fetcher),
    ):
        while True:
            step = [next(batches) for _ in range(accumulate)]
            position = order.after(position, share.samples)
            fetcher.ahead_of(position)  # its threads begin after the workers were forked
            yield step, position


def _micro_batches(order: BlockOrder, position: Position, share: Share) -> Iterator[Int64]:
    """Yields the block ids of a rank's micro-batches without end."""
    while True:
        yield from share.of_step(order, position)
        position = order.after(position, share.samples)


def _by_thread(
    reader: BatchReader, order: BlockOrder, position: Position, share: Share, _: int
) -> Generator[Batch, None, None]:
    """Yields a rank's batches; a thread reads the next step while one trains."""

    def load(start: Position) -> list[Batch]:
        return [reader.read(ids) for ids in share.of_step(order, start)]

    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        pending = pool.submit(load, position)
        while True:
            batches = pending.result()
            position = order.after(position, share.samples)
            pending = pool.submit(load, position)
            yield from batches


class _Reading(Dataset[Any]):
    """Block ids → the batch; our own errors as values, for torch would keep only their text."""

    def __init__(self, reader: BatchReader) -> None:
        self._reader = reader

    def __getitem__(self, block_ids: Int64) -> Batch | ScholiastError:
        try:
            return self._reader.read(block_ids)
        except ScholiastError as error:
            return error


def _same(batch: Any) -> Any:
    return batch


def _by_workers(
    reader: BatchReader, order: BlockOrder, position: Position, share: Share, workers: int
) -> Generator[Batch, None, None]:
    """Yields a rank's batches, in order, read by forked processes."""
    reader.calibrate()  # once, before the workers are forked
    ids: Any = _micro_batches(order, position, share)
    batches: Any = DataLoader(
        _Reading(reader), sampler=ids, batch_size=None, collate_fn=_same, num_workers=workers,
        prefetch_factor=max(2, -(-share.accumulate // workers) + 1), multiprocessing_context="fork",
        worker_init_fn=ignore_in_worker,
        generator=torch.Generator(),  # the default one, which the training is resumed by, stays put
    )  # fmt: skip
    try:
        for batch in batches:
            if isinstance(batch, ScholiastError):
                raise batch
            yield batch
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error):
            raise
        raise ScholiastError(
            "a process that reads batches died", where="train.workers", found=error,
            todo="give the job more memory, or lower train.workers; finished steps are kept",
        ) from error  # fmt: skip
