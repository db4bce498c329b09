"""M teachers' notes + weights → one fused target for the rows that have one.

Forward KL is linear in the target, so Σ_m w_m KL(t_m‖q) has the gradient of KL(Σ_m w_m t_m‖q), and
fusing sparse targets is putting their weighted entries side by side. Each teacher's tail is one
bucket: the ids outside that teacher's own head.

Shapes: M teachers, R rows, K head entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stages.options import FusionOptions
from stages.weighting import WEIGHTINGS
from storage.errors import ConfigError
from storage.types import Bool, TeacherNotes


@dataclass(frozen=True)
class FusedTarget:
    """The fused target of R rows at one temperature.

    Attributes:
        ids: int64 [M, R, K].
        logp: [M, R, K], log of `p`.
        p: [M, R, K], tempered head probabilities.
        tail: [M, R], tempered mass outside the head; p summed over K, plus tail, is 1.
        weights: [M, R], ≥ 0, summing to 1 over M.
        vocab_size: V; a student's logits beyond it are padding and get target 0.
        temperature: of target and student.
    """

    ids: Tensor
    logp: Tensor
    p: Tensor
    tail: Tensor
    weights: Tensor
    vocab_size: int
    temperature: float

    def rows(self, start: int, stop: int) -> FusedTarget:
        """Returns the target of rows [start, stop)."""
        return FusedTarget(
            self.ids[:, start:stop], self.logp[:, start:stop], self.p[:, start:stop],
            self.tail[:, start:stop], self.weights[:, start:stop], self.vocab_size, self.temperature,
        )  # fmt: skip


def temper(
    logprobs: Tensor, log_tail: Tensor, log_z: Tensor | None, temperature: float, complete: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Brings a head at temperature 1 to temperature τ.

    p_τ = exp(ℓ/τ − log_z(τ)) on the head. At τ = 1 the exact tail mass is known and the head is
    scaled to what remains, which undoes the rounding of its logprobs on average; at τ ≠ 1 the tail is
    what the exact partition leaves, 1 − Σ p_τ, never below 0.

    Args:
        logprobs: [..., K].
        log_tail: [...].
        log_z: log Σ_v p_v^(1/τ) [...], None at τ = 1.
        complete: whether the head holds the whole vocabulary (its tail is then exactly 0).

    Returns:
        (logp [..., K], p [..., K], tail [...]); p and tail sum to 1.
    """
    logp = logprobs if log_z is None else logprobs / temperature - log_z[..., None]
    p = logp.exp()
    mass = p.sum(-1)
    if complete:
        tail = torch.zeros_like(mass)
    elif log_z is None:
        tail = log_tail.exp()
    else:
        tail = (1.0 - mass).clamp_min(0.0)
    scale = (1.0 - tail) / mass
    return logp + scale.log()[..., None], p * scale[..., None], tail


def fuse(
    notes: Mapping[str, TeacherNotes],
    scored: Bool,
    grid: tuple[float, ...],
    vocab_size: int,
    temperature: float,
    options: FusionOptions,
) -> FusedTarget:
    """Returns the fused target of the scored rows of some blocks, on the CPU.

    Args:
        notes: teacher → notes on the same blocks.
        scored: bool [B, T].
        grid: temperatures whose log_z the caches hold.
        vocab_size: V.
        temperature: wanted.

    Raises:
        ConfigError: the caches cannot serve this temperature, or the weights are unusable.
    """
    column = temperature_column(temperature, grid)
    pieces = []
    for note in notes.values():
        log_z = None if column is None else torch.from_numpy(note.stats.log_z[scored][:, column])
        logprobs = torch.from_numpy(note.head.logprobs[scored])
        log_tail = torch.from_numpy(note.stats.log_tail_mass[scored])
        complete = logprobs.shape[-1] >= vocab_size
        pieces.append(temper(logprobs, log_tail, log_z, temperature, complete))
    entropy = np.stack([note.stats.entropy[scored] for note in notes.values()])
    weights = WEIGHTINGS[options.weights](torch.from_numpy(entropy), list(notes), options)
    ids = np.stack([note.head.ids[scored] for note in notes.values()])
    return FusedTarget(
        torch.from_numpy(ids.astype(np.int64)), torch.stack([a for a, _, _ in pieces]),
        torch.stack([b for _, b, _ in pieces]), torch.stack([c for _, _, c in pieces]),
        weights.contiguous(), vocab_size, temperature,
    )  # fmt: skip


def temperature_column(temperature: float, grid: tuple[float, ...]) -> int | None:
    """Returns the grid's column for a temperature, None for 1.

    Raises:
        ConfigError: the caches hold no log_z for it.
    """
    if temperature == 1.0:
        return None
    if temperature not in grid:
        raise ConfigError(
            "the caches cannot serve this temperature", where="loss.temperature",
            expected=f"one of {', '.join(str(t) for t in (1.0, *grid))}", found=temperature,
            todo="choose one of these, or add it to store.temperatures and cache again",
        )  # fmt: skip
    return grid.index(temperature)
