"""The chunked head against the plain losses: values, gradients, chunk sizes, extremes.

Forward KL here; every divergence, and gradcheck, in test_divergences.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as torch_cross_entropy
from torch.nn.functional import kl_div, log_softmax

from stages import chunked_head
from stages.chunked_head import chunked_loss
from stages.fusion import FusedTarget
from stages.head import Head, HeadRule
from stages.losses import bucket_kl, cross_entropy

R, D, V, M, K = 23, 8, 37, 3, 5


def dense_teachers(generator: torch.Generator, sharpness: float = 2.0) -> Tensor:
    """Teachers' full distributions, float64 [M, R, V]."""
    logits = torch.randn(M, R, V, generator=generator, dtype=torch.float64)
    return (logits * sharpness).softmax(-1)


def sparse_target(dense: Tensor, k: int, temperature: float = 1.0) -> FusedTarget:
    """The exact sparse target of dense teachers at a temperature, with random weights."""
    tempered = dense.pow(1 / temperature)
    tempered = tempered / tempered.sum(-1, keepdim=True)
    p, ids = tempered.topk(k, dim=-1)
    tail = tempered.scatter(-1, ids, 0.0).sum(-1)
    generator = torch.Generator().manual_seed(9)
    weights = torch.rand(dense.shape[:2], generator=generator, dtype=dense.dtype)
    return FusedTarget(
        ids, p.log(), p, tail, weights / weights.sum(0), dense.shape[-1], temperature
    )


def make(
    dtype: torch.dtype = torch.float64,
    padding: int = 0,
    bias: bool = False,
    rule: HeadRule | None = None,
) -> tuple[Tensor, Head, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(R, D, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V + padding, D, generator=generator, dtype=torch.float64).to(dtype)
    gold = torch.randint(0, V, (R,), generator=generator)
    offset = torch.randn(V + padding, generator=generator, dtype=torch.float64).to(dtype)
    head = Head(
        weight.requires_grad_(),
        offset.requires_grad_() if bias else None,
        rule or HeadRule(),
        False,
    )
    return hidden.requires_grad_(), head, gold


def plain_total(
    hidden: Tensor, head: Head, gold: Tensor, target: FusedTarget | None, a: float, b: float
) -> Tensor:
    logits = hidden @ head.weight.t()
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.rule.scale
    if head.rule.softcap is not None:
        logits = head.rule.softcap * torch.tanh(logits / head.rule.softcap)
    total = a * cross_entropy(logits, gold).sum()
    return total if target is None else total + b * bucket_kl(logits, target).sum()


def gradients(loss: Tensor, head: Head, hidden: Tensor) -> list[Tensor]:
    inputs = [hidden, head.weight, *([] if head.bias is None else [head.bias])]
    return list(torch.autograd.grad(loss, inputs))


@pytest.fixture(params=["slices", "whole chunks"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU, and as on a GPU: no slices, no memory kept, the target merged at once."""
    if request.param == "whole chunks":
        monkeypatch.setattr(chunked_head, "_scratch", lambda *_: None)
        monkeypatch.setattr(chunked_head, "cache_sized", lambda rows, _: range(0, rows, rows))


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("chunk", [1, 4, R, 100])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rule", [HeadRule(), HeadRule(0.7, 5.0)])
def test_equals_plain_losses(
    chunk: int, temperature: float, padding: int, bias: bool, rule: HeadRule
) -> None:
    hidden, head, gold = make(padding=padding, bias=bias, rule=rule)
    target = sparse_target(dense_teachers(torch.Generator().manual_seed(2)), K, temperature)
    plain = plain_total(hidden, head, gold, target, 0.3, 0.7)
    ours = chunked_loss(hidden, head, gold, target, 0.3, 0.7, chunk)
    torch.testing.assert_close(ours.total, plain, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        gradients(ours.total, head, hidden), gradients(plain, head, hidden), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("passes")
def test_no_rows_cost_nothing() -> None:
    """As of a block of a long prompt, none of whose tokens is a target."""
    hidden, head, gold = make()
    target = sparse_target(dense_teachers(torch.Generator().manual_seed(2)), K)
    ours = chunked_loss(hidden[:0], head, gold[:0], target.rows(0, 0), 0.3, 0.7, 4)
    assert float(ours.total.detach()) == 0.0
    assert not any(bool(mine.any()) for mine in gradients(ours.total, head, hidden))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_whole_vocabulary_is_the_dense_kl_to_the_mixture(temperature: float) -> None:
    """With k = V the sparse loss has the dense KL's value, and the mixture KL's gradient."""
    hidden, head, gold = make()
    dense = dense_teachers(torch.Generator().manual_seed(3))
    target = sparse_target(dense, V, temperature)
    tempered = dense.pow(1 / temperature)
    tempered = tempered / tempered.sum(-1, keepdim=True)
    logq = log_softmax(hidden @ head.weight.t() / temperature, -1)
    each = kl_div(logq.expand_as(tempered), tempered, reduction="none").sum(-1)
    expected = (target.weights * each).sum()
    mixture = (target.weights[..., None] * tempered).sum(0)
    ours = chunked_loss(hidden, head, gold, target, 0.0, 1.0, 7)
    torch.testing.assert_close(ours.total, expected, rtol=1e-12, atol=1e-12)
    to_mixture = kl_div(logq, mixture, reduction="sum")
    for mine, theirs in zip(
        gradients(ours.total, head, hidden), gradients(to_mixture, head, hidden), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_cross_entropy_alone_is_torchs() -> None:
    hidden, head, gold = make()
    ours = chunked_loss(hidden, head, gold, None, 1.0, 0.0, 4)
    theirs = torch_cross_entropy(hidden @ head.weight.t(), gold, reduction="sum")
    torch.testing.assert_close(ours.total, theirs)
    assert int(ours.correct) == int(((hidden @ head.weight.t()).argmax(-1) == gold).sum())
    assert float(ours.kd) == 0.0


@pytest.mark.parametrize(("bfloat16", "tolerance"), [(False, 1e-5), (True, 3e-2)])
def test_single_precision(bfloat16: bool, tolerance: float) -> None:
    """float32 within 1e-5 of float64; bfloat16 factors within 3 % of the largest gradient."""
    hidden, head, gold = make()
    target = sparse_target(dense_teachers(torch.Generator().manual_seed(5)), K)
    plain = plain_total(hidden, head, gold, target, 0.5, 0.5)
    small, single, _ = make(torch.float32)
    narrow = Head(single.weight, None, single.rule, bfloat16)
    ours = chunked_loss(small, narrow, gold, target, 0.5, 0.5, 6)
    torch.testing.assert_close(ours.total.double(), plain, rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(
        gradients(ours.total, narrow, small), gradients(plain, head, hidden), strict=True
    ):
        assert float((mine - theirs).abs().max() / theirs.abs().max()) < tolerance


@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
def test_sure_students_and_teachers_give_finite_exact_gradients(scale: float) -> None:
    """Students with next to no tail mass, teachers with an empty one: no NaN, no cancellation."""
    hidden, head, gold = make(torch.float32)
    hidden = (hidden.detach() * scale).requires_grad_()
    target = sparse_target(dense_teachers(torch.Generator().manual_seed(6), 20.0), K)
    target.tail[:, ::2] = 0.0
    scaled = FusedTarget(
        target.ids, target.logp, target.p / (target.p.sum(-1) + target.tail)[..., None],
        target.tail / (target.p.sum(-1) + target.tail), target.weights, V, 1.0,
    )  # fmt: skip
    ours = chunked_loss(hidden, head, gold, scaled, 0.0, 1.0, 6)
    (mine,) = torch.autograd.grad(ours.total, [hidden])
    assert bool(torch.isfinite(ours.total)) and bool(torch.isfinite(mine).all())
    # d/d logits = q − target' is at most 2 in sum; times the head's rows it is bounded likewise.
    assert float(mine.abs().max()) <= 2.0 * float(head.weight.abs().max())
    if scale == 1.0:
        wide = hidden.detach().double().requires_grad_()
        exact = bucket_kl(wide @ head.weight.detach().double().t(), scaled).sum()
        (theirs,) = torch.autograd.grad(exact, [wide])
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)


def test_no_rows_and_one_id() -> None:
    hidden, head, gold = make()
    empty = chunked_loss(hidden[:0], head, gold[:0], None, 1.0, 0.0, 4)
    empty.total.backward()  # type: ignore[no-untyped-call]
    assert float(empty.total) == 0.0 and head.weight.grad is not None
    one = Head(head.weight[:1].detach().requires_grad_(), None, HeadRule(), False)
    sure = torch.ones(1, R, 1, dtype=torch.float64)
    target = FusedTarget(
        torch.zeros(1, R, 1, dtype=torch.int64), sure.log(), sure, torch.zeros(1, R).double(),
        torch.ones(1, R).double(), 1, 1.0,
    )  # fmt: skip
    loss = chunked_loss(hidden, one, torch.zeros(R, dtype=torch.int64), target, 0.5, 0.5, 4)
    (gradient,) = torch.autograd.grad(loss.total, [hidden])
    assert float(loss.total) == 0.0 and float(gradient.abs().max()) == 0.0
