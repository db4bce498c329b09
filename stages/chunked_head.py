"""Head product, cross-entropy and sparse divergence a chunk of rows at a time, with their backward.

From one chunk of logits come both losses and the gradients of hidden states and head, so that
[B, T, V] never exists and no product is computed twice. What happens to a slice of logits is in
`chunk_terms.py`. Memory: one chunk of logits (its gradient overwrites it), what a slice of it needs,
and the head's gradient, whatever the number of rows. `losses.py` is the reference.

Shapes: R rows, C rows of a chunk, D hidden, P logits, V vocabulary, M teachers, K head entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stages.chunk_terms import chunk_terms
from stages.divergences import Divergence
from stages.fusion import FusedTarget
from stages.head import Head, add_product, cache_sized, product
from stages.union import merge

FORWARD_KL = Divergence()


@dataclass(frozen=True)
class ChunkedLoss:
    """What R rows cost; only `total` carries a gradient.

    Attributes:
        total: ce_scale·ce + kd_scale·kd.
        ce_R: −log q(gold) of each row, nats.
        kd_R: divergence of each row at the target's temperature, nats (0 without a target).
        correct_R: 1 where the student's most probable id is the gold one, else 0.
        agreed_R: 1 where it is the fused target's most probable one, else 0.
        confidence_R: the largest probability among the V ids, padding left out (all P logits without
            a target); 0 where gradients are wanted.
    """

    total: Tensor
    ce_R: Tensor
    kd_R: Tensor
    correct_R: Tensor
    agreed_R: Tensor
    confidence_R: Tensor

    @property
    def ce(self) -> Tensor:
        """Σ −log q(gold), nats, in float64 as every sum here."""
        return self.ce_R.sum(dtype=torch.float64)

    @property
    def kd(self) -> Tensor:
        """Σ divergence, nats."""
        return self.kd_R.sum(dtype=torch.float64)

    @property
    def correct(self) -> Tensor:
        """Number of rows whose most probable id is the gold one."""
        return self.correct_R.sum(dtype=torch.float64)

    @property
    def agreed(self) -> Tensor:
        """Number of rows whose most probable id is the fused target's."""
        return self.agreed_R.sum(dtype=torch.float64)


def chunked_loss(
    hidden_RD: Tensor,
    head: Head,
    gold_R: Tensor,
    target: FusedTarget | None,
    ce_scale: float,
    kd_scale: float,
    chunk: int,
    divergence: Divergence = FORWARD_KL,
) -> ChunkedLoss:
    """Returns the losses of R rows.

    Args:
        hidden_RD: the head's input.
        head: the student's head (live parameters: they get gradients).
        gold_R: int64.
        target: fused target of the same rows, or None for cross-entropy alone.
        ce_scale, kd_scale: factors of the two sums in `total`.
        chunk: C, at least 1; changes memory, not meaning.
        divergence: of student from target.
    """
    wanted = torch.is_grad_enabled() and (hidden_RD.requires_grad or head.weight.requires_grad)
    total, terms = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden_RD, head.weight, head.bias, head, gold_R, target, divergence, (ce_scale, kd_scale),
        chunk, wanted,
    )  # fmt: skip
    return ChunkedLoss(total, *terms)


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
        divergence: Divergence,
        scales: tuple[float, float],
        chunk: int,
        wanted: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        terms = torch.zeros(5, len(hidden), dtype=wide, device=hidden.device)
        head = head.rounded()
        grads = Gradients(hidden, head, wide, *ctx.needs_input_grad[:3]) if wanted else None
        buffer = _scratch(min(chunk, len(hidden)), len(head.weight), wide, hidden.device)
        # A GPU merges in a few large kernels, at some memory of the target's own order.
        merged = merge(target, wide) if target is not None and buffer is None else None
        for start in range(0, len(hidden), chunk):
            stop = min(start + chunk, len(hidden))
            kept = None if buffer is None else buffer[: stop - start]
            logits = head.logits(hidden[start:stop], kept)
            union = None if merged is None else merged.rows(start, stop)
            if union is None and target is not None:
                union = merge(target.rows(start, stop), wide)
            starts = cache_sized(stop - start, hidden.device)
            for i in starts:
                rows = slice(start + i, min(start + i + starts.step, stop))
                part = None if union is None else union.rows(i, i + starts.step)
                piece = logits[i : i + starts.step]
                gradient, terms[:, rows] = chunk_terms(
                    piece, gold[rows], part, divergence, *scales, wanted
                )
                if gradient is not None:
                    gradient = head.rule.backward_(gradient, piece)
                    if starts.step < stop - start:
                        piece.copy_(gradient)
                    else:  # of the whole chunk: it takes the logits' place
                        logits = gradient
                # On a GPU as large as the chunk: gone before the next one comes.
                del piece, gradient
            if grads is not None:
                grads.add(start, stop, logits)
            del logits
        if grads is not None:
            ctx.save_for_backward(grads.hidden, grads.weight(weight.dtype), grads.bias)
        ctx.mark_non_differentiable(terms)
        ce, kd = terms[:2].sum(-1, dtype=torch.float64)
        return (scales[0] * ce + scales[1] * kd).to(wide), terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        # Everything is linear in `grad`, which is 1 in a plain step: a pass over [P, D] saved.
        plain = grad.device.type == "cpu" and float(grad) == 1.0
        scaled = [t if plain or t is None else t * grad.to(t.dtype) for t in ctx.saved_tensors]
        return (*scaled, *[None] * 7)


_KEPT: dict[torch.dtype, Tensor] = {}


def _scratch(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Returns memory for one chunk of logits, the same as last time, already mapped; None on a GPU,
    whose allocator keeps what the last chunk let go of."""
    if device.type != "cpu":
        return None
    kept = _KEPT.get(dtype)
    if kept is None or kept.numel() < rows * columns:
        kept = _KEPT[dtype] = torch.empty(rows * columns, dtype=dtype)
    return kept[: rows * columns].view(rows, columns)


class Gradients:
    """Accumulates the gradients of hidden states, head and bias over the chunks, in float32.

    Only those that are wanted: with adapters the head is frozen, and its gradient is the largest.
    """

    def __init__(
        self, hidden: Tensor, head: Head, wide: torch.dtype,
        of_hidden: bool, of_weight: bool, of_bias: bool,
    ) -> None:  # fmt: skip
        self._rows, self._head = hidden, head
        self._of_weight = of_weight
        self.hidden = torch.empty_like(hidden) if of_hidden else None
        # The first chunk's product is taken as it comes: filling [P, D] with zeros and adding to it
        # costs as much as a small chunk's product.
        self._weight: Tensor | None = None
        bias = head.bias if of_bias else None
        self.bias = None if bias is None else torch.zeros_like(bias, dtype=wide)

    def add(self, start: int, stop: int, gradient_CP: Tensor) -> None:
        bf16 = self._head.bfloat16
        if self.bias is not None:
            self.bias += gradient_CP.sum(0)
        if bf16 and gradient_CP.device.type == "cuda":  # once for both products
            gradient_CP = gradient_CP.bfloat16()
        if self.hidden is not None:
            self.hidden[start:stop] = product(gradient_CP, self._head.weight, bf16)
        rows = self._rows[start:stop]
        if self._weight is not None:
            add_product(self._weight, gradient_CP.t(), rows, bf16)
        elif self._of_weight:
            self._weight = product(gradient_CP.t(), rows, bf16)

    def weight(self, dtype: torch.dtype) -> Tensor | None:
        """The head's, in the dtype of its parameter; None where it is not wanted."""
        if not self._of_weight:
            return None
        if self._weight is None:
            return torch.zeros_like(self._head.weight, dtype=dtype)
        return self._weight.to(dtype)
