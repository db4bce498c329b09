"""What the student's step takes: memory of the loss, time and memory of whole steps.

    python tests/benchmarks/step.py [FOLDER] [memory] [step]      (make bench-step)

FOLDER is runs/bench; without `memory` or `step` both tables are made. Each row of the first is put into
FOLDER/step.json once it is measured.

Memory. For each number of tokens T and vocabulary V a process of its own computes cross-entropy and
forward KL (one teacher, 64 entries and a bucket) of T rows of hidden size 1,024 in float32, and the
gradients of hidden states and head; given is by how much the process's peak (VmHWM) exceeds what it
held before (hidden states, head, target). "chunked" is stages/chunked_head.py with its default
budget; "dense" the leanest way with autograd: one product, one log_softmax, one gather of gold and
kept ids, the bucket from the kept mass. Dense is left out where it would need more than the machine
has free.

Steps. The demonstration's student, corpus, caches and options (one block of 512 tokens, bfloat16
autocast), features left out: forward, backward, clipping, AdamW, and reading where there are
caches. Methods take turns in one process, ROUNDS each after one that is not counted; seconds are
medians; relative_to_ce is the median over the rounds of a method's time over that of "cross-
entropy, chunked" of the same round. data_wait_share is the share of the steps' time in which the
training thread waits for the batch (one thread reads ahead). "own loss" is what
transformers computes for the same model and rows: under bfloat16 autocast its logits are bfloat16
(a KL of 9e-4); with float32 logits, as ours are, its head runs outside. peak_bytes is the peak of a
process of its own that takes three steps of the method.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from pipeline.config import load_config
from pipeline.reproduce.online import OnlineStudent
from pipeline.workspace import Workspace
from stages.batches import Batch
from stages.chunk_sizes import loss_rows
from stages.chunked_head import chunked_loss
from stages.device import Usage
from stages.fusion import FusedTarget
from stages.head import Head, HeadRule, run_decoder
from stages.optimizer import make_optimizer
from stages.order import BlockOrder, Position
from stages.progress import Silent
from stages.stream import steps_of_batches
from stages.student import DistilledStudent, build_student
from stages.teacher import TransformersTeacher

HIDDEN, KEPT = 1024, 64
SIZES = [(t, 151_936) for t in (1024, 2048, 4096, 8192, 16_384, 32_768)]
SIZES += [(4096, v) for v in (32_000, 49_152, 131_072, 262_144)]
CONFIG = Path("pipeline/configs/demo.yaml")
ROUNDS = 15
CE = "cross-entropy, chunked"


def status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


def available() -> int:
    text = Path("/proc/meminfo").read_text()
    return int(text.split("MemAvailable:")[1].split()[0]) * 1024


def some_target(rows: int, vocab: int) -> FusedTarget:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocab // KEPT, (1, rows, KEPT), generator=generator)
    ids += torch.arange(KEPT) * (vocab // KEPT)
    p = torch.rand(1, rows, KEPT, generator=generator).softmax(-1) * 0.9
    return FusedTarget(
        ids, p.log(), p, torch.full((1, rows), 0.1), torch.ones(1, rows), vocab, 1.0
    )  # fmt: skip


def dense(hidden: Tensor, weight: Tensor, gold: Tensor, target: FusedTarget) -> Tensor:
    """½·CE + ½·KL, summed, by autograd through [T, V]."""
    logq = (hidden @ weight.t()).log_softmax(-1)
    picked = logq.gather(-1, torch.cat([gold[:, None], target.ids[0]], -1))
    p, t, kept = target.p[0], target.tail[0], picked[:, 1:]
    bucket = t * (t.log() - torch.log1p(-kept.exp().sum(-1)))
    return 0.5 * (-picked[:, 0].sum() + (p * (target.logp[0] - kept)).sum() + bucket.sum())


def loss_memory(mode: str, tokens: int, vocab: int) -> None:
    """Prints the bytes that loss and backward take in this process."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).requires_grad_()
    weight = torch.randn(vocab, HIDDEN, generator=generator).mul_(0.02).requires_grad_()
    gold, target = (
        torch.randint(0, vocab, (tokens,), generator=generator),
        some_target(tokens, vocab),
    )
    before = status("VmRSS")
    if mode == "dense":
        dense(hidden, weight, gold, target).backward()
    else:
        head, chunk = (
            Head(weight, None, HeadRule(), False),
            loss_rows(vocab, "cpu", None),
        )
        chunked_loss(hidden, head, gold, target, 0.5, 0.5, chunk).total.backward()
    assert hidden.grad is not None and weight.grad is not None
    print(json.dumps(status("VmHWM") - before))


def measured(*arguments: object) -> Any:
    """Runs this file's helper in a process of its own; returns what it prints."""
    command = [sys.executable, __file__, *map(str, arguments)]
    shown = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    return json.loads(shown.splitlines()[-1])


def memory_rows() -> Iterator[dict[str, Any]]:
    for tokens, vocab in SIZES:
        needed = 4 * (3.2 * tokens * vocab + 2 * vocab * HIDDEN)
        fits = needed < 0.95 * available()
        yield {
            "tokens": tokens, "vocab": vocab,
            "dense_bytes": measured("--loss", "dense", tokens, vocab) if fits else None,
            "chunked_bytes": measured("--loss", "chunked", tokens, vocab),
        }  # fmt: skip


class Steps:
    """The demonstration's student and what feeds it; each method is a function that takes one step."""

    def __init__(self) -> None:
        overrides = ["loss.features.weight=0", "train.baseline=false"]
        self.work = Workspace(load_config(CONFIG, overrides), Silent())
        self.work.ensure_assets()
        self.work.cache_teachers()
        self.config, self.waited = self.work.config, 0.0
        self.vocab_size = self.work.finished_jobs()[0].vocab_size
        torch.manual_seed(0)

    def student(
        self, kind: Any = DistilledStudent, *more: Any
    ) -> tuple[Any, torch.optim.Optimizer]:
        folder = self.work.student_folder()
        model = build_student(self.config.student, folder, torch.device("cpu"), 0)
        student = kind(model, self.config.loss, True, *more)
        student.train()
        return student, make_optimizer(student, self.config.train)

    def teachers(self) -> list[TransformersTeacher]:
        return [
            TransformersTeacher(name, Path(options.model), options, torch.device("cpu"))
            for name, options in self.config.teachers.items()
        ]

    def batches(self, caches: bool) -> Iterator[Batch]:
        """Yields training batches, read ahead; counts the seconds that are waited for them."""
        reader = self.work.batch_reader(caches)
        info = reader.corpus.info
        order = BlockOrder(info.ranges("train"), info.blocks_per_part, 0, info.fingerprint)
        stream = steps_of_batches(reader, order, Position(), 1, 1)
        while True:
            start = time.perf_counter()
            step, _ = next(stream)
            self.waited = time.perf_counter() - start
            yield step[0]

    def step_of(
        self, student: Any, optimizer: torch.optim.Optimizer, batches: Iterator[Batch],
        loss: Callable[[Any, Batch], Tensor],
    ) -> Callable[[], None]:  # fmt: skip
        def step() -> None:
            batch = next(batches)
            optimizer.zero_grad(set_to_none=True)
            loss(student, batch).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), self.config.train.clip)
            optimizer.step()

        return step

    def methods(self) -> dict[str, Callable[[], Callable[[], None]]]:
        """Returns what makes each method's step, by name."""

        def distilled(student: Any, batch: Batch) -> Tensor:
            return student(batch, batch.rows, 1).total

        def online() -> Callable[[], None]:
            made = self.student(
                OnlineStudent, self.teachers(), self.config.fusion.tau, self.vocab_size
            )
            return self.step_of(*made, self.batches(False), distilled)

        return {
            "own loss, bfloat16 logits": lambda: self.step_of(
                *self.student(), self.batches(False), own_loss
            ),
            "own loss, float32 logits": lambda: self.step_of(
                *self.student(), self.batches(False), own_loss_wide
            ),
            CE: lambda: self.step_of(*self.student(), self.batches(False), distilled),
            "three cached teachers": lambda: self.step_of(
                *self.student(), self.batches(True), distilled
            ),
            "three teachers online": online,
        }


def labels_of(batch: Batch) -> Tensor:
    return torch.full_like(batch.inputs, -100).masked_scatter_(batch.scored, batch.gold)


def own_loss(student: DistilledStudent, batch: Batch) -> Tensor:
    labels = labels_of(batch)
    with torch.autocast("cpu", torch.bfloat16):
        out = student.model(
            input_ids=batch.inputs, position_ids=batch.positions, use_cache=False, labels=labels,
            shift_labels=labels,
        )  # fmt: skip
    loss: Tensor = out.loss
    return loss


def own_loss_wide(student: DistilledStudent, batch: Batch) -> Tensor:
    labels = labels_of(batch)
    with torch.autocast("cpu", torch.bfloat16):
        hidden, _ = run_decoder(student.model, batch.inputs, batch.positions, ())
    logits = hidden.float() @ student.model.get_output_embeddings().weight.t()
    loss: Tensor = student.model.loss_function(
        logits, labels, vocab_size=logits.shape[-1], shift_labels=labels
    )
    return loss


def peak_of(name: str) -> None:
    """Prints the peak of three steps of one method, in this process."""
    step, usage = Steps().methods()[name](), Usage(torch.device("cpu"))
    for _ in range(3):
        step()
    print(json.dumps(usage.peak_bytes))


def step_rows() -> list[dict[str, Any]]:
    steps = Steps()
    made = {name: make() for name, make in steps.methods().items()}
    seconds: dict[str, list[float]] = {name: [] for name in made}
    waits: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(ROUNDS + 1):
        for name, step in made.items():
            start = time.perf_counter()
            step()
            if turn:
                seconds[name].append(time.perf_counter() - start)
                waits[name].append(steps.waited)
    return [
        {
            "name": name, "seconds": median(found),
            "relative_to_ce": median(a / b for a, b in zip(found, seconds[CE], strict=True)),
            "data_wait_share": sum(waits[name]) / sum(found), "peak_bytes": measured("--peak", name),
        }
        for name, found in seconds.items()
    ]  # fmt: skip


def shown(rows: list[dict[str, Any]], forms: dict[str, str]) -> str:
    lines = ["| " + " | ".join(forms) + " |", "|---" * len(forms) + "|"]
    for row in rows:
        cells = ["–" if row[n] is None else format(row[n], form) for n, form in forms.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def save(folder: Path, **tables: list[dict[str, Any]]) -> None:
    """Puts tables into step.json, beside those that other runs put there."""
    path = folder / "step.json"
    folder.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **tables}, indent=1))


def main() -> None:
    if sys.argv[1:2] == ["--loss"]:
        loss_memory(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    elif sys.argv[1:2] == ["--peak"]:
        peak_of(sys.argv[2])
    else:
        print(__doc__)
        tables = {"memory": memory_table, "step": step_table}
        asked = [name for name in sys.argv[1:] if name in tables]
        folders = [Path(name) for name in sys.argv[1:] if name not in tables]
        for name in asked or tables:
            tables[name](folders[0] if folders else Path("runs/bench"))


def memory_table(folder: Path) -> None:
    rows: list[dict[str, Any]] = []
    for row in memory_rows():
        rows.append(row)
        save(folder, memory=rows)
    print(shown(rows, dict.fromkeys(rows[0], ",")), flush=True)


def step_table(folder: Path) -> None:
    rows = step_rows()
    save(folder, step=rows)
    forms = {"name": "", "seconds": ".3f", "relative_to_ce": ".3f", "data_wait_share": ".2%"}
    print(shown(rows, {**forms, "peak_bytes": ","}))


if __name__ == "__main__":
    main()
