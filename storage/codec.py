"""The lossy meaning of what is stored: float32 ↔ small integers, each with a stated error bound.

Byte compression (pcodec, crc32c) is not here but in Zarr's codec chain (layout.py), and which ids a
head holds is never lossy (orders.py).

A preset says how a cache is meant: how many head entries and tail draws by default, and which codecs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from storage.types import LOG_ZERO, AnyArray, Float32, UInt16


@dataclass(frozen=True)
class ExactLogprobs:
    """float32 as it is. Error: none."""

    name: str = "float32"
    dtype: ClassVar[str] = "float32"

    def encode(self, logprobs: Float32) -> AnyArray:
        return logprobs.astype(np.float32)

    def decode(self, stored: AnyArray) -> Float32:
        return stored.astype(np.float32)


_SLOPE = 4.0  # levels per nat, below the joint
_LOWEST = 277  # levels below the joint
_JOINT = 12  # a·p^(1/3) there: the derivative of a·e^(ℓ/3) is then 12/3 = _SLOPE
_BASE = _LOWEST + 1 - _JOINT


@dataclass(frozen=True)
class CubeRoot:
    """Levels evenly spaced in p^(1/3), and evenly in log p where p is very small.

    Forward KL would have levels even in √p (error ∝ √p in log p costs every entry the same); the cube
    root gives a little of that away at temperature 1 to keep temperature 2 precise. With a = `scale`,

        level(ℓ) = b + a·e^(ℓ/3)          for ℓ ≥ ℓ₀ = 3·ln(12/a)
        level(ℓ) = 277 + 1 + 4·(ℓ − ℓ₀)   for ℓ < ℓ₀, never below 1

    rounded to the nearest integer, b = 278 − 12 = 266; level 0 is LOG_ZERO. At ℓ₀ the two agree in
    value and slope.

    Error: |p̂^(1/3) − p^(1/3)| ≤ 1/(2a) for ℓ ≥ ℓ₀; |ℓ̂ − ℓ| ≤ 1/8 for ℓ₀ − 69 ≤ ℓ < ℓ₀; what is below
    (p < 10⁻³³) is raised to level 1, except that ℓ ≤ LOG_ZERO/2 stays LOG_ZERO. p = 1 is exact.
    """

    scale: int
    dtype: ClassVar[str] = "uint16"

    @property
    def name(self) -> str:
        return f"cube-root-{self.scale}"

    @property
    def joint(self) -> float:
        """ℓ₀, where the two kinds of levels meet."""
        return float(3.0 * np.log(_JOINT / self.scale))

    @cached_property
    def levels(self) -> Float32:
        """float32 [b + a + 1], the logprob of every level; the cache holds it as an array."""
        index = np.arange(_BASE + self.scale + 1, dtype=np.float64)
        low = self.joint + (index - (_LOWEST + 1)) / _SLOPE
        root = np.maximum(index - _BASE, 1.0) / self.scale
        table = np.where(index > _LOWEST, 3.0 * np.log(root), low)
        table[0], table[-1] = LOG_ZERO, 0.0
        return table.astype(np.float32)

    def encode(self, logprobs: Float32) -> AnyArray:
        third = np.exp(logprobs * np.float32(1 / 3))
        level = np.float32(_BASE) + np.float32(self.scale) * third
        low = logprobs < np.float32(self.joint)
        if low.any():
            below = _LOWEST + 1 + _SLOPE * (logprobs[low] - np.float32(self.joint))
            level[low] = np.where(logprobs[low] <= LOG_ZERO / 2, 0.0, np.maximum(below, 1.0))
        levels: UInt16 = np.rint(level).astype(np.uint16)
        return levels

    def decode(self, stored: AnyArray) -> Float32:
        return self.levels[stored]


_FINE_CODES = 32768
_COARSE = 4.0  # steps a nat of what is beyond the fine codes
_LAST = 65535


@dataclass(frozen=True)
class FixedPoint:
    """A statistic's magnitude |x| in nats as uint16: steps of 2^−bits up to m = 32768/2^bits nats,
    steps of 1/4 from there on.

        code = round(2^bits·|x|)            for |x| < m
        code = 32768 + round(4·(|x| − m))   up to code 65534; 65535 is |LOG_ZERO|

    Error: 2^−(bits+1) nats below m, 1/8 from there to m + 8,191.
    """

    bits: int
    dtype: ClassVar[str] = "uint16"

    @property
    def name(self) -> str:
        return f"fixed-point-{self.bits}"

    @property
    def fine(self) -> float:
        """m, nats."""
        return _FINE_CODES / 2.0**self.bits

    @cached_property
    def values(self) -> Float32:
        """float32 [65536], what every code stands for."""
        code = np.arange(_LAST + 1, dtype=np.float64)
        coarse = self.fine + (code - _FINE_CODES) / _COARSE
        table = np.where(code <= _FINE_CODES, code / 2.0**self.bits, coarse)
        table[_LAST] = -LOG_ZERO
        return table.astype(np.float32)

    def encode(self, magnitude: Float32) -> AnyArray:
        fine = np.rint(magnitude * np.float32(2.0**self.bits))
        coarse = _FINE_CODES + np.rint((magnitude - np.float32(self.fine)) * np.float32(_COARSE))
        code = np.where(magnitude < self.fine, fine, coarse)
        codes: UInt16 = np.clip(code, 0, _LAST).astype(np.uint16)
        return codes

    def decode(self, stored: AnyArray) -> Float32:
        if stored.size and int(stored.max()) <= _FINE_CODES:  # nearly always: no table is needed
            return stored * np.float32(2.0**-self.bits)
        return self.values.take(stored)


@dataclass(frozen=True)
class ExactStatistic:
    """float32 magnitudes as they are. Error: none."""

    name: str = "float32"
    dtype: ClassVar[str] = "float32"

    def encode(self, magnitude: Float32) -> AnyArray:
        return magnitude.astype(np.float32)

    def decode(self, stored: AnyArray) -> Float32:
        return stored.astype(np.float32)


DRAW_STEP = 0.5
"""Nats: a draw's logprob is stored as round((floor − ℓ)/DRAW_STEP) below the row's least head entry.
Error ≤ 1/4 nat. It only re-tempers draws, by the factor p^(1/T−1): at T = 2 that is off by at most 13 %
a draw, and by +0.3 % on average."""


@dataclass(frozen=True)
class Preset:
    """What a cache is meant to be.

    Attributes:
        meaning: in words, for the format and the reference.
        k, draws: head entries and tail draws a token unless the user says otherwise.
        logprobs: codec of the head's logprobs.
        statistics: codec of entropy, tail mass, gold logprob and log_z.
    """

    meaning: str
    k: int
    draws: int
    logprobs: ExactLogprobs | CubeRoot
    statistics: ExactStatistic | FixedPoint

    @property
    def exact(self) -> bool:
        return isinstance(self.logprobs, ExactLogprobs)

    def to_dict(self) -> dict[str, Any]:
        return {"logprobs": self.logprobs.name, "statistics": self.statistics.name}


PRESETS: dict[str, Preset] = {
    "exact": Preset(
        "float32 logprobs and statistics, as computed", 64, 0, ExactLogprobs(), ExactStatistic()
    ),
    "balanced": Preset(
        "near-lossless: the rounding costs a KL of about 2e-5 nats at temperature 1",
        64, 0, CubeRoot(420), FixedPoint(9),
    ),
    "compact": Preset(
        "a small exact head, and draws that stand for the tail without bias",
        16, 16, CubeRoot(160), FixedPoint(7),
    ),
}  # fmt: skip
"""store.preset → what it means."""


def to_bfloat16(values: Float32) -> UInt16:
    """Rounds float32 to bfloat16 (nearest, ties to even), as its 16 bits.

    Error: |decoded − x| ≤ 2^−9·|x| for normal x. Finite values only.
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype(np.uint16)


def from_bfloat16(stored: AnyArray) -> Float32:
    """Returns the float32 values of bfloat16 bits, exactly."""
    return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
