"""The loss of our own trainings as a module, for any loop: total = (1−α)·CE + α·T²·KD + β·features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.api.blocks import as_batch
from stages.common_caches import common_tail
from stages.head import Head, HeadRule
from stages.layer_pairs import Pair, resolve_pairs
from stages.schedule import alpha_at, weights_share
from stages.step_loss import StepLoss, distil, losses_of_hidden, make_aligner
from stages.target_options import FusionOptions, LossOptions
from storage.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.api.cache import Cache
    from stages.batches import Batch, BatchReader
    from storage.reader import CacheReader


_WITHOUT = "leave features out: open_cache(…, overrides=['loss.features.weight=0'])"
_FROZEN = "which trains no projections, with overrides=['loss.features.projection=random']"


class DistillationLoss(nn.Module):
    """Cross-entropy, distillation from the fused teachers and alignment of features, of a batch.

    Head and losses run over a chunk of rows at a time, so logits [B, T, V] never exist. Sums over rows
    are divided by the *step's* rows: give `rows` where a step has several batches or processes.

    In `eval` mode the bucket stands for the tail where the caches hold draws: these give a gradient
    without bias, but a divergence that is too high.

    Args:
        cache: that the batches are from.
        loss, fusion: as in the YAML; the cache's own if not given.
        student: the model, where `loss.features.weight` is set: its layers are aligned.
        bf16: whether the decoder runs in bfloat16 by autocast; as the surroundings do if not given.
        seed: of frozen random projections.

    Raises (on construction):
        ConfigError: the options do not fit the cache or the student.
    """

    def __init__(
        self,
        cache: Cache,
        loss: LossOptions | None = None,
        fusion: FusionOptions | None = None,
        *,
        student: Any = None,
        bf16: bool | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.options = cache.loss if loss is None else loss
        self.fusion = cache.fusion if fusion is None else fusion
        self.cache, self.bf16 = cache, bf16
        fused = cache.fused_readers(self.fusion)
        _require_temperature(self.options, fused)
        self._tail = common_tail(self.options, fused)
        self._reader = cache.batch_reader(
            self.fusion, self.options.temperature, self._tail, self.options.features.pooled
        )
        pairs = _pairs(self.options, cache, list(self._reader.caches), student)
        sizes = {name: layout.hidden_size for name, layout in cache.layouts.items()}
        self.aligner = make_aligner(student, self.options, pairs, sizes, seed)

    def forward(
        self,
        model: Any,
        batch: Mapping[str, Any],
        *,
        rows: int | None = None,
        segments: int | None = None,
        step: int | None = None,
        steps: int | None = None,
    ) -> StepLoss:
        """Runs a causal LM's decoder on a batch and returns its losses.

        Under DDP or FSDP call it inside the wrapped forward, or gradients are not synchronised
        (`DistillationMixin` does).

        Args:
            model: of transformers, also with peft's adapters.
            batch: from `collate` or a stream, on the model's device.
            rows, segments: rows and segments with a target in the whole step, over all its batches and
                processes; this batch's own if not given. (Segments matter to features alone.)
            step, steps: where the training stands, from 0, for `alpha_schedule` and `ramp`; without
                them α is the options' and the weights are the final ones.

        Returns:
            `total`, a scalar that carries the gradient: this batch's share of the step's loss, so those
            of a step's batches are added up; and the sums ce, kd (nats), features, correct, agreed.

        Raises:
            ConfigError: the surroundings autocast to float16.
        """
        batch_ = self._ramped(self.joined(batch), step, steps)
        kind = batch_.inputs.device.type
        bf16 = _ambient_bf16(kind) if self.bf16 is None else self.bf16
        with torch.autocast(kind, enabled=False):
            return distil(
                model, batch_, *_counts(batch_, rows, segments), self.options,
                self._alpha(step, steps), self.aligner, bf16,
            )  # fmt: skip

    def of_hidden(
        self,
        hidden_states: Tensor,
        lm_head: Any,
        batch: Mapping[str, Any],
        *,
        rows: int | None = None,
        alpha: float | None = None,
        rule: HeadRule | None = None,
        bf16: bool = False,
    ) -> StepLoss:
        """Returns the losses from what a decoder has left, features aside.

        Args:
            hidden_states: [B, T, D], the head's input, after the final norm, of a decoder that was given
                `position_ids` and `use_cache=False` (else documents of a block see one another).
            lm_head: the head's module (`weight` [P, D], `bias` [P] or None), P ≥ V.
            alpha: share of distillation; the options' if not given.
            rule: factor and cap that follow the product; none if not given.
            bf16: whether the head's products take bfloat16 factors; results are float32 anyway.

        Raises:
            ConfigError: features are to be aligned, which needs the model.
        """
        if self.aligner is not None:
            raise ConfigError(
                "features cannot be aligned from the last hidden states alone",
                where="loss.features.weight", expected=0, found=self.options.features.weight,
                todo=f"call the loss with the model: loss(model, batch); or {_WITHOUT}",
            )  # fmt: skip
        head = Head(lm_head.weight, getattr(lm_head, "bias", None), rule or HeadRule(), bf16)
        joined = self.joined(batch)
        with torch.autocast(hidden_states.device.type, enabled=False):
            return losses_of_hidden(
                hidden_states, {}, head, joined, *_counts(joined, rows, None), self.options, alpha
            )

    def joined(self, batch: Mapping[str, Any]) -> Batch:
        """Returns the batch with its fused target, as our own engine has it."""
        reader = self._reader
        if self._tail == "draws" and not self.training:
            reader = self._heldout
        return as_batch(reader, batch, self.options.features.pooled)

    @property
    def _heldout(self) -> BatchReader:
        options = self.options
        return self.cache.batch_reader(
            self.fusion, options.temperature, "bucket", options.features.pooled
        )

    def _ramped(self, batch: Batch, step: int | None, steps: int | None) -> Batch:
        if step is None or steps is None:
            return batch
        return self._reader.ramped(batch, weights_share(step, steps, self._reader.ramp))

    def _alpha(self, step: int | None, steps: int | None) -> float:
        if step is None or steps is None:
            return self.options.alpha
        return alpha_at(step, steps, self.options)


def _counts(batch: Batch, rows: int | None, segments: int | None) -> tuple[int, int]:
    return batch.rows if rows is None else rows, batch.segments if segments is None else segments


def _ambient_bf16(kind: str) -> bool:
    if not torch.is_autocast_enabled(kind):
        return False
    dtype = torch.get_autocast_dtype(kind)
    if dtype != torch.bfloat16:
        raise ConfigError(
            "the loss runs in float32 or bfloat16", where="autocast", expected=torch.bfloat16,
            found=dtype, todo="set bf16=True in place of fp16=True, or neither",
        )  # fmt: skip
    return True


def _require_temperature(options: LossOptions, readers: Mapping[str, CacheReader]) -> None:
    grid = (1.0, *next(iter(readers.values())).layout.temperatures)
    if options.temperature not in grid:
        raise ConfigError(
            "the caches cannot serve this temperature", where="loss.temperature",
            expected=f"one of {', '.join(map(str, grid))}", found=options.temperature,
            todo="choose one of these, or cache again with another store.temperatures",
        )  # fmt: skip


def _pairs(options: LossOptions, cache: Cache, teachers: list[str], student: Any) -> list[Pair]:
    """Returns the layers that are aligned."""
    features = options.features
    if not features.weight:
        return []
    if student is None:
        raise ConfigError(
            "features are to be aligned, and the student is not known",
            where="loss.features.weight", found=features.weight,
            todo=f"{_WITHOUT}; or align them: DistillationLoss(cache, student=model), in a loop of your "
            f"own, whose optimizer also takes loss.parameters(), or in a Trainer, {_FROZEN}",
        )  # fmt: skip
    stored = {name: cache.layouts[name].feature_layers for name in teachers}
    if any(
        features.pooled not in cache.layouts[n].pooling for n, layers in stored.items() if layers
    ):
        raise ConfigError(
            "the caches do not hold features pooled in this way", where="loss.features.pooled",
            expected=list(next(iter(cache.layouts.values())).pooling), found=features.pooled,
            todo="choose what is cached, or cache again with another store.pooling",
        )  # fmt: skip
    depths = cache.depths() if features.pairs == "auto" else {}
    ours = int(student.config.get_text_config().num_hidden_layers)
    return resolve_pairs(features, stored, depths, ours)
