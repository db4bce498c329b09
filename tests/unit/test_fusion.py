"""Weights, temperatures and fused targets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stages.fusion import fuse, rows_of, spread_tail, temper, temperature_column
from stages.options import Tail
from stages.row_notes import NoteRule, annotate_logits
from stages.target_options import FusionOptions
from storage.errors import ConfigError
from storage.types import LOG_ZERO, Float32, PooledFeatures, SparseLogits, TeacherNotes, TokenStats

V, K = 50, 6
ALL = np.ones((1, 9), bool)


def logits(seed: int, rows: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, V, generator=generator, dtype=torch.float64) * 2


def as_notes(seed: int, k: int = K, temperatures: tuple[float, ...] = (2.0,)) -> TeacherNotes:
    gold, uniform = torch.zeros(9, dtype=torch.int64), torch.zeros(9, dtype=torch.float64)
    notes = annotate_logits(logits(seed), gold, NoteRule(k, temperatures), uniform)

    def block(value: torch.Tensor) -> Float32:
        return value[None].numpy().astype(np.float32)

    return TeacherNotes(
        SparseLogits(notes.ids[None].numpy().astype(np.int32), block(notes.logprobs)),
        TokenStats(
            block(notes.entropy), block(notes.log_tail_mass), block(notes.gold_logprob),
            block(notes.log_z),
        ),
        PooledFeatures(np.zeros((1, 0), np.int32), {}),
    )  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_fused_head_is_exact_at_every_cached_temperature(temperature: float) -> None:
    rows = {name: rows_of(as_notes(seed), ALL) for name, seed in (("a", 1), ("b", 2))}
    target = fuse(rows, (2.0,), V, temperature, FusionOptions())
    for m, seed in enumerate((1, 2)):
        dense = (logits(seed) / temperature).softmax(-1).float()
        torch.testing.assert_close(
            target.p[m], dense.gather(-1, target.ids[m]), rtol=2e-5, atol=1e-7
        )
        tail = 1 - dense.gather(-1, target.ids[m]).sum(-1)
        torch.testing.assert_close(target.tail[m], tail, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(target.p.sum(-1) + target.tail, torch.ones(2, 9))
    torch.testing.assert_close(target.logp.exp(), target.p)


@pytest.mark.parametrize("kind", ["bucket", "renormalised", "residual"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_teachers_of_another_k_keep_what_they_have(temperature: float, kind: Tail) -> None:
    rows = {name: rows_of(as_notes(i, k), ALL) for i, (name, k) in enumerate([("a", 3), ("b", K)])}
    gold = torch.arange(9) * 5
    for names in ("ab", "ba"):
        target = fuse(
            {n: rows[n] for n in names}, (2.0,), V, temperature, FusionOptions(), kind, gold
        )
        assert target.ids.shape == target.p.shape == target.logp.shape
        for m, name in enumerate(names):
            single = FusionOptions(weights="uniform")
            alone = fuse({name: rows[name]}, (2.0,), V, temperature, single, kind, gold)
            width = alone.ids.shape[-1]
            for field in ("ids", "p", "logp"):
                mine, whole = getattr(alone, field)[0], getattr(target, field)[m]
                assert torch.equal(mine, whole[:, :width]), field
            assert torch.equal(alone.tail[0], target.tail[m])
            assert not target.p[m, :, width:].any()
            assert bool((target.ids[m, :, width:] == alone.ids[0, :, :1]).all())
            assert bool((target.logp[m, :, width:] == LOG_ZERO).all())


def test_complete_head_has_no_tail() -> None:
    for temperature in (1.0, 2.0):
        rows = {"a": rows_of(as_notes(3, V), ALL)}
        target = fuse(rows, (2.0,), V, temperature, FusionOptions())
        assert float(target.tail.abs().max()) == 0.0
        torch.testing.assert_close(target.p.sum(-1), torch.ones(1, 9))


@pytest.mark.parametrize("mass", [1e-5, 1e-3, 0.01])
def test_flat_row_keeps_its_head(mass: float) -> None:
    """A tail of almost 1 is stored as log 1 = 0: what is left of it says nothing of the head."""
    logprobs = torch.full((1, 4), mass / 4).log()
    logp, p, tail = temper(logprobs, torch.zeros(1), None, 1.0)
    torch.testing.assert_close(p, torch.full((1, 4), mass / 4))
    torch.testing.assert_close(p.sum(-1) + tail, torch.ones(1))
    assert bool(torch.isfinite(logp).all())


def test_repeated_draws_are_one_entry_that_carries_them_all() -> None:
    log_tail, log_z = torch.tensor([0.4]).log(), torch.tensor([1.3])
    ids, own = torch.tensor([[7, 7, 7, 9]]), torch.tensor([[0.1, 0.1, 0.1, 0.05]]).log()
    _, p = spread_tail(ids, None, log_tail, None, 1.0)
    torch.testing.assert_close(p, torch.tensor([[0.3, 0.0, 0.0, 0.1]]))
    logp, p = spread_tail(ids, own, log_tail, log_z, 2.0)
    tempered = torch.tensor([0.3 * 0.1**-0.5, 0.0, 0.0, 0.1 * 0.05**-0.5]) / math.exp(1.3)
    torch.testing.assert_close(p[0], tempered)
    assert bool(torch.isfinite(logp).all())


def test_empty_tail_gives_its_draws_nothing() -> None:
    ids, log_tail = torch.tensor([[3, 3]]), torch.tensor([LOG_ZERO])
    logp, p = spread_tail(ids, None, log_tail, None, 1.0)
    assert p.tolist() == [[0.0, 0.0]] and logp.tolist() == [[LOG_ZERO, LOG_ZERO]]


def test_rounded_head_is_scaled_to_the_exact_tail() -> None:
    logprobs = torch.tensor([[0.5, 0.3]]).log() * 1.002  # as if rounded
    _, p, tail = temper(logprobs, torch.tensor([0.2]).log(), None, 1.0)
    torch.testing.assert_close(p.sum(-1) + tail, torch.ones(1))
    torch.testing.assert_close(tail, torch.tensor([0.2]))


def test_temperature_the_cache_cannot_serve_is_refused_with_those_it_can() -> None:
    assert temperature_column(1.0, (1.5, 2.0)) is None
    assert temperature_column(2.0, (1.5, 2.0)) == 1
    with pytest.raises(ConfigError, match=r"one of 1\.0, 1\.5, 2\.0"):
        temperature_column(3.0, (1.5, 2.0))
