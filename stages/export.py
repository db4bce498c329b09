"""The trained student as an ordinary transformers checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storage import durable


def export(
    model: Any,
    state: dict[str, Tensor],
    tokenizer: Any,
    dtype: torch.dtype,
    folder: Path,
    facts: dict[str, Any],
) -> None:
    """Saves safetensors, tokenizer and generation config.

    Args:
        model: whose configuration is saved; it is left as it is.
        state: its weights, whole and on the CPU, without adapters.
        dtype: of the saved weights.
        facts: provenance, kept beside it as scholiast.json; its presence tells a finished export.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    saved = {name: value.to(dtype) for name, value in state.items()}
    before = model.config.dtype
    model.config.dtype = dtype
    try:
        with durable.disk_errors(folder):
            model.save_pretrained(temporary, state_dict=saved)
            tokenizer.save_pretrained(temporary)
            (temporary / "scholiast.json").write_text(json.dumps(facts, indent=2, sort_keys=True))
            durable.replace_folder(temporary, folder)
    finally:
        model.config.dtype = before
