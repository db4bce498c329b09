"""Hidden states → a teacher's notes: head in chunks of tokens, top-k, exact statistics, features.

Only rows that have a target are annotated (documents' last rows and masked tokens are not); other
rows hold zeros. Memory: one chunk of logits, O(chunk·V), whatever T is.

Shapes: R annotated rows, C rows of a chunk, V vocabulary, K head entries, Z temperatures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stages.head import cache_sized
from stages.teacher import HiddenStates, TeacherBackend
from storage.codec import to_bfloat16
from storage.errors import NonFiniteLogits
from storage.layout import Layout
from storage.types import LOG_ZERO, AnyArray, TokenBlocks


@dataclass(frozen=True)
class RowNotes:
    """Notes on R rows, on the device: ids int64 [R, K], logprobs [R, K], statistics [R] and [R, Z]."""

    ids: Tensor
    logprobs: Tensor
    entropy: Tensor
    log_tail_mass: Tensor
    gold_logprob: Tensor
    log_z: Tensor


def annotate_logits(
    logits_CV: Tensor, gold_C: Tensor, k: int, temperatures: tuple[float, ...]
) -> RowNotes:
    """Returns the notes on one chunk of logits.

    With z the logits and L = log Σ exp z:  log p = z − L,  H = L − Σ p·z,
    tail = Σ_{v ∉ top-k} p_v (summed directly, not as 1 − head, which would cancel),
    log_z(τ) = log Σ exp((z − L)/τ).

    Cost: K-selection, one pass a temperature, four more; in place, with one buffer of the chunk's
    size.

    Args:
        logits_CV: float32 or float64 [C, V], without padding rows of the head; overwritten.
        gold_C: int64 [C], the target of each row.
        k: head entries, 1 ≤ k ≤ V.
        temperatures: grid of log_z.

    Returns:
        Notes; non-finite where the logits are.
    """
    top, ids = logits_CV.topk(k, dim=-1)
    largest = top[:, :1]
    gold = logits_CV.gather(-1, gold_C[:, None]) - largest
    below = logits_CV.sub_(largest)
    e = torch.empty_like(below)
    sums = [torch.mul(below, 1.0 / t, out=e).exp_().sum(-1) for t in temperatures]
    total = torch.exp(below, out=e).sum(-1)
    lse = total.log()  # L, counted from the largest logit
    entropy = lse - below.mul_(e).sum(-1) / total
    tail = e.scatter_(-1, ids, 0.0).sum(-1) / total
    log_z = [s.log() - lse / t for s, t in zip(sums, temperatures, strict=True)]
    return RowNotes(
        ids=ids,
        logprobs=(top - largest - lse[:, None]).clamp(LOG_ZERO, 0.0),
        entropy=entropy.clamp_min(0.0),
        log_tail_mass=tail.log().clamp(LOG_ZERO, 0.0),
        gold_logprob=(gold[:, 0] - lse).clamp(LOG_ZERO, 0.0),
        log_z=torch.stack(log_z, -1) if log_z else lse.new_zeros(len(lse), 0),
    )


def annotate_rows(
    hidden_RD: Tensor,
    gold_R: Tensor,
    head: Callable[[Tensor], Tensor],
    layout: Layout,
    chunk: int,
) -> RowNotes:
    """Returns the notes on R rows, computing `chunk` rows of logits at a time."""
    pieces = []
    gold_R = gold_R.to(hidden_RD.device)
    for start in range(0, len(hidden_RD), chunk):
        logits = head(hidden_RD[start : start + chunk])[:, : layout.vocab_size]
        starts = cache_sized(len(logits), logits.device)
        for i in starts:
            rows, gold = logits[i : i + starts.step], gold_R[start + i : start + i + starts.step]
            notes = annotate_logits(rows, gold[: len(rows)], layout.k, layout.temperatures)
            pieces.append(notes)
    names = RowNotes.__dataclass_fields__
    return RowNotes(**{n: torch.cat([getattr(piece, n) for piece in pieces]) for n in names})


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
        self, blocks: TokenBlocks, batch: int, advance: Callable[[int], None]
    ) -> dict[str, AnyArray]:
        """Returns every array of the layout for these blocks, encoded.

        Args:
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
            self._batch(blocks.take(rows), {name: a[rows] for name, a in arrays.items()})
            advance((rows.stop - rows.start) * self.layout.block_length)
        return arrays

    @torch.inference_mode()
    def _batch(self, blocks: TokenBlocks, out: dict[str, AnyArray]) -> None:
        states = self.backend.forward(
            torch.from_numpy(blocks.inputs.astype(np.int64)),
            torch.from_numpy(blocks.positions), self.layout.feature_layers,
        )  # fmt: skip
        self._store_features(states, torch.from_numpy(blocks.present), out)
        scored = blocks.scored
        if not scored.any():
            return
        where = torch.from_numpy(scored).to(states.last.device)
        gold = torch.from_numpy(blocks.gold.astype(np.int64)[scored])
        notes = annotate_rows(
            states.last[where], gold, self.backend.logits, self.layout, self.chunk
        )
        self._require_finite(notes, blocks)
        encode = self.layout.logprob_codec.encode
        out["head_ids"][scored] = notes.ids.cpu().numpy()
        out["head_logprobs"][scored] = encode(notes.logprobs.float().cpu().numpy())
        for name in ("entropy", "log_tail_mass", "gold_logprob"):
            out[name][scored] = getattr(notes, name).float().cpu().numpy()
        if self.layout.temperatures:
            out["log_z"][scored] = notes.log_z.float().cpu().numpy()

    def _store_features(
        self, states: HiddenStates, present: Tensor, out: dict[str, AnyArray]
    ) -> None:
        for layer in self.layout.feature_layers:
            means, counts = pool(states.layers[layer], present, self.layout.segments)
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
