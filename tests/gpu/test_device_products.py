"""Products, notes, fused targets and the chunked loss on the device, against float64 on the CPU."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TypeVar

import pytest
import torch
from device_under_test import CPU, DEVICE, ON_GPU, needs_device, relative_error
from test_chunked_head import dense_teachers, gradients, make, plain_total, sparse_target
from test_divergences import NAMES, named, plain, plain_logits, target_of
from test_divergences import make as make_for
from test_targets import GOLD, KINDS, V, notes
from test_weighting import SEQUENCE, WEIGHTINGS, evidence, options
from torch import Tensor

from stages.chunked_head import ChunkedLoss, chunked_loss
from stages.fusion import FusedTarget, NoteRows, fuse
from stages.head import Head, HeadRule, add_product, product
from stages.losses import cross_entropy
from stages.mixing import fused_gold_logprob
from stages.options import Tail
from stages.row_notes import NoteRule, RowNotes, annotate_logits
from stages.target_options import FusionOptions
from stages.weighting import weigh

pytestmark = needs_device

T = TypeVar("T", FusedTarget, NoteRows)

EXACT = 1e-5  # of float32 sums; TF32 would give 3e-4, sums in bfloat16 4e-3


def moved(whole: T, dtype: torch.dtype | None = None, device: torch.device = DEVICE) -> T:
    """Returns the same on a device, floats in a dtype."""
    named_fields = {field.name: getattr(whole, field.name) for field in fields(whole)}
    return replace(whole, **{
        name: x.to(device, dtype if x.is_floating_point() else None)
        for name, x in named_fields.items() if isinstance(x, Tensor)
    })  # fmt: skip


def head_on_device(head: Head, dtype: torch.dtype, bfloat16: bool = False) -> Head:
    weight = head.weight.detach().to(DEVICE, dtype).requires_grad_(head.weight.requires_grad)
    bias = None if head.bias is None else head.bias.detach().to(DEVICE, dtype).requires_grad_()
    return Head(weight, bias, head.rule, bfloat16)


@pytest.mark.parametrize("bfloat16", [True, False])
def test_products_are_summed_in_float32(bfloat16: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(70, 1000, generator=generator)
    b = torch.randn(333, 1000, generator=generator)
    if bfloat16:
        a, b = a.bfloat16().float(), b.bfloat16().float()
    expected = a.double() @ b.double().t()
    mine, theirs = a.to(DEVICE), b.to(DEVICE).t()
    out = torch.empty(70, 333, device=DEVICE)
    for found in (product(mine, theirs, bfloat16), product(mine, theirs, bfloat16, out)):
        assert found.dtype == torch.float32 and relative_error(found, expected) < EXACT
    total = torch.ones(70, 333, device=DEVICE)
    add_product(total, mine, theirs, bfloat16)
    assert relative_error(total, expected + 1.0) < EXACT
    logits = Head(b.to(DEVICE), None, HeadRule(0.5, 30.0), bfloat16).logits(mine)
    assert relative_error(logits, 30.0 * torch.tanh(expected * 0.5 / 30.0)) < EXACT


def noted(logits: Tensor, rule: NoteRule, uniform: Tensor, device: torch.device) -> RowNotes:
    gold = (torch.arange(len(logits)) * 7) % logits.shape[1]
    wide = torch.nn.functional.pad(logits, (0, 5)).to(device)[:, : logits.shape[1]]
    return annotate_logits(wide, gold.to(device), rule, uniform.to(device))


@pytest.mark.parametrize("top_p", [1.0, 0.7])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_notes_are_those_of_the_cpu(top_p: float, scale: float) -> None:
    """Of a head with padding. Draws begin where u says, so they are the same but for rounded sums."""
    rows, generator = 200, torch.Generator().manual_seed(1)
    logits = torch.randn(rows, 4999, generator=generator) * scale
    uniform = torch.rand(rows, generator=generator, dtype=torch.float64)
    rule = NoteRule(16, (0.7, 2.0), top_p, 8)
    mine = noted(logits.clone(), rule, uniform, DEVICE)
    theirs = noted(logits.double(), rule, uniform, CPU)
    assert (mine.ids.cpu() == theirs.ids).float().mean() > 0.999
    for name in ("logprobs", "entropy", "log_tail_mass", "gold_logprob", "log_z"):
        found, expected = getattr(mine, name).double().cpu(), getattr(theirs, name)
        seen = expected > -80.0  # float32 sums no smaller terms
        apart = (found - expected)[seen].abs() / (1.0 + expected[seen].abs())
        assert float(apart.max()) < 3e-5, name
    same = mine.draw_ids.cpu() == theirs.draw_ids
    assert same.float().mean() > (0.995 if scale == 1.0 else 0.97), same.float().mean()


def test_draws_on_the_device_are_unbiased() -> None:
    from test_annotate import looks_unbiased, random

    rows, draws, row = 20_000, 4, random(1, 203, 2.0, seed=1)
    uniform = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = noted(row.expand(rows, -1), NoteRule(8, (), 1.0, draws), uniform, DEVICE)
    p, kept = row[0].double().softmax(-1).numpy(), found.ids[0].tolist()
    assert looks_unbiased(found.draw_ids.cpu().numpy(), p, kept, draws)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_divergence_and_its_gradients(name: str, temperature: float) -> None:
    """One row at a time, some, and all; with padding, bias, scale and cap."""
    hidden, head, gold = make_for(padding=3, bias=True, rule=HeadRule(0.7, 5.0))
    target = target_of(temperature=temperature)
    logits = plain_logits(hidden, head)
    total = 0.3 * cross_entropy(logits, gold).sum() + 0.7 * plain(logits, target, named(name)).sum()
    expected = gradients(total, head, hidden)
    for chunk in (1, 7, 100):
        on_device = head_on_device(head, torch.float32)
        states = hidden.detach().to(DEVICE, torch.float32).requires_grad_()
        ours = chunked_loss(
            states, on_device, gold.to(DEVICE), moved(target, torch.float32), 0.3, 0.7, chunk,
            named(name),
        )  # fmt: skip
        assert relative_error(ours.total, total) < EXACT, chunk
        for mine, theirs in zip(gradients(ours.total, on_device, states), expected, strict=True):
            assert mine.device.type == DEVICE.type
            assert relative_error(mine, theirs) < 3 * EXACT, (chunk, mine.shape)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_bfloat16_factors_stay_near(bfloat16: bool) -> None:
    hidden, head, gold = make(padding=3, bias=True)
    target = sparse_target(dense_teachers(torch.Generator().manual_seed(5)), 5)
    expected = plain_total(hidden, head, gold, target, 0.5, 0.5)
    on_device = head_on_device(head, torch.float32, bfloat16)
    states = hidden.detach().to(DEVICE, torch.float32).requires_grad_()
    # Surroundings that autocast must not reach into the sums.
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bfloat16):
        ours = chunked_loss(
            states, on_device, gold.to(DEVICE), moved(target, torch.float32), 0.5, 0.5, 6
        )
    tolerance = 3e-2 if bfloat16 else EXACT
    assert relative_error(ours.total, expected) < tolerance
    for mine, theirs in zip(
        gradients(ours.total, on_device, states), gradients(expected, head, hidden), strict=True
    ):
        assert mine.dtype == torch.float32 and relative_error(mine, theirs) < 3 * tolerance


def loss_of(
    kind: Tail, temperature: float, device: torch.device, dtype: torch.dtype
) -> tuple[ChunkedLoss, Tensor]:
    """Returns the loss, and its gradient of the hidden states, of two teachers' notes."""
    rows = {str(seed): moved(notes(seed), dtype, device) for seed in (1, 2)}
    target = fuse(
        rows, (2.0,), V, temperature, FusionOptions(weights="entropy"), kind, GOLD.to(device)
    )
    generator = torch.Generator().manual_seed(9)
    hidden = torch.randn(len(GOLD), 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, 4, generator=generator, dtype=torch.float64)
    hidden = hidden.to(device, dtype).requires_grad_()
    head = Head(weight.to(device, dtype), None, HeadRule(), False)
    loss = chunked_loss(hidden, head, GOLD.to(device), target, 0.2, 0.8, 5)
    return loss, torch.autograd.grad(loss.total, [hidden])[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_target_of_notes_on_the_device(kind: Tail, temperature: float) -> None:
    mine, my_gradient = loss_of(kind, temperature, DEVICE, torch.float32)
    theirs, their_gradient = loss_of(kind, temperature, CPU, torch.float64)
    assert mine.total.device.type == DEVICE.type
    for name in ("total", "ce_R", "kd_R", "correct_R", "agreed_R"):
        found, expected = getattr(mine, name), getattr(theirs, name)
        assert relative_error(found, expected) < 3 * EXACT, name
    assert relative_error(my_gradient, their_gradient) < 3 * EXACT


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("per", ["token", "sequence"])
def test_weights_are_those_of_the_cpu(name: str, per: str) -> None:
    given = evidence(sequence=SEQUENCE if per == "sequence" else None)
    chosen = options(name, per=per, prior={"b": 5.0}, floor=0.1)
    there = replace(
        given, notes={teacher: moved(note) for teacher, note in given.notes.items()},
        sequence_R=None if given.sequence_R is None else given.sequence_R.to(DEVICE),
        fitted_MR=None if given.fitted_MR is None else given.fitted_MR.to(DEVICE),
    )  # fmt: skip
    found = weigh(there, chosen)
    assert found.device.type == DEVICE.type
    torch.testing.assert_close(found.cpu(), weigh(given, chosen), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mixing", ["arithmetic", "geometric"])
@pytest.mark.parametrize("k", [6, 3], ids="second of {}".format)
def test_fused_targets_are_those_of_the_cpu(mixing: str, k: int) -> None:
    rows = {"1": notes(1), "2": notes(2)}
    rows["2"] = replace(rows["2"], ids=rows["2"].ids[:, :k], logprobs=rows["2"].logprobs[:, :k])
    chosen = FusionOptions.model_validate({"weights": "entropy", "mixing": mixing})
    theirs = fuse(rows, (2.0,), V, 2.0, chosen, "bucket")
    mine = fuse({n: moved(note) for n, note in rows.items()}, (2.0,), V, 2.0, chosen, "bucket")
    assert torch.equal(mine.ids.cpu(), theirs.ids)
    for name in ("logp", "p", "tail", "weights"):
        torch.testing.assert_close(getattr(mine, name).cpu(), getattr(theirs, name))
    gold = torch.stack([note.gold_logprob for note in rows.values()])
    found = fused_gold_logprob(mine, GOLD.to(DEVICE), gold.to(DEVICE))
    torch.testing.assert_close(found.cpu(), fused_gold_logprob(theirs, GOLD, gold))


@pytest.mark.skipif(not ON_GPU, reason="torch counts the memory of a GPU alone")
@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("wanted", [True, False])
def test_a_large_vocabulary_takes_less_than_its_logits(bfloat16: bool, wanted: bool) -> None:
    rows, vocab, width, k = 512, 151_936, 32, 16
    hidden = torch.randn(rows, width, device=DEVICE).requires_grad_()
    weight = torch.randn(vocab, width, device=DEVICE).requires_grad_()
    logits = torch.randn(1, rows, k, device=DEVICE)
    p = logits.softmax(-1) * 0.9
    ids = torch.arange(k, device=DEVICE) * 9001 + torch.arange(rows, device=DEVICE)[:, None]
    target = FusedTarget(
        ids[None], p.log(), p, torch.full((1, rows), 0.1, device=DEVICE),
        torch.ones(1, rows, device=DEVICE), vocab, 2.0,
    )  # fmt: skip
    gold, dense = torch.zeros(rows, dtype=torch.int64, device=DEVICE), rows * vocab * 4
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(DEVICE)
    before = torch.cuda.memory_allocated(DEVICE)
    with torch.set_grad_enabled(wanted):
        loss = chunked_loss(hidden, Head(weight, None, HeadRule(), bfloat16), gold, target,
                            0.5, 0.5, 32)  # fmt: skip
        if wanted:
            loss.total.backward()  # type: ignore[no-untyped-call]
    peak = torch.cuda.max_memory_allocated(DEVICE) - before
    print(f"\nbfloat16 {bfloat16}, gradient {wanted}: {peak / dense:.2f} of dense logits")
    assert peak < 0.75 * dense, f"{peak:,} bytes, dense logits would take {dense:,}"
    assert bool(torch.isfinite(loss.total))
