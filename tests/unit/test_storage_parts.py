"""Codecs with their bounds, durable writes, fingerprints."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from storage import durable
from storage.codec import (
    PRESETS,
    CubeRoot,
    ExactLogprobs,
    ExactStatistic,
    FixedPoint,
    from_bfloat16,
    to_bfloat16,
)
from storage.errors import DiskFull
from storage.fingerprint import differences, fingerprint
from storage.types import LOG_ZERO, Float32

LOGPROBS = arrays(np.float32, (3, 7), elements=st.floats(LOG_ZERO / 2, 0.0, width=32))
SCALES = sorted(
    {p.logprobs.scale for p in PRESETS.values() if isinstance(p.logprobs, CubeRoot)} | {37}
)


@pytest.mark.parametrize("scale", SCALES)
class TestCubeRoot:
    @given(values=LOGPROBS)
    def test_error_is_within_the_stated_bound(self, scale: int, values: Float32) -> None:
        codec = CubeRoot(scale)
        stored = codec.encode(values)
        assert stored.dtype == codec.dtype and stored.shape == values.shape
        decoded = codec.decode(stored).astype(np.float64)
        exact = values.astype(np.float64)
        root = np.abs(np.exp(decoded / 3) - np.exp(exact / 3)) <= 1 / (2 * scale) * 1.001
        nats = np.abs(decoded - exact) <= 0.125 * 1.001
        lowest = codec.joint - 69
        assert np.all(np.where(exact >= codec.joint, root, nats | (exact < lowest)))
        assert np.all(decoded[(exact < lowest) & (exact > LOG_ZERO / 2)] <= lowest + 0.3)
        assert np.all(decoded <= 0.0)

    def test_certainty_and_impossibility_are_exact(self, scale: int) -> None:
        codec = CubeRoot(scale)
        values = np.array([0.0, -0.0, LOG_ZERO], np.float32)
        assert codec.decode(codec.encode(values)).tolist() == [0.0, 0.0, LOG_ZERO]

    def test_levels_rise_and_are_stable(self, scale: int) -> None:
        codec = CubeRoot(scale)
        assert np.all(np.diff(codec.levels) > 0)
        index = np.arange(len(codec.levels))
        assert np.array_equal(codec.encode(codec.levels), index)


@pytest.mark.parametrize("bits", [7, 9, 12])
class TestFixedPoint:
    @given(values=arrays(np.float32, 20, elements=st.floats(0.0, 8000.0, width=32)))
    def test_error_is_within_the_stated_bound(self, bits: int, values: Float32) -> None:
        codec = FixedPoint(bits)
        error = np.abs(codec.decode(codec.encode(values)) - values)
        fine = values < codec.fine - 0.2
        assert np.all(error <= np.where(fine, 2.0 ** -(bits + 1), 0.125) * 1.001)

    def test_keeps_zero_and_log_zero(self, bits: int) -> None:
        codec = FixedPoint(bits)
        values = np.array([0.0, -LOG_ZERO], np.float32)
        assert np.array_equal(codec.decode(codec.encode(values)), values)


@given(LOGPROBS)
def test_exact_codecs_change_nothing(values: Float32) -> None:
    for codec in (ExactLogprobs(), ExactStatistic()):
        assert np.array_equal(codec.decode(codec.encode(values)), values)


@given(arrays(np.float32, 20, elements=st.floats(-(2.0**99), 2.0**99, width=32)))
def test_bfloat16_error(values: Float32) -> None:
    decoded = from_bfloat16(to_bfloat16(values))
    assert np.all(np.abs(decoded - values) <= 2.0**-8 * np.abs(values) + 1e-37)


def test_write_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    durable.write_bytes(path, b"old")

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match="disk is full") as caught:
        durable.write_bytes(path, b"new")
    assert "run the same command again" in str(caught.value)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_free_space_is_asked_for_before(tmp_path: Path) -> None:
    durable.require_free(tmp_path / "not" / "yet", 1, "a test", "less")
    with pytest.raises(DiskFull, match="too little disk space for a test") as error:
        durable.require_free(tmp_path / "not" / "yet", 1 << 60, "a test", "fewer of them")
    assert "store less (fewer of them)" in error.value.todo


def test_fingerprint_ignores_order_and_sees_values() -> None:
    assert fingerprint({"a": 1, "b": [1.5]}) == fingerprint({"b": [1.5], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 1.5})
    with pytest.raises(ValueError, match="JSON"):
        fingerprint({"a": float("nan")})


def test_differences_are_named() -> None:
    found = list(differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}}))
    assert found == [("a.c", 2, 4), ("d", 3, None)]
