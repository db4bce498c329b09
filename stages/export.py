"""The trained student as an ordinary transformers checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.checkpoint import checkpoint_of, load_checkpoint
from stages.lora import merged
from stages.ranks import Ranks
from stages.run import Run, require_identity
from storage import durable


def export(
    model: Any,
    state: dict[str, Tensor],
    tokenizer: Any,
    dtype: torch.dtype,
    folder: Path,
    facts: dict[str, Any],
    card: Callable[[Path], str] | None = None,
) -> None:
    """Saves safetensors, tokenizer, generation config and model card, all or nothing.

    Args:
        model: whose configuration is saved; it is left as it is.
        state: its weights, whole and on the CPU, without adapters.
        dtype: of the saved weights.
        facts: provenance, kept beside it as scholiast.json; its presence tells a finished export.
        card: gives README.md, asked once the rest is written.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tied = model.all_tied_weights_keys  # a tied head lies in the file once, as its model loads it
    saved = {name: value.to(dtype) for name, value in state.items() if name not in tied}
    with durable.disk_errors(folder):
        model.save_pretrained(temporary, state_dict=saved)
        _state_dtype(temporary / "config.json", dtype)
        tokenizer.save_pretrained(temporary)
        (temporary / "scholiast.json").write_text(json.dumps(facts, indent=2, sort_keys=True))
        if card is not None:
            (temporary / "README.md").write_text(card(temporary), encoding="utf-8")
        durable.replace_folder(temporary, folder)


def _state_dtype(path: Path, dtype: torch.dtype) -> None:
    """Puts the saved weights' dtype into a configuration: save_pretrained writes that of its model."""
    config = json.loads(path.read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def export_checkpoint(run: Run, model: Any, tokenizer: Any, step: int | None, folder: Path) -> int:
    """Saves the student as it was after a step that has a checkpoint; returns the step.

    Args:
        model: built as for the training; it takes the checkpoint's weights.
        step: None is the newest.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or it belongs to another run.
    """
    source, facts = checkpoint_of(run.folder / "checkpoints", step)
    require_identity(run, facts.get("identity"), source)
    state = {"student": {f"model.{name}": value for name, value in model.state_dict().items()}}
    load_checkpoint(source, facts, state, Ranks(torch.device("cpu")))
    whole = model.state_dict() if run.lora is None else merged(model.state_dict(), run.lora)
    told = {"identity": run.identity, "steps": facts["step"]}
    export(model, whole, tokenizer, run.dtype, folder, told, run.card)
    return int(facts["step"])
