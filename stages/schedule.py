"""What changes over the run: the learning rate, as a share of its peak, the loss's α, the weights."""

from __future__ import annotations

import math

from stages.target_options import LossOptions
from stages.train_options import TrainOptions


def lr_share(step: int, steps: int, options: TrainOptions) -> float:
    """Returns the factor of `lr` at a step.

    Linear warm-up over `warmup` of the steps; then cosine to `min_lr_ratio`, or WSD: constant, and a
    linear decay to 0 over the last `decay` of the steps.

    Args:
        step: 0-based.
        steps: length of the run.
    """
    warm = math.ceil(options.warmup * steps)
    if step < warm:
        return (step + 1) / warm
    if options.schedule == "cosine":
        done = (step - warm) / max(1, steps - warm)
        low = options.min_lr_ratio
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))
    tail = math.ceil(options.decay * steps)
    return min(1.0, (steps - step) / tail) if tail else 1.0


def alpha_at(step: int, steps: int, options: LossOptions) -> float:
    """Returns α, the share of distillation, at a step.

    constant: `alpha`. linear: α = alpha + (alpha_end − alpha)·s/(S − 1) at step s of S, both ends
    reached. wsd: from `alpha_end` in equal steps up to `alpha` over `alpha_warmup` of the steps, then
    `alpha`, and linearly back to `alpha_end` over the last `alpha_decay`, as the learning rate does
    (WSD-α of arXiv 2410.16215).

    Args:
        step: 0-based.
        steps: length of the run.
    """
    high, low = options.alpha, options.alpha_end
    if options.alpha_schedule == "constant":
        return high
    if options.alpha_schedule == "linear":
        return high + (low - high) * step / max(1, steps - 1)
    warm, tail = math.ceil(options.alpha_warmup * steps), math.ceil(options.alpha_decay * steps)
    share = (step + 1) / warm if step < warm else 1.0
    if tail:
        share = min(share, (steps - step) / tail)
    return low + (high - low) * share


def weights_share(step: int, steps: int, ramp: float) -> float:
    """Returns how far the teachers' weights are on their way from the first to the chosen ones.

    Linear from 0 to 1 over the first n = ⌈ramp·steps⌉ steps, both ends reached: s/(n − 1) at step s;
    then 1.

    Args:
        step: 0-based.
        steps: length of the run.
        ramp: `fusion.ramp`.
    """
    last = math.ceil(ramp * steps) - 1
    return min(1.0, step / last) if last > 0 else 1.0
