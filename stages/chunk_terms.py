"""From one slice of logits: cross-entropy, divergence, ranking, and the gradient of the logits.

The gradient is written down rather than traced. Forward KL keeps every teacher's own bucket. With
q = softmax(z/τ), p the head of teacher m, t its tail mass and q_t the student's mass on that bucket,

    d/dz_j τ Σ_m w_m KL(t_m‖q) = q_j − Σ_m w_m · (p_mj if j ∈ head_m;  t_m·q_j/q_tm if j is in its
                                                 bucket;  0 if j is padding)

that is, student minus a target whose tails have the student's own shape. Every other divergence takes
the mixture Σ_m w_m p_m over the union of the heads, and one bucket of mass Σ_m w_m t_m for the ids
outside it, with q renormalised over the vocabulary: padding has no part in it, and no gradient from it.

Passes over [C, P] at τ = 1: largest, subtract, exp, sum, sum outside the union, scale. Everything else
is on [C, U]. Ids of any head are written, not corrected: t/q_t may be huge and would cancel.

Shapes: C rows of a slice, P logits, V vocabulary, M teachers, U entries of all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.divergences import Divergence
from stages.union import UnionTarget

_TINY = 1e-30  # floor of a bucket's unnormalised mass: keeps log and ratio finite in float32
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
    """Returns (d total/d logits [C, P] if wanted, (ce, kd, correct, agreed) [4, C])."""
    largest = logits_CP.amax(-1, keepdim=True)
    gold_logit = logits_CP.gather(-1, gold_C[:, None])
    terms = logits_CP.new_zeros(4, len(logits_CP))
    terms[2] = (gold_logit == largest)[:, 0]
    if target is not None:
        terms[3] = (logits_CP.gather(-1, target.top_C[:, None]) == largest)[:, 0]
    e = (logits_CP - largest).exp_()
    z = e.sum(-1, keepdim=True)
    terms[0] = (z.log() + largest - gold_logit)[:, 0]
    gradient = None
    if target is None:
        if wanted:
            gradient = e.mul_(ce_scale / z)
    elif target.temperature == 1.0 and _same_softmax(logits_CP, target, divergence):
        terms[1], gradient = _distil(
            logits_CP, largest, e, target, divergence, ce_scale, kd_scale, wanted
        )
    else:
        if not _same_softmax(logits_CP, target, divergence):
            largest = logits_CP[:, : target.vocab_size].amax(-1, keepdim=True)
        f = (logits_CP - largest).div_(target.temperature).exp_()
        terms[1], gradient = _distil(
            logits_CP, largest, f, target, divergence, 0.0, kd_scale / target.temperature, wanted
        )
        if gradient is not None:
            gradient.add_(e.mul_(ce_scale / z))
    if gradient is not None:
        gradient.scatter_add_(-1, gold_C[:, None], torch.full_like(gold_logit, -ce_scale))
    return gradient, terms


def _same_softmax(logits_CP: Tensor, target: UnionTarget, divergence: Divergence) -> bool:
    """Whether the divergence's q is over the same logits as cross-entropy's: padding or none."""
    return divergence.per_teacher or logits_CP.shape[1] == target.vocab_size


def _distil(
    logits: Tensor,
    largest: Tensor,
    e: Tensor,
    target: UnionTarget,
    divergence: Divergence,
    a: float,
    b: float,
    wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """Returns (kd [C], gradient a·q + b·τ·dD/dz); `e` = exp((logits − largest)/τ) is consumed.

    a is 0 wherever q is not cross-entropy's softmax.
    """
    ids, vocab = target.ids, target.vocab_size
    kept = e.gather(-1, ids) * target.kept
    e.scatter_(-1, ids, 0.0)
    rest = e[:, :vocab].sum(-1, keepdim=True)  # summed directly and not as 1 − head
    z = rest + kept.sum(-1, keepdim=True)
    if divergence.per_teacher and e.shape[1] > vocab:
        z = z + e[:, vocab:].sum(-1, keepdim=True)
    scaled = (logits.gather(-1, ids) - largest) / target.temperature
    logq = (scaled - z.log()).clamp_min_(_LEAST)
    form = _per_teacher if divergence.per_teacher else _mixture
    kd, own, outside, padding = form(kept / z, logq, rest / z, z, target, divergence, a, b)
    if not wanted:
        return kd, None
    e[:, :vocab].mul_(outside / z)
    if e.shape[1] > vocab:
        e[:, vocab:].mul_(padding / z) if padding else e[:, vocab:].zero_()
    # Repeats of the first id are written with the first id's value: the order does not matter.
    e.scatter_(-1, ids, torch.where(target.kept, own, own[:, :1]))
    return kd, e


_Form = tuple[Tensor, Tensor, Tensor, float]


def _per_teacher(
    q: Tensor, logq: Tensor, rest: Tensor, z: Tensor, target: UnionTarget, _: Divergence,
    a: float, b: float,
) -> _Form:  # fmt: skip
    """Forward KL to each teacher. Returns (kd [C], gradient of kept ids [C, U], factors of q_j).

    q is 0 at repeats. The factors belong to ids outside the union [C, 1] and to padding.
    """
    # Teacher m's bucket: what no teacher kept, and what others did: sums of positive terms only.
    bucket = rest[:, 0] + (q * target.absent).sum(-1)
    bucket = torch.maximum(bucket, _TINY / z[:, 0])  # [M, C]
    kd = target.known - (target.p * logq).sum(-1) - (target.tail * bucket.log()).sum(0)
    ratio = target.tail / bucket  # w_m·t_m/q_tm
    own = q * (a + b * (1.0 - (ratio[..., None] * target.absent).sum(0))) - b * target.p
    return kd, own, (a + b * (1.0 - ratio.sum(0)))[:, None], a + b


def _mixture(
    q: Tensor, logq: Tensor, rest: Tensor, z: Tensor, target: UnionTarget, divergence: Divergence,
    a: float, b: float,
) -> _Form:  # fmt: skip
    """Any divergence to the mixture, over the union and one bucket. Returns what the other does."""
    p_bucket = target.tail.sum(0)[:, None]
    q_bucket = torch.maximum(rest, _TINY / z)
    there = (rest > 0) | (p_bucket > 0)  # a bucket that holds no id has no part
    d, h = divergence.terms(
        torch.cat([target.p, p_bucket], -1), torch.cat([q, q_bucket], -1),
        torch.cat([logq, q_bucket.log()], -1),
    )  # fmt: skip
    there = torch.cat([target.kept, there], -1)
    d, h = torch.where(there, d, 0.0), torch.where(there, h, 0.0)
    total = h.sum(-1, keepdim=True)
    own = q * (a - b * total) + b * h[:, :-1]
    return d.sum(-1), own, a + b * (h[:, -1:] / q_bucket - total), 0.0
