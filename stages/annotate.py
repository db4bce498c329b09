"""Hidden states → a teacher's notes: head in chunks of tokens, top-k, exact statistics, features.

Only rows that have a target are annotated (documents' last rows and masked tokens are not); other
rows hold zeros. Memory: one chunk of logits, O(chunk·V), whatever T is, and the notes themselves.

Shapes: R annotated rows, V vocabulary, K head entries, S draws, Z temperatures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from stages.row_notes import NoteRule, RowNotes, annotate_logits, join
from stages.teacher import HiddenStates, TeacherBackend
from storage.codec import to_bfloat16
from storage.errors import NonFiniteLogits
from storage.layout import Layout
from storage.notes import encode_rows
from storage.orders import IdOrders
from storage.sampling import uniforms
from storage.types import AnyArray, HostNotes, Int64, TokenBlocks


def to_host(notes: RowNotes) -> HostNotes:
    """Returns the same on the host: ids int64, everything else float32."""
    values = {field.name: getattr(notes, field.name) for field in fields(RowNotes)}
    return HostNotes(**{
        name: (v if v.dtype == torch.int64 else v.float()).cpu().numpy()
        for name, v in values.items()
    })  # fmt: skip


def annotate_rows(
    hidden_RD: Tensor,
    gold_R: Tensor,
    uniform_R: Tensor,
    head: Callable[[Tensor], Tensor],
    layout: Layout,
    chunk: int,
    compiled: bool = False,
) -> RowNotes:
    """Returns the notes on R rows, computing `chunk` rows of logits at a time.

    Memory beyond the notes, O(R·(K + S + Z)): one chunk of logits, and one slice a thread.
    """
    rule, pieces = NoteRule.of(layout, compiled), []
    gold_R, uniform_R = gold_R.to(hidden_RD.device), uniform_R.to(hidden_RD.device)
    for start in range(0, len(hidden_RD), chunk):
        rows = slice(start, start + chunk)
        logits = head(hidden_RD[rows])[:, : layout.vocab_size]
        pieces.append(annotate_logits(logits, gold_R[rows], rule, uniform_R[rows]))
        del logits  # before the next ones come
    return join(RowNotes, pieces)


def pool(
    hidden_BTD: Tensor, present_BT: Tensor, segments: int, pooling: str = "mean"
) -> tuple[Tensor, Tensor]:
    """Returns what stands for each of G equal spans, and how many present tokens it has.

    Args:
        hidden_BTD: [B, T, D].
        present_BT: bool [B, T].
        segments: G; the spans are [⌊g·T/G⌋, ⌊(g+1)·T/G⌋).
        pooling: "mean" over the span's present tokens, or the state of the "last" of them.

    Returns:
        float32 [B, G, D] (0 for an empty span) and int64 [B, G]. Keeps the gradient.
    """
    length = hidden_BTD.shape[1]
    present, whole = present_BT.to(hidden_BTD.device), POOLS[pooling]
    vectors, counts = [], []
    for g in range(segments):
        span = slice(g * length // segments, (g + 1) * length // segments)
        vectors.append(whole(hidden_BTD[:, span], present[:, span]))
        counts.append(present[:, span].sum(1))
    return torch.stack(vectors, 1), torch.stack(counts, 1)


def _mean(hidden_BTD: Tensor, present_BT: Tensor) -> Tensor:
    total = (hidden_BTD.float() * present_BT[..., None]).sum(1)
    return total / present_BT.sum(1).clamp_min(1)[:, None]


def _last(hidden_BTD: Tensor, present_BT: Tensor) -> Tensor:
    number = torch.arange(1, present_BT.shape[1] + 1, device=present_BT.device)
    last = (number * present_BT).amax(1)  # 0 where there is none
    rows = torch.arange(len(last), device=last.device)
    return hidden_BTD[rows, (last - 1).clamp_min(0)].float() * (last > 0)[:, None]


POOLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": _mean, "last": _last}
"""Pooling → [B, T, D] and bool [B, T] → float32 [B, D]."""


class PartAnnotator:
    """Annotates the blocks of one part and gives its arrays as the layout stores them.

    Args:
        name: the teacher's name, for messages.
        backend: the teacher.
        layout: what is stored.
        chunk: rows of one chunk of logits.
        compiled: whether the passes over the vocabulary are.
    """

    def __init__(
        self,
        name: str,
        backend: TeacherBackend,
        layout: Layout,
        chunk: int,
        compiled: bool = False,
    ) -> None:
        self.name, self.backend, self.layout, self.chunk = name, backend, layout, chunk
        self.compiled = compiled

    def annotate(
        self,
        blocks: TokenBlocks,
        orders: IdOrders,
        batch: int,
        advance: Callable[[int], None],
        later: Callable[..., object],
    ) -> dict[str, AnyArray]:
        """Returns every array of the layout for these blocks, encoded once what `later` took is done.

        Args:
            orders: of the cache's ids.
            batch: blocks of one forward.
            advance: told the tokens of each finished batch.
            later: called with the encoding of a batch and its arguments; does it, now or behind.

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
                later(encode_rows, self.layout, orders, notes, taken.scored, out)
            advance((rows.stop - rows.start) * self.layout.block_length)
        return arrays

    def heads(
        self, blocks: TokenBlocks, batch: int, advance: Callable[[int], None] = lambda tokens: None
    ) -> Int64:
        """Returns head and draws [R, K + S] of the scored rows: what orders of ids are learned from.

        Args:
            batch: blocks of one forward.
            advance: told the tokens of each.

        Raises:
            NonFiniteLogits
        """
        width = self.layout.k + self.layout.draws
        count, pieces = len(blocks.block_ids), [np.zeros((0, width), np.int64)]
        for start in range(0, count, batch):
            taken = blocks.take(slice(start, min(start + batch, count)))
            notes = self._batch(taken, None)
            if notes is not None:
                pieces.append(np.concatenate([notes.ids, notes.draw_ids], 1))
            advance(taken.inputs.size)
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
            self.chunk, self.compiled,
        )  # fmt: skip
        self._require_finite(notes, blocks)
        return to_host(notes)

    def _store_features(
        self, states: HiddenStates, present: Tensor, out: dict[str, AnyArray]
    ) -> None:
        for name, (pooling, layer) in self.layout.feature_names().items():
            vectors, counts = pool(states.layers[layer], present, self.layout.segments, pooling)
            if not bool(torch.isfinite(vectors).all()):
                raise NonFiniteLogits(
                    f"teacher {self.name!r} gave NaN or infinite hidden states",
                    where=f"layer {layer}",
                    todo=f"set teachers.{self.name}.dtype: float32, or check the checkpoint",
                )
            out[name][:] = to_bfloat16(vectors.cpu().numpy())
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
