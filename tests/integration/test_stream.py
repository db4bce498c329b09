"""Reading ahead: the same bits for any number of workers and ranks, and the same errors."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Lab

from stages.batches import Batch, BatchReader
from stages.order import BlockOrder, Position
from stages.stream import steps_of_batches
from storage.errors import CorruptShard, MissingShard, ScholiastError


@pytest.fixture(scope="module")
def lab_of_caches(cached_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(Path(shutil.copytree(cached_parts, tmp_path_factory.mktemp("stream") / "lab")))


@pytest.fixture
def work(lab_of_caches: Lab) -> Any:
    return lab_of_caches.workspace()


def order_of(reader: BatchReader) -> BlockOrder:
    info = reader.corpus.info
    return BlockOrder(info.ranges("train"), info.blocks_per_part, 0, info.fingerprint)


def leaves(value: Any) -> Iterator[Any]:
    """Every tensor and number of a batch."""
    if is_dataclass(value):
        for field in fields(value):
            yield from leaves(getattr(value, field.name))
    elif isinstance(value, dict):
        for key in value:
            yield key
            yield from leaves(value[key])
    else:
        yield value


def same(a: Batch, b: Batch) -> bool:
    pairs = list(zip(leaves(a), leaves(b), strict=True))
    return all(
        torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, torch.Tensor) else x == y
        for x, y in pairs
    )


def stream(work: Any, steps: int, accumulate: int = 6, **how: int) -> list[tuple[list[Batch], Any]]:
    reader = work.batch_reader()
    reader.read([0, 5])  # files are open before the workers are forked
    batches = steps_of_batches(reader, order_of(reader), Position(0, 3), 2, accumulate, **how)
    found = [next(batches) for _ in range(steps)]
    batches.close()
    return found


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_give_the_same_bits_as_the_thread(work: Any, workers: int) -> None:
    plain = [(b, at) for step, at in stream(work, 6) for b in step]
    found = [(b, at) for step, at in stream(work, 6, workers=workers) for b in step]
    assert [at for _, at in found] == [at for _, at in plain] and plain[-1][1].epoch > 0
    assert all(same(a, b) for (a, _), (b, _) in zip(plain, found, strict=True))
    assert not same(plain[0][0], plain[1][0])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_in_turn_give_the_same_bits(work: Any, world: int) -> None:
    plain = stream(work, 2)
    ranks = [
        stream(work, 2, accumulate=6 // world, rank=rank, world=world, workers=rank % 2)
        for rank in range(world)
    ]
    for s, (batches, position) in enumerate(plain):
        assert all(rank[s][1] == position for rank in ranks)
        joined = [rank[s][0][a] for a in range(6 // world) for rank in ranks]
        assert all(same(a, b) for a, b in zip(batches, joined, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_is_the_same_error_whoever_reads(work: Any, workers: int) -> None:
    path = work.config.cache_folder / "two/notes.zarr/entropy/c/0/0"
    whole = path.read_bytes()
    try:
        path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        with pytest.raises(CorruptShard, match="sha256") as caught:
            drain(work, workers)
        assert caught.value.where == str(path) and "cache-teachers" in caught.value.todo
        path.unlink()
        with pytest.raises(MissingShard):
            drain(work, workers)
    finally:
        path.write_bytes(whole)


def drain(work: Any, workers: int) -> None:
    reader = work.batch_reader()
    for _, position in steps_of_batches(
        reader, order_of(reader), Position(), 2, 1, workers=workers
    ):
        if position.epoch:
            return


def test_a_worker_that_dies_is_told(work: Any) -> None:
    reader, here = work.batch_reader(), os.getpid()
    read = reader.read

    def dying(block_ids: Any) -> Batch:
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(block_ids)

    reader.read = dying
    batches = steps_of_batches(reader, order_of(reader), Position(), 2, 1, workers=1)
    with pytest.raises(ScholiastError, match="a process that reads batches died"):
        next(batches)


def test_decoding_overlaps_training(work: Any) -> None:
    """While a step trains the next ones are read: waiting for them is less than reading them."""
    reader = work.batch_reader()
    read = reader.read

    def slow(block_ids: Any) -> Batch:
        time.sleep(0.2)
        return read(block_ids)

    reader.read = slow
    for workers in (0, 2):
        batches = steps_of_batches(reader, order_of(reader), Position(), 1, 1, workers=workers)
        next(batches)
        waited = 0.0
        for _ in range(4):
            time.sleep(0.3)  # the step trains
            start = time.perf_counter()
            next(batches)
            waited += time.perf_counter() - start
        batches.close()
        assert waited < 0.5 * 4 * 0.2


def test_training_with_workers_reaches_the_same_weights(lab_of_caches: Lab) -> None:
    models = []
    for workers in (0, 2):
        root = f"{lab_of_caches.root}/workers-{workers}"
        folders = {"corpus_dir": f"{lab_of_caches.root}/run/corpus",
                   "cache_dir": f"{lab_of_caches.root}/run/cache"}  # fmt: skip
        work = lab_of_caches.workspace(run_dir=root, train__workers=workers, **folders)
        run = work.train_students()["fused"]
        models.append((run.identity, (run.model_folder / "model.safetensors").read_bytes()))
    assert models[0] == models[1]
