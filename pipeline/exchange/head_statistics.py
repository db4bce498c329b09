"""What a head alone tells of its distribution: the tail's mass, and the least entropy that it allows.

Shapes: R rows, K head entries, V vocabulary.
"""

from __future__ import annotations

import numpy as np

from storage.types import LOG_ZERO, AnyArray, Float32, Float64


def head_statistics(logprobs: Float32, vocab_size: int) -> tuple[Float32, Float32]:
    """Returns (log tail mass, least entropy in nats), float32 [R].

    With t = 1 − Σ p over the head (0 where rounding made that negative) and p_K its least probability,
    no id of the tail has more than p_K. Entropy is concave, so it is least where the tail is as uneven as
    that allows: ⌊t / p_K⌋ ids of p_K and one of the rest r,

        H ≥ −Σ_head p log p − ⌊t / p_K⌋ p_K log p_K − r log r

    with equality for such tails. A head that holds the whole vocabulary has its own entropy.

    Args:
        logprobs: float32 [R, K], ≤ 0.
        vocab_size: V.
    """
    p = np.exp(logprobs.astype(np.float64))
    tail = np.maximum(1.0 - p.sum(1), 0.0)
    if logprobs.shape[1] == vocab_size:
        tail = np.zeros_like(tail)
    least = p.min(1, initial=1.0)
    with np.errstate(divide="ignore"):
        log_tail = np.where(tail > 0, np.log(tail), LOG_ZERO)
        whole = np.floor(np.divide(tail, least, out=np.zeros_like(tail), where=least > 0))
    rest = np.maximum(tail - whole * least, 0.0)
    bound = _entropy(p).sum(1) + whole * _entropy(least) + _entropy(rest)
    # No tail of more ids than there are: what float rounding may leave is no bound above log V.
    bound = np.minimum(bound, np.log(vocab_size))
    return log_tail.astype(np.float32), bound.astype(np.float32)


def _entropy(p: AnyArray) -> Float64:
    """Returns −p log p, 0 at 0."""
    return -p * np.log(np.where(p > 0, p, 1.0))
