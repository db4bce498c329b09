"""Divergences D(p, q) between a sparse target p and the student q: pure functions, one literal table.

Both are probabilities of the same categories: the ids that some teacher kept, and one bucket for all
others. Each function gives, category by category, the divergence's share d and h = q·∂d/∂q; from these
follow value and gradient without a trace through the vocabulary (`chunk_terms.py`). With H = Σ h and
z the student's logits at temperature 1,

    D = Σ d        ∂D/∂z_j = h_j − q_j·H  if j is kept;   q_j·(h_B/q_B − H)  if j lies in bucket B

Limits 0·log 0 = 0 hold everywhere. Where a divergence asks for log p of what the teachers give nothing
(reverse KL alone: it is infinite there), p counts as `FLOOR`. That is a constant of the target, so no
gradient is lost; the student's side has no floor but the smallest number that keeps log finite.

Shapes: C rows, U categories.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.target_options import LossOptions

FLOOR = 1e-12  # p that reverse KL reads where there is less: a row's loss stays below 28 nats

Terms = tuple[Tensor, Tensor]


def forward_kl(p: Tensor, q: Tensor, logq: Tensor, mix: float) -> Terms:
    """KL(p‖q) = Σ p (log p − log q), ≥ 0. Hinton et al., arXiv 1503.02531.

    Args (of all of these functions):
        p, q: probabilities [C, U], ≥ 0; q > 0 in the bucket.
        logq: log q, finite also where q underflows to 0.
        mix: β or λ, where the divergence has one.

    Returns:
        (d, h = q·∂d/∂q), [C, U].
    """
    return p * (_log(p) - logq), -p


def reverse_kl(p: Tensor, q: Tensor, logq: Tensor, mix: float) -> Terms:
    """KL(q‖p) = Σ q (log q − log max(p, FLOOR)). MiniLLM, arXiv 2306.08543."""
    ratio = logq - p.clamp_min(FLOOR).log()
    return q * ratio, q * (ratio + 1.0)


def js(p: Tensor, q: Tensor, logq: Tensor, mix: float) -> Terms:
    """β KL(p‖m) + (1−β) KL(q‖m), m = βp + (1−β)q, 0 < β < 1. GKD, arXiv 2306.13649.

    Over β it nears KL(p‖q) as β → 0, over 1−β KL(q‖p) as β → 1; β = ½ is Jensen and Shannon's.
    """
    logm = _log(mix * p + (1.0 - mix) * q)
    ratio = (1.0 - mix) * q * (logq - logm)
    return mix * p * (_log(p) - logm) + ratio, ratio


def skew_kl(p: Tensor, q: Tensor, logq: Tensor, mix: float) -> Terms:
    """KL(p‖m), m = λp + (1−λ)q, 0 < λ < 1: never above −log λ. DistiLLM, arXiv 2402.03898."""
    m = mix * p + (1.0 - mix) * q
    return p * (_log(p) - _log(m)), -(1.0 - mix) * p * (q / _floored(m))


def skew_reverse_kl(p: Tensor, q: Tensor, logq: Tensor, mix: float) -> Terms:
    """KL(q‖m), m = (1−λ)p + λq, 0 < λ < 1: never above −log λ. DistiLLM, arXiv 2402.03898."""
    m = (1.0 - mix) * p + mix * q
    ratio = logq - _log(m)
    return q * ratio, q * (ratio + (1.0 - mix) * p / _floored(m))


def tv(p: Tensor, q: Tensor, logq: Tensor, mix: float) -> Terms:
    """½ Σ |p − q|, in [0, 1], with subgradient 0 at p = q. f-distill, arXiv 2307.15190."""
    return 0.5 * (p - q).abs(), 0.5 * q * (q - p).sign()


def _floored(x: Tensor) -> Tensor:
    return x.clamp_min(torch.finfo(x.dtype).tiny)


def _log(x: Tensor) -> Tensor:
    """log x, finite at 0, where each caller multiplies it by 0."""
    return _floored(x).log()


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, Tensor, float], Terms]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "js": js,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tv": tv,
}
"""loss.divergence → function."""


@dataclass(frozen=True)
class Divergence:
    """One of the table, with its number.

    Attributes:
        name: key of `DIVERGENCES`.
        mix: β of js, λ of the skewed ones; the others ignore it.
    """

    name: str = "forward_kl"
    mix: float = 0.0

    @classmethod
    def of(cls, options: LossOptions) -> Divergence:
        """Returns what `loss.divergence`, `loss.beta` and `loss.skew` say."""
        mix = {"js": options.beta, "skew_kl": options.skew, "skew_reverse_kl": options.skew}
        return cls(options.divergence, mix.get(options.divergence, 0.0))

    @property
    def per_teacher(self) -> bool:
        """Whether each teacher's own bucket is used: forward KL alone is linear in the target."""
        return self.name == "forward_kl"

    def terms(self, p: Tensor, q: Tensor, logq: Tensor) -> Terms:
        """Returns (d, h)."""
        return DIVERGENCES[self.name](p, q, logq, self.mix)
