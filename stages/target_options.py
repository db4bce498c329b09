"""What a user may set of the targets: how teachers are fused, which layers are aligned, the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from stages.options import Count, Fraction, Inside, Options, Pooling, Positive, Tail
from stages.weighting import parsed


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
            "reverse, total variation. All but forward_kl take the tail as one bucket, beside the 16 "
            "entries of store.preset compact: balanced keeps 64 for them.",
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
    chunk_bytes: Count | None = Field(
        None,
        description="Memory of one chunk of logits; memory and time, not meaning. By default 96 MiB on a "
        "CPU, 512 MiB on a GPU.",
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
