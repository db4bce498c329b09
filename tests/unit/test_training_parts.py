"""Schedules, weights of segments, layer cutting."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import make_model

from stages.batches import segment_means
from stages.schedule import alpha_at, lr_share
from stages.student import cut_layers
from stages.target_options import LossOptions
from stages.train_options import TrainOptions
from storage.errors import ConfigError


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_schedule_warms_up_and_decays(schedule: str) -> None:
    options = TrainOptions(steps=100, schedule=schedule, warmup=0.1, decay=0.2)
    shares = [lr_share(step, 100, options) for step in range(100)]
    assert shares[0] == pytest.approx(0.1) and shares[9] == 1.0 and max(shares) == 1.0
    assert all(b <= a for a, b in pairwise(shares[10:])) and shares[-1] < 0.06
    if schedule == "wsd":
        assert shares[10:80] == [1.0] * 70 and shares[90] == pytest.approx(0.5)
    else:
        assert shares[55] == pytest.approx(0.5)


def test_alpha_is_constant_or_falls_or_rises_stays_and_falls() -> None:
    def alphas(steps: int, **options: object) -> list[float]:
        chosen = LossOptions(alpha=0.9, **options)  # type: ignore[arg-type]
        return [alpha_at(step, steps, chosen) for step in range(steps)]

    assert alphas(3) == [0.9] * 3
    linear = alphas(5, alpha_schedule="linear", alpha_end=0.1)
    assert linear == pytest.approx([0.9, 0.7, 0.5, 0.3, 0.1])
    assert alphas(1, alpha_schedule="linear") == [0.9]
    wsd = alphas(10, alpha_schedule="wsd", alpha_end=0.1, alpha_warmup=0.4, alpha_decay=0.2)
    assert wsd == pytest.approx([0.3, 0.5, 0.7, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.5])
    up = alphas(4, alpha_schedule="wsd", alpha_warmup=0.5, alpha_decay=0.0)
    assert up == pytest.approx([0.45, 0.9, 0.9, 0.9])


def test_segment_means_follow_the_scored_rows() -> None:
    scored = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0]], dtype=torch.bool)
    means = segment_means(torch.tensor([1.0, 2.0, 4.0, 8.0]), scored, 2)
    assert means.tolist() == [[1.0, 3.0], [0.0, 8.0]]


def test_cut_student_computes_with_the_kept_layers(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", 50, 3, layers=4)
    kept = [model.model.layers[i] for i in (0, 3)]
    tokens = torch.arange(10)[None]
    cut = cut_layers(model, (0, 3)).eval()
    assert cut.config.num_hidden_layers == 2
    for ours, theirs in zip(cut.model.layers, kept, strict=True):
        assert all(
            torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
        )
    cut.save_pretrained(tmp_path / "cut")
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, cut(tokens).logits)


@pytest.mark.parametrize("keep", [(), (4,), (0, 9)])
def test_layers_that_do_not_exist_are_refused(tmp_path: Path, keep: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="keep_layers"):
        cut_layers(make_model(tmp_path / "m", 50, 3, layers=4), keep)
