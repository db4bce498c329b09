"""Expected calibration error, from sums that add up over blocks.

Guo et al., "On Calibration of Modern Neural Networks" (arXiv 1706.04599), equation 3: rows go into 15
bins of equal width by the probability of their most probable id, and

    ECE = Σ_b n_b/n · |accuracy_b − confidence_b|
"""

from __future__ import annotations

import torch
from torch import Tensor

from storage.types import Float64

BINS = 15
COLUMNS = 3 * BINS
"""Of each bin: rows, their summed confidence, how many are right."""


def bin_sums(confidence_R: Tensor, correct_R: Tensor, group_R: Tensor, groups: int) -> Tensor:
    """Returns what `calibration_error` needs, float64 [groups, COLUMNS]; it may be added up.

    Args:
        confidence_R: probability of each row's most probable id.
        correct_R: 1 where that id is the gold one, else 0.
        group_R: int64, each row's group (its block).
    """
    # Bin b is (b/15, (b+1)/15], as in the paper.
    index_R = (confidence_R * BINS).ceil().long().clamp(1, BINS) - 1
    confidence, correct = confidence_R.double(), correct_R.double()
    terms_R3 = torch.stack([torch.ones_like(confidence), confidence, correct], 1)
    sums = terms_R3.new_zeros(groups * BINS, 3).index_add_(0, group_R * BINS + index_R, terms_R3)
    return sums.view(groups, COLUMNS)


def calibration_error(sums: Float64) -> Float64:
    """Returns the ECE, [...], of sums [..., COLUMNS]."""
    bins = sums.reshape(*sums.shape[:-1], BINS, 3)
    gaps: Float64 = abs(bins[..., 2] - bins[..., 1]).sum(-1) / bins[..., 0].sum(-1)
    return gaps
