"""The first part of gpu.py: memory and time of the loss and its gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from gpu_rows import LeftOut, Peak, Recorder, timed
from torch import Tensor

from stages.chunk_sizes import LOSS_BYTES, loss_rows
from stages.chunked_head import chunked_loss
from stages.fusion import FusedTarget
from stages.head import Head, HeadRule

TEACHERS, KEPT, TAIL, ALPHA = 3, 64, 0.1, 0.9
DENSE_BYTES = 22  # a logit: bfloat16 and float32, log-probabilities, their gradients
Loss = Callable[["Given"], Tensor]


class Given:
    """What a loss is computed from: hidden states and head want gradients."""

    def __init__(self, rows: int, hidden: int, vocab: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        def ids(below: int, *shape: int) -> Tensor:
            return torch.randint(below, shape, generator=generator, device=device)

        self.hidden = random(rows, hidden).requires_grad_()
        self.weight = random(vocab, hidden).mul_(2.0 / hidden**0.5).requires_grad_()
        self.gold, stride = ids(vocab, rows), vocab // KEPT
        kept = ids(stride, TEACHERS, rows, KEPT) + torch.arange(KEPT, device=device) * stride
        p = random(TEACHERS, rows, KEPT).mul_(2.0).softmax(-1) * (1.0 - TAIL)
        tail, weights = (
            torch.full((TEACHERS, rows), v, device=device) for v in (TAIL, 1 / TEACHERS)
        )
        self.target = FusedTarget(kept, p.log(), p, tail, weights, vocab, 1.0)
        self.rows = rows
        self.head = Head(self.weight, None, HeadRule(), True)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.hidden.device.type, torch.bfloat16)

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


def ours(budget: int, kl: bool) -> Loss:
    def loss(given: Given) -> Tensor:
        alpha = ALPHA if kl else 0.0
        chunk = loss_rows(len(given.weight), given.weight.device.type, budget)
        return chunked_loss(
            given.hidden, given.head, given.gold, given.target if kl else None,
            (1.0 - alpha) / given.rows, alpha / given.rows, chunk,
        ).total  # fmt: skip

    return loss


def dense(kl: bool) -> Loss:
    def loss(given: Given) -> Tensor:
        _require_room(given, DENSE_BYTES)
        with given.autocast():
            logits = torch.nn.functional.linear(given.hidden, given.weight)
        logq = logits.float().log_softmax(-1)
        ce = -logq.gather(-1, given.gold[:, None]).mean()
        if not kl:
            return ce
        target, kd = given.target, logq.new_zeros(())
        for m in range(TEACHERS):
            kept, t = logq.gather(-1, target.ids[m]), target.tail[m]
            head = (target.p[m] * (target.logp[m] - kept)).sum(-1)
            rest = t * (t.log() - torch.log1p(-kept.exp().sum(-1)))
            kd = kd + (target.weights[m] * (head + rest)).mean()
        return (1.0 - ALPHA) * ce + ALPHA * kd

    return loss


def liger_ce(given: Given, once: bool = False) -> Tensor:
    """With `once` hidden states and head are bfloat16 before they are given to Liger."""
    from liger_kernel.transformers.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyLoss,
    )

    with given.autocast():
        made = LigerFusedLinearCrossEntropyLoss(reduction="mean", accum_dtype=torch.float32)
        weight, hidden = given.weight, given.hidden
        if once:
            weight, hidden = weight.bfloat16(), hidden.bfloat16()
        loss: Tensor = made(weight, hidden, given.gold)
    return loss


class LigerKL:
    """Liger's KL to a target of [T, V] probabilities, which is made once and counts as given."""

    def __init__(self) -> None:
        self.target: Tensor | None = None

    def __call__(self, given: Given) -> Tensor:
        from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

        if self.target is None:
            _require_room(given, 6)
            p = (given.target.weights[..., None] * given.target.p / (1.0 - TAIL)).transpose(0, 1)
            ids = given.target.ids.transpose(0, 1)
            target = torch.zeros(given.rows, len(given.weight), device=p.device)
            self.target = target.scatter_add_(-1, ids.flatten(1), p.flatten(1))
        with given.autocast():
            made = LigerFusedLinearKLDivLoss(accum_dtype=torch.float32)
            loss: Tensor = made(given.hidden, given.weight, self.target)
        return loss


def _require_room(given: Given, bytes_of_a_logit: int) -> None:
    if given.hidden.device.type != "cuda":
        return
    free = (
        torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    )
    needed = bytes_of_a_logit * given.rows * len(given.weight)
    if needed > 0.95 * free:
        raise LeftOut(f"about {needed / 1e9:.0f} GB are needed and {free / 1e9:.0f} GB free")


def measure(recorder: Recorder, given: Given, make: Callable[[], Loss]) -> dict[str, Any]:
    """Returns time, peak and value of a loss and its gradients."""
    loss, shown = make(), list[float]()

    def run() -> None:
        given.clear()
        total = loss(given)
        total.backward()
        if not shown:
            shown.append(float(total.detach()))

    given.clear()
    if isinstance(loss, LigerKL):
        loss(given)  # makes its target
    peak = Peak(recorder.device)
    seconds, repeats = timed(run, recorder.device, recorder.sizes.pause)
    beyond = peak.beyond
    given.clear()
    work = 6.0 * given.rows * given.weight.numel()
    return {
        "ms": seconds * 1e3, "of_products_rate": work / seconds / recorder.facts["flops"],
        "beyond_bytes": beyond, "nats": shown[0], "repeats": repeats,
    }  # fmt: skip


def methods(budgets: tuple[int, ...], device: str) -> dict[str, Callable[[], Loss]]:
    """Returns what makes each loss, by name; those that tell most first, for time may be short."""

    def name(what: str, budget: int) -> str:
        marked = " (default)" if budget == LOSS_BYTES[device] else ""
        return f"{what}, ours, {budget / 2**20:,.3g} MiB{marked}"

    made: dict[str, Callable[[], Loss]] = {}
    for budget in budgets:
        made[name("CE + KL", budget)] = partial(ours, budget, True)
    made["CE + KL, dense"] = partial(dense, True)
    for budget in budgets[:2]:
        made[name("CE", budget)] = partial(ours, budget, False)
    made["CE, dense"] = partial(dense, False)
    if find_spec("liger_kernel") is not None:
        made["CE, Liger"] = partial(partial, liger_ce)
        made["CE, Liger, all cast once"] = partial(partial, liger_ce, once=True)
        made["KL to [T, V], Liger"] = LigerKL
    return made


def run(recorder: Recorder) -> None:
    sizes = recorder.sizes
    if find_spec("liger_kernel") is None:
        recorder.failed("Liger", LeftOut("liger_kernel is not installed"))
    for rows in sizes.rows:
        for hidden in sizes.hidden:
            given = Given(rows, hidden, sizes.vocab, recorder.device)
            for name, make in methods(sizes.budgets, recorder.device.type).items():
                recorder.row(name, partial(measure, recorder, given, make), T=rows, D=hidden)
            del given
