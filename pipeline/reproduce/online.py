"""Online distillation, to compare with: the teachers are in memory and run on every batch.

The upper bound of what a cache can teach, at four times the time a step and with all models in memory.
The targets are the teachers' whole distributions, fused by entropy weights as `stages/weighting.py` does,
at temperature 1; logits of student and teachers exist a chunk of rows at a time, as in our own loss, and
no row is kept on disk. Features are not aligned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stages.batches import Batch
from stages.chunked_head import Gradients
from stages.head import Head, run_decoder
from stages.step_loss import StepLoss
from stages.student import DistilledStudent
from stages.teacher import TransformersTeacher

CHUNK = 128


class _DenseLoss(torch.autograd.Function):
    """(1−α)·CE + α·Σ_m w_m KL(t_m‖q) over all V ids, w_m ∝ exp(−H_m/τ); sums over rows."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, head: Head, gold: Tensor,
        theirs: Sequence[tuple[TransformersTeacher, Tensor]], vocab: int, scales: tuple[float, float],
        tau: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        wanted, head = hidden.requires_grad, head.rounded()
        grads = Gradients(hidden, head, torch.float32, True, True, False) if wanted else None
        terms = hidden.new_zeros(4, len(hidden), dtype=torch.float32)
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, min(start + CHUNK, len(hidden)))
            logq = head.logits(hidden[rows]).log_softmax(-1)
            mixture, kd = fuse([t.logits(h[rows])[:, :vocab] for t, h in theirs], logq, tau)
            at = gold[rows, None]
            terms[0, rows], terms[1, rows] = -logq.gather(-1, at)[:, 0], kd
            largest, found = logq.max(-1)
            terms[2, rows], terms[3, rows] = (found == gold[rows]).float(), largest.exp()
            if grads is not None:
                gradient = logq.exp_().mul_(sum(scales)).sub_(mixture, alpha=scales[1])
                gradient.scatter_add_(-1, at, torch.full_like(at, -scales[0], dtype=torch.float32))
                grads.add(rows.start, rows.stop, gradient)
        if grads is not None:
            ctx.save_for_backward(grads.hidden, grads.weight(weight.dtype))
        ctx.mark_non_differentiable(terms)
        ce, kd = terms[:2].sum(-1, dtype=torch.float64)
        return (scales[0] * ce + scales[1] * kd).float(), terms

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        hidden, weight = ctx.saved_tensors
        return hidden * grad, weight * grad, *[None] * 6


def fuse(logits: Sequence[Tensor], logq: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Returns Σ_m w_m t_m [C, P] and Σ_m w_m KL(t_m‖q) [C].

    Args:
        logits: of each teacher over the V ids [C, V].
        logq: of the student over its P ≥ V logits; ids of padding get target 0.
    """
    logps = [each.log_softmax(-1) for each in logits]
    padding, logq = logq.shape[-1] - logps[0].shape[-1], logq[:, : logps[0].shape[-1]]
    entropies = torch.stack([-(logp.exp() * logp).sum(-1) for logp in logps])
    weights = (-entropies / tau).softmax(0)
    kd = torch.stack([(logp.exp() * (logp - logq)).sum(-1) for logp in logps])
    mixture = sum(w[:, None] * logp.exp() for w, logp in zip(weights, logps, strict=True))
    assert isinstance(mixture, Tensor)
    return torch.nn.functional.pad(mixture, (0, padding)), (weights * kd).sum(0)


class OnlineStudent(DistilledStudent):
    """A student whose teachers run beside it; a batch's cached target, if any, is not looked at.

    Args:
        teachers: in memory all the time.
        tau: of the entropy weights.
        vocab_size: V; logits beyond it are padding.
    """

    def __init__(
        self, model: Any, options: Any, autocast: bool, teachers: Sequence[TransformersTeacher],
        tau: float, vocab_size: int,
    ) -> None:  # fmt: skip
        super().__init__(model, options, autocast)
        self.teachers, self.tau, self.vocab_size = list(teachers), tau, vocab_size

    def forward(
        self, batch: Batch, rows: int, segments: int, alpha: float | None = None
    ) -> StepLoss:
        kind = batch.inputs.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self.autocast):
            hidden, _ = run_decoder(self.model, batch.inputs, batch.positions, ())
        alpha = self.options.alpha if alpha is None else alpha
        theirs = [
            (t, t.forward(batch.inputs, batch.positions, ()).last[batch.scored])
            for t in self.teachers
        ]
        head = Head.of(self.model, self.autocast)
        total, terms = _DenseLoss.apply(  # type: ignore[no-untyped-call]
            hidden[batch.scored], head.weight, head, batch.gold, theirs, self.vocab_size,
            ((1 - alpha) / max(rows, 1), alpha / max(rows, 1)), self.tau,
        )  # fmt: skip
        ce, kd, correct, _ = terms.sum(-1, dtype=torch.float64)
        nothing, no_R = ce.new_zeros(()), torch.zeros_like(terms[0])
        return StepLoss(
            total, ce, kd, nothing, correct, nothing, terms[0], terms[1], terms[2], no_R, terms[3]
        )
