"""Held-out figures against the same written plainly over whole distributions."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Lab, build_parts
from torch import Tensor
from whole_caches import dense_logits, model, whole_caches

from stages import bootstrap, evaluate
from stages.bootstrap import interval, resampled
from stages.calibration import BINS, bin_sums, calibration_error
from stages.evaluate import (
    Sums,
    cached_sums,
    figures,
    forward_speed,
    heldout_sums,
    loss_difference,
    table,
)
from stages.losses import bucket_kl
from stages.student import DistilledStudent

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache that holds every id of every teacher, unrounded, and held-out text of two domains."""
    root: Path = tmp_path_factory.mktemp("evaluation")
    build_parts(root)
    lab = Lab(root)
    lab.config["corpus"]["sources"].append(
        {"domain": "y", "split": "heldout", "format": "jsonl", "path": f"{root}/y.jsonl"}
    )
    return whole_caches(lab)


def dense(work: Any, name: str, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (log p [R, V], gold [R], most probable of all P ids [R]) of a model that reads one block a
    document at a time."""
    reader = work.batch_reader()
    batch, vocab = reader.read(np.array([block])), reader.corpus.info.vocab_size
    logits = dense_logits(work, name, batch)
    return torch.log_softmax(logits[:, :vocab], -1), batch.gold, logits.argmax(-1)


def plain_error(logp: Tensor, right: Tensor) -> float:
    """The ECE, row by row."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for confidence, hit in zip(logp.exp().amax(-1).tolist(), right.tolist(), strict=True):
        at = max(math.ceil(confidence * 15) - 1, 0)
        bins.setdefault(at, []).append((confidence, hit))
    return sum(abs(sum(c - h for c, h in rows)) for rows in bins.values()) / len(right)


def everything(work: Any, name: str) -> tuple[Any, Tensor, Tensor, Tensor]:
    blocks = work.prepared().block_ids("heldout")
    found = zip(*(dense(work, name, int(block)) for block in blocks), strict=True)
    return blocks, *map(torch.cat, found)


@pytest.mark.parametrize("name", ["one", "two"])  # two has logits beyond the vocabulary
def test_a_students_figures_are_the_dense_ones(work: Any, name: str) -> None:
    reader = work.batch_reader()
    blocks, logp, gold, best = everything(work, name)
    student = DistilledStudent(model(work, name), work.config.loss, False).train()
    sums = heldout_sums(student, reader, blocks, 3)
    found = table(sums, reader.corpus.info, blocks, 50, 0)
    whole, target = found["overall"], reader.read(blocks).target
    assert student.training and target is not None
    assert whole["rows"] == len(gold) == sum(found[d]["rows"] for d in ("x", "y"))
    nll = -logp.gather(-1, gold[:, None])[:, 0]
    if name == "one":  # without padding the student's own distribution is this one
        assert whole["ce"] == pytest.approx(float(nll.mean()), rel=1e-5)
        kd = bucket_kl(logp.float(), target).mean()
        assert whole["kd"] == pytest.approx(float(kd), rel=1e-4, abs=1e-6)
    assert whole["ece"] == pytest.approx(plain_error(logp, best == gold), abs=1e-5)
    mixture = (target.weights[..., None] * torch.zeros(2, *logp.shape).scatter_add(
        -1, target.ids, target.p)).sum(0)  # fmt: skip
    assert (best >= logp.shape[1]).any() == (name == "two"), "padding was not tried"
    assert whole["accuracy"] == pytest.approx(float((best == gold).double().mean()))
    assert whole["agreement"] == pytest.approx(float((best == mixture.argmax(-1)).double().mean()))
    low, high = whole["intervals"]["perplexity"]
    assert low < whole["perplexity"] < high


def test_figures_from_the_caches_are_those_of_the_teachers(work: Any) -> None:
    reader = work.batch_reader()
    info = reader.corpus.info
    blocks, one, gold, _ = everything(work, "one")
    two = everything(work, "two")[1]
    found = {n: table(s, info, blocks, 0, 0) for n, s in cached_sums(reader, blocks).items()}
    target = reader.read(blocks).target
    assert target is not None
    mixture = (target.weights[..., None].double() * torch.stack([one.exp(), two.exp()])).sum(0)
    for name, logp in {"one": one, "two": two, "fused": mixture.log()}.items():
        whole, best = found[name]["overall"], logp.argmax(-1)
        nll = -logp.gather(-1, gold[:, None]).mean()
        assert whole["ce"] == pytest.approx(float(nll), rel=1e-4)
        assert whole["ece"] == pytest.approx(plain_error(logp, best == gold), abs=1e-4)
        assert whole["accuracy"] == pytest.approx(float((best == gold).double().mean()))
        if name != "fused":
            share = float((best == mixture.argmax(-1)).double().mean())
            assert whole["agreement"] == pytest.approx(share)
            assert whole["intervals"] == {}


def test_bits_per_byte_counts_all_nats_and_the_targets_bytes(work: Any) -> None:
    reader = work.batch_reader()
    blocks = reader.corpus.info.block_ids("heldout")
    sums = cached_sums(reader, blocks)["one"]
    sizes = np.arange(len(blocks)) + 7
    found = table(sums.with_bytes(sizes), reader.corpus.info, blocks, 20, 0)["overall"]
    nats = sums.values[:, sums.names.index("ce")].sum()
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / sizes.sum())
    assert found["ece"] == table(sums, reader.corpus.info, blocks, 0, 0)["overall"]["ece"]
    nothing = table(sums.with_bytes(sizes * 0), reader.corpus.info, blocks, 20, 0)["overall"]
    assert nothing["bits_per_byte"] is None and "bits_per_byte" not in nothing["intervals"]


def test_resamples_draw_in_each_domain_apart(work: Any) -> None:
    reader = work.batch_reader()
    info, blocks = reader.corpus.info, reader.corpus.info.block_ids("heldout")
    sums = cached_sums(reader, blocks)["one"]
    values = np.zeros_like(sums.values)
    values[:, 0] = 1  # a row a block, and the loss is the domain's: nothing varies
    values[:, -3] = 1  # in one bin
    values[:, 1] = 1 + info.domain_of(blocks)
    found = table(Sums(sums.names, values), info, blocks, 40, 0)
    for name in ("x", "y", "overall"):
        low, high = found[name]["intervals"]["perplexity"]
        assert low == pytest.approx(high) and low == pytest.approx(found[name]["perplexity"])


def test_one_block_tells_no_spread(work: Any) -> None:
    sums = cached_sums(work.batch_reader(), np.array([0]))["fused"]
    found = table(sums, work.batch_reader().corpus.info, np.array([0]), 20, 0)
    assert len(found) == 2 and all(one["intervals"] == {} for one in found.values())


def test_speed_is_a_positive_number_or_nothing(work: Any) -> None:
    reader, network = work.batch_reader(), model(work, "one")
    blocks = reader.corpus.info.block_ids("heldout")
    assert (forward_speed(network, reader, blocks, 2, True) or 0) > 0
    assert forward_speed(network, reader, blocks[:0], 2, False) is None


def test_the_timed_forward_gives_the_models_logits(
    work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is timed is the whole forward: every row's logits, equal to the model's own."""
    reader, network, seen = work.batch_reader(), model(work, "one"), []
    product: Callable[..., Tensor] = evaluate.Head.logits

    def keep(head: Any, hidden: Tensor) -> Tensor:
        seen.append(product(head, hidden))
        return seen[-1]

    monkeypatch.setattr(evaluate.Head, "logits", keep)
    batch = reader.read(np.array([0]))
    with torch.no_grad():
        evaluate._forward(network, evaluate.Head.of(network, False), batch)
        theirs = network(
            input_ids=batch.inputs, position_ids=batch.positions, use_cache=False
        ).logits
    assert torch.allclose(torch.cat(seen), theirs[batch.present], atol=1e-4)


# -- calibration and bootstrap alone


def test_calibration_error_of_known_cases() -> None:
    group, confidence = torch.zeros(4, dtype=torch.int64), torch.full((4,), 0.75)
    half = torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert calibration_error(bin_sums(confidence, half, group, 1).numpy())[0] == pytest.approx(0.25)
    right = torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert calibration_error(bin_sums(confidence, right, group, 1).numpy())[0] == pytest.approx(0.0)
    # Over and under in different bins do not cancel.
    mixed = bin_sums(torch.tensor([0.9, 0.1]), torch.tensor([0.0, 1.0]), group[:2], 1)
    assert calibration_error(mixed.numpy())[0] == pytest.approx(0.9)


def test_bins_take_their_upper_edge_and_add_up_over_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(200, generator=generator)
    confidence[:3] = torch.tensor([0.0, 1.0, 1.0 / 15])
    correct = (torch.rand(200, generator=generator) < confidence).float()
    group = torch.arange(200) % 5
    apart = bin_sums(confidence, correct, group, 5)
    whole = bin_sums(confidence, correct, group * 0, 1)
    assert torch.allclose(apart.sum(0), whole[0])
    counts = whole.view(BINS, 3)[:, 0]
    edges = torch.arange(1, BINS + 1) / BINS
    assert counts.cumsum(0).tolist() == [(confidence <= e + 1e-7).sum().item() for e in edges]


def test_resampled_sums_are_those_of_drawn_units(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(9, 3))
    found = resampled(values, 500, 3)
    counts = resampled(np.eye(9), 500, 3)
    assert (counts == counts.round()).all() and (counts.sum(1) == 9).all()
    plain = np.array([values[np.repeat(np.arange(9), row.astype(int))].sum(0) for row in counts])
    assert found == pytest.approx(plain)
    monkeypatch.setattr(bootstrap, "_COUNTS", 50)
    assert (resampled(values, 500, 3) == found).all()
    assert (resampled(values, 500, 4) != found).any()
    assert resampled(values, 0, 3).shape == (0, 3)


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, size=(400, 1))
    low, high = interval(resampled(values, 4000, 0)[:, 0] / 400)
    half = 1.96 * values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_perplexity_of_sums_has_the_sums_leading_shape() -> None:
    found = figures(Sums(("rows", "ce"), np.array([[2.0, 2.0], [1.0, 3.0]])))
    assert found["perplexity"] == pytest.approx(np.exp([1.0, 3.0]))


def test_a_paired_difference_leaves_out_what_makes_text_hard_for_both() -> None:
    generator = np.random.default_rng(2)
    domain, rows = np.arange(60) % 2, np.full(60, 8.0)
    info: Any = SimpleNamespace(domains=("x", "y"), domain_of=lambda ids: domain[ids])
    hard = generator.normal(3.0, 1.0, 60)
    a, b = (
        Sums(("rows", "ce"), np.stack([rows, rows * (hard + generator.normal(by, 0.01, 60))], 1))
        for by in (0.0, 0.1)
    )
    ids = np.arange(60)
    found = loss_difference(a, b, info, ids, 500, 0)
    apart = (a.values[:, 1] - b.values[:, 1]) / rows
    assert found["ce"] == pytest.approx(apart.mean())
    low, high = found["interval"]
    half = 1.96 * apart.std() / math.sqrt(60)
    assert [low, high] == pytest.approx([apart.mean() - half, apart.mean() + half], abs=half / 3)
    alone = interval(resampled(a.values, 500, 0)[:, 1] / 480)
    assert high - low < 0.1 * (alone[1] - alone[0])
    assert loss_difference(a, b, info, ids, 0, 0)["interval"] is None
    domain[:] = 0
    domain[7] = 1
    assert loss_difference(a, b, info, ids, 500, 0)["interval"] is None, "a block tells no spread"
