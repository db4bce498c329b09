"""Many short processes of stage one: imports are paid once, each run is a fork. Run by test_faults.

A process of its own, because a fork of pytest's would inherit other tests' threads.

Usage: warm.py kill CONFIG FOLDER KILLS SEED | warm.py share CONFIG FOLDER WORKERS...
| warm.py race CONFIG FOLDER TASKS
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets  # noqa: F401  (this and what follows it: paid for before the fork)
import numpy as np
import torch
import zarr.codecs.numcodecs  # noqa: F401
from transformers import LlamaForCausalLM

import stages.cache_teachers
import stages.corpus
from pipeline.cache_workspace import quiet_transformers
from pipeline.config import load_config
from pipeline.workspace import Workspace
from stages.progress import Silent
from stages.shares import Share
from stages.tokenizer import load_tokenizer
from storage.reader import CacheReader
from storage.tables import load_orders
from storage.writer import CacheWriter


def forked(task: Callable[[], Any]) -> int:
    """Runs a task in a child; returns its process id."""
    child = os.fork()
    if child:
        return child
    try:
        # After a fork torch makes its pool anew at the first call, which must not come from two of the
        # threads that load a checkpoint: one of them would find none.
        torch.set_num_threads(1)
        task()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def warm_up(config: str) -> None:
    """Does once what every child would do anew: lazy imports, caches of the libraries."""
    torch.set_num_threads(1)
    quiet_transformers()
    folder = load_config(Path(config)).corpus.tokenizer
    load_tokenizer(Path(folder), "corpus.tokenizer")
    LlamaForCausalLM.from_pretrained(folder)
    gc.collect()
    gc.freeze()


def workspace(config: str, **overrides: object) -> Workspace:
    return Workspace(
        load_config(Path(config), [f"{k}={v}" for k, v in overrides.items()]), Silent()
    )


def kill(config: str, folder: str, kills: str, seed: str) -> None:
    """Kills runs at random moments until KILLS of them are dead; each ends as folder/<n>."""
    moments, rounds = random.Random(int(seed)), 0
    lengths, killed = [], 0
    for name in ("0", "once-more"):  # the quicker one says how long a run takes
        begun = time.monotonic()
        run = workspace(config, run_dir=f"{folder}/{name}")
        assert os.waitpid(forked(run.cache_teachers), 0)[1] == 0
        lengths.append(time.monotonic() - begun)
    while killed < int(kills):
        rounds += 1
        run = workspace(config, run_dir=f"{folder}/{rounds}")
        while True:
            child = forked(run.cache_teachers)
            time.sleep(moments.uniform(0, min(lengths)))
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            if status == 0:  # it was done before
                break
            assert os.WIFSIGNALED(status), "a run failed by itself"
            killed += 1
    print(json.dumps({"kills": killed, "rounds": rounds, "seconds": min(lengths)}))


def share(config: str, folder: str, *counts: str) -> None:
    """Does stage one as folder/<n> for each number n of processes, each with its own parts in an
    order of its own; then folder/same: two processes write every part at the same moment."""
    for count in map(int, counts):
        run = workspace(config, cache_dir=f"{folder}/{count}")
        run.prepare()
        together(count, lambda index, run=run, count=count: share_of(run, index, count))  # type: ignore[misc]
    for root in sorted(Path(folder, counts[0]).iterdir()):
        barrier = multiprocessing.get_context("fork").Barrier(2)
        together(2, lambda _, root=root, barrier=barrier: copy(root, Path(folder, "same"), barrier))  # type: ignore[misc]


def race(config: str, folder: str, count: str) -> None:
    """Does stage one alone, then once more by tasks that all begin at the same moment."""
    alone = workspace(config, cache_dir=f"{folder}/alone")
    raced = workspace(config, cache_dir=f"{folder}/raced")
    assert os.waitpid(forked(alone.cache_teachers), 0)[1] == 0
    barrier = multiprocessing.get_context("fork").Barrier(int(count))

    def task(index: int) -> None:
        barrier.wait(120)
        raced.cache_share(Share(index, int(count), wait=False))

    together(int(count), task)
    print(json.dumps({"parts": raced.jobs(raced.prepare())[0].layout.parts}))


def together(count: int, task: Callable[[int], None]) -> None:
    children = [forked(lambda i=i: task(i)) for i in range(count)]  # type: ignore[misc]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * count


def share_of(run: Workspace, index: int, count: int) -> None:
    jobs = []
    for job in run.jobs(run.prepare()):
        mine = list(range(job.layout.parts))[index::count]
        random.Random(index).shuffle(mine)
        jobs.append(replace(job, pending=tuple(mine)))
    tokenizer = load_tokenizer(Path(run.config.corpus.tokenizer), "corpus.tokenizer")
    stages.cache_teachers.cache_teachers(
        jobs, run.config.store, run.config.corpus_folder, tokenizer, "cpu", Silent()
    )


def copy(source: Path, folder: Path, barrier: Any) -> None:
    """Writes every part of a cache anew, at the same moment as another process."""
    reader = CacheReader(source)
    orders = load_orders(source, reader.layout)
    writer = CacheWriter(folder / source.name, reader.identity, reader.layout, lambda: orders)
    for part in range(reader.layout.parts):
        ids = np.arange(*reader.layout.part_range(part))
        arrays = {name: reader.array(name, ids) for name in reader.layout.arrays()}
        barrier.wait(60)
        writer.write_part(part, arrays)


if __name__ == "__main__":
    warm_up(sys.argv[2])
    {"kill": kill, "share": share, "race": race}[sys.argv[1]](*sys.argv[2:])
