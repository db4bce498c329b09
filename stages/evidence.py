"""What weights are made of: the teachers' statistics on some rows, of a token or of its sequence.

Shapes: M teachers, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from stages.fusion import NoteRows


@dataclass(frozen=True)
class Evidence:
    """The teachers' notes on R rows, as a weighting asks for them.

    Attributes:
        notes: teacher → notes on the same rows.
        vocab_size: V.
        sequence_R: int64, number of each row's sequence; its rows' mean stands for each of them.
            None: every row stands for itself.
        fitted_MR: weights fitted beforehand, for each row; None where nothing was fitted.
    """

    notes: Mapping[str, NoteRows]
    vocab_size: int
    sequence_R: Tensor | None = None
    fitted_MR: Tensor | None = None

    @property
    def log_vocab(self) -> float:
        """log V, the largest entropy there is, nats."""
        return math.log(self.vocab_size)

    @property
    def entropy(self) -> Tensor:
        """[M, R], exact entropies, nats."""
        return self._means([note.entropy for note in self.notes.values()])

    @property
    def largest(self) -> Tensor:
        """[M, R], the largest probability at temperature 1: that of the head's first id."""
        return self._means([note.logprobs.amax(-1).exp() for note in self.notes.values()])

    @property
    def gold_loss(self) -> Tensor:
        """[M, R], −log p_m(gold), nats."""
        return self._means([-note.gold_logprob for note in self.notes.values()])

    def constant(self, weights: Sequence[float]) -> Tensor:
        """Returns [M, R] of one number a teacher."""
        like = next(iter(self.notes.values())).entropy
        return like.new_tensor(weights)[:, None].expand(-1, len(like))

    def _means(self, values: Sequence[Tensor]) -> Tensor:
        stacked = torch.stack(list(values))
        return stacked if self.sequence_R is None else sequence_means(stacked, self.sequence_R)


def sequence_means(values_MR: Tensor, sequence_R: Tensor) -> Tensor:
    """Returns [M, R], each row's value replaced by the mean over its sequence (summed in float64)."""
    if not len(sequence_R):
        return values_MR
    count = int(sequence_R.max()) + 1
    wide = torch.cat([values_MR, torch.ones_like(values_MR[:1])]).double()
    sums = wide.new_zeros(len(wide), count).index_add_(1, sequence_R, wide)
    means = sums[:-1] / sums[-1].clamp_min(1.0)
    return means.to(values_MR.dtype)[:, sequence_R]
