"""The plain losses: dense, differentiable by autograd, the reference for `chunked_head`.

Shapes: M teachers, R rows, P logits (vocabulary and padding), K head entries.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as _cross_entropy
from torch.nn.functional import log_softmax

from stages.divergences import Divergence
from stages.fusion import FusedTarget


def cross_entropy(logits_RP: Tensor, gold_R: Tensor) -> Tensor:
    """Returns −log q(gold) of each row, nats, [R]."""
    return _cross_entropy(logits_RP, gold_R, reduction="none")


def bucket_kl(logits_RP: Tensor, target: FusedTarget) -> Tensor:
    """Returns Σ_m w_m KL(t_m‖q) of each row, nats, [R], each teacher's tail as one bucket.

        KL(t‖q) = Σ_{i ∈ head} p_i (log p_i − log q_i) + t (log t − log Σ_{j ∉ head, j < V} q_j)

    with q = softmax(logits/τ) over all P logits: mass on padding ids is lost to every term, and so
    pushed down. A lower bound of the KL over the whole vocabulary, equal to it where K = V. The
    factor τ² of Hinton et al. (arXiv 1503.02531) is the caller's.
    """
    logq = log_softmax(logits_RP / target.temperature, dim=-1)
    total = logits_RP.new_zeros(len(logits_RP))
    for ids, logp, p, tail, weight in zip(
        target.ids, target.logp, target.p, target.tail, target.weights, strict=True
    ):
        head = (p * (logp - logq.gather(-1, ids))).sum(-1)
        outside = torch.ones_like(logq, dtype=torch.bool).scatter_(-1, ids, False)
        outside[:, target.vocab_size :] = False
        has_tail = tail > 0  # an empty tail adds 0 and must not meet log 0
        masked = logq.masked_fill(~outside, float("-inf"))[has_tail]
        bucket = tail[has_tail] * (tail[has_tail].log() - masked.logsumexp(-1))
        total = total + weight * head.index_add(0, has_tail.nonzero()[:, 0], bucket)
    return total


def mixture_divergence(logits_RP: Tensor, target: FusedTarget, divergence: Divergence) -> Tensor:
    """Returns D(p, q) of each row, nats, [R]: any divergence to the mixture of the teachers.

        categories: each id that is in some head, and one bucket of the other ids of the vocabulary
        p = Σ_m w_m p_m on the ids, Σ_m w_m t_m on the bucket

    with q = softmax(logits[:V]/τ): padding has no part. What a teacher leaves of an id that only
    others keep counts to the bucket, as nothing tells it apart.
    """
    vocab, shape = target.vocab_size, (len(logits_RP), target.vocab_size)
    p, kept = logits_RP.new_zeros(shape), torch.zeros_like(logits_RP[:, :vocab], dtype=torch.bool)
    for ids, mine, weight in zip(target.ids, target.p, target.weights, strict=True):
        p = p.scatter_add(-1, ids, weight[:, None] * mine)
        kept = kept.scatter(-1, ids, True)
    logq = log_softmax(logits_RP[:, :vocab] / target.temperature, dim=-1)
    each = divergence.terms(p, logq.exp(), logq)[0].masked_fill(~kept, 0.0).sum(-1)
    log_bucket = logq.masked_fill(kept, -1e30).logsumexp(-1)
    mass = (target.weights * target.tail).sum(0)
    bucket = divergence.terms(mass, log_bucket.exp(), log_bucket)[0]
    return each + bucket.masked_fill(kept.all(-1), 0.0)
