"""Percentile intervals by the bootstrap (Efron 1979): units are drawn again with replacement.

A figure that is a function of sums over units (blocks, prompts) needs no unit twice: a resample is how
often each unit is drawn, and its sums are one matrix product.
"""

from __future__ import annotations

import numpy as np

from storage.types import Float64

LEVEL = 0.95
_COUNTS = 1 << 22  # drawn at once


def resampled(values_NF: Float64, resamples: int, seed: int) -> Float64:
    """Returns the sums of each resample of N units, [resamples, F].

    Args:
        values_NF: what each unit adds; N at least 1.
        seed: the same seed draws the same units, so that two models' figures are of the same resamples.
    """
    count = len(values_NF)
    generator, chances = np.random.default_rng(seed), np.full(count, 1.0 / count)
    step, pieces = max(1, _COUNTS // count), []
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        pieces.append(generator.multinomial(count, chances, size) @ values_NF)
    return np.concatenate([np.empty((0, values_NF.shape[1])), *pieces])


def interval(values: Float64) -> list[float]:
    """Returns [low, high], between which the middle 95 % of the resampled figures lie."""
    low, high = np.percentile(values, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return [float(low), float(high)]
