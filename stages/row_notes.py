"""A chunk of logits → the notes on its rows: head, exact statistics, tail draws.

Shapes: R annotated rows, C rows of a chunk, V vocabulary, K head entries, S draws, Z temperatures.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

from stages.row_threads import over_rows
from stages.tail_draws import draw
from stages.top_k import top_k
from storage.layout import Layout
from storage.types import LOG_ZERO

SLICE_ROWS = 8
"""Rows that a CPU's thread passes over together: their logits and a buffer of that size, 3 MB at
V = 49,152, stay in its cache for the most part; with fewer rows the calls cost what the cache saves."""

GONE = -1e30
"""Stands in a row of logits where the head was: its exponential is 0 at every temperature, and its
product with that is 0, where −inf would give NaN."""


@dataclass(frozen=True)
class NoteRule:
    """What is noted of a row: see storage.layout.Layout for the fields."""

    k: int
    temperatures: tuple[float, ...] = ()
    top_p: float = 1.0
    draws: int = 0

    @classmethod
    def of(cls, layout: Layout) -> NoteRule:
        return cls(layout.k, layout.temperatures, layout.top_p, layout.draws)


@dataclass(frozen=True)
class RowNotes:
    """Notes on R rows, on the device.

    Attributes:
        ids, logprobs: [R, K], the head, most probable first; ids int64. Entries beyond a top-p cut
            repeat the most probable id with logprob LOG_ZERO.
        entropy, log_tail_mass, gold_logprob: [R].
        log_z: [R, Z].
        draw_ids, draw_logprobs: [R, S], ids outside the kept head, which may repeat; float32
            logprobs at temperature 1. Where the tail has no mass: the most probable id, LOG_ZERO.
    """

    ids: Tensor
    logprobs: Tensor
    entropy: Tensor
    log_tail_mass: Tensor
    gold_logprob: Tensor
    log_z: Tensor
    draw_ids: Tensor
    draw_logprobs: Tensor


@dataclass(frozen=True)
class _Sums:
    """What passes over the logits leave; logits are counted from the row's largest.

    ids, head: [R, K], the K most probable and their logits; gold: [R], a logit; tails: [R, Z + 1],
    Σ exp(logit/τ) outside these K for each τ and for 1; cross: [R], Σ logit·exp there; drawn: [R, S],
    the logits of draw_ids, −inf where there is no tail.
    """

    ids: Tensor
    head: Tensor
    gold: Tensor
    tails: Tensor
    cross: Tensor
    draw_ids: Tensor
    drawn: Tensor


Rows = TypeVar("Rows", _Sums, RowNotes)


@torch.inference_mode()
def annotate_logits(
    logits_CV: Tensor, gold_C: Tensor, rule: NoteRule, uniform_C: Tensor
) -> RowNotes:
    """Returns the notes on one chunk of logits.

    With z the logits and L = log Σ exp z:  log p = z − L,  H = L − Σ p·z,
    tail = Σ_{v not kept} p_v (summed directly, not as 1 − head, which would cancel),
    log_z(τ) = log Σ exp((z − L)/τ).

    Cost: K-selection (one pass) and, slice by slice in the cache, five passes, three for each
    temperature but 1 (two for 2), one for draws. In place, with a buffer of one slice a thread.

    Args:
        logits_CV: float32 or float64 [C, V], without padding rows of the head; overwritten.
        gold_C: int64 [C], the target of each row.
        rule: 1 ≤ k ≤ V head entries; draws S ≥ 0; top_p in (0, 1].
        uniform_C: float64 [C], u in [0, 1), where each row's draws begin.

    Returns:
        Notes; non-finite where the logits are. Each row's depend on it alone (its sums up to
        rounding).
    """
    on_cpu = logits_CV.device.type == "cpu"

    def work(span: slice) -> _Sums:
        step = SLICE_ROWS if on_cpu else span.stop
        e = logits_CV.new_empty(min(step, span.stop - span.start), logits_CV.shape[1])
        pieces = []
        for start in range(span.start, span.stop, step):
            rows = slice(start, min(start + step, span.stop))
            buffer = e[: rows.stop - start]
            pieces.append(_sums(logits_CV[rows], gold_C[rows], rule, uniform_C[rows], buffer))
        return join(_Sums, pieces)

    return _finish(join(_Sums, over_rows(work, len(logits_CV), logits_CV.device)), rule)


def _sums(logits: Tensor, gold: Tensor, rule: NoteRule, uniform: Tensor, e: Tensor) -> _Sums:
    """Passes over a slice of logits; overwrites it and `e`, a buffer of its shape."""
    top, ids = top_k(logits, rule.k)
    largest = top[:, :1]
    head = top - largest
    # exp at τ = 2 and its square serve two temperatures. Halving is exact, and no pass of its own.
    unit = 2.0 if 2.0 in rule.temperatures else 1.0
    below = torch.add(largest / -unit, logits, alpha=1.0 / unit, out=logits)
    gold_logit = below.gather(-1, gold[:, None])[:, 0] * unit
    below.scatter_(-1, ids, GONE)
    tails = _exponentials(below, unit, rule.temperatures, e)
    cross = below.mul_(e).sum(-1) * unit
    draw_ids, drawn = ids[:, :0], head[:, :0]
    if rule.draws:
        if rule.top_p < 1.0:  # what is cut from the head may be drawn
            kept = _kept(head.exp(), tails[:, -1], rule.top_p)
            e.scatter_(-1, ids, head.exp().masked_fill_(kept, 0.0))
        draw_ids = draw(e, uniform, rule.draws)
        drawn = e.gather(-1, draw_ids).log_()
        draw_ids = torch.where(torch.isneginf(drawn), ids[:, :1], draw_ids)
    return _Sums(ids, head, gold_logit, tails, cross, draw_ids, drawn)


def _kept(head_e: Tensor, tail: Tensor, top_p: float) -> Tensor:
    """Returns bool [R, K]: whether the mass before an entry has not yet reached top_p."""
    mass = head_e.double().cumsum(-1)
    total = mass[:, -1:] + tail[:, None]
    return torch.nn.functional.pad(mass[:, :-1], (1, 0)) < top_p * total


def _finish(sums: _Sums, rule: NoteRule) -> RowNotes:
    """Turns the sums of a chunk into its notes; O(C·K)."""
    head, head_e, tail = sums.head, sums.head.exp(), sums.tails[:, -1]
    total = tail + head_e.sum(-1)
    lse = total.log()[:, None]  # L, counted from the largest logit
    entropy = lse[:, 0] - (sums.cross + (head_e * head).sum(-1)) / total
    log_z = [
        (sums.tails[:, z] + (head / t).exp().sum(-1)).log() - lse[:, 0] / t
        for z, t in enumerate(rule.temperatures)
    ]
    ids, logprobs = sums.ids, (head - lse).clamp(LOG_ZERO, 0.0)
    if rule.top_p < 1.0:
        kept = _kept(head_e, tail, rule.top_p)
        tail = tail + head_e.masked_fill(kept, 0.0).sum(-1)
        ids = torch.where(kept, ids, ids[:, :1])
        logprobs = logprobs.masked_fill(~kept, LOG_ZERO)
    return RowNotes(
        ids=ids,
        logprobs=logprobs,
        entropy=entropy.clamp_min(0.0),
        log_tail_mass=(tail.log() - lse[:, 0]).clamp(LOG_ZERO, 0.0),
        gold_logprob=(sums.gold - lse[:, 0]).clamp(LOG_ZERO, 0.0),
        log_z=torch.stack(log_z, -1) if log_z else lse[:, :0],
        draw_ids=sums.draw_ids,
        draw_logprobs=(sums.drawn - lse).clamp(LOG_ZERO, 0.0),
    )


def _exponentials(below: Tensor, unit: float, temperatures: tuple[float, ...], e: Tensor) -> Tensor:
    """Returns Σ exp(logit/τ) for each τ, and last for 1, [R, Z + 1]; leaves exp(logit) in `e`.

    `below` holds logit/unit, unit 1 or 2. Roots of exp(logit) would be no quicker than exponentials
    of their own, and wrong: it underflows below −103, where its τ-th roots still count.
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


def join(kind: type[Rows], pieces: list[Rows]) -> Rows:
    """Returns one of these for the rows of all pieces, in order."""
    names = [field.name for field in fields(kind)]
    return kind(**{n: torch.cat([getattr(piece, n) for piece in pieces]) for n in names})
