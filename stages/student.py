"""The student: where it comes from, and the module whose forward(batch) returns the losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stages.batches import Batch
from stages.head import find_decoder_layers
from stages.layer_pairs import Pair
from stages.lora import add_adapters
from stages.model_files import context_length
from stages.step_loss import StepLoss, distil, make_aligner
from stages.target_options import LossOptions
from stages.teacher import load_causal_lm, random_causal_lm
from stages.train_options import StudentOptions
from storage.errors import ConfigError, VocabularyMismatch
from storage.layout import Layout


def build_student(
    options: StudentOptions, folder: Path, device: torch.device, seed: int = 0
) -> Any:
    """Returns the student in float32: from a checkpoint, cut to `keep_layers` if they are given and
    with adapters if they are asked for, or from a configuration with random weights.

    Args:
        folder: of the checkpoint or the configuration.
        seed: of random weights and adapters.

    Raises:
        TeacherError: the checkpoint cannot be loaded.
        ConfigError: a layer that does not exist, or peft is wanted and not installed.
    """
    torch.manual_seed(seed)
    if options.config is not None:
        return random_causal_lm(
            folder, "student.config", attention=options.attention,
            trust_remote_code=options.trust_remote_code,
        ).to(device)  # fmt: skip
    model = load_causal_lm(
        folder, "student.model", dtype=torch.float32, attention=options.attention,
        device=torch.device("cpu"), trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    if options.keep_layers is not None:
        model = cut_layers(model, options.keep_layers)
    if options.lora is not None:
        add_adapters(model, options.lora)
    return model.to(device)


def require_student_fit(model: Any, layout: Layout, where: str = "student.model") -> None:
    """Refuses a student without a logit for every id, or with too short a context.

    Args:
        where: what names the model, for messages.

    Raises:
        VocabularyMismatch, ConfigError
    """
    rows = int(model.get_output_embeddings().weight.shape[0])
    if rows < layout.vocab_size:
        raise VocabularyMismatch(
            "the student has fewer logits than the tokenizer has ids", where=where,
            expected=f"at least {layout.vocab_size}", found=rows,
            todo="use the tokenizer this model was trained with, or resize its embeddings",
        )  # fmt: skip
    longest = context_length(model.config.get_text_config().to_dict())
    if longest is not None and layout.block_length > longest:
        raise ConfigError(
            "blocks are longer than the student's context", where="corpus.block_length",
            expected=f"at most {longest}", found=layout.block_length,
            todo="prepare the corpus with shorter blocks, or choose another student",
        )  # fmt: skip


def cut_layers(model: Any, keep: Sequence[int]) -> Any:
    """Returns a new model with only these decoder layers (0 = first), in the order given.

    Raises:
        ConfigError: a layer that does not exist, or none at all.
    """
    blocks = find_decoder_layers(model)
    count = len(blocks)
    if not keep or not all(0 <= i < count for i in keep):
        raise ConfigError(
            "layers to keep do not exist", where="student.keep_layers",
            expected=f"some of 0 to {count - 1}", found=list(keep), todo="choose existing layers",
        )  # fmt: skip
    text = model.config.get_text_config()
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == count:  # layer_types and their like
            setattr(text, name, [value[i] for i in keep])
    text.num_hidden_layers = len(keep)
    kept = [blocks[i] for i in keep]
    del blocks[:]
    blocks.extend(kept)
    cut = type(model)(model.config)  # so that whatever counts layers counts these
    cut.load_state_dict(model.state_dict())
    cut.generation_config = model.generation_config
    return cut


class DistilledStudent(nn.Module):
    """Student and projections. The loss runs inside forward, so that wrappers synchronise it.

    Args:
        model: a causal LM.
        options: the loss.
        autocast: whether the forward and the head's products run in bfloat16.
        pairs: layers to align; the projections are not exported.
        teacher_sizes: teacher → hidden size.
        seed: of frozen random projections.
    """

    def __init__(
        self,
        model: Any,
        options: LossOptions,
        autocast: bool,
        pairs: Sequence[Pair] = (),
        teacher_sizes: Mapping[str, int] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model, self.options, self.autocast = model, options, autocast
        self.aligner = make_aligner(model, options, pairs, teacher_sizes or {}, seed)

    def forward(
        self, batch: Batch, rows: int, segments: int, alpha: float | None = None
    ) -> StepLoss:
        """Returns the losses of a batch.

        Args:
            batch: on the model's device.
            rows: rows with a target in the whole step, over all batches.
            segments: segments with a target in the whole step.
            alpha: share of distillation in this step; the options' if not given.
        """
        return distil(
            self.model, batch, rows, segments, self.options, alpha, self.aligner, self.autocast
        )
