"""Rows shared out among Python threads, each of which runs torch's kernels on one thread.

A kernel over a slice that fits in the cache takes some 50 µs. Torch's own threads would meet at a
barrier after each; here they meet once a chunk, and what is not a kernel runs side by side as well.
Torch and NumPy give up the interpreter's lock inside their kernels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch

MOST_THREADS = 8
"""More threads than this would wait for the interpreter's lock."""

T = TypeVar("T")


def over_rows(work: Callable[[slice], T], rows: int, device: torch.device) -> list[T]:
    """Returns work's results for consecutive slices that cover range(rows), in order.

    Args:
        work: called under inference mode, from several threads at once on a CPU.
        rows: at least 1.
        device: on a GPU there is one slice.
    """
    threads = min(torch.get_num_threads(), MOST_THREADS) if device.type == "cpu" else 1
    if threads == 1:
        return [work(slice(0, rows))]
    # Two turns, so that a thread that is held up keeps none waiting.
    step = -(-rows // (2 * threads))
    spans = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    return list(_pool(threads).map(torch.inference_mode()(work), spans))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    pool, before, barrier = ThreadPoolExecutor(threads), torch.get_num_threads(), Barrier(threads)

    def begin(_: int) -> None:
        torch.get_num_threads()  # or this thread's first kernel would take the number of the start
        torch.set_num_threads(1)  # of this thread, and what threads to come start with
        barrier.wait()

    list(pool.map(begin, range(threads)))
    torch.set_num_threads(before)
    return pool


os.register_at_fork(after_in_child=_pool.cache_clear)  # its threads are not forked
