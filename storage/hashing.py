"""A small integer hash, for what must come out the same on every machine and in every language."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UInt64 = npt.NDArray[np.uint64]


def splitmix64(values: UInt64) -> UInt64:
    """Returns the splitmix64 hash of each value (Steele, Lea, Flood 2014): a bijection of uint64.

    x += 0x9E3779B97F4A7C15;  x = (x ^ x>>30)·0xBF58476D1CE4E5B9;  x = (x ^ x>>27)·0x94D049BB133111EB;
    x ^ x>>31, all modulo 2^64.
    """
    with np.errstate(over="ignore"):
        x = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
