"""EM's weights against a search of the whole simplex, and the blocks they are fitted on."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from stages.mixture_em import Float64, calibration_blocks, fit
from storage.corpus_info import CorpusInfo, SourceRange
from storage.types import LOG_ZERO


def gold(teachers: int, rows: int, seed: int) -> Float64:
    generator = np.random.default_rng(seed)
    return -generator.exponential(np.linspace(1.0, 3.0, teachers)[:, None], (teachers, rows))


def mean_log(weights: Float64, given: Float64) -> float:
    return float(np.log(weights @ np.exp(given)).mean())


@pytest.mark.parametrize("seed", range(4))
def test_two_teachers_as_a_grid_finds_them(seed: int) -> None:
    given = gold(2, 200, seed)
    grid = np.linspace(0, 1, 20001)
    best = grid[np.argmax([mean_log(np.array([w, 1 - w]), given) for w in grid])]
    found = fit(given)
    assert found.sum() == pytest.approx(1.0) and found.min() >= 0
    assert found[0] == pytest.approx(best, abs=2e-3)
    assert mean_log(found, given) >= mean_log(np.array([best, 1 - best]), given) - 1e-6


def test_three_teachers_meet_the_conditions_of_the_maximum() -> None:
    """Of a concave function on the simplex: mean p_m/mix is 1 where w_m > 0, else at most 1."""
    given = gold(3, 500, 7)
    found = fit(given, 1e-13)
    slope = (np.exp(given) / (found @ np.exp(given))).mean(1)
    assert (slope <= 1 + 1e-4).all()
    np.testing.assert_allclose(slope[found > 1e-3], 1.0, atol=1e-4)


def test_no_iteration_loses() -> None:
    given = gold(3, 300, 1)
    values = [mean_log(fit(given, tolerance), given) for tolerance in (1.0, 1e-2, 1e-4, 1e-6, 1e-9)]
    assert all(b >= a - 1e-12 for a, b in pairwise(values)) and values[-1] > values[0]


def test_edges() -> None:
    assert fit(np.zeros((1, 3))).tolist() == [1.0]
    assert fit(np.full((2, 4), -3.0)).tolist() == [0.5, 0.5]
    never = np.array([[-1.0, -2.0], [LOG_ZERO, LOG_ZERO]])
    np.testing.assert_allclose(fit(never), [1.0, 0.0], atol=1e-12)
    given = gold(2, 50, 3)
    np.testing.assert_array_equal(fit(given), fit(given.copy()))
    np.testing.assert_allclose(fit(given), fit(given - 700.0), atol=1e-9)  # a factor a row
    np.testing.assert_allclose(fit(given), fit(given[::-1])[::-1], atol=1e-12)


def info(*sources: tuple[str, str, int, int]) -> CorpusInfo:
    ranges = tuple(SourceRange(d, s, first, n, 1, 1) for d, s, first, n in sources)
    return CorpusInfo({}, "", "", 9, 4, 100, 8, ranges, ())


def test_calibration_blocks_are_spread_over_all_ranges_of_the_domain() -> None:
    given = info(("x", "train", 0, 10), ("y", "train", 10, 3), ("x", "heldout", 13, 50),
                 ("x", "train", 70, 10), ("z", "heldout", 90, 4))  # fmt: skip
    assert calibration_blocks(given, "x", 4).tolist() == [2, 7, 72, 77]
    assert calibration_blocks(given, "x", 1).tolist() == [70]
    assert calibration_blocks(given, "x", 99).tolist() == [*range(10), *range(70, 80)]
    assert calibration_blocks(given, "y", 64).tolist() == [10, 11, 12]
    none = calibration_blocks(given, "z", 64)
    assert none.tolist() == [] and none.dtype == np.int64
