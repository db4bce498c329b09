"""Head and draws stand for the whole distribution: in the mean, and in the student's gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stages.chunked_head import chunked_loss
from stages.fusion import FusedTarget, spread_tail, temper
from stages.head import Head, HeadRule
from stages.row_notes import NoteRule, RowNotes, annotate_logits
from storage.sampling import uniforms

V, K, S, RUNS, D = 211, 6, 5, 3000, 7


def teacher_logits() -> Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 1.5


def notes_of_many_seeds() -> RowNotes:
    """The notes on one row of logits, drawn with as many seeds as there are rows."""
    uniform = [uniforms(seed, torch.tensor([5]).numpy(), torch.tensor([9]).numpy())[0]
               for seed in range(RUNS)]  # fmt: skip
    logits = teacher_logits().expand(RUNS, V).clone()
    rule = NoteRule(K, (2.0,), 1.0, S)
    return annotate_logits(
        logits, torch.zeros(RUNS, dtype=torch.int64), rule, torch.tensor(uniform)
    )


def biased(notes: RowNotes, how: str) -> tuple[Tensor, Tensor]:
    """Draws (ids, logprobs) of samplers that are wrong."""
    logp = teacher_logits().log_softmax(-1)
    generator = torch.Generator().manual_seed(1)
    outside = torch.ones(V).scatter(0, notes.ids[0], 0.0)
    if how == "uniform":
        ids = torch.multinomial(outside.expand(RUNS, V), S, replacement=True, generator=generator)
    else:  # the most probable of the tail, every time
        ids = (logp.masked_fill(outside == 0, -1e9)).topk(S).indices.expand(RUNS, S)
    ids = ids.sort(-1).values
    return ids, logp[ids]


def target_of(notes: RowNotes, draws: tuple[Tensor, Tensor], temperature: float) -> FusedTarget:
    log_z = None if temperature == 1.0 else notes.log_z[:, 0]
    logp, p, tail = temper(notes.logprobs, notes.log_tail_mass, log_z, temperature)
    more = spread_tail(*draws, notes.log_tail_mass, log_z, temperature)
    return FusedTarget(
        torch.cat([notes.ids, draws[0]], -1)[None], torch.cat([logp, more[0]], -1)[None],
        torch.cat([p, more[1]], -1)[None], torch.zeros_like(tail)[None],
        torch.ones(1, RUNS, dtype=torch.float64), V, temperature,
    )  # fmt: skip


def sides(notes: RowNotes, draws: tuple[Tensor, Tensor], temperature: float) -> dict[str, Tensor]:
    """What each run gives [RUNS, …], and what the dense distribution gives, by name."""
    target = target_of(notes, draws, temperature)
    dense = (teacher_logits() / temperature).softmax(-1)
    spread = torch.zeros(RUNS, V, dtype=torch.float64).scatter_add(-1, target.ids[0], target.p[0])
    rare = dense < 100 / RUNS / S  # too seldom drawn for a normal error: pooled
    pooled = [torch.cat([x[..., ~rare], x[..., rare].sum(-1, keepdim=True)], -1)
              for x in (spread, dense)]  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    row = torch.randn(D, generator=generator, dtype=torch.float64)
    hidden = row.expand(RUNS, D).clone().requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    gold = torch.zeros(RUNS, dtype=torch.int64)
    head = Head(weight, None, HeadRule(), False)
    chunked_loss(hidden, head, gold, target, 0.0, 1.0, 512).total.backward()
    assert hidden.grad is not None
    q = (weight @ row / temperature).softmax(-1)
    return {
        "distribution": pooled[0], "dense distribution": pooled[1],
        "gradient": hidden.grad, "dense gradient": (q - dense) @ weight / temperature,
    }  # fmt: skip


def unbiased(samples: Tensor, truth: Tensor) -> bool:
    """Whether the samples' mean is the truth within its standard error, in every coordinate."""
    error = samples.std(0) / RUNS**0.5
    z = (samples.mean(0) - truth) / error.clamp_min(1e-7)
    return float(z.abs().max()) < 4.5 and float(z.square().mean()) < 1.5


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_head_and_draws_are_unbiased(temperature: float) -> None:
    notes = notes_of_many_seeds()
    found = sides(notes, (notes.draw_ids, notes.draw_logprobs), temperature)
    assert unbiased(found["distribution"], found["dense distribution"])
    assert unbiased(found["gradient"], found["dense gradient"])


@pytest.mark.parametrize("how", ["uniform", "largest"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_check_fails_a_biased_sampler(temperature: float, how: str) -> None:
    notes = notes_of_many_seeds()
    found = sides(notes, biased(notes, how), temperature)
    assert not unbiased(found["distribution"], found["dense distribution"])
    assert not unbiased(found["gradient"], found["dense gradient"])
