"""Every divergence: the chunked path against the plain one, the definitions, and at its extremes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from stages.chunk_sizes import loss_rows, notes_rows
from stages.chunked_head import ChunkedLoss, chunked_loss
from stages.divergences import DIVERGENCES, FLOOR, Divergence
from stages.fusion import FusedTarget
from stages.head import Head, HeadRule
from stages.losses import bucket_kl, cross_entropy, mixture_divergence

R, D, V, M, K = 17, 6, 31, 3, 5
MIX = {"js": 0.3, "skew_kl": 0.1, "skew_reverse_kl": 0.1}
NAMES = sorted(DIVERGENCES)
MIXED = [name for name in NAMES if name != "forward_kl"]


def named(name: str) -> Divergence:
    return Divergence(name, MIX.get(name, 0.0))


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def target_of(
    k: int = K, temperature: float = 1.0, disjoint: bool = False, rows: int = R, vocab: int = V
) -> FusedTarget:
    """Exact sparse notes of M teachers; disjoint: no id is in two heads."""
    logits = random(M, rows, vocab, seed=2, scale=2.0)
    if disjoint:
        for m in range(M):
            logits[m, :, m * k : (m + 1) * k] += 15.0
    dense = (logits / temperature).softmax(-1)
    p, ids = dense.topk(k, -1)
    tail = dense.scatter(-1, ids, 0.0).sum(-1)
    weights = random(M, rows, seed=3).softmax(0)
    return FusedTarget(ids, p.log(), p, tail, weights, vocab, temperature)


def make(
    dtype: torch.dtype = torch.float64,
    padding: int = 0,
    bias: bool = False,
    rule: HeadRule | None = None,
) -> tuple[Tensor, Head, Tensor]:
    hidden = random(R, D, seed=4).to(dtype).requires_grad_()
    weight = random(V + padding, D, seed=5).to(dtype).requires_grad_()
    offset = random(V + padding, seed=6).to(dtype).requires_grad_() if bias else None
    gold = torch.randint(0, V, (R,), generator=torch.Generator().manual_seed(7))
    return hidden, Head(weight, offset, rule or HeadRule(), False), gold


def plain_logits(hidden: Tensor, head: Head) -> Tensor:
    logits = hidden @ head.weight.t()
    logits = (logits if head.bias is None else logits + head.bias) * head.rule.scale
    cap = head.rule.softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def plain(logits: Tensor, target: FusedTarget, divergence: Divergence) -> Tensor:
    if divergence.name == "forward_kl":
        return bucket_kl(logits, target)
    return mixture_divergence(logits, target, divergence)


def gradients(total: Tensor, hidden: Tensor, head: Head) -> list[Tensor]:
    inputs = [hidden, head.weight, *([] if head.bias is None else [head.bias])]
    return list(torch.autograd.grad(total, inputs))


def same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_h_is_the_derivative_of_d_by_log_q(name: str) -> None:
    p, logq = random(4, 9, seed=1).softmax(-1), random(4, 9).log_softmax(-1).requires_grad_()
    d, h = named(name).terms(p, logq.exp(), logq)
    (expected,) = torch.autograd.grad(d.sum(), [logq])
    torch.testing.assert_close(h, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("disjoint", [False, True])
@pytest.mark.parametrize(
    ("padding", "bias", "rule"),
    [(0, False, HeadRule()), (3, True, HeadRule()), (0, True, HeadRule(0.7, 5.0))],
)
def test_chunked_equals_plain(
    name: str, temperature: float, disjoint: bool, padding: int, bias: bool, rule: HeadRule
) -> None:
    """In the total and in the gradients of hidden states, matrix and bias, to 1e-10."""
    hidden, head, gold = make(padding=padding, bias=bias, rule=rule)
    target = target_of(temperature=temperature, disjoint=disjoint)
    assert bool((target.ids.transpose(0, 1).flatten(1).sort().values.diff() == 0).any()) ^ disjoint
    logits = plain_logits(hidden, head)
    ce, kd = cross_entropy(logits, gold), plain(logits, target, named(name))
    ours = chunked_loss(hidden, head, gold, target, 0.3, 0.7, 4, named(name))
    same([ours.ce_R, ours.kd_R], [ce.detach(), kd.detach()])
    expected = 0.3 * ce.sum() + 0.7 * kd.sum()
    same([ours.total], [expected])
    same(gradients(ours.total, hidden, head), gradients(expected, hidden, head))


@pytest.mark.parametrize("name", NAMES)
def test_chunk_size_changes_nothing(name: str) -> None:
    hidden, head, gold = make(padding=2)
    target = target_of()

    def run(chunk: int) -> tuple[ChunkedLoss, list[Tensor]]:
        ours = chunked_loss(hidden, head, gold, target, 0.3, 0.7, chunk, named(name))
        return ours, gradients(ours.total, hidden, head)

    whole, expected = run(R)
    for chunk in range(1, R):
        ours, found = run(chunk)
        same([ours.ce_R, ours.kd_R, *found], [whole.ce_R, whole.kd_R, *expected], 1e-12)


def definition(name: str, p: Tensor, logq: Tensor) -> Tensor:
    """The divergences of whole distributions as their papers write them, by torch's own KL."""

    def kl(logs: Tensor, of: Tensor) -> Tensor:
        return kl_div(logs, of, reduction="sum")

    q, mix = logq.exp(), MIX.get(name, 0.0)
    if name == "js":
        m = mix * p + (1 - mix) * q
        return mix * kl(m.log(), p) + (1 - mix) * kl(m.log(), q)
    return {
        "forward_kl": lambda: kl(logq, p),
        "reverse_kl": lambda: kl(p.log(), q),
        "skew_kl": lambda: kl((mix * p + (1 - mix) * q).log(), p),
        "skew_reverse_kl": lambda: kl(((1 - mix) * p + mix * q).log(), q),
        "tv": lambda: (p - q).abs().sum() / 2,
    }[name]()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_whole_heads_give_the_dense_divergence(name: str, temperature: float) -> None:
    """k = V: the value (of forward KL up to the teachers' own divergence) and every gradient."""
    hidden, head, gold = make()
    target = target_of(V, temperature)
    target = replace(target, tail=torch.zeros_like(target.tail))
    dense = torch.zeros(M, R, V, dtype=torch.float64).scatter_(-1, target.ids, target.p)
    mixture = (target.weights[..., None] * dense).sum(0)
    expected = definition(name, mixture, log_softmax(hidden @ head.weight.t() / temperature, -1))
    ours = chunked_loss(hidden, head, gold, target, 0.0, 1.0, 5, named(name))
    if name != "forward_kl":
        same([ours.total], [expected])
    same(gradients(ours.total, hidden, head), gradients(expected, hidden, head))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_one_teachers_mixture_is_that_teacher(temperature: float) -> None:
    """The two forms of forward KL, one of them used nowhere else, are then the same."""
    logits, target = random(R, V, seed=8), target_of(temperature=temperature)
    fields = ("ids", "logp", "p", "tail", "weights")
    one = replace(target, **{name: getattr(target, name)[:1] for name in fields})
    one = replace(one, weights=torch.ones_like(one.weights))
    both = bucket_kl(logits, one), mixture_divergence(logits, one, named("forward_kl"))
    torch.testing.assert_close(*both)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_gradcheck(name: str, temperature: float) -> None:
    hidden = random(3, 2, seed=4).requires_grad_()
    weight = random(10, 2, seed=5).requires_grad_()  # the last is padding
    gold, target = torch.tensor([0, 8, 4]), target_of(3, temperature, rows=3, vocab=9)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        head = Head(weight, None, HeadRule(), False)
        return chunked_loss(hidden, head, gold, target, 0.4, 0.6, 2, named(name)).total

    check: Callable[..., bool] = torch.autograd.gradcheck
    assert check(loss, (hidden, weight))


@pytest.mark.parametrize("name", NAMES)
def test_tied_matrix_gets_both_gradients(name: str) -> None:
    _, head, gold = make()
    tokens, mixer = torch.arange(R), random(D, D, seed=9)
    target = target_of()
    hidden = torch.tanh(head.weight[tokens] @ mixer)
    ours = chunked_loss(hidden, head, gold, target, 0.3, 0.7, 4, named(name)).total
    expected = 0.3 * cross_entropy(hidden @ head.weight.t(), gold).sum()
    expected = expected + 0.7 * plain(hidden @ head.weight.t(), target, named(name)).sum()
    inputs = [head.weight]
    same(
        list(torch.autograd.grad(ours, inputs, retain_graph=True)),
        list(torch.autograd.grad(expected, inputs)),
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("bfloat16", "tolerance"), [(False, 1e-5), (True, 3e-2)])
def test_single_precision(name: str, bfloat16: bool, tolerance: float) -> None:
    """float32 within 1e-5 of float64; bfloat16 factors within 3 % of the largest gradient."""
    hidden, head, gold = make()
    target, divergence = target_of(), named(name)
    logits = plain_logits(hidden, head)
    expected = 0.5 * cross_entropy(logits, gold).sum()
    expected = expected + 0.5 * plain(logits, target, divergence).sum()
    small, single, _ = make(torch.float32)
    narrow = replace(single, bfloat16=bfloat16)
    halves = {x: getattr(target, x).float() for x in ("logp", "p", "tail", "weights")}
    ours = chunked_loss(small, narrow, gold, replace(target, **halves), 0.5, 0.5, 6, divergence)
    torch.testing.assert_close(ours.total.double(), expected, rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(
        gradients(ours.total, small, narrow), gradients(expected, hidden, head), strict=True
    ):
        assert float((mine - theirs).abs().max() / theirs.abs().max()) < tolerance


def edges() -> FusedTarget:
    """One teacher, ids 0 and 1: sure, half sure, all in the bucket, an exact 0, a next to empty tail."""
    p = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 0.0], [0.0, 1.0], [1.0 - 1e-7, 1e-30]])
    tail = torch.tensor([[0.0, 0.0, 1.0, 0.0, 1e-7]])
    ids = torch.tensor([0, 1]).expand(1, 5, 2).clone()
    return FusedTarget(ids, p.log().clamp_min(-1e4)[None], p[None], tail, torch.ones(1, 5), 4, 1.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("size", [0.0, 1.0, 60.0, 300.0, 1e4, 1e30])
def test_extremes_are_finite(name: str, temperature: float, padding: int, size: float) -> None:
    """However sure the student is, of whichever id, padding included, and whatever the teacher."""
    target = replace(edges(), temperature=temperature)
    for sure in range(4 + padding):
        bias = torch.zeros(4 + padding)
        bias[sure] = size
        head = Head(torch.zeros(4 + padding, 3), bias.requires_grad_(), HeadRule(), False)
        hidden, gold = torch.ones(5, 3, requires_grad=True), torch.zeros(5, dtype=torch.int64)
        ours = chunked_loss(hidden, head, gold, target, 0.0, 1.0, 2, named(name))
        assert bool(torch.isfinite(ours.kd_R).all()) and bool(torch.isfinite(ours.total))
        (found,) = torch.autograd.grad(ours.total, [bias])
        assert bool(torch.isfinite(found).all())
        if name != "forward_kl":
            assert bool((found[4:] == 0).all())  # padding has no part
        if size <= 60.0 and temperature == 1.0:
            wide = bias.detach().double().requires_grad_()
            doubles = {x: getattr(target, x).double() for x in ("logp", "p", "tail", "weights")}
            exact = plain(wide.expand(5, -1), replace(target, **doubles), named(name)).sum()
            (theirs,) = torch.autograd.grad(exact, [wide])
            torch.testing.assert_close(ours.total.double(), exact, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MIXED)
def test_bounds_hold_where_the_student_is_certainly_wrong(name: str) -> None:
    """Reverse KL reads FLOOR where the teachers give nothing, and no gradient is lost by that."""
    target = edges().rows(0, 1)  # the teacher is sure of id 0
    bias = torch.tensor([0.0, 0.0, 30.0, 0.0], requires_grad=True)  # the student of another
    head = Head(torch.zeros(4, 3), bias, HeadRule(), False)
    gold = torch.zeros(1, dtype=torch.int64)
    ours = chunked_loss(torch.ones(1, 3), head, gold, target, 0.0, 1.0, 1, named(name))
    mix = torch.tensor(MIX.get(name, 1.0))
    largest = {
        "reverse_kl": -torch.tensor(FLOOR).log(), "js": -mix * mix.log() - (1 - mix) * (1 - mix).log(),
        "skew_kl": -mix.log(), "skew_reverse_kl": -mix.log(), "tv": torch.tensor(1.0),
    }[name]  # fmt: skip
    torch.testing.assert_close(ours.kd, largest.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_and_one_id(name: str) -> None:
    hidden, head, gold = make(torch.bfloat16)
    nothing = target_of().rows(0, 0)
    empty = chunked_loss(hidden[:0], head, gold[:0], nothing, 0.5, 0.5, 4, named(name))
    empty.total.backward()  # type: ignore[no-untyped-call]
    assert float(empty.total.detach()) == 0.0 and head.weight.grad is not None
    one = Head(head.weight[:1].detach().requires_grad_(), None, HeadRule(), False)
    sure = torch.ones(1, R, 1)
    target = FusedTarget(
        torch.zeros(1, R, 1, dtype=torch.int64), sure.log(), sure, torch.zeros(1, R),
        torch.ones(1, R), 1, 1.0,
    )  # fmt: skip
    ours = chunked_loss(hidden, one, torch.zeros_like(gold), target, 0.5, 0.5, 4, named(name))
    for gradient in torch.autograd.grad(ours.total, [hidden, one.weight]):
        assert float(gradient.abs().max()) == 0.0
    assert float(ours.total.detach()) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_extremes(name: str) -> None:
    """Hidden states and matrix in bfloat16, as large as products in float32 allow."""
    hidden, head, gold = make(torch.bfloat16)
    for size in (1e-30, 1.0, 1e4, 1e18):
        large = (hidden.detach() * size).requires_grad_()
        heavy = Head(
            (head.weight.detach() * max(size, 1.0)).requires_grad_(), None, HeadRule(), True
        )
        ours = chunked_loss(large, heavy, gold, target_of(), 1e-3, 1e-3, 4, named(name))
        assert bool(torch.isfinite(ours.total))
        for gradient in torch.autograd.grad(ours.total, [large, heavy.weight]):
            assert bool(torch.isfinite(gradient).all())


def test_ranking_is_told_by_row() -> None:
    hidden, head, gold = make()
    target = target_of()
    dense = torch.zeros(R, V, dtype=torch.float64)
    for ids, p, weight in zip(target.ids, target.p, target.weights, strict=True):
        dense.scatter_add_(-1, ids, weight[:, None] * p)
    best = plain_logits(hidden, head).argmax(-1)
    gold[:5] = best[:5]
    hidden = hidden.detach()
    hidden[0] = head.weight[dense[0].argmax()].detach() * 9.0  # agrees at least here
    best = plain_logits(hidden, head).argmax(-1)
    ours = chunked_loss(hidden, head, gold, target, 0.3, 0.7, 4)
    assert ours.correct_R.bool().tolist() == (best == gold).tolist()
    assert ours.agreed_R.bool().tolist() == (best == dense.argmax(-1)).tolist()
    assert 0 < int(ours.agreed) < R and 0 < int(ours.correct) < R


def test_a_chunk_fits_its_budget() -> None:
    assert loss_rows(49_152, "cpu", None) == 512
    assert loss_rows(151_936, "cpu", None) == 165
    assert loss_rows(151_936, "cuda", None) == 883
    assert loss_rows(151_936, "cuda", 96 << 20) == 165
    assert loss_rows(10**9, "cpu", 1) == 1
    assert loss_rows(49_152, "cpu", 1, 7) == 7
    assert [notes_rows(151_936, kind, None) for kind in ("cpu", "cuda")] == [128, 441]
    assert notes_rows(10**9, "cuda", None) == 1 and notes_rows(9, "cuda", 3) == 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padding", [0, 2])
def test_a_bucket_without_ids_has_no_part(name: str, padding: int) -> None:
    """Together the teachers keep all ids, and each alone leaves a tail to those of the others."""
    hidden, head, gold = make(padding=padding)
    whole = target_of(k=V - 1)
    rows = [r for r in range(R) if len(whole.ids[:, r].unique()) == V]
    assert rows and float(whole.tail[:, rows].min()) > 0
    target = replace(
        whole, ids=whole.ids[:, rows], logp=whole.logp[:, rows], p=whole.p[:, rows],
        tail=whole.tail[:, rows], weights=whole.weights[:, rows],
    )  # fmt: skip
    loss = chunked_loss(hidden[rows], head, gold[rows], target, 0.0, 1.0, 4, named(name))
    expected = plain(plain_logits(hidden[rows], head), target, named(name))
    torch.testing.assert_close(loss.kd_R, expected, rtol=1e-10, atol=1e-10)
    same(gradients(loss.total, hidden, head), gradients(expected.sum(), hidden, head))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_tail_that_the_student_all_but_excludes_keeps_its_gradient(
    dtype: torch.dtype, temperature: float
) -> None:
    hidden, head, gold = make(dtype, padding=3)
    far = (hidden.detach() * 400.0).requires_grad_()  # gaps of thousands of nats
    target = target_of(k=2, temperature=temperature)
    narrow = replace(
        target, **{n: getattr(target, n).to(dtype) for n in ("logp", "p", "tail", "weights")}
    )
    logits = plain_logits(far, head)
    gone = torch.softmax(logits / temperature, -1).sort(-1, descending=True).values[:, 7:].sum(-1)
    assert (gone < 1e-40).any(), "the case is not extreme"
    expected = bucket_kl(logits, narrow)
    found = chunked_loss(far, head, gold, narrow, 0.0, 1.0, 5, named("forward_kl"))
    scale = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found.kd_R.to(dtype), expected, rtol=scale, atol=scale)
    theirs = gradients(expected.sum(), far, head)
    for mine, other in zip(gradients(found.total, far, head), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=scale, atol=scale * float(other.abs().max()))
