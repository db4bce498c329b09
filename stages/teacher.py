"""Teacher backends: block of tokens → hidden states, and hidden states → logits.

One protocol, so that other engines can serve; the transformers backend is the reference. When a
teacher is loaded, `model_checks.py` looks whether its head and its attention are what we take them for.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from stages.head import Head, run_decoder
from stages.model_checks import check_model
from stages.model_safety import first_line, require_plain, todo_of, weight_files
from stages.options import TeacherOptions
from storage.errors import TeacherError, VocabularyMismatch


@dataclass(frozen=True)
class HiddenStates:
    """What a forward leaves.

    Attributes:
        last: [B, T, D], the head's input (after the final norm).
        layers: decoder layer (1 = first) → its output [B, T, D], before the final norm.
    """

    last: Tensor
    layers: dict[int, Tensor]


class TeacherBackend(Protocol):
    """What stage one needs of a teacher.

    Attributes:
        head_rows: rows of the head, at least the tokenizer's vocabulary.
        hidden_size, layers: D, and the number of decoder layers.
        device: where inputs go.
    """

    head_rows: int
    hidden_size: int
    layers: int
    device: torch.device

    def forward(
        self, tokens_BT: Tensor, positions_BT: Tensor, layers: tuple[int, ...]
    ) -> HiddenStates:
        """Reads blocks; positions restart at 0 with each document, and attention with them."""
        ...

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """Returns float32 logits [C, head_rows]; the next call may overwrite them."""
        ...

    def close(self) -> None:
        """Frees the model's memory."""
        ...


class TransformersTeacher:
    """A causal LM of transformers.

    Args:
        name: the teacher's name, for messages.
        folder: checkpoint folder.
        options: dtype, attention, device_map, batch size.
        device: where a teacher without device_map goes.

    Raises:
        TeacherError: it cannot be loaded, its head is not one we reproduce, or its attention
            crosses documents.
    """

    def __init__(
        self, name: str, folder: Path, options: TeacherOptions, device: torch.device
    ) -> None:
        self.name = name
        self._model = load_causal_lm(
            folder, f"teachers.{name}.model", dtype=getattr(torch, options.dtype),
            attention=options.attention, device=device, device_map=options.device_map,
            trust_remote_code=options.trust_remote_code,
        )  # fmt: skip
        self._model.eval().requires_grad_(False)
        head = Head.of(self._model, bfloat16=options.dtype == "bfloat16")
        if head.weight.device.type == "cpu":  # widen once, not at every chunk
            head = Head(head.weight.float(), head.bias, head.rule, head.bfloat16)
        self._head = head
        self._buffer: Tensor | None = None
        config = self._model.config.get_text_config()
        self.head_rows, self.hidden_size = head.weight.shape
        self.layers = int(config.num_hidden_layers)
        self.device = self._model.get_input_embeddings().weight.device
        check_model(self._model, head, f"teachers.{name}", f"teachers.{name}.attention")

    @torch.inference_mode()
    def forward(
        self, tokens_BT: Tensor, positions_BT: Tensor, layers: tuple[int, ...]
    ) -> HiddenStates:
        tokens, positions = tokens_BT.to(self.device), positions_BT.to(self.device)
        return HiddenStates(*run_decoder(self._model, tokens, positions, layers))

    @torch.inference_mode()
    def logits(self, hidden_CD: Tensor) -> Tensor:
        head = self._head
        if head.weight.device.type != "cpu":  # what the allocator keeps there serves as well
            return head.logits(hidden_CD.to(head.weight.device))
        if self._buffer is None or len(self._buffer) < len(hidden_CD):
            self._buffer = head.weight.new_empty(
                len(hidden_CD), self.head_rows, dtype=torch.float32
            )
        return head.logits(hidden_CD.to(head.weight.device), self._buffer[: len(hidden_CD)])

    def close(self) -> None:
        del self._model, self._head, self._buffer
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def load_causal_lm(
    folder: Path,
    key: str,
    *,
    dtype: torch.dtype,
    attention: str,
    device: torch.device,
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Returns a causal LM from a checkpoint folder.

    Raises:
        TeacherError: it cannot be loaded, weights are missing, or memory does not suffice.
    """
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    weight_files(folder, key)  # refuses pickles and adapters
    require_plain(folder, key)
    try:
        model, info = loader.from_pretrained(
            folder, dtype=dtype, device_map=device_map,
            attn_implementation=None if attention == "auto" else attention,
            trust_remote_code=trust_remote_code, use_safetensors=True, output_loading_info=True,
        )  # fmt: skip
        if info["missing_keys"]:
            raise ValueError(f"weights are missing: {sorted(info['missing_keys'])[:3]} …")
        return model if device_map else model.to(device)
    except torch.OutOfMemoryError as error:
        raise TeacherError(
            "the model does not fit into the device's memory", where=f"{key}: {folder}",
            todo='set device_map: auto to spread it over several GPUs, or dtype: bfloat16',
        ) from error  # fmt: skip
    except Exception as error:  # safetensors and configurations raise types of their own
        raise TeacherError(
            f"the model cannot be loaded: {first_line(error)}", where=f"{key}: {folder}",
            todo=todo_of(error, "check the checkpoint with transformers alone"),
        ) from error  # fmt: skip


def random_causal_lm(
    folder: Path, key: str, *, attention: str, trust_remote_code: bool = False
) -> Any:
    """Returns a causal LM in float32 from a configuration alone, with random weights, on the CPU.

    Raises:
        TeacherError: the configuration is not one of a causal LM.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    require_plain(folder, key)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return loader.from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code,
            attn_implementation=None if attention == "auto" else attention,
        )  # fmt: skip
    except Exception as error:  # configurations raise types of their own
        raise TeacherError(
            f"no model can be made of the configuration: {first_line(error)}",
            where=f"{key}: {folder}",
            todo=todo_of(error, "give the config.json of a transformers causal LM"),
        ) from error  # fmt: skip


def require_fit(backend: TeacherBackend, name: str, vocab: int, layers: tuple[int, ...]) -> None:
    """Refuses a teacher without a logit for every id, or without a layer that is asked for.

    Raises:
        VocabularyMismatch, TeacherError
    """
    if backend.head_rows < vocab:
        raise VocabularyMismatch(
            "the teacher has fewer logits than the tokenizer has ids", where=f"teachers.{name}",
            expected=f"at least {vocab}", found=backend.head_rows,
            todo="use the tokenizer this model was trained with",
        )  # fmt: skip
    wrong = [layer for layer in layers if layer > backend.layers]
    if wrong:
        raise TeacherError(
            "the teacher has no such layer", where=f"teachers.{name}.feature_layers",
            expected=f"1 to {backend.layers}", found=wrong, todo="choose existing layers",
        )  # fmt: skip
