"""From one slice of logits: cross-entropy, divergence, ranking, and the gradient of the logits.

The gradient is written down rather than traced. Forward KL keeps every teacher's own bucket. With
q = softmax(z/τ), p the head of teacher m, t its tail mass and q_t the student's mass on that bucket,

    d/dz_j τ Σ_m w_m KL(t_m‖q) = q_j − Σ_m w_m · (p_mj if j ∈ head_m;  t_m·q_j/q_tm if j is in its
                                                 bucket;  0 if j is padding)

that is, student minus a target whose tails have the student's own shape. Every other divergence takes
the mixture Σ_m w_m p_m over the union of the heads, and one bucket of mass Σ_m w_m t_m for the ids
outside it, with q renormalised over the vocabulary: padding has no part in it, and no gradient from it.

Passes over [C, P] at τ = 1: largest, softmax, its largest and its sum, the sum outside the union, scale.
Everything else is on [C, U]. torch's softmax is there for its exponentials, on a CPU quicker by a third
than exp; its own sum drifts by 5e-6 at V = 49,152 and so is taken again. Ids of any head are written, not
corrected: t/q_t may be huge and would cancel.

Shapes: C rows of a slice, P logits, V vocabulary, M teachers, U entries of all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.divergences import Divergence
from stages.union import UnionTarget

_TINY = 1e-30  # of a bucket's mass: below it log and ratio are taken from the logits (`_by_logs`)
_FAR_ROWS = 32  # of these at once; memory, not meaning
_LEAST = -1e30  # floor of a log-probability, so that 0 times it is 0


def chunk_terms(
    logits_CP: Tensor,
    gold_C: Tensor,
    target: UnionTarget | None,
    divergence: Divergence,
    ce_scale: float,
    kd_scale: float,
    wanted: bool,
) -> tuple[Tensor | None, Tensor]:
    """Returns (d total/d logits [C, P] if wanted, (ce, kd, correct, agreed, confidence) [5, C]);
    the last is 0 where the gradient is wanted: only evaluation looks at it."""
    soft = _Softmax.of(logits_CP, 1.0)
    largest, gold_logit = soft.largest, logits_CP.gather(-1, gold_C[:, None])
    z = soft.e.sum(-1, keepdim=True)
    terms = logits_CP.new_zeros(5, len(logits_CP))
    terms[0] = -soft.log_q(gold_C[:, None], z)[:, 0]
    terms[2] = (gold_logit == largest)[:, 0]
    if target is not None:
        terms[3] = (logits_CP.gather(-1, target.top_C[:, None]) == largest)[:, 0]
    if not wanted:
        known = logits_CP[:, : target.vocab_size if target else None]
        terms[4] = torch.softmax(known, -1).amax(-1)
    width = target.vocab_size if target and not divergence.per_teacher else logits_CP.shape[1]
    if target is not None and target.temperature == 1.0 and width == logits_CP.shape[1]:
        terms[1] = _distil(soft, target, divergence, ce_scale, kd_scale, wanted)
    elif target is not None:
        other = _Softmax.of(logits_CP[:, :width], target.temperature)
        scale = kd_scale / target.temperature
        terms[1] = _distil(other, target, divergence, 0.0, scale, wanted)
        if wanted:
            soft.e.mul_(ce_scale / z)[:, :width].add_(other.e)
    elif wanted:
        soft.e.mul_(ce_scale / z)
    if not wanted:
        return None, terms
    soft.e.scatter_add_(-1, gold_C[:, None], torch.full_like(gold_logit, -ce_scale))
    return soft.e, terms


@dataclass(frozen=True)
class _Softmax:
    """The student's distribution up to a factor a row, e ∝ exp(logits/τ).

    Attributes:
        logits, e: [C, W], W = P or V.
        largest: of the logits [C, 1].
        peak: e there [C, 1].
        temperature: τ.
    """

    logits: Tensor
    e: Tensor
    largest: Tensor
    peak: Tensor
    temperature: float

    @classmethod
    def of(cls, logits: Tensor, temperature: float) -> _Softmax:
        e = torch.softmax(logits if temperature == 1.0 else logits / temperature, -1)
        if logits.device.type == "cpu":
            largest, peak = logits.amax(-1, keepdim=True), e.amax(-1, keepdim=True)
        else:  # a pass less; a CPU's maximum with its place is slow
            largest, at = logits.max(-1, keepdim=True)
            peak = e.gather(-1, at)
        return cls(logits, e, largest, peak, temperature)

    def log_q(self, ids: Tensor, z: Tensor) -> Tensor:
        """Returns log q of some ids, exact where e underflows; z is the sum of e."""
        scaled = (self.logits.gather(-1, ids) - self.largest) / self.temperature
        return scaled + (self.peak / z).log()


def _distil(
    soft: _Softmax, target: UnionTarget, divergence: Divergence, a: float, b: float, wanted: bool
) -> Tensor:
    """Returns kd [C]; if wanted, `soft.e` becomes the gradient a·q + b·τ·dD/dz.

    a is 0 wherever q is not cross-entropy's softmax.
    """
    ids, vocab, e = target.ids, target.vocab_size, soft.e
    kept = e.gather(-1, ids) * target.kept
    e.scatter_(-1, ids, 0.0)
    rest = e[:, :vocab].sum(-1, keepdim=True)  # summed directly and not as 1 − head
    z = rest + kept.sum(-1, keepdim=True)
    if e.shape[1] > vocab:
        z = z + e[:, vocab:].sum(-1, keepdim=True)
    logq = soft.log_q(ids, z).clamp_min_(_LEAST)
    form = _per_teacher if divergence.per_teacher else _mixture
    kd, own, outside, far = form(kept / z, logq, rest / z, target, divergence, a, b)
    if wanted:
        e[:, :vocab].mul_(outside / z)
        e[:, vocab:].mul_((a + b) / z)  # forward KL alone comes here with padding
        # Repeats of the first id are written with the first id's value: the order does not matter.
        e.scatter_(-1, ids, torch.where(target.kept, own, own[:, :1]))
    if far is not None:
        for rows in torch.split(far.nonzero()[:, 0], _FAR_ROWS):
            kd[rows], gradient = _by_logs(soft.logits[rows], target.at(rows), a, b)
            if wanted:
                e[rows] = gradient
    return kd


_Form = tuple[Tensor, Tensor, Tensor, Tensor | None]


def _per_teacher(
    q: Tensor, logq: Tensor, rest: Tensor, target: UnionTarget, _: Divergence,
    a: float, b: float,
) -> _Form:  # fmt: skip
    """Forward KL to each teacher; q is 0 at repeats.

    Returns:
        kd [C]; the gradient of the union's ids [C, U]; what multiplies q_j of the other ids [C, 1];
        bool [C], rows whose student has too little in some bucket for these to be exact.
    """
    # Teacher m's bucket: what no teacher kept, and what others did: sums of positive terms only.
    bucket = rest[:, 0] + (q * target.absent).sum(-1)
    far = ((bucket < _TINY) & (target.tail > 0)).any(0)
    bucket = bucket.clamp_min(_TINY)  # [M, C]
    kd = target.known - (target.p * logq).sum(-1) - (target.tail * bucket.log()).sum(0)
    ratio = target.tail / bucket  # w_m·t_m/q_tm
    own = q * (a + b * (1.0 - (ratio[..., None] * target.absent).sum(0))) - b * target.p
    return kd, own, (a + b * (1.0 - ratio.sum(0)))[:, None], far


def _by_logs(logits_CP: Tensor, target: UnionTarget, a: float, b: float) -> tuple[Tensor, Tensor]:
    """Forward KL and a·q + b·τ·d/dz as in `_per_teacher`, exact where q_t underflows; several passes.

    q_j/q_t is the softmax of the bucket's own logits, and log q_t its log-sum-exp. A bucket without an
    id has no part.
    """
    logq = torch.log_softmax(logits_CP / target.temperature, -1)
    kd = target.known - (target.p * logq.gather(-1, target.ids)).sum(-1)
    gradient = (logq.exp() * (a + b)).scatter_add_(-1, target.ids, -b * target.p)
    for absent, tail in zip(target.absent, target.tail, strict=True):
        outside = torch.ones_like(logq, dtype=torch.bool)
        # Repeats of the first id say what it says: the order of writing does not matter.
        outside.scatter_(-1, target.ids, torch.where(target.kept, absent, absent[:, :1]))
        outside[:, target.vocab_size :] = False
        tail = torch.where(outside.any(-1), tail, 0.0)
        bucket = logq.masked_fill(~outside, _LEAST)
        kd = kd - torch.where(tail > 0, tail * bucket.logsumexp(-1), 0.0)
        gradient.sub_(bucket.softmax(-1).mul_(b * tail[:, None]))
    return kd, gradient


def _mixture(
    q: Tensor, logq: Tensor, rest: Tensor, target: UnionTarget, divergence: Divergence,
    a: float, b: float,
) -> _Form:  # fmt: skip
    """Any divergence to the mixture, over the union and one bucket. Returns what the other does."""
    p_bucket = target.tail.sum(0)[:, None]
    q_bucket = rest.clamp_min(_TINY)
    # A bucket that holds no id has no part, also where each teacher leaves a tail to the others' ids.
    there = target.kept.sum(-1, keepdim=True) < target.vocab_size
    d, h = divergence.terms(
        torch.cat([target.p, p_bucket], -1), torch.cat([q, q_bucket], -1),
        torch.cat([logq, q_bucket.log()], -1),
    )  # fmt: skip
    there = torch.cat([target.kept, there], -1)
    d, h = torch.where(there, d, 0.0), torch.where(there, h, 0.0)
    total = h.sum(-1, keepdim=True)
    own = q * (a - b * total) + b * h[:, :-1]
    return d.sum(-1), own, a + b * (h[:, -1:] / q_bucket - total), None
