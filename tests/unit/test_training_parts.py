"""Schedules, feature alignment, pooling, layer cutting."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import make_model

from stages.annotate import pool
from stages.batches import segment_means
from stages.features import FeatureAligner, resolve_pairs
from stages.options import FeatureOptions, LossOptions, TrainOptions
from stages.schedule import alpha_at, lr_share
from stages.student import cut_layers
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


def test_pool_means_present_tokens_only() -> None:
    hidden = torch.arange(24, dtype=torch.float32).view(1, 8, 3)
    present = torch.tensor([[1, 1, 0, 1, 0, 0, 0, 0]], dtype=torch.bool)
    means, counts = pool(hidden, present, 2)
    assert counts.tolist() == [[3, 0]]
    torch.testing.assert_close(means[0, 0], hidden[0, [0, 1, 3]].mean(0))
    assert float(means[0, 1].abs().max()) == 0.0


def test_segment_means_follow_the_scored_rows() -> None:
    scored = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0]], dtype=torch.bool)
    means = segment_means(torch.tensor([1.0, 2.0, 4.0, 8.0]), scored, 2)
    assert means.tolist() == [[1.0, 3.0], [0.0, 8.0]]


def aligned(kind: str, theirs: torch.Tensor, weight: float) -> torch.Tensor:
    torch.manual_seed(0)
    aligner = FeatureAligner([(1, "a", 2)], kind, 4, {"a": 6})
    ours = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(1))
    projected = aligner.projections[0](ours)
    given = projected.detach() if theirs is None else theirs
    return aligner({1: ours}, {("a", 2): given}, {"a": torch.full((2, 1), weight)})


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_alignment_is_zero_at_the_teacher_and_scales_with_its_weight(kind: str) -> None:
    assert float(aligned(kind, None, 1.0)) == pytest.approx(0.0, abs=1e-6)  # type: ignore[arg-type]
    theirs = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(3))
    whole, half = aligned(kind, theirs, 1.0), aligned(kind, theirs, 0.5)
    assert float(whole) > 0.1
    torch.testing.assert_close(half * 2, whole)
    assert float(aligned(kind, theirs, 0.0)) == 0.0


def test_pairs_must_be_stored() -> None:
    stored = {"a": (2, 3), "b": (3,)}
    options = FeatureOptions(weight=1.0, pairs=({"student": 1, "teacher": 3},))
    assert resolve_pairs(options, stored) == [(1, "a", 3), (1, "b", 3)]
    by_name = FeatureOptions(weight=1.0, pairs=({"student": 1, "teacher": {"a": 2}},))
    assert resolve_pairs(by_name, stored) == [(1, "a", 2)]
    assert resolve_pairs(FeatureOptions(), stored) == []
    for pairs, match in (
        (({"student": 1, "teacher": 2},), "'b' holds no features of layer 2"),
        (({"student": 1, "teacher": {"c": 2}},), "no teacher 'c'"),
        ((), "no layers"),
    ):
        with pytest.raises(ConfigError, match=match):
            resolve_pairs(FeatureOptions(weight=1.0, pairs=pairs), stored)


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
