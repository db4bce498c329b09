"""Hidden states → a teacher's notes: head in chunks of tokens, top-k, exact statistics, features.

Only rows that have a target are annotated (documents' last rows and masked tokens are not); other
rows hold zeros. Memory: one chunk of logits, O(chunk·V), whatever T is, and the notes themselves.

Shapes: R annotated rows, C rows of a chunk, V vocabulary, K head entries, S draws, Z temperatures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from stages.row_threads import over_rows
from stages.tail_draws import draw
from stages.teacher import HiddenStates, TeacherBackend
from stages.top_k import top_k
from storage.codec import to_bfloat16
from storage.errors import NonFiniteLogits
from storage.layout import Layout
from storage.notes import encode_rows
from storage.orders import IdOrders
from storage.sampling import uniforms
from storage.types import LOG_ZERO, AnyArray, HostNotes, Int64, TokenBlocks

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


def to_host(notes: RowNotes) -> HostNotes:
    """Returns the same on the host: ids int64, everything else float32."""
    values = {field.name: getattr(notes, field.name) for field in fields(RowNotes)}
    return HostNotes(**{
        name: (v if v.dtype == torch.int64 else v.float()).cpu().numpy()
        for name, v in values.items()
    })  # fmt: skip


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
    temperature but 1, one for draws. In place, with a buffer of one slice.

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
        return _join(_Sums, pieces)

    return _finish(_join(_Sums, over_rows(work, len(logits_CV), logits_CV.device)), rule)


def _sums(logits: Tensor, gold: Tensor, rule: NoteRule, uniform: Tensor, e: Tensor) -> _Sums:
    """Passes over a slice of logits; overwrites it and `e`, a buffer of its shape."""
    top, ids = top_k(logits, rule.k)
    largest = top[:, :1]
    head, below = top - largest, logits.sub_(largest)
    gold_logit = below.gather(-1, gold[:, None])[:, 0]
    below.scatter_(-1, ids, GONE)
    tails = _exponentials(below, rule.temperatures, e)
    cross = below.mul_(e).sum(-1)
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


def _exponentials(below: Tensor, temperatures: tuple[float, ...], e: Tensor) -> Tensor:
    """Returns Σ exp(below/τ) for each τ, and last for 1, [R, Z + 1]; leaves exp(below) in `e`.

    exp(below) is the square of exp(below/2) where τ = 2 is asked for. Roots of exp(below) would be
    no quicker, and wrong: it underflows below −103, where its τ-th roots still count.
    """
    sums: dict[float, Tensor] = {}
    for t in sorted({*temperatures, 1.0}, key=lambda t: (t == 1.0, t == 2.0)):
        if t == 1.0 and 2.0 in sums:
            torch.mul(e, e, out=e)
        elif t == 1.0:
            torch.exp(below, out=e)
        else:
            torch.mul(below, 1.0 / t, out=e).exp_()
        sums[t] = e.sum(-1)
    return torch.stack([sums[t] for t in (*temperatures, 1.0)], -1)


def annotate_rows(
    hidden_RD: Tensor,
    gold_R: Tensor,
    uniform_R: Tensor,
    head: Callable[[Tensor], Tensor],
    layout: Layout,
    chunk: int,
) -> RowNotes:
    """Returns the notes on R rows, computing `chunk` rows of logits at a time.

    Memory beyond the notes, O(R·(K + S + Z)): one chunk of logits and one slice.
    """
    rule, pieces = NoteRule.of(layout), []
    gold_R, uniform_R = gold_R.to(hidden_RD.device), uniform_R.to(hidden_RD.device)
    for start in range(0, len(hidden_RD), chunk):
        rows = slice(start, start + chunk)
        logits = head(hidden_RD[rows])[:, : layout.vocab_size]
        pieces.append(annotate_logits(logits, gold_R[rows], rule, uniform_R[rows]))
    return _join(RowNotes, pieces)


def _join(kind: type[Rows], pieces: list[Rows]) -> Rows:
    names = [field.name for field in fields(kind)]
    return kind(**{n: torch.cat([getattr(piece, n) for piece in pieces]) for n in names})


def pool(hidden_BTD: Tensor, present_BT: Tensor, segments: int) -> tuple[Tensor, Tensor]:
    """Returns the means over the present tokens of each of G equal spans, and their counts.

    Args:
        hidden_BTD: [B, T, D].
        present_BT: bool [B, T].
        segments: G; the spans are [⌊g·T/G⌋, ⌊(g+1)·T/G⌋).

    Returns:
        float32 [B, G, D] (0 for an empty span) and int64 [B, G]. Keeps the gradient.
    """
    length = hidden_BTD.shape[1]
    present = present_BT.to(hidden_BTD.device)
    means, counts = [], []
    for g in range(segments):
        span = slice(g * length // segments, (g + 1) * length // segments)
        mask = present[:, span]
        count = mask.sum(1)
        total = (hidden_BTD[:, span].float() * mask[..., None]).sum(1)
        means.append(total / count.clamp_min(1)[:, None])
        counts.append(count)
    return torch.stack(means, 1), torch.stack(counts, 1)


class PartAnnotator:
    """Annotates the blocks of one part and gives its arrays as the layout stores them.

    Args:
        name: the teacher's name, for messages.
        backend: the teacher.
        layout: what is stored.
        chunk: rows of one chunk of logits.
    """

    def __init__(self, name: str, backend: TeacherBackend, layout: Layout, chunk: int) -> None:
        self.name, self.backend, self.layout, self.chunk = name, backend, layout, chunk

    def annotate(
        self, blocks: TokenBlocks, orders: IdOrders, batch: int, advance: Callable[[int], None]
    ) -> dict[str, AnyArray]:
        """Returns every array of the layout for these blocks, encoded.

        Args:
            orders: of the cache's ids.
            batch: blocks of one forward.
            advance: told the tokens of each finished batch.

        Raises:
            NonFiniteLogits: says teacher, block and position.
        """
        count = len(blocks.block_ids)
        arrays = {
            name: np.zeros((count, *spec.shape[1:]), spec.dtype)
            for name, spec in self.layout.arrays().items()
        }
        for start in range(0, count, batch):
            rows = slice(start, min(start + batch, count))
            taken, out = blocks.take(rows), {name: a[rows] for name, a in arrays.items()}
            notes = self._batch(taken, out)
            if notes is not None:
                encode_rows(self.layout, orders, notes, taken.scored, out)
            advance((rows.stop - rows.start) * self.layout.block_length)
        return arrays

    def heads(self, blocks: TokenBlocks, batch: int) -> Int64:
        """Returns head and draws [R, K + S] of the scored rows: what orders of ids are learned from.

        Raises:
            NonFiniteLogits
        """
        width = self.layout.k + self.layout.draws
        count, pieces = len(blocks.block_ids), [np.zeros((0, width), np.int64)]
        for start in range(0, count, batch):
            notes = self._batch(blocks.take(slice(start, min(start + batch, count))), None)
            if notes is not None:
                pieces.append(np.concatenate([notes.ids, notes.draw_ids], 1))
        return np.concatenate(pieces)

    @torch.inference_mode()
    def _batch(self, blocks: TokenBlocks, out: dict[str, AnyArray] | None) -> HostNotes | None:
        """Returns the notes on the scored rows, if there are any; writes features to `out`."""
        states = self.backend.forward(
            torch.from_numpy(blocks.inputs.astype(np.int64)),
            torch.from_numpy(blocks.positions), self.layout.feature_layers,
        )  # fmt: skip
        if out is not None:
            self._store_features(states, torch.from_numpy(blocks.present), out)
        scored = blocks.scored
        if not scored.any():
            return None
        where = torch.from_numpy(scored).to(states.last.device)
        gold = torch.from_numpy(blocks.gold.astype(np.int64)[scored])
        rows, positions = np.nonzero(scored)
        uniform = uniforms(self.layout.seed, blocks.block_ids[rows], positions)
        notes = annotate_rows(
            states.last[where], gold, torch.from_numpy(uniform), self.backend.logits, self.layout,
            self.chunk,
        )  # fmt: skip
        self._require_finite(notes, blocks)
        return to_host(notes)

    def _store_features(
        self, states: HiddenStates, present: Tensor, out: dict[str, AnyArray]
    ) -> None:
        for layer in self.layout.feature_layers:
            means, counts = pool(states.layers[layer], present, self.layout.segments)
            if not bool(torch.isfinite(means).all()):
                raise NonFiniteLogits(
                    f"teacher {self.name!r} gave NaN or infinite hidden states",
                    where=f"layer {layer}",
                    todo=f"set teachers.{self.name}.dtype: float32, or check the checkpoint",
                )
            out[f"feature_{layer}"][:] = to_bfloat16(means.cpu().numpy())
            out["feature_count"][:] = counts.cpu().numpy()

    def _require_finite(self, notes: RowNotes, blocks: TokenBlocks) -> None:
        # A NaN or +inf logit makes the entropy NaN; so does −inf, as 0·(−inf).
        finite = torch.isfinite(notes.entropy)
        if bool(finite.all()):
            return
        rows, positions = np.nonzero(blocks.scored)
        bad = int((~finite).nonzero()[0])
        raise NonFiniteLogits(
            f"teacher {self.name!r} gave NaN or infinite logits",
            where=f"block {int(blocks.block_ids[rows[bad]])}, position {int(positions[bad])}",
            todo=f"set teachers.{self.name}.dtype: float32, or check the checkpoint",
        )
