"""The third part of gpu.py: whole steps of a student."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_parts import (
    BATCH,
    Planner,
    disk_bytes,
    made_up_caches,
    make_corpus,
    mean_entropy,
    model_folder,
    random_teacher,
)
from gpu_rows import Peak, Recorder, wait
from gpu_stage_one import at_hand
from torch import Tensor

from pipeline.reproduce.online import OnlineStudent
from stages.batches import Batch, BatchReader
from stages.head import run_decoder
from stages.optimizer import make_optimizer
from stages.options import TeacherOptions
from stages.order import BlockOrder, Position
from stages.stream import steps_of_batches
from stages.student import DistilledStudent, build_student
from stages.target_options import FusionOptions, LossOptions
from stages.teacher import TransformersTeacher
from stages.train_options import StudentOptions, TrainOptions
from storage.blocks import BlockReader
from storage.reader import CacheReader

NAMES = ("one", "two", "three")
ONLINE = "1.7B"
Loss = Callable[[Any, Batch], Tensor]


def distilled(student: Any, batch: Batch) -> Tensor:
    total: Tensor = student(batch, batch.rows, 1).total
    return total


def own_loss(student: DistilledStudent, batch: Batch) -> Tensor:
    """What transformers computes of the same rows, with logits as its Trainer has them."""
    labels = torch.full_like(batch.inputs, -100).masked_scatter_(batch.scored, batch.gold)
    with torch.autocast(batch.inputs.device.type, torch.bfloat16):
        hidden, _ = run_decoder(student.model, batch.inputs, batch.positions, ())
        logits = student.model.get_output_embeddings()(hidden)
    loss: Tensor = student.model.loss_function(
        logits, labels, vocab_size=logits.shape[-1], shift_labels=labels
    )
    return loss


class Steps:
    """The student, what feeds it, and the rows about it."""

    def __init__(self, recorder: Recorder, root: Path) -> None:
        self.recorder, self.root = recorder, root
        self.folder = model_folder(root, "student", recorder.sizes.student)
        self.corpus = make_corpus(root / "corpus", recorder.sizes)
        self.plan = Planner(root, recorder.sizes, recorder.gpu, recorder.facts["flops"])
        self.train = TrainOptions(steps=1)

    def caches(self) -> dict[str, Any]:
        begun = time.perf_counter()
        made_up_caches(self.root / "caches", self.corpus, NAMES, self.recorder.device)
        seconds = time.perf_counter() - begun
        first = self.root / "caches" / NAMES[0]
        info = self.corpus.info
        return {
            "seconds": seconds, "entropy": mean_entropy(first, self.corpus),
            "disk_bytes_a_token": disk_bytes(first) / (info.blocks * info.block_length),
        }  # fmt: skip

    def student(self, loss: LossOptions, kind: Any, *more: Any) -> DistilledStudent:
        options = StudentOptions(config=str(self.folder))
        with torch.device(self.recorder.device):
            model = build_student(options, self.folder, self.recorder.device, 0)
        student: DistilledStudent = kind(model, loss, True, *more)
        student.to(self.recorder.device).train()
        return student

    def reader(self, caches: bool, on_device: bool) -> BatchReader:
        opened = {n: CacheReader(self.root / "caches" / n, n) for n in NAMES} if caches else {}
        corpus = BlockReader(self.corpus.root)
        return BatchReader(corpus, opened, 1.0, FusionOptions(), on_device)

    def measure(
        self, *, caches: bool = False, on_device: bool = False, workers: int = 0,
        chunk_bytes: int | None = None, loss: Loss = distilled, kind: Any = DistilledStudent,
        more: Callable[[], tuple[Any, ...]] = tuple,
    ) -> dict[str, Any]:  # fmt: skip
        """Returns tokens/s, waits and peak of steps with one way of distilling, and the plan's."""
        device, options = self.recorder.device, LossOptions()
        if chunk_bytes is not None:
            options = LossOptions(chunk_bytes=chunk_bytes)
        peak = Peak(device)
        student = self.student(options, kind, *more())
        optimizer = make_optimizer(student, self.train)
        reader = self.reader(caches, on_device)
        info = reader.corpus.info
        order = BlockOrder(info.ranges("train"), info.blocks_per_part, 0, info.fingerprint)
        stream = steps_of_batches(reader, order, Position(), BATCH, 1, workers=workers)
        with contextlib.closing(stream):
            steps = list(self._steps(stream, reader, student, optimizer, loss))
        seconds = [sum(step) for step in steps]
        return {
            "tokens_per_s": BATCH * info.block_length / median(seconds),
            "wait_share": sum(s[0] for s in steps) / sum(seconds),
            "ready_share": sum(s[1] for s in steps) / sum(seconds),
            "peak_bytes": peak.bytes, "beyond_bytes": peak.beyond,
            **self.plan.student(len(NAMES) if caches else 0, options.chunk_bytes),
            "repeats": len(steps),
        }  # fmt: skip

    def _steps(
        self, stream: Iterator[Any], reader: BatchReader, student: DistilledStudent,
        optimizer: torch.optim.Optimizer, loss: Loss,
    ) -> Iterator[tuple[float, float, float]]:  # fmt: skip
        """Yields (waited for a batch, made it ready, the rest) in seconds, of each step after two."""
        device, begun = self.recorder.device, time.perf_counter()
        for number in range(32):
            if number == 2:
                begun = time.perf_counter()
            if number > 4 and time.perf_counter() - begun > 6 * self.recorder.sizes.pause:
                break
            times = [time.perf_counter()]
            (read,), _ = next(stream)
            times.append(time.perf_counter())
            batch = reader.ready(read, device)
            wait(device)
            times.append(time.perf_counter())
            optimizer.zero_grad(set_to_none=True)
            loss(student, batch).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), self.train.clip)
            optimizer.step()
            wait(device)
            times.append(time.perf_counter())
            if number >= 2:
                yield times[1] - times[0], times[2] - times[1], times[3] - times[2]

    def online_teachers(self) -> tuple[Any, ...]:
        """Returns what OnlineStudent takes after the options: one teacher's weights, three times."""
        folder = model_folder(self.root, ONLINE, self.recorder.sizes.teachers[ONLINE])
        options = TeacherOptions(model=str(folder))
        with at_hand(random_teacher(folder, self.recorder.device)):
            teacher = TransformersTeacher(ONLINE, folder, options, self.recorder.device)
        return [teacher] * len(NAMES), FusionOptions().tau, self.corpus.info.vocab_size

    def rows(self) -> None:
        """Measures all of them; those that tell most first."""
        row, measure, budgets = self.recorder.row, self.measure, self.recorder.sizes.budgets
        row("cross-entropy", lambda: measure())
        if "error" in row("writing three caches", self.caches):
            return
        row("three caches", lambda: measure(caches=True))
        row("three caches, decoded there", lambda: measure(caches=True, on_device=True))
        row("three caches, 4 processes read", lambda: measure(caches=True, workers=4))
        for budget in budgets[1:3]:
            row(
                f"three caches, chunks of {budget / 2**20:,.3g} MiB",
                partial(measure, caches=True, chunk_bytes=budget),
            )
        row("own loss, cross-entropy", lambda: measure(loss=own_loss))
        row(
            f"three {ONLINE} teachers online",
            lambda: measure(kind=OnlineStudent, more=self.online_teachers),
        )


def run(recorder: Recorder) -> None:
    root = recorder.folder / "gpu"
    shutil.rmtree(root, ignore_errors=True)
    try:
        Steps(recorder, root).rows()
    finally:
        shutil.rmtree(root, ignore_errors=True)
