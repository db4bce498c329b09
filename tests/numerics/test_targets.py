"""What stands for the tail, each against its plain formula, and what cannot be had is refused."""

from __future__ import annotations

import math
from collections import Counter
from typing import get_args

import pytest
import torch
from conftest import Lab
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from stages.chunked_head import chunked_loss
from stages.fusion import NoteRows, fuse, give_to_gold, renormalise
from stages.head import Head, HeadRule
from stages.options import Tail
from stages.row_notes import NoteRule, annotate_logits
from stages.target_options import FusionOptions
from storage.errors import ConfigError
from storage.sampling import uniforms
from storage.types import LOG_ZERO

R, V, K, S = 12, 40, 6, 5
GOLD = torch.arange(R) * 3
KINDS: tuple[Tail, ...] = get_args(Tail)


def teacher(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(R, V, generator=generator, dtype=torch.float64) * 2
    logits[: R // 2].scatter_(-1, GOLD[: R // 2, None], 9.0)  # in half of the heads, surely
    return logits


def notes(seed: int, draws: int = S) -> NoteRows:
    uniform = torch.from_numpy(uniforms(seed, torch.tensor([1]).numpy(), torch.arange(R).numpy()))
    found = annotate_logits(teacher(seed), GOLD, NoteRule(K, (2.0,), 1.0, draws), uniform)
    return NoteRows(
        found.ids, found.logprobs, found.entropy, found.log_tail_mass, found.log_z,
        found.gold_logprob, found.draw_ids if draws else None, found.draw_logprobs if draws else None,
    )  # fmt: skip


def dense_target(seed: int, kind: Tail, temperature: float) -> Tensor:
    """One teacher's target on every id [R, V]; for the bucket the student's shape is left out."""
    note, log_z = notes(seed), (teacher(seed).log_softmax(-1) / temperature).logsumexp(-1)
    p = (teacher(seed) / temperature).softmax(-1)
    target = torch.zeros(R, V, dtype=torch.float64)
    for r in range(R):
        head = note.ids[r].tolist()
        for i in head:
            target[r, i] = p[r, i] / p[r, head].sum() if kind == "renormalised" else p[r, i]
        tail = 1.0 - p[r, head].sum()
        if kind == "residual":
            target[r, GOLD[r]] += tail
        if kind == "draws":
            assert note.draw_ids is not None and note.draw_logprobs is not None
            at_one, logp = note.log_tail[r].exp(), teacher(seed)[r].log_softmax(-1)
            for i, times in Counter(note.draw_ids[r].tolist()).items():
                tempered = logp[i] * (1 / temperature - 1) - (log_z[r] if temperature != 1 else 0)
                target[r, i] += times * at_one / S * tempered.exp()
    return target


def student() -> tuple[Tensor, Head]:
    generator = torch.Generator().manual_seed(9)
    hidden = torch.randn(R, 4, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(V, 4, generator=generator, dtype=torch.float64)
    return hidden, Head(weight, None, HeadRule(), False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_each_target_is_its_plain_formula(kind: Tail, temperature: float) -> None:
    """Value and gradient of Σ_m w_m KL(t_m‖q) written out over the whole vocabulary."""
    seeds = (1, 2)
    target = fuse(
        {str(seed): notes(seed) for seed in seeds}, (2.0,), V, temperature,
        FusionOptions(weights="uniform"), kind, GOLD,
    )  # fmt: skip
    hidden, head = student()
    ours = chunked_loss(hidden, head, GOLD, target, 0.0, 1.0, 5)
    logq = log_softmax(hidden @ head.weight.t() / temperature, -1)
    expected = torch.zeros((), dtype=torch.float64)
    for seed in seeds:
        dense = dense_target(seed, kind, temperature)
        expected = expected + 0.5 * kl_div(logq, dense, reduction="sum")
        if kind == "bucket":
            outside = dense == 0
            tail = 1.0 - dense.sum(-1)
            log_q_tail = logq.masked_fill(~outside, -math.inf).logsumexp(-1)
            expected = expected + 0.5 * (tail * (tail.log() - log_q_tail)).sum()
    torch.testing.assert_close(ours.total, expected)
    (mine,) = torch.autograd.grad(ours.total, [hidden])
    (theirs,) = torch.autograd.grad(expected, [hidden])
    if kind == "draws" and temperature != 1.0:  # they sum to 1 on average; the gradient is q − t̂
        both = sum(0.5 * dense_target(seed, kind, temperature) for seed in seeds)
        theirs = (logq.detach().exp() - both) @ head.weight / temperature
    torch.testing.assert_close(mine, theirs)


def test_a_bucket_serves_a_cache_with_draws() -> None:
    both = (
        fuse({"a": notes(1, draws)}, (2.0,), V, 2.0, FusionOptions(), "bucket") for draws in (0, S)
    )
    first, second = both
    for name in ("ids", "p", "logp", "tail"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert float(first.tail.min()) > 0


def test_unused_entries_and_empty_tails_stay_so() -> None:
    """A row that top_p cut holds its first id again, with no mass; the gold token may be that id."""
    ids = torch.tensor([[4, 7, 4], [4, 7, 4]])
    logprobs = torch.tensor([[0.6, 0.3, 0.0]] * 2).log().clamp_min(LOG_ZERO)
    logp, p = renormalise(logprobs, 1.0)
    torch.testing.assert_close(p, torch.tensor([[2 / 3, 1 / 3, 0.0]] * 2))
    torch.testing.assert_close(logp.exp(), p)
    assert LOG_ZERO <= float(logp.min()) < LOG_ZERO / 2
    _, tempered = renormalise(logprobs, 2.0)
    root = torch.tensor([0.6, 0.3]).sqrt()
    torch.testing.assert_close(tempered[0, :2], root / root.sum())
    for order in ([0, 1, 2], [2, 1, 0]):
        found, logp, p = give_to_gold(
            ids, logprobs.exp()[:, order], torch.tensor([0.1, 0.0]), torch.tensor([4, 9])
        )
        dense = torch.zeros(2, 10).scatter_add_(-1, found, p)
        torch.testing.assert_close(dense[0, [4, 7]], torch.tensor([0.7, 0.3]))
        torch.testing.assert_close(dense[1, [4, 7, 9]], torch.tensor([0.6, 0.3, 0.0]))
        assert int((p[0] > 0).sum()) == 2  # one entry holds an id's whole mass: p log p is right
        torch.testing.assert_close(logp.exp(), p)


def test_draws_of_a_cache_without_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"hold no draws[\s\S]*auto, bucket, renormalised or"):
        fuse({"a": notes(1, 0)}, (2.0,), V, 1.0, FusionOptions(), "draws")


def test_temperatures_that_can_be_had_are_listed() -> None:
    with pytest.raises(ConfigError, match=r"one of 1\.0, 2\.0"):
        fuse({"a": notes(1)}, (2.0,), V, 1.7, FusionOptions())


@pytest.mark.parametrize("decode", ["cpu", "device"])
def test_the_configuration_decides_what_a_batch_holds(lab: Lab, decode: str) -> None:
    """From loss.target, and auto from the divergence, to the reader's targets."""
    store = {"preset": "exact", "k": 6, "draws": 4, "temperatures": [2.0]}
    base = {"store": store, "train__decode": decode}
    lab.workspace(**base).cache_teachers()
    entries = {
        "auto": 10, "draws": 10, "bucket": 6, "renormalised": 6, "residual": 7, "js": 6,
    }  # fmt: skip
    for name, count in entries.items():
        change = {"loss__divergence": "js"} if name == "js" else {"loss__target": name}
        reader = lab.workspace(**base, **change).batch_reader(on_device=decode == "device")
        batch = reader.ready(reader.read(torch.tensor([0, 2]).numpy()), torch.device("cpu"))
        assert batch.target is not None and batch.target.ids.shape[-1] == count, name
        has_bucket = name in ("bucket", "js")
        assert bool((batch.target.tail > 0).all()) is has_bucket
        mass = batch.target.p.sum(-1) + batch.target.tail
        torch.testing.assert_close(mass, torch.ones_like(mass), rtol=1e-4, atol=1e-4)
        if name == "residual":
            added = batch.target.ids[..., -1]
            assert torch.equal(added, batch.gold.expand_as(added))
        # Held-out losses know no draws: of an estimate t̂, KL(t̂‖q) is too high.
        measured = lab.workspace(**base, **change).heldout_reader().read(torch.tensor([0]).numpy())
        assert measured.target is not None
        assert measured.target.ids.shape[-1] == (6 if count == 10 else count)
        assert bool((measured.target.tail > 0).all()) is (has_bucket or count == 10)
