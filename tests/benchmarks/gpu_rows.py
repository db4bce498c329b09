"""Rows of gpu.py: measured within a time, saved at once, printed as tables at the end; and the sizes."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pipeline.planning.pace import measure_flops
from stages.device import Usage, resident_bytes

PACKAGES = ("torch", "triton", "transformers", "numpy", "pcodec", "numcodecs", "liger_kernel")


@dataclass(frozen=True)
class Shape:
    """A decoder's dimensions, as a Qwen configuration names them."""

    kind: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int
    tied: bool


@dataclass(frozen=True)
class Sizes:
    """All that --small makes smaller.

    Attributes:
        vocab: V of corpus and student.
        hidden, rows: D and T of the losses, in the order in which they are measured.
        budgets: chunk_bytes of ours, the default first.
        length, blocks, part: tokens of a block; blocks of the corpus, of a part.
        chunks: store.chunk_tokens, the default first.
        teachers, student: their shapes.
        pause: seconds for which a row is repeated.
    """

    vocab: int
    hidden: tuple[int, ...]
    rows: tuple[int, ...]
    budgets: tuple[int, ...]
    length: int
    blocks: int
    part: int
    chunks: tuple[int, ...]
    teachers: dict[str, Shape]
    student: Shape
    pause: float


MB = 2**20
FULL = Sizes(
    151_936, (896, 2048), (8192, 32_768, 2048), (512 * MB, 96 * MB, 1024 * MB, 2048 * MB), 2048, 48,
    8, (441, 128, 2048),
    {
        "7B": Shape("qwen2", 3584, 28, 28, 4, 18_944, 152_064, False),
        "1.7B": Shape("qwen3", 2048, 28, 16, 8, 6144, 151_936, False),
    },
    Shape("qwen2", 896, 24, 14, 2, 4864, 151_936, True), 0.3,
)  # fmt: skip
SMALL = Sizes(
    1000, (16, 32), (64, 128), (96 * MB, 2 * MB, 65_536), 64, 16, 4, (128, 32),
    {
        "7B": Shape("qwen2", 64, 2, 4, 2, 128, 1024, False),
        "1.7B": Shape("qwen3", 32, 2, 4, 2, 64, 1000, False),
    },
    Shape("qwen2", 32, 2, 4, 2, 64, 1000, True), 0.02,
)  # fmt: skip


class LeftOut(Exception):
    """A row that is not measured, and why."""


class Recorder:
    """Measures rows and keeps them.

    Args:
        folder: where gpu.json goes.
        device: "cuda" or "cpu".
        seconds: for all parts.
    """

    def __init__(self, folder: Path, device: str, sizes: Sizes, seconds: float) -> None:
        self.folder, self.device, self.sizes = folder, torch.device(device), sizes
        self.rows: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {}
        self._part, self._end, self._until = "", time.monotonic() + seconds, 0.0
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def machine(self) -> None:
        """Finds out what there is: names, versions, rates."""
        versions = {}
        for name in PACKAGES:
            with contextlib.suppress(PackageNotFoundError):
                versions[name] = version(name)
        self.facts = {
            "device": torch.cuda.get_device_name(self.device) if self.gpu else "cpu",
            "memory_bytes": torch.cuda.mem_get_info()[1] if self.gpu else None,
            "cuda": torch.version.cuda, "processors": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(), "versions": versions,
            "flops": measure_flops(self.device.type),
        }  # fmt: skip
        size = (2**31 if self.gpu else 2**24) // 4
        source = torch.ones(size, device=self.device)
        seconds, _ = timed(lambda: source.clone(), self.device, 0.1)
        self.facts["copy_bytes_per_s"] = 2 * 4 * size / seconds
        self.save()
        print(json.dumps(self.facts), flush=True)

    def begin(self, part: str, share: float) -> None:
        """Begins a part, which has this share of the time that is left."""
        self._part, now = part, time.monotonic()
        self._until = now + max(0.0, self._end - now) * share

    @contextlib.contextmanager
    def up_to(self, share: float) -> Iterator[None]:
        """Lets what runs inside have at most this share of what the part still has."""
        before = self._until
        self._until = time.monotonic() + max(0.0, self.left) * share
        try:
            yield
        finally:
            self._until = before

    @property
    def left(self) -> float:
        """Seconds that the part still has."""
        return self._until - time.monotonic()

    def row(self, name: str, work: Callable[[], dict[str, Any]], **facts: Any) -> dict[str, Any]:
        """Measures one row, and returns it; with "error" where that failed."""
        begun, found = time.monotonic(), {"part": self._part, "name": name, **facts}
        try:
            with within(self.left):
                found |= work()
        except Exception as error:
            found["error"] = _said(error)
        found["row_seconds"] = round(time.monotonic() - begun, 2)
        return self._keep(found)

    def failed(self, name: str, error: Exception) -> None:
        """Keeps what failed beside the rows."""
        self._keep({"part": self._part, "name": name, "error": _said(error)})

    def _keep(self, row: dict[str, Any]) -> dict[str, Any]:
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        self.save()
        free()
        return row

    def save(self) -> None:
        """Writes gpu.json, whole at any time."""
        path, new = self.folder / "gpu.json", self.folder / "gpu.json.new"
        new.write_text(json.dumps({"machine": self.facts, "rows": self.rows}, indent=1))
        new.replace(path)

    def show(self) -> None:
        """Prints a table a part."""
        print(f"\n{self.facts['device']}, torch {torch.__version__}")
        for part in dict.fromkeys(row["part"] for row in self.rows):
            rows = [row for row in self.rows if row["part"] == part]
            print(f"\n{part}\n{_table(rows)}", flush=True)


_LEFT_OUT_OF_TABLES = ("part", "row_seconds", "repeats")


def _said(error: Exception) -> str:
    if isinstance(error, LeftOut):
        return f"left out: {error}"
    return (
        f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error) else ''}"
    )


def _table(rows: Sequence[dict[str, Any]]) -> str:
    columns = [c for c in dict.fromkeys(k for row in rows for k in row)
               if c not in _LEFT_OUT_OF_TABLES]  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(_cell(row.get(c)) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Stops what runs inside by TimeoutError after so many seconds; LeftOut where none is left."""
    if seconds < 0.5:
        raise LeftOut("the part's time is over")

    def over(*_: Any) -> None:
        raise TimeoutError("the part's time was over before the row was measured")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def free() -> None:
    """Gives back what no one holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(
    run: Callable[[], object], device: torch.device, seconds: float, most: int = 20
) -> tuple[float, int]:
    """Returns (median seconds of a run, how many were measured), after one that is not counted.

    Args:
        seconds: for which it is repeated, at least twice.
        most: times at most.
    """
    run()
    wait(device)
    found: list[float] = []
    begun = time.perf_counter()
    while len(found) < 2 or (len(found) < most and time.perf_counter() - begun < seconds):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1e3)
        else:
            start_s = time.perf_counter()
            run()
            found.append(time.perf_counter() - start_s)
    return median(found), len(found)


class Peak:
    """The peak from now on: allocated on the GPU, or of the process's resident size.

    Attributes:
        before: what is held now, in bytes.
    """

    def __init__(self, device: torch.device) -> None:
        free()
        self.before = resident_bytes(device)
        self._usage = Usage(device)

    @property
    def bytes(self) -> int:
        return self._usage.peak_bytes

    @property
    def beyond(self) -> int:
        """By how much it exceeds what was held before."""
        return max(0, self.bytes - self.before)
