"""Where the work runs, what it draws from, and what it took."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from pathlib import Path

import torch

from storage.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """Returns the device: "auto" is the first GPU if there is one, else the CPU.

    Raises:
        ConfigError: the device asked for is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "no GPU is visible to torch", where="device", found=name,
            todo="set device: auto or cpu, or check the driver and CUDA_VISIBLE_DEVICES",
        )  # fmt: skip
    return device


def multiplies_bfloat16(device: torch.device) -> bool:
    """Returns whether a device has hardware for bfloat16 products; a CPU without is many times slower
    at them than at float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    with contextlib.suppress(OSError):
        words = set(Path("/proc/cpuinfo").read_text().split())
        return bool(words & {"amx_bf16", "avx512_bf16", "bf16"})  # the last is Arm's
    return False


def device_of_task(name: str) -> torch.device:
    """Returns the device of one of the tasks on this host: the GPU of its LOCAL_RANK, if it has one.

    Tasks that are no ranks share nothing, so more of them than GPUs take turns with these.

    Raises:
        ConfigError: the device asked for is not there.
    """
    device = choose_device(name)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return device


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Returns the state of everything random that a training on a device draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(device: torch.device, state: dict[str, torch.Tensor]) -> None:
    """Restores what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def resident_bytes(device: torch.device) -> int:
    """Returns what `Usage.peak_bytes` has before any work: the process's resident size, 0 on a GPU."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return 0


class Usage:
    """Measures a stretch of work: wall seconds and peak memory in bytes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            # Linux then counts the peak (VmHWM) anew; elsewhere it stays the process's so far.
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @property
    def peak_bytes(self) -> int:
        """Peak allocated on the GPU, or the process's largest resident size since the start."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
