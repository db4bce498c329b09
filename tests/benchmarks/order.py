"""One epoch's order over 10^6 parts, by simulation: seconds and memory.

    python tests/benchmarks/order.py [PARTS]

Method: the order of a corpus of that many parts of 100 blocks, a held-out source in its midst; no
block exists. In a process of its own: the order is built and its first step taken, then the whole
epoch is walked in steps of 4,096 and each block ticked off in a bitmap, which ends full with each
ticked once; last, the epoch is entered at its middle by a fresh order. Seconds are wall-clock after
the imports; memory is the process's peak, imports included: of building, and of all with the bitmap.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BLOCKS_PER_PART, STEP = 100, 4096


def peak_bytes() -> int:
    """Linux's high-water mark of this program; getrusage's would include the one that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measure(parts: int) -> dict[str, Any]:
    """Returns the figures, taken in this process."""
    import numpy as np

    from stages.order import BlockOrder, Position

    total = parts * BLOCKS_PER_PART
    heldout = (total // 2 + 17, total // 100)
    ranges = [(0, heldout[0]), (sum(heldout), total - sum(heldout))]
    start = time.perf_counter()
    order = BlockOrder(ranges, BLOCKS_PER_PART, 0, "c" * 64)
    order.take(Position(), STEP)
    figures: dict[str, Any] = {
        "parts": parts, "blocks": len(order), "build_seconds": time.perf_counter() - start,
        "build_peak_bytes": peak_bytes(),
    }  # fmt: skip
    seen, position, walk, steps = np.zeros(total, bool), Position(), 0.0, 0
    while position.epoch == 0:
        start = time.perf_counter()
        ids, position = order.take(position, min(STEP, len(order) - position.consumed))
        walk, steps = walk + time.perf_counter() - start, steps + 1
        if seen[ids].any() or len(np.unique(ids)) != len(ids):
            raise AssertionError("a block came twice")
        seen[ids] = True
    if int(seen.sum()) != len(order) or seen[heldout[0] : sum(heldout)].any():
        raise AssertionError("not every training block came, or a held-out one did")
    start = time.perf_counter()
    fresh = BlockOrder(ranges, BLOCKS_PER_PART, 0, "c" * 64)
    fresh.take(Position(0, len(order) // 2), STEP)
    return {
        **figures, "walk_seconds": walk, "walk_steps": steps,
        "resume_seconds": time.perf_counter() - start, "peak_bytes": peak_bytes(),
    }  # fmt: skip


def run(parts: int = 10**6) -> dict[str, Any]:
    """Returns the figures, taken in a process of its own."""
    command = [sys.executable, __file__, "--here", str(parts)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    figures: dict[str, Any] = json.loads(shown)
    return figures


if __name__ == "__main__":
    if "--here" in sys.argv:
        print(json.dumps(measure(int(sys.argv[-1]))))
    else:
        print(__doc__)
        for name, value in run(*map(int, sys.argv[1:2])).items():
            print(f"{name:18} {value:,.3f}" if isinstance(value, float) else f"{name:18} {value:,}")
