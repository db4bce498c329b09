"""M teachers' entries merged: one list of distinct ids a row, with who lacks which.

What a chunk of logits needs of a fused target is then asked for once an id, and not once a teacher.

Shapes: M teachers, C rows, K entries a teacher, U = M·K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.fusion import FusedTarget


@dataclass(frozen=True)
class UnionTarget:
    """A fused target's entries by id.

    Attributes:
        ids: int64 [C, U], distinct ids, ascending; what is left of U repeats the first.
        kept: bool [C, U], False for those repeats.
        p: [C, U], Σ_m w_m p_m of each id; 0 for repeats.
        absent: bool [M, C, U], whether an id is none of teacher m's (True for repeats).
        tail: [M, C], w_m t_m.
        known: [C], Σ_m w_m (Σ_k p log p + t log t): the part of forward KL that has no student.
        vocab_size, temperature: as in FusedTarget.
    """

    ids: Tensor
    kept: Tensor
    p: Tensor
    absent: Tensor
    tail: Tensor
    known: Tensor
    vocab_size: int
    temperature: float

    @property
    def top_C(self) -> Tensor:
        """int64 [C], the fused target's most probable id (the least of equals)."""
        return self.ids.gather(-1, self.p.argmax(-1, keepdim=True))[:, 0]

    def rows(self, start: int, stop: int) -> UnionTarget:
        """Returns rows [start, stop)."""
        return self.at(slice(start, stop))

    def at(self, rows: slice | Tensor) -> UnionTarget:
        """Returns some rows, a slice or int64 indices."""
        return UnionTarget(
            self.ids[rows], self.kept[rows], self.p[rows], self.absent[:, rows], self.tail[:, rows],
            self.known[rows], self.vocab_size, self.temperature,
        )  # fmt: skip


def merge(target: FusedTarget, dtype: torch.dtype) -> UnionTarget:
    """Returns the target's entries by id, in a dtype: an id of several teachers stands once."""
    teachers, count, k = target.ids.shape
    w, p, tail = (x.to(dtype) for x in (target.weights, target.p, target.tail))

    def side_by_side(x_MCK: Tensor) -> Tensor:
        return x_MCK.transpose(0, 1).reshape(count, teachers * k)

    ids, order = side_by_side(target.ids).sort(-1)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    run = first.cumsum(-1) - 1
    weighted = side_by_side(w[..., None] * p).gather(-1, order)
    absent = torch.ones(count, teachers * run.shape[1], dtype=torch.bool, device=ids.device)
    absent.scatter_(-1, (order // k) * run.shape[1] + run, False)
    entropy = (p * target.logp.to(dtype)).sum(-1) + torch.special.xlogy(tail, tail)
    return UnionTarget(
        ids=ids[:, :1].expand_as(ids).scatter(-1, run, ids),
        kept=torch.arange(run.shape[1], device=ids.device) <= run[:, -1:],
        p=torch.zeros_like(weighted).scatter_add_(-1, run, weighted),
        absent=absent.view(count, teachers, run.shape[1]).transpose(0, 1),
        tail=w * tail, known=(w * entropy).sum(0),
        vocab_size=target.vocab_size, temperature=target.temperature,
    )  # fmt: skip
