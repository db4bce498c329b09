"""Where the work runs, and what it took."""

from __future__ import annotations

import resource
import sys
import time

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


class Usage:
    """Measures a stretch of work: wall seconds and peak memory in bytes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @property
    def peak_bytes(self) -> int:
        """Peak allocated on the GPU, or the process's largest resident size on a CPU."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
