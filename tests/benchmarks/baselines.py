"""Other systems' ways to write a head down, each as its own files lay it out, with our byte counts.

Each encoding turns heads (ids [n, K] and logprobs [n, K], most probable first) into bytes a block and
back. None stores the tail's mass: it is what the decoded head leaves, never less than a millionth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numcodecs import Zstd

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Baseline:
    """An encoding: `encode(ids, logprobs) -> bytes`, `decode(bytes, n, K) -> (ids, logprobs)`."""

    name: str
    encode: Callable[[Array, Array], bytes]
    decode: Callable[[bytes, int, int], tuple[Array, Array]]


def pack_bits(values: Array, width: int) -> bytes:
    """Packs unsigned integers of `width` bits end to end, least significant bit first."""
    bits = np.unpackbits(
        values.astype("<u4").view(np.uint8).reshape(-1, 4), axis=1, bitorder="little"
    )
    return np.packbits(bits[:, :width].reshape(-1), bitorder="little").tobytes()


def unpack_bits(data: bytes, width: int, count: int) -> Array:
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=count * width, bitorder="little")
    wide = np.zeros((count, 32), np.uint8)
    wide[:, :width] = bits.reshape(count, width)
    return np.packbits(wide, axis=1, bitorder="little").view("<u4").reshape(-1)


def _raw_encode(ids: Array, logprobs: Array) -> bytes:
    return ids.astype("<i4").tobytes() + logprobs.astype("<f2").tobytes()


def _raw_decode(data: bytes, n: int, k: int) -> tuple[Array, Array]:
    ids = np.frombuffer(data, "<i4", n * k)
    return ids.reshape(n, k), np.frombuffer(data, "<f2", n * k, 4 * n * k).reshape(n, k)


_ZSTD = Zstd(level=3)


def _megatron_encode(ids: Array, logprobs: Array) -> bytes:
    return bytes(_ZSTD.encode(pack_bits(ids, 17) + logprobs.astype("<f2").tobytes()))


def _megatron_decode(data: bytes, n: int, k: int) -> tuple[Array, Array]:
    plain = _ZSTD.decode(data)
    size = -(-n * k * 17 // 8)
    ids = unpack_bits(plain[:size], 17, n * k).reshape(n, k)
    return ids, np.frombuffer(plain, "<f2", n * k, size).reshape(n, k)


_EXACT = 16


def _basis(k: int) -> Array:
    """DistillKit's recommended terms over the place in the row: 1, x, x², x³, x⁴, √x."""
    x = np.linspace(0.0, 1.0, k - _EXACT)
    return np.stack([x**0, x, x**2, x**3, x**4, np.sqrt(x)], 1)


def _distillkit_encode(ids: Array, logprobs: Array, vocab: int = 49_152) -> bytes:
    k = ids.shape[1]
    bits = logprobs[:, :_EXACT].astype(np.float32).view(np.uint32)
    exact = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    terms = logprobs[:, _EXACT:].astype(np.float64) @ np.linalg.pinv(_basis(k)).T
    packed = pack_bits(ids, (vocab - 1).bit_length())
    return packed + exact.tobytes() + terms.astype("<f4").tobytes()


def _distillkit_decode(data: bytes, n: int, k: int, vocab: int = 49_152) -> tuple[Array, Array]:
    width = (vocab - 1).bit_length()
    size = -(-n * k * width // 8)
    ids = unpack_bits(data[:size], width, n * k).reshape(n, k)
    exact = np.frombuffer(data, "<u2", n * _EXACT, size).astype(np.uint32) << 16
    terms = np.frombuffer(data, "<f4", n * 6, size + 2 * n * _EXACT).reshape(n, 6)
    rest = terms.astype(np.float64) @ _basis(k).T
    exact_values = exact.view(np.float32).reshape(n, _EXACT)
    return ids, np.concatenate([exact_values, np.minimum(rest, 0.0).astype(np.float32)], 1)


BASELINES = (
    Baseline("int32 + float16", _raw_encode, _raw_decode),
    Baseline("17-bit ids + float16, zstd (Megatron-LM)", _megatron_encode, _megatron_decode),
    Baseline(
        "bit-packed ids + polynomial, 16 exact bfloat16 (DistillKit)",
        _distillkit_encode, _distillkit_decode,
    ),
)  # fmt: skip
