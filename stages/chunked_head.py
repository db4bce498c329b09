"""Head product, cross-entropy and sparse KL a chunk of rows at a time, with their backward.

From one chunk of logits come both losses and the gradients of hidden states and head, so that
[B, T, V] never exists and no product is computed twice. The gradient is written down rather than
traced. With q = softmax(z/τ), p the head of teacher m, t its tail mass and q_t the student's mass
on the same bucket:

    d/dz_j τ Σ_m w_m KL(t_m‖q) = q_j − Σ_m w_m · (p_mj if j ∈ head_m;  t_m·q_j/q_tm if j is in its
                                                 bucket;  0 if j is padding)

that is, student minus a target whose tails have the student's own shape. Memory: one chunk
of logits (its gradient overwrites it), what a slice of it needs, and the head's gradient, whatever
the number of rows. `losses.py` is the reference.

Shapes: R rows, C rows of a chunk, D hidden, P logits, V vocabulary, M teachers, K head entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.fusion import FusedTarget
from stages.head import Head, cache_sized, product

_TINY = 1e-30  # floor of a bucket's unnormalised mass: keeps log and ratio finite in float32


@dataclass(frozen=True)
class ChunkedLoss:
    """Sums over rows; only `total` carries a gradient.

    Attributes:
        total: ce_scale·ce + kd_scale·kd.
        ce: Σ −log q(gold), nats.
        kd: Σ Σ_m w_m KL(t_m‖q) at the target's temperature, nats (0 without a target).
        correct: number of rows whose most probable id is the gold one.
    """

    total: Tensor
    ce: Tensor
    kd: Tensor
    correct: Tensor


def chunked_loss(
    hidden_RD: Tensor,
    head: Head,
    gold_R: Tensor,
    target: FusedTarget | None,
    ce_scale: float,
    kd_scale: float,
    chunk: int,
) -> ChunkedLoss:
    """Returns the losses of R rows.

    Args:
        hidden_RD: the head's input.
        head: the student's head (live parameters: they get gradients).
        gold_R: int64.
        target: fused target of the same rows, or None for cross-entropy alone.
        ce_scale, kd_scale: factors of the two sums in `total`.
        chunk: C, at least 1; changes memory, not meaning.
    """
    wanted = torch.is_grad_enabled() and (hidden_RD.requires_grad or head.weight.requires_grad)
    total, ce, kd, correct = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden_RD, head.weight, head.bias, head, gold_R, target, (ce_scale, kd_scale), chunk, wanted
    )
    return ChunkedLoss(total, ce, kd, correct)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        gold: Tensor,
        target: FusedTarget | None,
        scales: tuple[float, float],
        chunk: int,
        wanted: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        sums = torch.zeros(3, dtype=torch.float64, device=hidden.device)
        grads = _Gradients(hidden, head, wide) if wanted else None
        buffer = _scratch(min(chunk, len(hidden)), len(head.weight), wide, hidden.device)
        for start in range(0, len(hidden), chunk):
            stop = min(start + chunk, len(hidden))
            logits = head.logits(hidden[start:stop], buffer[: stop - start])
            starts = cache_sized(stop - start, hidden.device)
            for i in starts:
                rows = slice(start + i, min(start + i + starts.step, stop))
                part = None if target is None else target.rows(rows.start, rows.stop)
                piece = logits[i : i + starts.step]
                gradient, *terms = chunk_terms(piece, gold[rows], part, *scales, wanted)
                sums += torch.stack([term.double() for term in terms])
                if gradient is not None:
                    piece.copy_(head.rule.backward_(gradient, piece))
            if grads is not None:
                grads.add(start, stop, logits)
        if grads is not None:
            ctx.save_for_backward(*grads.tensors())
        ce, kd, correct = sums.unbind()
        ctx.mark_non_differentiable(ce, kd, correct)
        return (scales[0] * ce + scales[1] * kd).to(wide), ce, kd, correct

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        hidden, weight, bias = (*ctx.saved_tensors, None)[:3]
        saved = (hidden, weight, bias)
        # Everything is linear in `grad`, which is 1 in a plain step: a pass over [P, D] saved.
        plain = grad.device.type == "cpu" and float(grad) == 1.0
        scaled = [t if plain or t is None else t * grad.to(t.dtype) for t in saved]
        return (*scaled, *[None] * 6)


_KEPT: dict[torch.dtype, Tensor] = {}


def _scratch(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns memory for one chunk of logits; on a CPU the same as last time, already mapped."""
    if device.type != "cpu":
        return torch.empty(rows, columns, dtype=dtype, device=device)
    kept = _KEPT.get(dtype)
    if kept is None or kept.numel() < rows * columns:
        kept = _KEPT[dtype] = torch.empty(rows * columns, dtype=dtype)
    return kept[: rows * columns].view(rows, columns)


class _Gradients:
    """Accumulates the gradients of hidden states, head and bias over the chunks, in float32."""

    def __init__(self, hidden: Tensor, head: Head, wide: torch.dtype) -> None:
        self._rows, self._head = hidden, head
        self.hidden = torch.empty_like(hidden)
        # The first chunk's product is taken as it comes: filling [P, D] with zeros and adding to it
        # costs as much as a small chunk's product.
        self.weight: Tensor | None = None
        self.bias = None if head.bias is None else torch.zeros_like(head.bias, dtype=wide)

    def add(self, start: int, stop: int, gradient_CP: Tensor) -> None:
        bf16 = self._head.bfloat16
        self.hidden[start:stop] = product(gradient_CP, self._head.weight, bf16)
        part = product(gradient_CP.t(), self._rows[start:stop], bf16)
        self.weight = part if self.weight is None else self.weight.add_(part)
        if self.bias is not None:
            self.bias += gradient_CP.sum(0)

    def tensors(self) -> list[Tensor]:
        like = self._head.weight
        weight = torch.zeros_like(like) if self.weight is None else self.weight.to(like.dtype)
        return [self.hidden, weight] if self.bias is None else [self.hidden, weight, self.bias]


def chunk_terms(
    logits_CP: Tensor,
    gold_C: Tensor,
    target: FusedTarget | None,
    ce_scale: float,
    kd_scale: float,
    wanted: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Returns (d total/d logits [C, P] if wanted, Σ ce, Σ kd, Σ correct) of one chunk."""
    largest = logits_CP.amax(-1, keepdim=True)
    gold_logit = logits_CP.gather(-1, gold_C[:, None])
    correct = (gold_logit == largest).sum()
    e = (logits_CP - largest).exp_()
    z = e.sum(-1, keepdim=True)
    ce = (z.log() + largest - gold_logit).sum()
    if target is None:
        gradient = e.mul_(ce_scale / z) if wanted else None
        kd = ce.new_zeros(())
    elif target.temperature == 1.0:
        kd, gradient = _distil(logits_CP, largest, e, z, target, ce_scale, kd_scale, wanted)
    else:
        f = ((logits_CP - largest) / target.temperature).exp_()
        zf = f.sum(-1, keepdim=True)
        kd, gradient = _distil(
            logits_CP, largest, f, zf, target, 0.0, kd_scale / target.temperature, wanted
        )
        if gradient is not None:
            gradient.add_(e.mul_(ce_scale / z))
    if gradient is not None:
        gradient.scatter_add_(-1, gold_C[:, None], torch.full_like(gold_logit, -ce_scale))
    return gradient, ce, kd, correct


def _distil(
    logits: Tensor,
    largest: Tensor,
    e: Tensor,
    z: Tensor,
    target: FusedTarget,
    a: float,
    b: float,
    wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """Returns (Σ kd, gradient a·q + b·(q − target')); `e` = exp((logits − largest)/τ) is consumed."""
    ids, w, vocab = target.ids, target.weights.to(e.dtype), target.vocab_size
    scaled = (logits.gather(-1, ids.transpose(0, 1).flatten(1)) - largest) / target.temperature
    logq = (scaled - z.log()).view(len(logits), len(ids), -1).transpose(0, 1)  # [M, C, K]
    mass = torch.stack([_outside(e, row, vocab) for row in ids]).clamp_min_(_TINY)
    tail = target.tail.to(e.dtype)
    log_tail = torch.where(tail > 0, tail, 1.0).log()
    bucket = tail * (log_tail - (mass.log() - z[:, 0].log()))
    p, logp = target.p.to(e.dtype), target.logp.to(e.dtype)
    kd = (w * ((p * (logp - logq)).sum(-1) + bucket)).sum()
    if not wanted:
        return kd, None
    ratio = w * tail * z[:, 0] / mass  # w_m·t_m/q_tm, [M, C]
    # Ids of any head are written, not corrected: 1 − ratio may be huge and would cancel.
    outside = 1.0 - _ratio_outside(ids, ratio)  # [M, C, K]
    heads = logq.exp() * (a + b * outside)
    e[:, :vocab].mul_((a + b * (1.0 - ratio.sum(0)))[:, None] / z)
    e[:, vocab:].mul_((a + b) / z)
    for row, value in zip(ids, heads, strict=True):
        e.scatter_(-1, row, value)
    for row, value in zip(ids, w[..., None] * p, strict=True):
        e.scatter_add_(-1, row, value * -b)
    return kd, e


def _outside(e: Tensor, ids: Tensor, vocab: int) -> Tensor:
    """Returns Σ of e over the vocabulary without `ids`, summed directly and not as 1 − head."""
    kept = e.gather(-1, ids)
    e.scatter_(-1, ids, 0.0)
    total = e[:, :vocab].sum(-1)
    e.scatter_(-1, ids, kept)
    return total


def _ratio_outside(ids: Tensor, ratio: Tensor) -> Tensor:
    """Returns for each entry (m, c, k) the sum of ratio over the teachers whose head lacks its id."""
    total = torch.zeros(ids.shape, dtype=ratio.dtype, device=ids.device)
    for other in range(len(ids)):
        sorted_ids = ids[other].sort(-1).values
        for m in range(len(ids)):
            if m != other:
                at = torch.searchsorted(sorted_ids, ids[m].contiguous())
                found = sorted_ids.gather(-1, at.clamp_max(sorted_ids.shape[-1] - 1)) == ids[m]
                total[m] += ratio[other][:, None] * ~found
    return total
