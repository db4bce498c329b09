"""Caches that hold every id unrounded, and the whole distributions they are held to."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from conftest import Lab
from torch import Tensor

from stages.teacher import load_causal_lm


def whole_caches(lab: Lab) -> Any:
    """Returns a workspace whose caches hold every id of every teacher, in float32."""
    opened = lab.workspace(
        store={"k": lab.vocab_size, "temperatures": [], "preset": "exact"}, loss={"chunk_tokens": 7},
        teachers__one__dtype="float32", teachers__two__dtype="float32",
    )  # fmt: skip
    opened.cache_teachers()
    return opened


def model(work: Any, name: str) -> Any:
    """Returns a teacher's model."""
    folder, cpu = Path(work.config.teachers[name].model), torch.device("cpu")
    return load_causal_lm(folder, name, dtype=torch.float32, attention="auto", device=cpu).eval()


def dense_logits(work: Any, name: str, batch: Any) -> Tensor:
    """Returns a teacher's logits, float64 [R, P], of the scored rows of a batch of one block, which it
    reads one document at a time."""
    starts = [*(batch.positions[0] == 0).nonzero()[:, 0].tolist(), batch.inputs.shape[1]]
    network, pieces = model(work, name), []
    with torch.no_grad():
        for begin, end in pairwise(starts):
            pieces.append(network(input_ids=batch.inputs[:, begin:end]).logits[0])
    return torch.cat(pieces)[batch.scored[0]].double()
