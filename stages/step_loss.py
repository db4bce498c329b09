"""What a batch costs a student: its decoder, cross-entropy, distillation, alignment of features.

Pure functions of model, batch and options, so that our own engine (`student.py`) and other people's
trainers (`pipeline/api`) compute the same numbers by the same code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.annotate import pool
from stages.batches import Batch
from stages.chunk_sizes import loss_rows
from stages.chunked_head import chunked_loss
from stages.divergences import Divergence
from stages.features import FeatureAligner
from stages.head import Head, run_decoder
from stages.layer_pairs import Pair
from stages.target_options import LossOptions
from storage.errors import ConfigError


@dataclass(frozen=True)
class StepLoss:
    """One batch's losses; `total` carries the gradient, the rest are detached sums.

    Attributes:
        total: share of the step's loss (already divided by the step's global counts).
        ce, kd: sums over rows, nats.
        features: sum over segments of weight·distance.
        correct: rows whose most probable id is the gold one.
        agreed: rows whose most probable id is the fused target's.
        ce_R, kd_R: of each row, nats, in the order of the batch's rows (Batch.row_domain).
        correct_R, agreed_R, confidence_R: of each row, as in ChunkedLoss.
    """

    total: Tensor
    ce: Tensor
    kd: Tensor
    features: Tensor
    correct: Tensor
    agreed: Tensor
    ce_R: Tensor
    kd_R: Tensor
    correct_R: Tensor
    agreed_R: Tensor
    confidence_R: Tensor


def make_aligner(
    model: Any,
    options: LossOptions,
    pairs: Sequence[Pair],
    teacher_sizes: Mapping[str, int],
    seed: int,
) -> FeatureAligner | None:
    """Returns the projections that align a causal LM's layers with the teachers', None without pairs.

    Args:
        teacher_sizes: teacher → hidden size.
        seed: of frozen random projections.

    Raises:
        ConfigError: the model has no such layer.
    """
    if not pairs:
        return None
    config = model.config.get_text_config()
    layers = int(config.num_hidden_layers)
    wrong = sorted({s for s, _, _ in pairs if s > layers})
    if wrong:
        raise ConfigError(
            "the student has no such layer", where="loss.features.pairs",
            expected=f"1 to {layers}", found=wrong, todo="choose existing layers",
        )  # fmt: skip
    return FeatureAligner(pairs, options.features, config.hidden_size, teacher_sizes, seed)


def distil(
    model: Any,
    batch: Batch,
    rows: int,
    segments: int,
    options: LossOptions,
    alpha: float | None = None,
    aligner: FeatureAligner | None = None,
    autocast: bool = False,
) -> StepLoss:
    """Returns the losses of a batch under a causal LM of transformers.

    Args:
        batch: on the model's device.
        rows, segments: rows and segments with a target in the whole step, over all batches and ranks.
        alpha: share of distillation in this step; the options' if not given.
        aligner: of `make_aligner`.
        autocast: whether the decoder and the head's products run in bfloat16.
    """
    layers = () if aligner is None else aligner.student_layers
    with torch.autocast(batch.inputs.device.type, torch.bfloat16, enabled=autocast):
        hidden, found = run_decoder(model, batch.inputs, batch.positions, layers)
    head = Head.of(model, autocast)
    return losses_of_hidden(hidden, found, head, batch, rows, segments, options, alpha, aligner)


def losses_of_hidden(
    hidden_BTD: Tensor,
    layers: Mapping[int, Tensor],
    head: Head,
    batch: Batch,
    rows: int,
    segments: int,
    options: LossOptions,
    alpha: float | None = None,
    aligner: FeatureAligner | None = None,
) -> StepLoss:
    """Returns the same from what a decoder left.

    Args:
        hidden_BTD: the head's input (after the final norm).
        layers: layer (1 = first) → its output [B, T, D], of those that `aligner` aligns.
    """
    alpha = options.alpha if alpha is None else alpha
    alpha = alpha if batch.target is not None else 0.0
    loss = chunked_loss(
        hidden_BTD[batch.scored], head, batch.gold, batch.target,
        (1.0 - alpha) / max(rows, 1), alpha * options.temperature**2 / max(rows, 1),
        loss_rows(
            len(head.weight), hidden_BTD.device.type, options.chunk_bytes, options.chunk_tokens
        ),
        Divergence.of(options),
    )  # fmt: skip
    features = hidden_BTD.new_zeros(())
    if aligner is not None:
        features = _features(aligner, batch, layers, options.features.pooled)
    total = loss.total + options.features.weight / max(segments, 1) * features
    return StepLoss(
        total, loss.ce, loss.kd, features.detach(), loss.correct, loss.agreed, loss.ce_R,
        loss.kd_R, loss.correct_R, loss.agreed_R, loss.confidence_R,
    )  # fmt: skip


def _features(
    aligner: FeatureAligner, batch: Batch, layers: Mapping[int, Tensor], pooling: str
) -> Tensor:
    count = next(iter(batch.segment_weights.values())).shape[1]
    pooled = {n: pool(hidden, batch.present, count, pooling)[0] for n, hidden in layers.items()}
    with torch.autocast(batch.inputs.device.type, enabled=False):
        loss: Tensor = aligner(pooled, batch.features, batch.segment_weights)
    return loss
