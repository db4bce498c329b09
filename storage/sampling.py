"""Where a row's systematic draws begin: a number decided by seed, block and position alone.

Plain 64-bit arithmetic, so that a reader in another language can repeat it. All sums and products
are modulo 2^64:

    mix(x):   x ← (x xor (x >> 30)) · 0xBF58476D1CE4E5B9
              x ← (x xor (x >> 27)) · 0x94D049BB133111EB
              x xor (x >> 31)
    hash:     h ← 0;  for w in (seed, block id, position):  h ← mix(h + w + 0x9E3779B97F4A7C15)
    uniform:  u = (h >> 11) / 2^53

(0, 0, 0) gives 0.13870941014555427, (1, 2, 3) gives 0.4175580595044027.

mix is the finaliser of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014) and its increment is the constant added to each word.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from storage.types import AnyArray

Float64 = npt.NDArray[np.float64]
UInt64 = npt.NDArray[np.uint64]

INCREMENT = 0x9E3779B97F4A7C15


def uniforms(seed: int, block_ids: AnyArray, positions: AnyArray) -> Float64:
    """Returns u in [0, 1) for each row: float64, of the arrays' common shape.

    Args:
        seed: taken modulo 2^64.
        block_ids: integers, index of each row's block in the corpus.
        positions: integers, the row's index t in its block.
    """
    blocks, places = np.broadcast_arrays(block_ids, positions)
    start = np.full(blocks.shape, seed % 2**64, np.uint64)
    state = np.zeros(blocks.shape, np.uint64)
    for word in (start, blocks.astype(np.uint64), places.astype(np.uint64)):
        state = mix(state + word + np.uint64(INCREMENT))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def mix(x: UInt64) -> UInt64:
    """Returns splitmix64's finaliser of each value: a bijection of uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
