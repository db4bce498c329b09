"""The device that these tests compute on, and what other rooms' tests have that serves here as well."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

DEVICE = torch.device(os.environ.get("SCHOLIAST_TEST_DEVICE", "cuda"))
CPU = torch.device("cpu")
ON_GPU = DEVICE.type == "cuda"

needs_device = pytest.mark.skipif(
    ON_GPU and not torch.cuda.is_available(), reason="torch sees no GPU"
)

sys.path += [str(Path(__file__).parents[1] / room) for room in ("numerics", "unit", "integration")]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the largest difference over the largest value that is expected, in float64 on the CPU."""
    mine, theirs = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((mine - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
