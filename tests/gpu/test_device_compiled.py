"""What torch.compile makes on the device: the same notes, the same training. Needs a C compiler."""

from __future__ import annotations

import copy
import shutil
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from conftest import make_model
from device_under_test import DEVICE, needs_device

from stages.head import run_decoder
from stages.parallel import compile_layers
from stages.row_notes import NoteRule, RowNotes, annotate_logits

pytestmark = [
    needs_device,
    pytest.mark.skipif(
        not any(map(shutil.which, ("g++", "gcc", "clang"))), reason="there is no C compiler"
    ),
]


def test_compiled_passes_give_the_eager_notes() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(11, 1003, generator=generator).to(DEVICE) * 3
    gold = torch.full((11,), 5, device=DEVICE)
    uniform = torch.rand(11, generator=generator, dtype=torch.float64).to(DEVICE)
    rule = NoteRule(8, (1.5, 2.0), 0.6, 5)
    eager, fused = (
        annotate_logits(logits.clone(), gold, replace(rule, compiled=compiled), uniform)
        for compiled in (False, True)
    )
    for field in fields(RowNotes):
        mine, theirs = getattr(fused, field.name), getattr(eager, field.name)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_compiled_layers_give_the_same_states_and_gradients(tmp_path: Any) -> None:
    plain = make_model(tmp_path, 50, 3, layers=1).to(DEVICE)
    compiled = copy.deepcopy(plain)
    compile_layers(compiled)
    tokens = torch.arange(32, device=DEVICE).view(2, 16)
    positions = torch.arange(16, device=DEVICE).expand(2, -1)
    states = []
    for model in (plain, compiled):
        hidden, _ = run_decoder(model, tokens, positions, ())
        hidden.square().sum().backward()
        states.append((hidden, model.get_input_embeddings().weight.grad))
    for mine, theirs in zip(states[1], states[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
