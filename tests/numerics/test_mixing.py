"""Geometric mixing against whole distributions, written out a row at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from stages.chunked_head import chunked_loss
from stages.divergences import Divergence
from stages.fusion import NoteRows, fuse
from stages.head import Head, HeadRule
from stages.losses import bucket_kl, mixture_divergence
from stages.mixing import fused_gold_logprob
from stages.row_notes import NoteRule, annotate_logits
from stages.target_options import FusionOptions
from storage.errors import ConfigError
from storage.types import LOG_ZERO

R, V = 9, 30
GOLD = torch.arange(R) * 3
GEOMETRIC = FusionOptions(weights="static", static={"a": 1.0, "b": 3.0}, mixing="geometric")
W = (0.25, 0.75)


def logits(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(R, V, generator=generator, dtype=torch.float64) * 2


def notes(seed: int, k: int, top_p: float = 1.0, draws: int = 0) -> NoteRows:
    uniform = torch.full((R,), 0.3, dtype=torch.float64)
    found = annotate_logits(logits(seed), GOLD, NoteRule(k, (2.0,), top_p, draws), uniform)
    return NoteRows(
        found.ids, found.logprobs, found.entropy, found.log_tail_mass, found.log_z,
        found.gold_logprob, found.draw_ids if draws else None,
        found.draw_logprobs if draws else None,
    )  # fmt: skip


def both(k: int, top_p: float = 1.0, second: int | None = None) -> dict[str, NoteRows]:
    return {"a": notes(1, k, top_p), "b": notes(2, k if second is None else second, top_p)}


def filled_in(note: NoteRows, seed: int, r: int, temperature: float) -> tuple[set[int], Tensor]:
    """Returns the ids that are kept in a row, and the whole distribution that they stand for."""
    p = (logits(seed)[r] / temperature).softmax(-1)
    head = {i for i, logp in zip(note.ids[r].tolist(), note.logprobs[r].tolist(), strict=True)
            if logp > LOG_ZERO / 2}  # fmt: skip
    rest = [i for i in range(V) if i not in head]
    if rest:
        p[rest] = p[rest].sum() / len(rest)
    return head, p


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    ("k", "top_p", "second"),
    [(1, 1.0, 1), (6, 1.0, 6), (6, 0.7, 6), (V - 1, 1.0, V - 1), (2, 1.0, 6), (6, 0.7, 3)],
)
def test_mixture_is_the_geometric_mean_of_evenly_filled_distributions(
    k: int, top_p: float, second: int, temperature: float
) -> None:
    given = both(k, top_p, second)
    target = fuse(given, (2.0,), V, temperature, GEOMETRIC, "bucket")
    assert target.ids.shape == (1, R, 2 * max(k, second)) and target.weights.tolist() == [[1.0] * R]
    at_one = fused_gold_logprob(target, GOLD, torch.empty(0))
    for r in range(R):
        (kept, p), (other, q) = (
            filled_in(note, seed, r, temperature) for seed, note in enumerate(given.values(), 1)
        )
        mean = (W[0] * p.log() + W[1] * q.log()).softmax(-1)
        union = kept | other
        found = torch.zeros(V, dtype=torch.float64).scatter_add_(
            0, target.ids[0, r], target.p[0, r]
        )
        assert {i for i in range(V) if found[i] > 0} == union
        torch.testing.assert_close(found[sorted(union)], mean[sorted(union)])
        outside = [i for i in range(V) if i not in union]
        torch.testing.assert_close(target.tail[0, r], mean[outside].sum())
        torch.testing.assert_close(at_one[r], mean[GOLD[r]].log())
    torch.testing.assert_close(target.logp.exp(), target.p)


def test_with_whole_heads_it_is_the_dense_geometric_mean() -> None:
    target = fuse(both(V), (2.0,), V, 1.0, GEOMETRIC)
    mean = sum(w * logits(seed).log_softmax(-1) for seed, w in enumerate(W, 1))
    assert isinstance(mean, Tensor)
    dense = torch.zeros(R, V, dtype=torch.float64).scatter_add_(-1, target.ids[0], target.p[0])
    torch.testing.assert_close(dense, mean.softmax(-1), rtol=1e-12, atol=1e-14)
    assert float(target.tail.abs().max()) == 0.0
    generator = torch.Generator().manual_seed(9)
    hidden = torch.randn(R, 4, generator=generator, dtype=torch.float64).requires_grad_()
    head = Head(
        torch.randn(V, 4, generator=generator, dtype=torch.float64), None, HeadRule(), False
    )
    ours = chunked_loss(hidden, head, GOLD, target, 0.0, 1.0, 4)
    plain = kl_div(log_softmax(hidden @ head.weight.t(), -1), mean.softmax(-1), reduction="sum")
    torch.testing.assert_close(ours.total, plain)
    mine, theirs = (torch.autograd.grad(x, [hidden])[0] for x in (ours.total, plain))
    torch.testing.assert_close(mine, theirs)


def test_the_loss_takes_a_union_with_repeats() -> None:
    target = fuse(both(6), (2.0,), V, 1.0, GEOMETRIC)
    assert bool((target.p == 0).any()) and bool((target.tail > 0).all())
    generator = torch.Generator().manual_seed(9)
    hidden = torch.randn(R, 4, generator=generator, dtype=torch.float64)
    head = Head(
        torch.randn(V, 4, generator=generator, dtype=torch.float64), None, HeadRule(), False
    )
    ours = chunked_loss(hidden.requires_grad_(), head, GOLD, target, 0.0, 1.0, 4)
    torch.testing.assert_close(ours.kd_R, bucket_kl(hidden @ head.weight.t(), target).detach())


@pytest.mark.parametrize("divergence", [Divergence(), Divergence("js", 0.5)])
def test_the_loss_of_teachers_of_another_k_is_that_of_their_own_entries(
    divergence: Divergence,
) -> None:
    """Written out: forward KL teacher by teacher, each fused alone; else over dense mixtures."""
    given, chosen = both(6, second=2), FusionOptions(weights="static", static=GEOMETRIC.static)
    target = fuse(given, (2.0,), V, 1.0, chosen, "bucket")
    generator = torch.Generator().manual_seed(9)
    hidden = torch.randn(R, 4, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(V, 4, generator=generator, dtype=torch.float64)
    ours = chunked_loss(
        hidden, Head(weight, None, HeadRule(), False), GOLD, target, 0.0, 1.0, 4, divergence
    )
    logits_RP = hidden @ weight.t()
    if divergence.per_teacher:
        alone = FusionOptions(weights="uniform")
        plain = sum(
            w * bucket_kl(logits_RP, fuse({name: note}, (2.0,), V, 1.0, alone, "bucket"))
            for w, (name, note) in zip(W, given.items(), strict=True)
        )
    else:
        plain = mixture_divergence(logits_RP, target, divergence)
        assert sorted((target.p[1] > 0).sum(-1).tolist()) == [2] * R
    assert isinstance(plain, Tensor)
    torch.testing.assert_close(ours.kd_R, plain.detach())
    mine, theirs = (torch.autograd.grad(x, [hidden])[0] for x in (ours.total, plain.sum()))
    torch.testing.assert_close(mine, theirs)


def test_alike_teachers_and_a_single_one_stay_as_they_are() -> None:
    one = fuse({"a": notes(1, 6)}, (2.0,), V, 1.0, FusionOptions(weights="uniform"), "bucket")
    same = {"a": notes(1, 6), "b": notes(1, 6)}
    alone = FusionOptions(weights="single:a", mixing="geometric")
    for given, chosen in ((same, GEOMETRIC), ({"a": notes(1, 6)}, alone)):
        target = fuse(given, (2.0,), V, 1.0, chosen, "bucket")
        torch.testing.assert_close(target.tail, one.tail)
        dense, plain = (
            torch.zeros(R, V, dtype=torch.float64).scatter_add_(-1, x.ids[0], x.p[0])
            for x in (target, one)
        )
        torch.testing.assert_close(dense, plain)


def test_weights_of_the_teachers_are_kept_beside_the_target() -> None:
    chosen = FusionOptions(tau=0.5, mixing="geometric")
    target = fuse(both(6), (2.0,), V, 1.0, chosen, "bucket")
    plain = fuse(both(6), (2.0,), V, 1.0, FusionOptions(tau=0.5), "bucket")
    assert torch.equal(target.teacher_weights, plain.teacher_weights)
    cut = target.rows(2, 5)
    assert torch.equal(cut.teacher_weights, plain.weights[:, 2:5]) and cut.p.shape[:2] == (1, 3)
    assert plain.spent is None and plain.teacher_weights is plain.weights


def test_a_tail_of_nothing_and_heads_apart_stay_finite() -> None:
    """Each vetoes the other's ids: what is left is a distribution, and no NaN."""
    ids, logp = torch.tensor([[[0, 1]], [[2, 3]]]), torch.tensor([[[0.5, 0.5]], [[0.4, 0.6]]]).log()
    empty, gold = torch.tensor([LOG_ZERO]), torch.tensor([-1.0])
    given = {
        name: NoteRows(ids[m], logp[m], gold, empty, torch.zeros(1, 0), gold)
        for m, name in enumerate("ab")
    }
    for w in (0.0, 0.5):
        chosen = replace_static(w)
        target = fuse(given, (), V, 1.0, chosen, "bucket")
        assert bool(torch.isfinite(target.logp).all() and torch.isfinite(target.p).all())
        assert float(target.p.sum() + target.tail.sum()) == pytest.approx(1.0)
        if w == 0.0:
            found = torch.zeros(V).scatter_add_(0, target.ids[0, 0], target.p[0, 0])
            torch.testing.assert_close(found[[2, 3]], torch.tensor([0.4, 0.6]))


def replace_static(a: float) -> FusionOptions:
    return FusionOptions(weights="static", static={"a": a, "b": 1.0 - a}, mixing="geometric")


def test_arithmetic_ensemble_is_the_log_of_the_weighted_sum() -> None:
    target = fuse(both(6), (2.0,), V, 1.0, FusionOptions(weights="static", static=GEOMETRIC.static))
    gold = torch.stack([note.gold_logprob for note in both(6).values()])
    found = fused_gold_logprob(target, GOLD, gold)
    for r in range(R):
        plain = math.log(sum(w * math.exp(float(g)) for w, g in zip(W, gold[:, r], strict=True)))
        assert float(found[r]) == pytest.approx(plain)
    alone = replace(target, weights=torch.tensor([[1.0], [0.0]]).expand(2, R))
    torch.testing.assert_close(fused_gold_logprob(alone, GOLD, gold), gold[0].double())


def test_draws_and_cut_tails_are_refused() -> None:
    drawn = {"a": notes(1, 6, draws=4), "b": notes(2, 6, draws=4)}
    for kind in (None, "draws", "renormalised", "residual"):
        with pytest.raises(ConfigError, match="biased"):
            fuse(drawn, (2.0,), V, 1.0, GEOMETRIC, kind, GOLD)  # type: ignore[arg-type]
    target = fuse(drawn, (2.0,), V, 1.0, GEOMETRIC, "bucket")
    assert target.ids.shape == (1, R, 12)
