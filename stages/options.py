"""What a user may set, stage by stage: strict, frozen models without any heavy import.

`pipeline/config.py` puts them together into one file's schema; defaults and limits live here.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

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
    passage_chars: Count | None = Field(
        None,
        description="Cut each text into documents of at most so many characters, at blank lines, line "
        "ends or spaces, which laid end to end are the text: so some of a few long ones can be held out.",
    )
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
        if self.passage_chars and self.messages_field:
            raise ValueError("`passage_chars` cuts texts, and `messages_field` names chats")
        if self.split == "heldout" and self.heldout:
            raise ValueError("`heldout` cuts a train source; this one is held out altogether")
        return self


class CorpusOptions(Options):
    """Stage zero: documents → tokens → packed blocks."""

    tokenizer: str = Field(description="Folder or hub name of the tokenizer all models share.")
    tokenizer_revision: str | None = Field(None, description="Hub revision.")
    block_length: Annotated[int, Field(ge=2, le=1 << 24)] = Field(
        1024, description="T, tokens of a block."
    )
    blocks_per_part: Annotated[Count, Field(le=1 << 20)] | None = Field(
        None,
        description="Blocks of a part: the unit of work, of a shard and of a resume. If not given: what "
        "the slowest teacher needs cluster.part_minutes for, decided once, when the corpus is prepared.",
    )
    append_eos: bool = Field(True, description="End each plain-text document with the EOS token.")
    sources: Annotated[tuple[SourceOptions, ...], Field(min_length=1)]


class TeacherOptions(Options):
    """One teacher: an ordinary causal-LM checkpoint in safetensors."""

    model: str = Field(description="Folder or hub name.")
    revision: str | None = Field(None, description="Hub revision.")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "bfloat16",
        description="Of weights and forward; the head's results are float32 anyway. auto: bfloat16 "
        "where the machine that reads this multiplies it in hardware; such a cache ties to that.",
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
        "compact",
        description="compact: a small head, and draws that stand for the tail without bias in "
        "loss.divergence forward_kl alone; balanced: a large head, near-lossless (KL about 2e-5), and "
        "the mass of the tail; exact: that in float32.",
    )
    k: Count | None = Field(
        None, description="Head entries a token; if not given: 16 of compact, 64 of the others."
    )
    draws: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Tail draws a token; if not given: 16 of compact, 0 of the others."
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
    chunk_tokens: Count | None = Field(
        None,
        description="Tokens of one chunk of logits; memory and time, not meaning. By default 128 on a "
        "CPU, and what makes 256 MiB on a GPU.",
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

    def smaller(self, features: bool) -> str:
        """Returns what would make a cache smaller, as advice: of what it has.

        Args:
            features: whether it has feature layers.
        """
        levers = {
            "store.preset: compact": self.preset != "compact",
            "a smaller store.k": self.preset != "compact" or self.entries > PRESETS["compact"].k,
            "fewer store.draws": self.drawn > 0,
            "store.temperatures: []": bool(self.temperatures),
            "no teachers.NAME.feature_layers": features,
            "less text": True,
        }
        return ", ".join(lever for lever, has in levers.items() if has)


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
