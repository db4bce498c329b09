"""What this machine has: its processor, memory and GPUs, and how fast bf16 products are here."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_MEASURED = 0.25  # seconds of products for each of the two kinds
_SIZES = {"cpu": 1024, "cuda": 4096}  # rows and columns of the matrices
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Gpu:
    """A GPU as torch sees it.

    Attributes:
        memory, free: bytes.
        capability: e.g. "9.0".
        bf16: whether it computes in bf16 itself, without emulation.
    """

    name: str
    memory: int
    free: int
    capability: str
    bf16: bool


@dataclass(frozen=True)
class Rates:
    """Matrix products as measured, FLOP/s.

    Attributes:
        size: rows and columns of the square matrices.
        device, threads: where; threads of the CPU.
    """

    bf16: float
    fp32: float
    size: int
    device: str
    threads: int

    @property
    def gain(self) -> float:
        """How many times as fast as fp32 bf16 is."""
        return self.bf16 / self.fp32

    @property
    def method(self) -> str:
        count = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        where = count if self.device == "cpu" else self.device
        return f"products of {self.size}² matrices for {_MEASURED} s each, {where}"


@dataclass(frozen=True)
class Machine:
    """Where a run would compute.

    Attributes:
        device: "cpu" or "cuda".
        memory: bytes of that device, or of one of its GPUs.
        gpus: how many there are.
        fast_bf16: whether bf16 products are at least as fast as fp32's.
        about: one line for people.
    """

    device: str
    memory: int
    gpus: int
    fast_bf16: bool
    about: str


def look(device: str = "auto", memory: int | None = None) -> Machine:
    """Returns the machine as a run on `device` would find it; measures for half a second.

    Args:
        device: as in the configuration.
        memory: bytes, in place of what the device has; with "cuda" also of one on another machine.

    Raises:
        ConfigError: the device asked for is not there.
    """
    from stages.device import choose_device

    found = gpus()
    if memory and device.startswith("cuda") and not found:
        return Machine(
            "cuda", memory, 1, True, f"a GPU of {memory / 1e9:.0f} GB, not seen from here"
        )
    chosen = choose_device(device)
    rates = measure(str(chosen))
    if chosen.type == "cuda":
        gpu = found[chosen.index or 0]
        about = f"{gpu.name}, {gpu.memory / 1e9:.0f} GB" + (
            f", one of {len(found)}" if len(found) > 1 else ""
        )
        return Machine("cuda", memory or gpu.memory, len(found), rates.gain >= 1, about)
    about = f"{cores()} CPU cores, {memory_bytes() / 1e9:.0f} GB, no GPU"
    return Machine("cpu", memory or memory_bytes(), 0, rates.gain >= 1, about)


def gpus() -> list[Gpu]:
    """Returns the GPUs that torch sees."""
    import torch

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        of: Any = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append(Gpu(of.name, total, free, f"{of.major}.{of.minor}", of.major >= 8))
    return found


def measure(device_name: str) -> Rates:
    """Returns the device's rates of bf16 and fp32 matrix products; half a second, once a process."""
    import torch

    rates = [rate(device_name, bf16) for bf16 in (True, False)]
    size = _SIZES[torch.device(device_name).type]
    return Rates(rates[0], rates[1], size, device_name, torch.get_num_threads())


@cache
def rate(device_name: str, bf16: bool) -> float:
    """Returns the device's FLOP/s of bf16 or fp32 matrix products; a quarter of a second, once a process,
    or one product where that takes longer, as in bf16 on a CPU that only emulates it."""
    import torch

    device = torch.device(device_name)
    size = _SIZES[device.type]
    a = torch.randn(size, size, device=device).to(torch.bfloat16 if bf16 else torch.float32)

    def seconds() -> float:
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    # The first also chooses kernels, and on a GPU loads libraries: there it says nothing.
    first = seconds()
    taken = [first] if device.type == "cpu" and first >= _MEASURED else []
    while sum(taken) < _MEASURED:
        taken.append(seconds())
    return 2.0 * size**3 * len(taken) / sum(taken)


def cores() -> int:
    """Returns the CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu() -> tuple[str, list[str]]:
    """Returns the processor's name and those of its vector and matrix extensions that matter here."""
    name, flags = platform.processor() or platform.machine(), []
    for line in _lines("/proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() == "flags":
            flags = [flag for flag in _FLAGS if flag in value.split()]
            break
    return name, flags


def memory_bytes() -> int:
    """Returns the memory that this process may use: the machine's, or less by its control group."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limits += [int(line) for path in _CGROUP_LIMITS for line in _lines(path) if line.isdigit()]
    return min(limits)


def available_bytes() -> int:
    """Returns the memory that is free now, as far as the system tells; else all of it."""
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return min(int(line.split()[1]) * 1024, memory_bytes())
    return memory_bytes()


def _lines(path: str) -> Sequence[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return ()
