"""The lossy meaning of what is stored: float32 ↔ small integers, each with a stated error bound.

Byte compression (pcodec, crc32c) is not here but in Zarr's codec chain (layout.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from storage.types import AnyArray, Float32, UInt16


class LogprobCodec(Protocol):
    """Maps logprobs (float32, in [LOG_ZERO, 0]) to what is stored and back."""

    name: ClassVar[str]
    dtype: ClassVar[str]

    def encode(self, logprobs: Float32) -> AnyArray: ...

    def decode(self, stored: AnyArray) -> Float32: ...

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class ExactLogprobs:
    """float32 as it is. Error: none."""

    name: ClassVar[str] = "float32"
    dtype: ClassVar[str] = "float32"

    def encode(self, logprobs: Float32) -> AnyArray:
        return logprobs.astype(np.float32)

    def decode(self, stored: AnyArray) -> Float32:
        return stored.astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name}


@dataclass(frozen=True)
class RoundedMagnitude:
    """The float32 bits of −logprob rounded to 8 mantissa bits, as uint16 (no sign: it is ≤ 0).

    Error: |decoded − ℓ| ≤ 2^−9·|ℓ|, so a probability p is off by at most about |ln p|/512 of
    itself: little where p is large, which is where forward KL feels it. 0 is exact.
    """

    name: ClassVar[str] = "rounded-magnitude-8"
    dtype: ClassVar[str] = "uint16"
    _SHIFT: ClassVar[int] = 23 - 8

    def encode(self, logprobs: Float32) -> AnyArray:
        bits = np.ascontiguousarray(-logprobs, np.float32).view(np.uint32)
        bits = bits & np.uint32(0x7FFFFFFF)  # −0.0 and 0.0 are one value
        return ((bits + np.uint32(1 << (self._SHIFT - 1))) >> np.uint32(self._SHIFT)).astype(
            np.uint16
        )

    def decode(self, stored: AnyArray) -> Float32:
        bits = stored.astype(np.uint32) << np.uint32(self._SHIFT)
        return -bits.view(np.float32)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name}


LOGPROB_CODECS: dict[str, LogprobCodec] = {
    "exact": ExactLogprobs(),
    "balanced": RoundedMagnitude(),
}
"""store.precision → codec."""


def codec_named(name: str) -> LogprobCodec:
    """Returns the codec whose `to_dict` carries this name (KeyError if there is none)."""
    return {codec.name: codec for codec in LOGPROB_CODECS.values()}[name]


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
