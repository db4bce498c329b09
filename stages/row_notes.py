"""A chunk of logits → the notes on its rows: head, exact statistics, tail draws.

Shapes: R annotated rows, C rows of a chunk, V vocabulary, K head entries, S draws, Z temperatures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

from stages.row_threads import over_rows
from stages.tail_draws import draw, group_of
from stages.tail_sums import GONE, TailSums, compiled_sums, eager_sums
from stages.top_k import top_k
from storage.layout import Layout
from storage.types import LOG_ZERO

SLICE_ROWS = 8
"""Rows that a CPU's thread takes together, from the selection of the head to the draws: 1.6 MB of logits
at V = 49,152, which stay in its cache for the most part."""


@dataclass(frozen=True)
class NoteRule:
    """What is noted of a row (see storage.layout.Layout for the fields), and whether the passes over
    its logits are compiled."""

    k: int
    temperatures: tuple[float, ...] = ()
    top_p: float = 1.0
    draws: int = 0
    compiled: bool = False

    @classmethod
    def of(cls, layout: Layout, compiled: bool = False) -> NoteRule:
        return cls(layout.k, layout.temperatures, layout.top_p, layout.draws, compiled)


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
class _Heads:
    """The K most probable ids of R rows and their logits, [R, K], and the gold ones' logits, [R].

    Logits are counted from the row's largest, [R, 1].
    """

    ids: Tensor
    logits: Tensor
    gold: Tensor
    largest: Tensor


@dataclass(frozen=True)
class _Draws:
    """draw_ids: [R, S]; logits: theirs, counted from the row's largest; −inf where there is no tail."""

    ids: Tensor
    logits: Tensor


T = TypeVar("T")
Rows = TypeVar("Rows", _Heads, TailSums, _Draws, RowNotes)


@torch.inference_mode()
def annotate_logits(
    logits_CV: Tensor, gold_C: Tensor, rule: NoteRule, uniform_C: Tensor
) -> RowNotes:
    """Returns the notes on one chunk of logits.

    With z the logits and L = log Σ exp z:  log p = z − L,  H = L − Σ p·z,
    tail = Σ_{v not kept} p_v (summed directly, not as 1 − head, which would cancel),
    log_z(τ) = log Σ exp((z − L)/τ).

    Cost: K-selection (one pass), the passes of tail_sums.py, and O(K + 32·S) a row.

    Args:
        logits_CV: float32 or float64 [C, V], without padding rows of the head; overwritten.
        gold_C: int64 [C], the target of each row.
        rule: 1 ≤ k ≤ V head entries; draws S ≥ 0; top_p in (0, 1].
        uniform_C: float64 [C], u in [0, 1), where each row's draws begin.

    Returns:
        Notes; non-finite where the logits are. Each row's depend on it alone (its sums up to
        rounding).

    Raises:
        ConfigError: the passes are to be compiled and cannot be.
    """
    device, rows = logits_CV.device, len(logits_CV)
    if rule.compiled:
        heads = join(
            _Heads, over_slices(lambda at: _head(logits_CV[at], gold_C[at], rule.k), rows, device)
        )
        sums = compiled_sums(rule.temperatures, rule.draws > 0)(logits_CV, heads.largest)
        return _finish(heads, sums, _draws(logits_CV, heads, sums, rule, uniform_C), rule)

    def work(at: slice) -> tuple[_Heads, TailSums, _Draws]:
        logits = logits_CV[at]
        heads = _head(logits, gold_C[at], rule.k)
        sums = eager_sums(logits, heads.largest, rule.temperatures, rule.draws > 0)
        return heads, sums, _draws(logits, heads, sums, rule, uniform_C[at])

    pieces = over_slices(work, rows, device)
    heads, sums = join(_Heads, [p[0] for p in pieces]), join(TailSums, [p[1] for p in pieces])
    return _finish(heads, sums, join(_Draws, [p[2] for p in pieces]), rule)


def over_slices(work: Callable[[slice], T], rows: int, device: torch.device) -> list[T]:
    """Returns work's results for consecutive slices of rows, in order; on a GPU there is one."""
    step = SLICE_ROWS if device.type == "cpu" else rows

    def several(span: slice) -> list[T]:
        starts = range(span.start, span.stop, step)
        return [work(slice(start, min(start + step, span.stop))) for start in starts]

    return [found for some in over_rows(several, rows, device) for found in some]


def _head(logits: Tensor, gold: Tensor, k: int) -> _Heads:
    """Selects the K most probable, and puts GONE in their place."""
    top, ids = top_k(logits, k)
    largest = top[:, :1]
    gold_logit = (logits.gather(-1, gold[:, None]) - largest)[:, 0]
    logits.scatter_(-1, ids, GONE)
    return _Heads(ids, top - largest, gold_logit, largest)


def _draws(
    logits: Tensor, heads: _Heads, sums: TailSums, rule: NoteRule, uniform: Tensor
) -> _Draws:
    """Draws from what was not kept of the head and from the rest; overwrites the head's logits."""
    if not rule.draws:
        return _Draws(heads.ids[:, :0], heads.logits[:, :0])
    width, groups = logits.shape[-1], sums.groups
    if rule.top_p < 1.0:  # what is cut from the head may be drawn
        e = heads.logits.exp()
        kept = _kept(e, sums.tails[:, -1], rule.top_p)
        logits.scatter_(-1, heads.ids, (heads.logits + heads.largest).masked_fill_(kept, GONE))
        cut = e.masked_fill_(kept, 0.0)
        groups = groups.scatter_add(-1, group_of(heads.ids, width), cut)

    def weights_at(ids: Tensor) -> Tensor:
        return (logits.gather(-1, ids) - heads.largest).exp_()

    ids = draw(groups, weights_at, width, uniform, rule.draws)
    drawn = weights_at(ids).log_()
    return _Draws(torch.where(torch.isneginf(drawn), heads.ids[:, :1], ids), drawn)


def _kept(head_e: Tensor, tail: Tensor, top_p: float) -> Tensor:
    """Returns bool [R, K]: whether the mass before an entry has not yet reached top_p."""
    mass = head_e.double().cumsum(-1)
    total = mass[:, -1:] + tail[:, None]
    return torch.nn.functional.pad(mass[:, :-1], (1, 0)) < top_p * total


def _finish(heads: _Heads, sums: TailSums, draws: _Draws, rule: NoteRule) -> RowNotes:
    """Turns what was found of a chunk into its notes; O(C·K)."""
    head, head_e, tail = heads.logits, heads.logits.exp(), sums.tails[:, -1]
    total = tail + head_e.sum(-1)
    lse = total.log()[:, None]  # L, counted from the largest logit
    entropy = lse[:, 0] - (sums.cross + (head_e * head).sum(-1)) / total
    log_z = [
        (sums.tails[:, z] + (head / t).exp().sum(-1)).log() - lse[:, 0] / t
        for z, t in enumerate(rule.temperatures)
    ]
    ids, logprobs = heads.ids, (head - lse).clamp(LOG_ZERO, 0.0)
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
        gold_logprob=(heads.gold - lse[:, 0]).clamp(LOG_ZERO, 0.0),
        log_z=torch.stack(log_z, -1) if log_z else lse[:, :0],
        draw_ids=draws.ids,
        draw_logprobs=(draws.logits - lse).clamp(LOG_ZERO, 0.0),
    )


def join(kind: type[Rows], pieces: Sequence[Rows]) -> Rows:
    """Returns one of these for the rows of all pieces, in order."""
    names = [field.name for field in fields(kind)]
    return kind(**{n: torch.cat([getattr(piece, n) for piece in pieces]) for n in names})
