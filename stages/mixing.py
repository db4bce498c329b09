"""Geometric mixing: M teachers' heads and buckets → one target, log p ∝ Σ_m w_m log p_m.

The categories are the ids that some teacher kept, and one bucket for all others. An id that teacher m
did not keep has there the probability that m's tail gives it when it is spread evenly,

    p_m(v) = t_m / (V − K_m)  for v outside m's own head        log 0 counts as LOG_ZERO

with K_m the distinct ids of that head. So the bucket, of N = V − |union| ids, is given
N · Π_m (t_m / (V − K_m))^w_m before everything is divided by its sum. At K = V this is the geometric
mean itself. Below that an id that only some teachers kept is given too little (the others' true
probability of it lies between that even share and their least kept one), and the bucket as much as the
teachers' tails allow: by Hölder's inequality Σ_v Π p_m^w_m is largest where they have one shape.

A product of powers of estimates is biased even where each estimate is not, hence no draws.

Shapes: M teachers, R rows, K entries, U = M·K.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from storage.types import LOG_ZERO

if TYPE_CHECKING:
    from stages.fusion import FusedTarget

_NEVER = 2 * LOG_ZERO  # below every stored logprob: no teacher's entry


def geometric(
    ids_MRK: Tensor,
    logp_MRK: Tensor,
    used_MRK: Tensor,
    tail_MR: Tensor,
    weights_MR: Tensor,
    vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the mixture as one target: (ids [1, R, U], log p, p, bucket's mass [1, R]).

    Entries beyond a row's distinct ids repeat the first with p = 0.

    Args:
        ids_MRK: int64.
        logp_MRK: tempered; Σ p over an entry's row, plus the tail, is 1.
        used_MRK: bool; False for entries that a top-p cut left unused, which repeat an id.
        tail_MR: tempered mass of each teacher's own bucket.
        weights_MR: ≥ 0, summing to 1 over M.
        vocab_size: V.
    """
    teachers, _, k = ids_MRK.shape
    each, ids, distinct_R1, missing_MR = _aligned(ids_MRK, logp_MRK, used_MRK, tail_MR, vocab_size)
    real = torch.arange(teachers * k, device=ids.device) < distinct_R1
    mixed = (weights_MR[..., None] * each).sum(0).masked_fill(~real, _NEVER)
    outside = (vocab_size - distinct_R1).to(mixed.dtype)
    bucket = (weights_MR * missing_MR).sum(0)[:, None] + outside.clamp_min(1.0).log()
    bucket = bucket.masked_fill(outside == 0, _NEVER)
    logp = torch.log_softmax(torch.cat([mixed, bucket], -1), -1)
    p = logp.exp().masked_fill(torch.cat([~real, outside == 0], -1), 0.0)
    head = logp[:, :-1].masked_fill(~real, LOG_ZERO).clamp_min(LOG_ZERO)
    return ids[None], head[None], p[None, :, :-1], p[None, :, -1]


def _aligned(
    ids_MRK: Tensor, logp_MRK: Tensor, used_MRK: Tensor, tail_MR: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns each teacher's log p of every id of the union [M, R, U], these ids [R, U], how many of
    them are distinct [R, 1] (the rest repeat the first), and each teacher's log p of any id outside
    its own head [M, R]."""
    teachers, rows, k = ids_MRK.shape
    flat = ids_MRK.transpose(0, 1).reshape(rows, -1)
    ordered, order = flat.sort(-1)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    place = new.cumsum(-1) - 1  # in the union, of each entry as sorted
    ids = ordered[:, :1].expand_as(ordered).scatter(-1, place, ordered)
    at = torch.empty_like(place).scatter_(-1, order, place)  # of each entry as given
    at = at.view(rows, teachers, k).transpose(0, 1)
    values = torch.where(used_MRK, logp_MRK, _NEVER)
    each = values.new_full((teachers, rows, teachers * k), _NEVER).scatter_reduce_(
        -1, at, values, "amax"
    )
    left = (vocab_size - used_MRK.sum(-1)).to(values.dtype)
    none = (tail_MR <= 0) | (left == 0)
    missing = (_log(tail_MR) - left.clamp_min(1.0).log()).masked_fill(none, LOG_ZERO)
    each = torch.where(each <= _NEVER, missing[..., None], each)
    return each, ids, place[:, -1:] + 1, missing


def fused_gold_logprob(target: FusedTarget, gold_R: Tensor, gold_MR: Tensor) -> Tensor:
    """Returns the ensemble's log p(gold) at temperature 1, float64 [R].

    Arithmetic: log Σ_m w_m p_m(gold), exact. Geometric: of the target itself, its bucket spread evenly
    over the ids outside the union, which is a proper distribution. The geometric mean of the whole
    distributions cannot be told from heads.

    Args:
        target: at temperature 1.
        gold_R: int64.
        gold_MR: log p_m(gold) of each teacher.
    """
    if target.spent is None:
        return (target.weights.double().log() + gold_MR.double()).logsumexp(0)
    ids, logp, tail = target.ids[0], target.logp[0].double(), target.tail[0].double()
    hit = ids == gold_R[:, None]
    inside = logp.masked_fill(~hit, LOG_ZERO).amax(-1)  # what repeats the first has LOG_ZERO
    outside = target.vocab_size - 1 - (ids != ids[:, :1]).sum(-1)
    spread = (_log(tail) - outside.clamp_min(1).log()).masked_fill(tail == 0, LOG_ZERO)
    return torch.where(hit.any(-1), inside, spread)


def _log(x: Tensor) -> Tensor:
    """log x, finite at 0."""
    return x.clamp_min(torch.finfo(x.dtype).tiny).log()
