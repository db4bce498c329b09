"""What a model is, told from its small files: weights are neither loaded nor downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.model_files import (
    context_length,
    hidden_size,
    layer_count,
    locate,
    parameters,
    parameters_of,
    present,
    read_config,
)
from storage.errors import TeacherError, VocabularyMismatch


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model without its weights.

    Attributes:
        model: as the user named it.
        folder: where its configuration lies (the file itself, for random weights).
        here: whether its weights are on this machine.
        kind: transformers' model type.
        layers, hidden, inner: decoder layers, D, width of the MLP.
        context: longest block, None if not told.
        rows: rows of the head, padding included.
        parameters: exact where the weights are here, else estimated.
        embeddings: parameters outside the decoder layers, about.
        tokenizer: a fast tokenizer; None of a bare configuration.
    """

    model: str
    folder: Path
    here: bool
    kind: str
    layers: int
    hidden: int
    inner: int
    context: int | None
    rows: int
    parameters: int
    embeddings: int
    tokenizer: Any

    @property
    def about(self) -> str:
        """One line for people."""
        context = f", context {self.context:,}" if self.context else ""
        return (
            f"{self.kind}, {human_count(self.parameters)} parameters, {self.layers} layers of "
            f"{self.hidden:,}, head of {self.rows:,} rows{context}"
            f"{'' if self.here else '; weights are not here yet'}"
        )

    def parameters_with(self, layers: int) -> int:
        """Returns about how many parameters are left when only so many layers are kept."""
        inside = max(0, self.parameters - self.embeddings)
        return self.embeddings + inside * layers // max(1, self.layers)


def human_count(parameters: int) -> str:
    """Returns a number of parameters for people: 135 M."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= unit:
            return f"{parameters / unit:.3g} {name}"
    return str(parameters)


def look_at(model: str, revision: str | None, key: str, *, trusted: bool = False) -> ModelFacts:
    """Returns what a folder or hub name is; of a hub name at most configuration and tokenizer are
    downloaded.

    Args:
        key: configuration key, for messages.
        trusted: whether code that comes with the model may be run.

    Raises:
        TeacherError: it cannot be had, is no causal LM, or lacks weights or a fast tokenizer.
    """
    from stages.tokenizer import load_tokenizer

    here = present(model, revision)
    folder = locate(model, revision, key, weights=False)
    config = read_config(folder, key)
    _require_causal(config, folder, key, trusted)
    tokenizer = load_tokenizer(folder, key, trust_remote_code=trusted)
    count = parameters(folder, key) if here else parameters_of(config)
    return _facts(model, folder, here, config, count, tokenizer)


def look_at_config(path: str, key: str) -> ModelFacts:
    """Returns what a configuration for random weights means.

    Raises:
        TeacherError: it is not there, or not that of a causal LM.
    """
    folder = Path(path)
    config = read_config(folder, key)
    _require_causal(config, folder, key, False)
    return _facts(path, folder, True, config, parameters_of(config), None)


def _facts(
    model: str, folder: Path, here: bool, config: Mapping[str, Any], count: int, tokenizer: Any
) -> ModelFacts:
    known, rows = dict(config), int(config.get("vocab_size") or 0)
    size = hidden_size(known)
    tied = 1 if config.get("tie_word_embeddings", True) else 2
    return ModelFacts(
        model, folder, here, str(config.get("model_type")), layer_count(known) or 0, size,
        int(config.get("intermediate_size") or 4 * size), context_length(known), rows, count,
        min(count, rows * size * tied), tokenizer,
    )  # fmt: skip


def _require_causal(config: Mapping[str, Any], folder: Path, key: str, trusted: bool) -> None:
    """Refuses what transformers does not take for a causal LM."""
    from transformers.models.auto import modeling_auto

    known: Mapping[str, str] = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    kind = config.get("model_type")
    if kind in known or (trusted and config.get("auto_map")):
        return
    raise TeacherError(
        "transformers knows no causal language model of this type", where=f"{key}: {folder}",
        expected="a model_type such as llama, qwen2 or gemma3_text", found=kind,
        todo="take another model, or set trust_remote_code for one that comes with its own code",
    )  # fmt: skip


def common_tokenizer(models: Mapping[str, ModelFacts], chat: bool) -> str:
    """Returns the name of the model whose tokenizer cuts the corpus, after checking that all agree.

    It is the one with the fewest entries, since every head must have a row for each of its ids; of
    equals the last, which is the student's. Of a corpus of chats, one with a chat template.

    Args:
        models: name for messages → facts, teachers first.

    Raises:
        VocabularyMismatch: two tokenizers give other ids, or a head has too few rows.
    """
    from stages.tokenizer import require_same_tokenizer, vocab_size

    owners = {name: facts for name, facts in models.items() if facts.tokenizer is not None}
    sizes = {name: len(facts.tokenizer.get_vocab()) for name, facts in owners.items()}
    least = min(reversed(owners), key=lambda name: sizes[name])
    for name, facts in owners.items():
        require_same_tokenizer(owners[least].tokenizer, facts.tokenizer, least, name)
    chosen = least
    if chat and not getattr(owners[least].tokenizer, "chat_template", None):
        chosen = next(
            (name for name in reversed(owners) if sizes[name] == sizes[least]
             and getattr(owners[name].tokenizer, "chat_template", None)), least,
        )  # fmt: skip
    for name, facts in models.items():
        if facts.rows < vocab_size(owners[chosen].tokenizer):
            raise VocabularyMismatch(
                f"{name} has fewer logits than the tokenizer has ids", where=facts.model,
                expected=f"at least {vocab_size(owners[chosen].tokenizer):,}", found=f"{facts.rows:,}",
                todo="use the tokenizer this model was trained with",
            )  # fmt: skip
    return chosen
