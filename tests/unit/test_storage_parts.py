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
    LOGPROB_CODECS,
    ExactLogprobs,
    LogprobCodec,
    RoundedMagnitude,
    codec_named,
    from_bfloat16,
    to_bfloat16,
)
from storage.errors import DiskFull
from storage.fingerprint import differences, fingerprint
from storage.types import LOG_ZERO, Float32

LOGPROBS = arrays(np.float32, (3, 7), elements=st.floats(LOG_ZERO, 0.0, width=32))


ERRORS = {ExactLogprobs.name: 0.0, RoundedMagnitude.name: 2.0**-9}
"""Codec → the relative error that its docstring states."""


@pytest.mark.parametrize("preset", sorted(LOGPROB_CODECS))
class TestCodecConformance:
    """What every logprob codec must do."""

    @given(values=LOGPROBS)
    def test_error_is_within_the_stated_bound(self, preset: str, values: Float32) -> None:
        codec: LogprobCodec = LOGPROB_CODECS[preset]
        stored = codec.encode(values)
        assert stored.dtype == codec.dtype and stored.shape == values.shape
        decoded = codec.decode(stored)
        assert decoded.dtype == np.float32
        # Below the smallest normal float32 the bound is absolute.
        bound = ERRORS[codec.name] * np.abs(values.astype(np.float64)) + 1e-37
        assert np.all(np.abs(decoded.astype(np.float64) - values) <= bound)
        assert np.all(decoded <= 0.0) and np.all(np.isfinite(decoded))

    def test_is_found_by_name_and_keeps_certainty(self, preset: str) -> None:
        codec = LOGPROB_CODECS[preset]
        assert codec_named(codec.to_dict()["name"]) == codec
        zeros = np.array([0.0, -0.0], np.float32)
        assert np.array_equal(codec.decode(codec.encode(zeros)), zeros)


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
    durable.require_free(tmp_path / "not" / "yet", 1, "a test")
    with pytest.raises(DiskFull, match="too little disk space for a test"):
        durable.require_free(tmp_path / "not" / "yet", 1 << 60, "a test")


def test_fingerprint_ignores_order_and_sees_values() -> None:
    assert fingerprint({"a": 1, "b": [1.5]}) == fingerprint({"b": [1.5], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 1.5})
    with pytest.raises(ValueError, match="JSON"):
        fingerprint({"a": float("nan")})


def test_differences_are_named() -> None:
    found = list(differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}}))
    assert found == [("a.c", 2, 4), ("d", 3, None)]
