"""Low-rank adapters (Hu et al., arXiv 2106.09685) by peft: W + (alpha/rank)·B·A, with W kept as it is.

The adapters go into the linear maps of the decoder layers, in place, so that the model keeps its class
and everything else works as without them. At export they are merged: the result is an ordinary model.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from stages.head import find_decoder_layers
from stages.train_options import LoraOptions
from storage.errors import ConfigError

_ADAPTER = "default"


def add_adapters(model: Any, options: LoraOptions) -> None:
    """Puts adapters into a student and freezes the rest, in place.

    Raises:
        ConfigError: peft is not installed, or no linear map has such a name.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            "adapters need the package peft", where="student.lora", found=error,
            todo="pip install 'scholiast[lora]', or leave student.lora out",
        ) from error  # fmt: skip
    settings = LoraConfig(
        r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout,
        target_modules=linear_maps(model, options.targets), bias="none",
    )  # fmt: skip
    inject_adapter_in_model(settings, model, adapter_name=_ADAPTER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def linear_maps(model: Any, targets: tuple[str, ...]) -> list[str]:
    """Returns the full names of the decoder layers' linear maps, of those last names if any are given.

    Raises:
        ConfigError: there is none.
    """
    inside = {id(m) for layer in find_decoder_layers(model) for m in layer.modules()}
    found = [
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) in inside
    ]  # fmt: skip
    last = sorted({name.rsplit(".", 1)[-1] for name in found})
    if unknown := sorted(set(targets) - set(last)):
        raise ConfigError(
            "the student's layers have no such linear map", where="student.lora.targets",
            expected=f"some of {last}", found=unknown, todo="choose existing names",
        )  # fmt: skip
    return [name for name in found if not targets or name.rsplit(".", 1)[-1] in targets]


def merged(state: dict[str, Tensor], options: LoraOptions) -> dict[str, Tensor]:
    """Returns a state dict with the adapters added to the weights and gone."""
    scale = options.alpha / options.rank
    whole = {}
    for name, value in state.items():
        if re.search(r"\.lora_[AB]\.", name):
            continue
        plain = name.replace(".base_layer.", ".")
        if plain != name and plain.endswith(".weight"):
            stem = name.removesuffix("base_layer.weight")
            a = state[f"{stem}lora_A.{_ADAPTER}.weight"]
            b = state[f"{stem}lora_B.{_ADAPTER}.weight"]
            value = value + scale * (b @ a)
        whole[plain] = value
    return whole
