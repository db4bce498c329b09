"""Which command of llama.cpp makes a GGUF file of an exported student. Nothing is converted here."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Final

SUPPORTED: Final = frozenset(
    f"{name}ForCausalLM"
    for name in (
        "Apertus", "Arcee", "Bloom", "Cohere", "Cohere2", "Dbrx", "DeepseekV2", "DeepseekV3",
        "Ernie4_5", "Exaone4", "Falcon", "FalconH1", "FalconMamba", "GPTBigCode", "GPTNeoX", "Gemma",
        "Gemma2", "Gemma3", "Gemma3n", "Glm", "Glm4", "Glm4Moe", "GptOss", "Granite", "GraniteMoe",
        "GraniteMoeHybrid", "HunYuanDenseV1", "Jamba", "Lfm2", "Lfm2Moe", "Llama", "Llama4", "Mamba",
        "Mamba2", "MiniMaxM2", "Ministral3", "Mistral", "Mixtral", "Nemotron", "NemotronH", "Olmo",
        "Olmo2", "Olmo3", "Olmoe", "Phi", "Phi3", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "Qwen3Next",
        "SeedOss", "SmolLM3", "StableLm", "Starcoder2",
    )
) | {"GPT2LMHeadModel"}  # fmt: skip
"""Causal models of transformers that llama.cpp's conversion/__init__.py (TEXT_MODEL_MAP) names."""

_TYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


def conversion(folder: Path, shown: str, name: str) -> tuple[str, str | None]:
    """Returns the model's architecture and the command that converts it, None if none is known to.

    Args:
        folder: of the exported model.
        shown: how the command names that folder.
        name: of the file to make, without .gguf.
    """
    config = json.loads((folder / "config.json").read_text())
    architecture = next(iter(config.get("architectures") or ()), "unknown")
    if architecture not in SUPPORTED:
        return architecture, None
    kind = _TYPES.get(config.get("dtype") or config.get("torch_dtype"), "auto")
    words = [
        "python",
        "convert_hf_to_gguf.py",
        shown,
        "--outfile",
        f"{name}.gguf",
        "--outtype",
        kind,
    ]
    return architecture, shlex.join(words)
