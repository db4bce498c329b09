"""Continuations of held-out text: which prompts, and what a model writes after them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from storage.blocks import BlockReader
from storage.types import Int64

_AT_ONCE = 32  # prompts of one batch; with the seed it decides what is sampled


@dataclass(frozen=True)
class Prompt:
    """Held-out tokens, and as many that follow them in the same document as are to be written.

    Attributes:
        domain: name.
        tokens: ids to continue.
        following: ids of the text itself.
    """

    domain: str
    tokens: list[int]
    following: list[int]


def choose_prompts(
    corpus: BlockReader,
    domain: str,
    count: int,
    prompt_tokens: int,
    new_tokens: int,
    end: int | None,
) -> list[Prompt]:
    """Returns prompts of one domain, spread evenly over its held-out blocks; the same ones each time.

    Every document's piece of a block is cut into stretches of `prompt_tokens + new_tokens`; what is
    left over is no prompt, so there may be fewer than `count`, or none.

    Args:
        end: id that ends a document and is not to be written, if there is one.
    """
    width, found = prompt_tokens + new_tokens, []
    for block in corpus.info.block_ids("heldout", domain):
        blocks = corpus.read([int(block)])
        tokens, document = blocks.inputs[0], blocks.document[0, :-1]
        for start in _stretches(
            np.where(tokens == (-1 if end is None else end), -1, document), width
        ):
            found.append(tokens[start : start + width].tolist())
    chosen = [found[i * len(found) // count] for i in range(count)] if len(found) > count else found
    return [Prompt(domain, ids[:prompt_tokens], ids[prompt_tokens:]) for ids in chosen]


def _stretches(document_T: Int64, width: int) -> list[int]:
    """Returns where the stretches of `width` tokens of one document begin; −1 belongs to none."""
    starts, start = [], 0
    while start + width <= len(document_T):
        stretch = document_T[start : start + width]
        other = np.flatnonzero((stretch != stretch[0]) | (stretch < 0))
        if len(other):
            start += max(1, int(other[0]))
        else:
            starts.append(start)
            start += width
    return starts


@torch.inference_mode()
def continue_prompts(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], new_tokens: int,
    temperature: float, seed: int,
) -> list[list[int]]:  # fmt: skip
    """Returns the ids that a causal LM writes after each prompt, without the end of document.

    The model's own preferences (repetition penalty, top-p) are left out, so that models can be compared.

    Args:
        prompts: of one length, so that a batch needs no padding.
        temperature: 0 is greedy.
        seed: of the sampling.
    """
    model.eval()
    ends = {tokenizer.eos_token_id, *_listed(model.generation_config.eos_token_id)} - {None}
    written: list[list[int]] = []
    for start in range(0, len(prompts), _AT_ONCE):
        torch.manual_seed(seed + start)
        ids = torch.tensor(prompts[start : start + _AT_ONCE], device=model.device)
        out = _generate(model, ids, new_tokens, temperature, sorted(ends))[:, ids.shape[1] :]
        written += [_until(row, ends) for row in out.tolist()]
    return written


def _generate(
    model: Any, ids: torch.Tensor, new_tokens: int, temperature: float, ends: list[int]
) -> Any:
    from transformers import GenerationConfig

    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    own, plain = model.generation_config, GenerationConfig()  # type: ignore[no-untyped-call]
    model.generation_config = plain  # what is not given is taken from there
    try:
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens,
            eos_token_id=ends or None, pad_token_id=ends[0] if ends else None,
            **(sampling if temperature else {"do_sample": False}),
        )  # fmt: skip
    finally:
        model.generation_config = own


def _listed(ends: int | list[int] | None) -> list[int | None]:
    return [*ends] if isinstance(ends, list) else [ends]


def _until(ids: list[int], ends: set[int | None]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]
