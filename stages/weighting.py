"""How much each teacher counts, token by token: the literal table of weightings.

Shapes: M teachers, R rows (tokens with a target). Weights are ≥ 0 and sum to 1 over the teachers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stages.options import FusionOptions
from storage.errors import ConfigError

Weighting = Callable[[Tensor, Sequence[str], FusionOptions], Tensor]


def uniform(entropy_MR: Tensor, names: Sequence[str], options: FusionOptions) -> Tensor:
    """w_m = 1/M."""
    return torch.full_like(entropy_MR, 1.0 / len(names))


def static(entropy_MR: Tensor, names: Sequence[str], options: FusionOptions) -> Tensor:
    """w_m = s_m / Σ s, the same for every token.

    Raises:
        ConfigError: `static` does not name exactly the teachers, or is zero altogether.
    """
    given = options.static
    if set(given) != set(names) or not sum(given.values()):
        raise ConfigError(
            "static weights must name every teacher, and one must be positive",
            where="fusion.static", expected=", ".join(names),
            found=", ".join(f"{k}={v}" for k, v in given.items()) or "nothing",
            todo="give a weight for each teacher",
        )  # fmt: skip
    weights = entropy_MR.new_tensor([given[name] for name in names])
    return (weights / weights.sum())[:, None].expand_as(entropy_MR)


def entropy(entropy_MR: Tensor, names: Sequence[str], options: FusionOptions) -> Tensor:
    """w_m ∝ exp(−H_m/τ), H_m the exact entropy of teacher m's distribution of this token.

    The entropy-driven weights of arXiv 2507.15198 as a softmax over teachers: τ → ∞ is uniform,
    τ → 0 takes the surest teacher. Never looks at the gold token.
    """
    return torch.softmax(-entropy_MR / options.tau, dim=0)


WEIGHTINGS: dict[str, Weighting] = {"uniform": uniform, "static": static, "entropy": entropy}
"""fusion.weights → function."""
