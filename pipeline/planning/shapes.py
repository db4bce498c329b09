"""How large a model is, from its configuration and the headers of its weights: no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pipeline.cache_workspace import CacheWorkspace
from pipeline.workspace import Workspace
from stages.model_files import (
    at_hand,
    context_length,
    dimension,
    hidden_size,
    layer_count,
    locate,
    parameters,
    read_config,
)


@dataclass(frozen=True)
class Shape:
    """A decoder's dimensions.

    Attributes:
        parameters: of all that is stored.
        checkpoint: of what is loaded, before layers are cut away.
        trainable: of those that an optimizer moves.
        layers, hidden, inner: decoder layers, D, the MLP's width.
        queries, keys: heads times their size, of queries and of keys (as many as values).
        heads: of queries.
        vocab: rows of the head, padding included.
        tied: whether embedding and head are one matrix.
        context: the longest block it was made for, if it says so.
    """

    parameters: int
    checkpoint: int
    trainable: int
    layers: int
    hidden: int
    inner: int
    queries: int
    keys: int
    heads: int
    vocab: int
    tied: bool
    context: int | None

    @property
    def head(self) -> int:
        """Parameters of the head's matrix."""
        return self.vocab * self.hidden

    @property
    def decoder(self) -> int:
        """Parameters of all decoder layers: what is neither embedding nor head."""
        return max(0, self.parameters - self.head * (1 if self.tied else 2))

    @classmethod
    def of(cls, config: dict[str, Any], count: int | None = None) -> Shape:
        """Reads a transformers configuration; without a count it is that of attention, a gated MLP and
        embeddings."""
        size, layers = hidden_size(config), layer_count(config) or 0
        inner = dimension(config, "intermediate_size", "n_inner", "ffn_dim") or 4 * size
        heads = dimension(config, "num_attention_heads", "n_head") or 1
        of_one = dimension(config, "head_dim") or size // heads
        kv_heads = dimension(config, "num_key_value_heads") or heads
        vocab, tied = (
            int(config.get("vocab_size") or 0),
            bool(config.get("tie_word_embeddings", True)),
        )
        if count is None:
            a_layer = 2 * size * of_one * (heads + kv_heads) + 3 * size * inner
            count = layers * a_layer + vocab * size * (1 if tied else 2)
        return cls(
            count, count, count, layers, size, inner, heads * of_one, kv_heads * of_one, heads, vocab,
            tied, context_length(config),
        )  # fmt: skip


def teacher_shape(work: CacheWorkspace, name: str) -> Shape | None:
    """Returns a teacher's shape, None if its model is not here yet."""
    options, key = work.config.teachers[name], f"teachers.{name}.model"
    if not at_hand(options.model, options.revision):
        return None
    folder = locate(options.model, options.revision, key)
    return Shape.of(read_config(folder, key), parameters(folder, key))


def student_shape(work: Workspace) -> Shape | None:
    """Returns the student's shape as it is trained, None if its model is not here yet."""
    options = work.config.student
    if options.model is None:
        return Shape.of(read_config(work.student_folder(), "student.config"))
    if not work.there(options.model, options.revision):
        return None
    folder = work.student_folder()
    shape = Shape.of(read_config(folder, "student.model"), parameters(folder, "student.model"))
    if options.keep_layers and shape.layers:
        left = shape.decoder * len(options.keep_layers) // shape.layers
        count = shape.parameters - shape.decoder + left
        shape = replace(shape, parameters=count, trainable=count, layers=len(options.keep_layers))
    if options.lora is not None:
        # Rank times inputs and outputs of the seven linear maps of a layer (fewer with `targets`).
        ends = 7 * shape.hidden + 2 * (shape.queries + shape.keys) + 3 * shape.inner
        shape = replace(shape, trainable=options.lora.rank * ends * shape.layers)
    return shape
