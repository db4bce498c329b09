"""What a user may set, stage by stage: strict, frozen models without any heavy import.

`pipeline/config.py` puts them together into one file's schema; defaults and limits live here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from stages.weighting import parsed
from storage.codec import PRESETS
from storage.layout import POOLINGS

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Inside = Annotated[float, Field(gt=0.0, lt=1.0)]
Below1 = Annotated[float, Field(ge=0.0, lt=1.0)]
Seed = Annotated[int, Field(ge=-(2**62), lt=2**62)]  # what torch takes, with room for the ranks
Count = Annotated[int, Field(ge=1)]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]
Tail = Literal["draws", "bucket", "renormalised", "residual"]
Pooling = Literal["mean", "last"]


class Options(BaseModel):
    """Base: unknown keys are errors and nothing can be changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SourceOptions(Options):
    """One source of documents. Blocks never mix two sources."""

    domain: str = Field(min_length=1, description="Name that reports group by.")
    split: Literal["train", "heldout"] = Field("train", description="What the source is for.")
    heldout: Below1 = Field(
        0.0, description="Share of a train source's documents, chosen by their hash, to hold out."
    )
    format: Literal["text", "jsonl", "parquet", "disk", "hub"] = Field(
        description="text: a document a file; jsonl, parquet: a document a row; disk: a folder of "
        "`save_to_disk`; hub: a data set of the Hugging Face hub."
    )
    path: str = Field(description="File, glob, folder, or the hub's data set name.")
    text_field: str = Field("text", description="Column that holds the text.")
    messages_field: str | None = Field(
        None,
        description="Column that holds chat messages: they are rendered with the tokenizer's chat "
        "template and only assistant tokens are targets.",
    )
    hub_config: str | None = Field(None, description="hub: configuration name.")
    hub_split: str = Field("train", description="hub and disk (of a DatasetDict): split name.")
    revision: str | None = Field(None, description="hub: commit hash or tag; required there.")

    @model_validator(mode="after")
    def _pinned(self) -> SourceOptions:
        if self.domain == "overall":
            raise ValueError("a domain cannot be named 'overall': reports use it for all of them")
        if self.format == "hub" and not self.revision:
            raise ValueError("a hub source needs `revision`, so that the corpus stays the same")
        if self.split == "heldout" and self.heldout:
            raise ValueError("`heldout` cuts a train source; this one is held out altogether")
        return self


class CorpusOptions(Options):
    """Stage zero: documents → tokens → packed blocks."""

    tokenizer: str = Field(description="Folder or hub name of the tokenizer all models share.")
    tokenizer_revision: str | None = Field(None, description="Hub revision.")
    block_length: Annotated[int, Field(ge=2)] = Field(1024, description="T, tokens of a block.")
    blocks_per_part: Count = Field(
        64, description="Blocks of a part: the unit of work, of a shard and of a resume."
    )
    append_eos: bool = Field(True, description="End each plain-text document with the EOS token.")
    sources: Annotated[tuple[SourceOptions, ...], Field(min_length=1)]


class TeacherOptions(Options):
    """One teacher: an ordinary causal-LM checkpoint in safetensors."""

    model: str = Field(description="Folder or hub name.")
    revision: str | None = Field(None, description="Hub revision.")
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="Of weights and forward; the head's results are float32 anyway."
    )
    device_map: str | None = Field(
        None, description='"auto" spreads a teacher over several GPUs (accelerate).'
    )
    attention: Attention = Field(
        "auto", description="Implementation; auto: sdpa where the model has it."
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")
    feature_layers: tuple[Count, ...] = Field(
        (), description="Decoder layers (1 = first) whose outputs are pooled and stored."
    )
    batch_blocks: Count = Field(4, description="Blocks of one forward pass.")

    @field_validator("feature_layers")
    @classmethod
    def _distinct(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(layers)) != len(layers):
            raise ValueError("a layer is named twice")
        return layers


class StoreOptions(Options):
    """What is kept of every teacher's distribution."""

    preset: Literal["exact", "balanced", "compact"] = Field(
        "balanced",
        description="exact: float32; balanced: near-lossless (KL about 2e-5); compact: a small "
        "head, and draws that stand for the tail without bias.",
    )
    k: Count | None = Field(
        None, description="Head entries a token; if not given the preset's: 64, compact 16."
    )
    draws: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Tail draws a token; if not given the preset's: 0, compact 16."
    )
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="End a row's head where its mass reaches this, at k at the latest."
    )
    seed: int = Field(0, description="Of the draws.")
    temperatures: tuple[Positive, ...] = Field(
        (1.5, 2.0), description="Temperatures ≠ 1 at which the cache can be used."
    )
    segments: Count = Field(1, description="Equal spans of a block that are pooled apart.")
    pooling: Annotated[tuple[Pooling, ...], Field(min_length=1)] = Field(
        ("mean",),
        description="What is stored of each segment's hidden states: their mean, that of its last token.",
    )
    chunk_tokens: Count = Field(
        128, description="Tokens of one chunk of logits; memory, not meaning."
    )
    compile: bool = Field(
        False,
        description="Fuse the passes over the vocabulary by torch.compile; the same notes up to "
        "rounding. On a CPU this needs a C++ compiler.",
    )

    @field_validator("temperatures")
    @classmethod
    def _grid(cls, grid: tuple[float, ...]) -> tuple[float, ...]:
        if len({*grid, 1.0}) != len(grid) + 1 or not all(0.05 <= t <= 100 for t in grid):
            raise ValueError("temperatures must be distinct, not 1, and between 0.05 and 100")
        return grid

    @field_validator("pooling")
    @classmethod
    def _ordered(cls, pooling: tuple[Pooling, ...]) -> tuple[Pooling, ...]:
        if len(set(pooling)) != len(pooling):
            raise ValueError("a pooling is named twice")
        return tuple(sorted(pooling, key=POOLINGS.index))  # the order changes nothing

    @property
    def entries(self) -> int:
        """K: what was asked for, or the preset's."""
        return PRESETS[self.preset].k if self.k is None else self.k

    @property
    def drawn(self) -> int:
        """S: what was asked for, or the preset's."""
        return PRESETS[self.preset].draws if self.draws is None else self.draws


class FusionOptions(Options):
    """How much each teacher counts, token by token, and how their distributions are mixed."""

    weights: str = Field(
        "entropy",
        description="uniform; static; entropy: w_m ∝ exp(−H_m/tau); max_prob: w_m ∝ (largest "
        "probability)^(1/tau); single:NAME: one teacher alone. These look at the gold token: "
        "confidence: CA-MKD's (1 − softmax of the losses)/(M−1); min_ce: the teacher of least loss "
        "takes all; em: constants a domain, fitted to training blocks.",
    )
    per: Literal["token", "sequence"] = Field(
        "token",
        description="entropy, max_prob, confidence, min_ce: of each token, or of the mean over the "
        "scored tokens of its document in its block.",
    )
    tau: Positive = Field(
        1.0, description="entropy: temperature of the weights, nats; max_prob: without a unit."
    )
    normalise: bool = Field(
        False, description="entropy: divide H_m by log V, so that tau has no unit."
    )
    static: dict[str, Annotated[float, Field(ge=0.0)]] = Field(
        default_factory=dict, description="static: teacher → weight (normalised)."
    )
    prior: dict[str, Positive] = Field(
        default_factory=dict,
        description="Teacher → factor of its weights, which are then normalised; 1 if not named.",
    )
    floor: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="Least weight of every teacher, below 1/M: w ← floor + (1 − M·floor)·w."
    )
    ramp: Fraction = Field(
        0.0,
        description="Share of the steps over which the weights move linearly from uniform ones (times "
        "the prior) to the chosen ones; arithmetic mixing only.",
    )
    calibration_blocks: Count = Field(
        64, description="em: training blocks of a domain that it is fitted on, at most."
    )
    mixing: Literal["arithmetic", "geometric"] = Field(
        "arithmetic",
        description="Σ w p, or Π p^w normalised; geometric needs the tail as a bucket, not draws.",
    )
    teachers: tuple[str, ...] | None = Field(
        None, description="The cached teachers to fuse; all if not given."
    )
    k: Count | None = Field(
        None,
        description="Head entries to use, the most probable ones; all that are cached if not "
        "given.",
    )

    @field_validator("weights")
    @classmethod
    def _known(cls, weights: str) -> str:
        parsed(weights)
        return weights

    @model_validator(mode="after")
    def _linear(self) -> FusionOptions:
        if self.ramp and self.mixing == "geometric":
            raise ValueError(
                "fusion.ramp goes with fusion.mixing: arithmetic: a geometric target is not linear in "
                "the weights, and is made before its step is known"
            )
        return self

    def require_teachers(self, names: Sequence[str]) -> None:
        """Refuses weights that do not fit the teachers that are fused.

        Raises:
            ValueError: says which key.
        """
        listed = list(names)
        chosen = parsed(self.weights)[1]
        if chosen and chosen not in names:
            raise ValueError(
                f"fusion.weights {self.weights!r} names no fused teacher: NAME is one of {listed}"
            )
        if self.weights == "static" and (
            set(self.static) != set(names) or not sum(self.static.values())
        ):
            raise ValueError(
                f"fusion.static must give each of {listed} a weight, one of them positive"
            )
        unknown = sorted(set(self.prior) - set(names))
        if unknown:
            raise ValueError(f"fusion.prior names {unknown}: fused are {listed}")
        if self.floor * len(names) >= 1:
            raise ValueError(
                f"fusion.floor {self.floor} must be below 1/{len(names)}, the number of fused teachers"
            )


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
            raise ValueError("`keep_layers` and `lora` go with `model`: there is nothing to keep")
        return self


class FeaturePair(Options):
    """A student layer aligned with a teacher layer (1 = output of the first decoder block)."""

    student: Count = Field(description="Layer of the student.")
    teacher: Count | dict[str, Count] = Field(
        description="Layer of every teacher, or teacher → layer."
    )


Pairs = Annotated[
    Annotated[Literal["auto"], Tag("[auto]")]
    | Annotated[tuple[FeaturePair, ...], Tag("[by hand]")],
    Discriminator(lambda value: "[auto]" if isinstance(value, str) else "[by hand]"),
]
"""The tags tell pydantic which of the two is meant, so that an error is told once."""


class FeatureOptions(Options):
    """Alignment of pooled hidden states."""

    weight: Annotated[float, Field(ge=0.0)] = Field(0.0, description="β; 0 switches it off.")
    kind: Literal["cosine", "mse", "gram"] = Field(
        "cosine",
        description="cosine: 1 − cos after LayerNorm; mse: mean squared error; gram: of the cosines "
        "between the segments of a micro-batch, without a projection.",
    )
    projection: Literal["linear", "random"] = Field(
        "linear",
        description="From the student's size to a teacher's. linear: trained; random: frozen, by "
        "train.seed.",
    )
    pooled: Pooling = Field("mean", description="Which of store.pooling to align.")
    pairs: Pairs = Field(
        "auto",
        description="Layers to align. auto: each stored layer with the student's at the same relative "
        "depth.",
    )


class LossOptions(Options):
    """total = (1−alpha)·CE + alpha·temperature²·KD + features.weight·features."""

    alpha: Fraction = Field(0.9, description="Share of distillation against gold tokens.")
    alpha_schedule: Literal["constant", "linear", "wsd"] = Field(
        "constant",
        description="linear: from alpha to alpha_end; wsd: up from alpha_end, alpha, down again.",
    )
    alpha_end: Fraction = Field(0.0, description="linear, wsd: share at the end.")
    alpha_warmup: Fraction = Field(0.1, description="wsd: share of the steps that rise.")
    alpha_decay: Fraction = Field(0.2, description="wsd: share of the steps that fall.")
    temperature: Positive = Field(1.0, description="1, or one of store.temperatures.")
    divergence: Literal["forward_kl", "reverse_kl", "js", "skew_kl", "skew_reverse_kl", "tv"] = (
        Field(
            "forward_kl",
            description="Of student and teachers: KL, its reverse, Jensen–Shannon, skewed KL and its "
            "reverse, total variation.",
        )
    )
    beta: Inside = Field(0.5, description="js: weight of the teachers in the mixture and the sum.")
    skew: Inside = Field(0.1, description="skew_kl, skew_reverse_kl: λ of the mixture.")
    target: Literal["auto", "draws", "bucket", "renormalised", "residual"] = Field(
        "auto",
        description="What stands for the tail. draws: the cached ones, without bias; bucket: one "
        "category; renormalised: nothing; residual: the gold token gets its mass; auto: draws if they "
        "are cached and the divergence is forward_kl, else bucket.",
    )
    features: FeatureOptions = FeatureOptions()
    chunk_tokens: Count | None = Field(
        None, description="Tokens of one chunk of logits, in place of chunk_bytes."
    )
    chunk_bytes: Count = Field(
        96 * 2**20, description="Memory of one chunk of logits; memory, not meaning."
    )

    @model_validator(mode="after")
    def _possible(self) -> LossOptions:
        if self.divergence != "forward_kl" and self.target not in ("auto", "bucket"):
            raise ValueError(
                f"loss.divergence {self.divergence} needs the tail as a bucket: `loss.target` can be "
                f"auto or bucket, and {self.target} goes with forward_kl alone"
            )
        if self.alpha_schedule == "wsd" and self.alpha_warmup + self.alpha_decay > 1:
            raise ValueError("`alpha_warmup` and `alpha_decay` together exceed the run")
        return self

    def tail(self, draws: int) -> Tail:
        """Returns what stands for the tail with a cache of this many draws a token.

        Raises:
            ValueError: draws are asked for and none are cached.
        """
        if self.target == "draws" and not draws:
            raise ValueError(
                "loss.target draws, and the caches hold none (store.draws 0): possible are auto, "
                "bucket, renormalised and residual"
            )
        if self.target != "auto":
            return self.target
        return "draws" if draws and self.divergence == "forward_kl" else "bucket"


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
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="bf16: autocast, float32 weights."
    )
    gradient_checkpointing: bool = Field(False, description="Less memory, a forward more.")
    compile: bool = Field(
        False,
        description="Compile the decoder layers by torch.compile. On a CPU this needs a C++ compiler.",
    )
    seed: Seed = Field(0, description="Of the blocks' order and of everything random.")
    eval_every: Count = Field(200, description="Steps between evaluations on held-out blocks.")
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


class ReadingOptions(Options):
    """How corpus_dir and cache_dir are read where they are URLs."""

    local_cache: str = Field(
        "~/.cache/scholiast", description="Folder for what is fetched; processes may share it."
    )
    local_cache_bytes: Count = Field(
        50_000_000_000,
        description="Its size; the least recently read is evicted. 128 parts of all should fit.",
    )
    fetch_threads: Annotated[int, Field(ge=0)] = Field(
        8, description="Threads that fetch the order's next parts ahead; 0: when they are read."
    )


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
