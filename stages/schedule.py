"""Learning rates over the run, as shares of the peak."""

from __future__ import annotations

import math

from stages.options import TrainOptions


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
