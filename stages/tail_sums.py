"""Passes over rows of logits without their head: the sums that a row's statistics are made of.

Two ways give the same sums up to rounding. Eager: operations of torch one by one, in a buffer of few
rows that stays in the cache. Compiled: `torch.compile` makes one loop of them (on a GPU, kernels that
read the logits once or twice instead of a dozen times), with powers of one exponential.

Shapes: R rows, V vocabulary, Z temperatures, G groups of draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from stages.tail_draws import sum_groups
from storage.errors import ConfigError

GONE = -1e30
"""Stands in a row of logits where the head was: its exponential is 0 at every temperature, and its
product with that is 0, where −inf would give NaN."""

PASS_ROWS = 2
"""Rows that a CPU's eager passes take together. With more, logits and buffers would leave the cache
between two passes; with fewer, the calls would cost as much."""

LARGEST_POWER = 12
"""Of one exponential, in the place of others: its relative error, 1e-7, grows as much."""


@dataclass(frozen=True)
class TailSums:
    """Sums over R rows; logits z are counted from the row's largest, head included, and GONE is 0.

    Attributes:
        tails: [R, Z + 1], Σ exp(z/τ) for each τ, and last for 1.
        cross: [R], Σ z·exp(z).
        groups: [R, G + 1], Σ exp(z) over each group of tail_draws.py; [R, 0] if not asked for.
    """

    tails: Tensor
    cross: Tensor
    groups: Tensor


def eager_sums(
    logits_RV: Tensor, largest_R1: Tensor, temperatures: Sequence[float], groups: bool
) -> TailSums:
    """Returns the sums, by one pass each to count from the largest, to multiply by it and to sum, and
    three for each τ but 1 (two for 2, whose exponentials' square serves for 1)."""
    step = PASS_ROWS if logits_RV.device.type == "cpu" else max(1, len(logits_RV))
    # exp at τ = 2 and its square serve two temperatures. Halving is exact, and no pass of its own.
    unit = 2.0 if 2.0 in temperatures else 1.0
    offset = largest_R1 / -unit
    below, e = (logits_RV.new_empty(min(step, len(logits_RV)), logits_RV.shape[1]) for _ in "ab")
    tails, cross, grouped = [], [], [logits_RV[:0, :0]]
    for start in range(0, len(logits_RV), step):
        rows = logits_RV[start : start + step]
        x, y = below[: len(rows)], e[: len(rows)]
        torch.add(offset[start : start + step], rows, alpha=1.0 / unit, out=x)
        tails.append(_exponentials(x, unit, temperatures, y))
        if groups:
            grouped.append(sum_groups(y))
        cross.append(y.mul_(x).sum(-1))
    return TailSums(
        torch.cat(tails), torch.cat(cross).mul_(unit),
        torch.cat(grouped[1:]) if groups else largest_R1[:, :0],
    )  # fmt: skip


def _exponentials(below: Tensor, unit: float, temperatures: Sequence[float], e: Tensor) -> Tensor:
    """Returns Σ exp(z/τ) for each τ, and last for 1, [R, Z + 1]; leaves exp(z) in `e`.

    `below` holds z/unit, unit 1 or 2. Roots of exp(z) would be no quicker than exponentials of their
    own, and wrong: it underflows below −103, where its τ-th roots still count.
    """
    sums: dict[float, Tensor] = {}
    for t in sorted({*temperatures, 1.0}, key=lambda t: (t == 1.0, t == unit)):
        if t == unit:
            torch.exp(below, out=e)
        elif t == 1.0:
            torch.mul(e, e, out=e)
        else:
            torch.mul(below, unit / t, out=e).exp_()
        sums[t] = e.sum(-1)
    return torch.stack([sums[t] for t in (*temperatures, 1.0)], -1)


@cache
def compiled_sums(
    temperatures: tuple[float, ...], groups: bool
) -> Callable[[Tensor, Tensor], TailSums]:
    """Returns a function of logits [R, V] and the largest [R, 1] that gives what `eager_sums` does.

    It is compiled when it is first called, which takes some 10 s, and again for a single row.

    Raises (when called):
        ConfigError: there is no compiler.
    """
    unit = next((u for u in range(1, LARGEST_POWER + 1) if _divides(u, temperatures)), 1)

    def passes(logits: Tensor, largest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        below = logits - largest
        root = torch.exp(below / unit)
        e = power(root, unit)
        tails = [
            (power(root, round(unit / t)) if _divides(unit, (t,)) else torch.exp(below / t)).sum(-1)
            for t in temperatures
        ]
        grouped = sum_groups(e) if groups else largest[:, :0]
        return torch.stack([*tails, e.sum(-1)], -1), (below * e).sum(-1), grouped

    fused = torch.compile(passes, dynamic=True)

    def run(logits: Tensor, largest: Tensor) -> TailSums:
        try:
            return TailSums(*fused(logits, largest))
        except Exception as error:
            if "compiler" not in f"{type(error).__name__} {error}".lower():
                raise
            raise ConfigError(
                "the passes over the vocabulary cannot be compiled", where="store.compile",
                found=str(error).strip().splitlines()[0],
                todo="install a C++ compiler (g++), or set store.compile: false",
            ) from error  # fmt: skip

    return run


def _divides(unit: int, temperatures: Sequence[float]) -> bool:
    return all(unit / t == round(unit / t) <= LARGEST_POWER for t in temperatures)


def power(x: Tensor, n: int) -> Tensor:
    """Returns x^n, n ≥ 1, by multiplications; a compiler keeps one of those that recur."""
    if n == 1:
        return x
    return power(x * x, n // 2) if n % 2 == 0 else power(x, n - 1) * x
