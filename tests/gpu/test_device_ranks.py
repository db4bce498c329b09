"""Sharded (FSDP2) and replicated (DDP) students in a group of one process, over the device's backend."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import make_model
from device_under_test import DEVICE, ON_GPU, needs_device
from test_targets import notes

from stages.batches import Batch
from stages.checkpoint import load_checkpoint, read_facts, save_checkpoint
from stages.fusion import fuse
from stages.optimizer import make_optimizer, materialise_moments, moments
from stages.parallel import full_state, replicate, shard
from stages.ranks import Ranks
from stages.student import DistilledStudent
from stages.target_options import FusionOptions, LossOptions
from stages.train_options import TrainOptions

pytestmark = needs_device

V, STEPS = 40, 4


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """One rank with the backends that `stages.ranks.joined` gives several of them."""
    backend = "cpu:gloo,cuda:nccl" if ON_GPU else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    device = torch.device("cuda", 0) if ON_GPU else DEVICE
    yield Ranks(device, 0, 1, dist.new_group(backend="gloo"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_model(tmp_path_factory.mktemp("model"), V, 3)


def batch_of_notes() -> Batch:
    """Two blocks of eight tokens, six of each with a target."""
    scored = torch.zeros(2, 8, dtype=torch.bool)
    scored[:, :6] = True
    generator = torch.Generator().manual_seed(4)
    target = fuse({"t": notes(1)}, (2.0,), V, 2.0, FusionOptions(), "bucket")
    narrow = {n: getattr(target, n).float() for n in ("logp", "p", "tail", "weights")}
    return Batch(
        inputs=torch.randint(0, V, (2, 8), generator=generator),
        positions=torch.arange(8).expand(2, -1), present=torch.ones(2, 8, dtype=torch.bool),
        scored=scored, gold=torch.arange(12) * 3, domain=torch.zeros(2, dtype=torch.int64),
        target=replace(target, **narrow), features={}, segment_weights={},
    ).to(DEVICE)  # fmt: skip


class Training:
    """A student on the device, plain, sharded or replicated, and its optimizer."""

    def __init__(self, model: Any, ranks: Ranks, how: str, bf16: bool = False) -> None:
        loss = LossOptions.model_validate({"temperature": 2.0, "chunk_tokens": 5})
        self.student = DistilledStudent(copy.deepcopy(model), loss, bf16)
        self.module: Any = self.student
        if how == "fsdp":
            shard(self.student, ranks, bf16)
        else:
            self.student.to(ranks.device)
        if how == "ddp":
            self.module = replicate(self.student, ranks)
        self.optimizer = make_optimizer(self.student, TrainOptions(lr=1e-2, steps=STEPS))
        self.batch = batch_of_notes()

    def steps(self, count: int) -> list[float]:
        """Returns the losses of some steps."""
        losses = []
        for _ in range(count):
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.module(self.batch, self.batch.rows, 1, 0.8)
            loss.total.backward()
            norm: Any = torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
            assert bool(
                torch.isfinite(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
            )
            self.optimizer.step()
            losses.append(float(loss.total.detach()))
        return losses

    def state(self) -> dict[str, Any]:
        return {
            "student": dict(self.student.state_dict()),
            "optimizer": moments(self.optimizer, self.student),
        }


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_group_of_one_has_the_losses_of_one_process(model: Any, ranks: Ranks, how: str) -> None:
    plain, grouped = Training(model, ranks, "plain"), Training(model, ranks, how)
    expected = plain.steps(STEPS)
    assert grouped.steps(STEPS) == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < 0.95 * expected[0]
    mine, theirs = (full_state(t.student.model, True) for t in (grouped, plain))
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert mine[name].device.type == "cpu" and mine[name].shape == value.shape
        # AdamW divides by the root of small numbers: rounding grows there, but not far.
        assert float((mine[name] - value).abs().max()) < 2e-3, name


def test_sharded_bfloat16_follows_float32(model: Any, ranks: Ranks) -> None:
    expected = Training(model, ranks, "plain").steps(STEPS)
    assert Training(model, ranks, "fsdp", bf16=True).steps(STEPS) == pytest.approx(
        expected, rel=3e-2
    )


def test_a_sharded_checkpoint_goes_on(model: Any, ranks: Ranks, tmp_path: Path) -> None:
    """Saved from pieces; resumed by a sharded and by a plain student."""
    whole = Training(model, ranks, "fsdp")
    whole.steps(2)
    save_checkpoint(tmp_path, 2, whole.state(), {}, 1, ranks)
    expected = whole.steps(2)
    folder = tmp_path / "step-00000002"
    for how in ("fsdp", "plain"):
        resumed = Training(model, ranks, how)
        materialise_moments(resumed.optimizer)
        load_checkpoint(folder, read_facts(folder), resumed.state(), ranks)
        assert resumed.steps(2) == pytest.approx(expected, rel=1e-5), how


def test_numbers_go_over_gloo_and_gradients_over_the_device(ranks: Ranks) -> None:
    numbers = torch.tensor([1.5, 2.5], dtype=torch.float64)
    dist.all_reduce(numbers, group=ranks.group)
    tensor = torch.ones(3, device=ranks.device)
    dist.all_reduce(tensor)
    assert numbers.tolist() == [1.5, 2.5] and tensor.tolist() == [1.0] * 3
