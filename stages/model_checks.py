"""Two facts about a causal LM, teacher or student, that are checked on 64 tokens instead of trusted.

Our head gives the model's own logits (families scale and cap them in ways of their own), and one
document of a packed block cannot see another (recurrent layers carry a state over).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from stages.head import Head, run_decoder
from storage.errors import TeacherError

FIRST, SECOND = 20, 12  # tokens of a block's two documents


@torch.no_grad()
def check_model(model: Any, head: Head, key: str, attention: str) -> None:
    """Checks head and isolation on two blocks of 32 tokens; the model is left as it was.

    Args:
        head: as it will be used.
        key, attention: of the configuration, for messages.

    Raises:
        TeacherError: says which of the two is not as we take it.
    """
    training = model.training
    model.eval()
    with _runnable(model):
        _check(model, head, key, attention)
    model.train(training)


@contextlib.contextmanager
def _runnable(model: Any) -> Iterator[None]:
    """Lets a model that waits on the CPU for its GPU run there: flash attention has no CPU kernel.

    Its head is then checked, and that documents are told apart by their positions.
    """
    chosen = str(getattr(model.config, "_attn_implementation", ""))
    if "flash" not in chosen or _input_device(model).type != "cpu":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(chosen)


def _input_device(model: Any) -> torch.device:
    device: torch.device = model.get_input_embeddings().weight.device
    return device


def _check(model: Any, head: Head, key: str, attention: str) -> None:
    device, ids = _input_device(model), min(len(head.weight), 1000)
    generator = torch.Generator().manual_seed(0)
    # Two blocks: some implementations look at positions only in a batch of one.
    tokens = torch.randint(0, ids, (2, FIRST + SECOND), generator=generator)
    positions = torch.cat([torch.arange(FIRST), torch.arange(SECOND)]).expand(2, -1).to(device)

    def read(tokens: Tensor) -> Tensor:
        return run_decoder(model, tokens.to(device), positions, ())[0]

    hidden = read(tokens)
    theirs = model(
        input_ids=tokens.to(device), position_ids=positions, use_cache=False
    ).logits[0, :FIRST]  # fmt: skip
    ours = head.logits(hidden[0, :FIRST].to(head.weight.device)).to(theirs.device)
    # Same batch, so the same rounding of the hidden states; norms, since bfloat16 logits of other
    # kernels may differ by a hundredth here and there while a wrong head is wrong everywhere.
    tolerance = 0.03 if theirs.dtype == torch.bfloat16 else 1e-4
    error = float((ours - theirs.float()).norm() / theirs.float().norm().clamp_min(1e-6))
    if not error <= tolerance:
        raise TeacherError(
            f"the head of {type(model).__name__} is not one that this version reproduces", where=key,
            expected=f"logits equal to the model's own within {tolerance:.1e}",
            found=f"a difference of {error:.1e} of their norm",
            todo="please report the model's name; another model of the family may work",
        )  # fmt: skip
    other = tokens.clone()
    other[:, :FIRST] = torch.randint(0, ids, (2, FIRST), generator=generator)
    change = (read(other) - hidden)[:, FIRST:].float().norm()
    moved = float(change / hidden[:, FIRST:].float().norm())
    if not moved <= tolerance:
        raise TeacherError(
            f"{type(model).__name__} lets a packed document see the one before it", where=attention,
            expected="hidden states that do not move when another document of the block is changed",
            found=f"a change of {moved:.1e} of their norm",
            todo="set another attention implementation (sdpa or eager), or take a model without "
            "recurrent layers",
        )  # fmt: skip
