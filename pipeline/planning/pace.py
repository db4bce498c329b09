"""How fast a model goes: measured if it was, else told from its parameters and a device's rate."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.cache_workspace import CacheWorkspace
from pipeline.planning.calibration import STUDENT, Measured, device_name, fitting
from pipeline.start import machine

_EFFICIENCY = 0.3  # of the matrix products' rate that a forward reaches, for a first estimate

MEASURED, ESTIMATE = "measured here", "estimate from parameters"


@dataclass(frozen=True)
class Device:
    """Where the work will run, as far as a plan has to know.

    Attributes:
        flops: its bf16 FLOP/s; None: this machine's, measured for an instant when first needed.
        gpu: whether it is a GPU, of which a CPU's calibration tells nothing.
        any_measured: whether a calibration of any device will do, and not only of this machine's.
    """

    flops: float | None = None
    gpu: bool = False
    any_measured: bool = False


class Pace:
    """Tokens a second of teachers and student."""

    def __init__(self, work: CacheWorkspace, device: Device) -> None:
        self._work, self._device = work, device
        self._name: str | None = None

    def measured(self, key: str) -> Measured | None:
        """Returns the calibration of "teachers.NAME" or "student" that holds here, if there is one."""
        return fitting(self._work, key, lambda found: self._will_do(key, found))

    def _will_do(self, key: str, found: Measured) -> bool:
        if self._device.any_measured:
            return True
        if self._device.flops is None:
            if self._name is None:
                self._name = device_name(self._work)[0]
            return found.device == self._name
        # On a cluster's devices: what a CPU took says nothing of a GPU.
        cluster = self._work.config.cluster
        asked = cluster.train if key == "student" else cluster.teachers.get(key.partition(".")[2])
        over = cluster.defaults if asked is None else asked.over(cluster.defaults)
        return found.gpu or not (self._device.gpu or over.gpus)

    def tokens_per_s(self, key: str, flops_of_a_token: float) -> tuple[float, str]:
        """Returns the rate of a model and what it rests on."""
        found = self.measured(key)
        if found is not None:
            return found.tokens_per_s, MEASURED
        return self.rate(key) * _EFFICIENCY / max(flops_of_a_token, 1.0), ESTIMATE

    def rate(self, key: str) -> float:
        """Returns the device's FLOP/s in the precision of a model: of a CPU without bf16 units the two
        differ by a factor of fifty."""
        if self._device.flops is not None:
            return self._device.flops
        from stages.device import choose_device  # which loads torch

        config = self._work.config
        if key == STUDENT:
            bf16 = config.train.precision == "bf16"
        else:
            bf16 = config.teachers[key.removeprefix("teachers.")].dtype == "bfloat16"
        return machine.rate(str(choose_device(config.device)), bf16)
