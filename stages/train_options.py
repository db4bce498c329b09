"""What a user may set of stage two: where the student comes from, its training, its evaluation."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.options import Attention, Below1, Count, Fraction, Options, Positive, Seed


class LoraOptions(Options):
    """Low-rank adapters in the decoder layers; everything else stays as it is."""

    rank: Count = Field(16, description="Rank of the adapters (needs the extra `lora`).")
    alpha: Positive = Field(32.0, description="They are scaled by alpha / rank.")
    dropout: Below1 = Field(0.0, description="Of the adapters' input.")
    targets: tuple[str, ...] = Field(
        (), description="Last names of the linear maps that get one, e.g. q_proj; all if none."
    )


class StudentOptions(Options):
    """Where the student comes from."""

    model: str | None = Field(
        None, description="Folder or hub name of the checkpoint it starts from."
    )
    config: str | None = Field(
        None,
        description="In place of `model`: a config.json, or a folder that holds one; random weights "
        "by train.seed.",
    )
    revision: str | None = Field(None, description="Hub revision.")
    keep_layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="Decoder layers (0 = first) to keep; all if not given."
    )
    attention: Attention = Field(
        "auto", description="Implementation; auto: sdpa where the model has it."
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")
    lora: LoraOptions | None = Field(None, description="Train adapters only.")

    @model_validator(mode="after")
    def _one_origin(self) -> StudentOptions:
        if (self.model is None) == (self.config is None):
            raise ValueError("give either `model` or `config`")
        if self.config is not None and (self.keep_layers is not None or self.lora is not None):
            raise ValueError(
                "`keep_layers` and `lora` go with `model`: `config` has nothing to keep"
            )
        return self


class TrainOptions(Options):
    """Stage two's loop."""

    epochs: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Passes over the training blocks."
    )
    steps: Count | None = Field(None, description="Optimizer steps, in place of `epochs`.")
    batch_blocks: Count = Field(1, description="Blocks of one forward and backward.")
    accumulate: Count = Field(
        1, description="Batches of one optimizer step, shared out among the ranks."
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="With several ranks. ddp: each holds everything; fsdp: weights, gradients and "
        "moments are cut into one piece a rank.",
    )
    decode: Literal["cpu", "device"] = Field(
        "cpu",
        description="Where notes are unpacked; device: packed integers go to it, a third of the bytes.",
    )
    workers: Annotated[int, Field(ge=0)] = Field(
        0, description="Processes that read and fuse ahead; 0: a thread. The batches are the same."
    )
    lr: Positive = Field(1e-3, description="Peak learning rate of AdamW.")
    schedule: Literal["cosine", "wsd"] = Field(
        "cosine", description="After the warm-up; wsd: constant, then linear decay."
    )
    warmup: Fraction = Field(0.05, description="Share of the steps.")
    decay: Fraction = Field(0.2, description="wsd: share of the steps that decay to 0.")
    min_lr_ratio: Fraction = Field(0.0, description="cosine: final rate over lr.")
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(
        0.01, description="Of matrices; vectors are not decayed."
    )
    betas: tuple[Below1, Below1] = Field((0.9, 0.95), description="AdamW's.")
    clip: Positive = Field(1.0, description="Largest gradient norm.")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "bf16",
        description="bf16: autocast, float32 weights. auto: bf16 where the machine that reads this "
        "multiplies it in hardware.",
    )
    gradient_checkpointing: bool = Field(False, description="Less memory, a forward more.")
    compile: bool = Field(
        False,
        description="Compile the decoder layers by torch.compile. On a CPU this needs a C++ compiler.",
    )
    seed: Seed = Field(0, description="Of the blocks' order and of everything random.")
    eval_every: Count | None = Field(
        200,
        description="Steps between evaluations on held-out blocks; also before the first and after the "
        "last. null: none, `scholiast evaluate` measures alone.",
    )
    checkpoint_every: Count = Field(100, description="Steps between checkpoints.")
    keep_checkpoints: Count = Field(2, description="Newest checkpoints that are kept.")
    async_checkpoint: bool = Field(
        False,
        description="Write checkpoints while the training goes on, from a copy in memory.",
    )
    log_every: Count = Field(1, description="Steps between rows of metrics.jsonl.")
    loggers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        (), description="Who gets the rows as well; each needs the extra of its name."
    )
    baseline: bool = Field(
        False, description="Also train the same student for the same steps on cross-entropy alone."
    )

    @model_validator(mode="after")
    def _one_length(self) -> TrainOptions:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either `epochs` or `steps`")
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError("`warmup` and `decay` together exceed the run")
        return self

    def steps_over(self, blocks: int) -> int:
        """Returns the optimizer steps of a training on so many blocks: those asked for, or what the
        epochs come to, the last step's blocks being fewer where they do not come out even."""
        if self.steps is not None:
            return self.steps
        return math.ceil(blocks * (self.epochs or 1) / (self.batch_blocks * self.accumulate))


class EvaluateOptions(Options):
    """What is measured on the held-out blocks, and what the samples continue."""

    batch_blocks: Count = Field(4, description="Blocks of one forward.")
    samples: Annotated[int, Field(ge=0)] = Field(1, description="Continuations shown, per domain.")
    prompts: Annotated[int, Field(ge=0)] = Field(
        8, description="Continuations scored, per domain; those shown are among them."
    )
    prompt_tokens: Count = Field(48, description="Held-out tokens that are continued.")
    new_tokens: Count = Field(64, description="Tokens of a continuation.")
    sample_temperature: Positive = Field(
        1.0, description="Of the sampled continuations; the others are greedy."
    )
    resamples: Annotated[int, Field(ge=0)] = Field(
        1000, description="Bootstrap resamples behind each 95 % interval; 0: no intervals."
    )
    seed: int = Field(0, ge=0, description="Of sampled continuations and resamples.")
    token_rows: Annotated[int, Field(ge=0)] = Field(
        192,
        description="Rows of a held-out block that the report shows token by token; per domain.",
    )
