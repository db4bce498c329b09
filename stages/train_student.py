"""Stage two: the student on fused targets, streamed from the caches.

A plain loop: AdamW, a schedule, clipping, accumulation, bf16 autocast. Losses are summed over rows
and divided by the step's global count, so batch shape and accumulation do not change the mean. A
killed run goes on from its newest checkpoint and reaches the same weights bit for bit on the same
machine: order, optimizer, random state and schedule are all functions of what is saved.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.batches import Batch, BatchReader
from stages.checkpoint import export, latest_checkpoint, load_checkpoint, save_checkpoint
from stages.device import Usage
from stages.evaluate import heldout_losses
from stages.options import LossOptions, TrainOptions
from stages.order import BlockOrder, Position, Ranges
from stages.progress import Progress
from stages.schedule import alpha_at, lr_share
from stages.stream import steps_of_batches
from stages.student import DistilledStudent, StepLoss
from storage import durable
from storage.blocks import require_targets
from storage.errors import CheckpointError, CorpusError, ScholiastError
from storage.fingerprint import describe_differences, fingerprint
from storage.types import Int64


@dataclass(frozen=True)
class Run:
    """One student's training.

    Attributes:
        folder: where metrics, checkpoints and the finished model go.
        identity: what decides the result; a checkpoint of another identity is refused.
        train, loss: options.
        train_blocks: ranges of blocks.
        heldout_blocks: int64 block ids.
        dtype: of the exported weights.
    """

    folder: Path
    identity: dict[str, Any]
    train: TrainOptions
    loss: LossOptions
    train_blocks: Ranges
    heldout_blocks: Int64
    dtype: torch.dtype

    @property
    def model_folder(self) -> Path:
        return self.folder / "model"

    @property
    def steps(self) -> int:
        if self.train.steps is not None:
            return self.train.steps
        samples = sum(count for _, count in self.train_blocks) * (self.train.epochs or 1)
        return math.ceil(samples / (self.train.batch_blocks * self.train.accumulate))


def finished(run: Run) -> bool:
    """Returns whether the run's model is exported.

    Raises:
        StaleCache, CheckpointError: the folder holds a model of another run.
    """
    path = run.model_folder / "scholiast.json"
    if not path.exists():
        return False
    _require_identity(run, json.loads(path.read_text())["identity"], run.model_folder)
    return True


def _require_identity(run: Run, found: dict[str, Any], where: Path) -> None:
    if fingerprint(found) != fingerprint(run.identity):
        ours, theirs = describe_differences(run.identity, found)
        raise CheckpointError(
            "the folder holds another run", where=where, expected=ours, found=theirs,
            todo="restore those settings, or name another run_dir (and in corpus_dir and cache_dir what "
            f"is there now), or delete {run.folder}",
        )  # fmt: skip


class Trainer:
    """Trains one student from its beginning or from its newest checkpoint.

    Args:
        run: what to train, on what.
        student: the module, on its device.
        tokenizer: exported beside the student.
        reader: batches of training blocks.
        evaluation: batches of held-out blocks, with fused targets.
        progress: who listens.
        fetch_threads: threads that fetch remote parts ahead.

    Raises (on construction):
        CorpusError: there is nothing to train on.
        CheckpointError: the folder's checkpoint belongs to another run.
    """

    def __init__(
        self,
        run: Run,
        student: DistilledStudent,
        tokenizer: Any,
        reader: BatchReader,
        evaluation: BatchReader,
        progress: Progress,
        fetch_threads: int = 0,
    ) -> None:
        if not any(count for _, count in run.train_blocks):
            raise CorpusError(
                "there are no training blocks", where="corpus.sources",
                todo="give at least one source with split: train",
            )  # fmt: skip
        require_targets(reader.corpus, run.train_blocks)
        self.run, self.student, self.tokenizer = run, student, tokenizer
        self.reader, self.evaluation, self.progress = reader, evaluation, progress
        self.fetch_threads = fetch_threads
        self.device = next(student.parameters()).device
        info = reader.corpus.info
        self.order = BlockOrder(
            run.train_blocks, info.blocks_per_part, run.train.seed, info.fingerprint
        )
        self.optimizer = make_optimizer(student, run.train)
        self.step, self.position = 0, Position()
        self.tokens, self.seconds = 0, 0.0  # trained on so far, over all resumed stretches
        if run.train.gradient_checkpointing:
            student.model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(run.train.seed)
        self._metrics = run.folder / "metrics.jsonl"
        self._resume()

    # -- the loop

    def train(self) -> None:
        """Trains to the last step and exports the model.

        Raises:
            ScholiastError: the loss is no longer finite, or data or disk fail.
        """
        run, options = self.run, self.run.train
        self.student.train()
        self.progress.start(f"train {run.folder.name}", run.steps, "step", self.step)
        stream = steps_of_batches(
            self.reader, self.order, self.position, options.batch_blocks, options.accumulate,
            workers=options.workers, fetch_threads=self.fetch_threads,
        )  # fmt: skip
        usage, before = Usage(self.device), self.seconds
        if self.step == 0:
            self._log({"step": 0, "heldout": self._evaluate()})
        while self.step < run.steps:
            batches, position = next(stream)
            row = self._optimize([self.reader.ready(batch, self.device) for batch in batches])
            self.step, self.position = self.step + 1, position
            self.tokens += row["rows"]
            self.seconds = before + usage.seconds
            row |= {"tokens": self.tokens, "seconds": self.seconds, "peak_bytes": usage.peak_bytes}
            if self.step % options.eval_every == 0 or self.step == run.steps:
                row["heldout"] = self._evaluate()
            if self.step % options.log_every == 0 or "heldout" in row:
                self._log(row)
            if self.step % options.checkpoint_every == 0 or self.step == run.steps:
                self._save()
            self.progress.advance(1, loss=row["total"], tokens_per_s=self.tokens / self.seconds)
        stream.close()
        self.progress.finish()
        facts = {"identity": run.identity, "steps": run.steps}
        export(self.student.model, self.tokenizer, run.dtype, run.model_folder, facts)

    def _optimize(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """One optimizer step; returns its row of metrics (means over the step's rows)."""
        options = self.run.train
        rows = sum(batch.rows for batch in batches)
        segments = sum(_segments(batch) for batch in batches)
        share = lr_share(self.step, self.run.steps, options)
        alpha = alpha_at(self.step, self.run.steps, self.run.loss)
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * share
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for batch in batches:
            loss: StepLoss = self.student(batch, rows, segments, alpha)
            loss.total.backward()  # type: ignore[no-untyped-call]
            losses.append(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), options.clip)
        total = float(sum(loss.total.detach() for loss in losses))
        if not (math.isfinite(total) and bool(torch.isfinite(norm))):
            raise ScholiastError(
                "the loss or its gradient is no longer finite", where=f"step {self.step + 1}",
                found=f"loss {total}, gradient norm {float(norm)}",
                todo="lower train.lr, raise train.warmup, or set train.precision: fp32; "
                "the last checkpoint is untouched",
            )  # fmt: skip
        self.optimizer.step()
        return {
            "step": self.step + 1, "rows": rows, "lr": options.lr * share, "total": total,
            "alpha": alpha,
            "ce": _mean(losses, "ce", rows), "kd": _mean(losses, "kd", rows),
            "features": _mean(losses, "features", segments), "grad_norm": float(norm),
            "weights": teacher_weights(batches, self.reader),
        }  # fmt: skip

    def _evaluate(self) -> dict[str, Any]:
        if not len(self.run.heldout_blocks):
            return {}
        return heldout_losses(
            self.student, self.evaluation, self.run.heldout_blocks, self.run.train.batch_blocks
        )

    # -- what survives a kill

    def _state(self) -> dict[str, Any]:
        """Returns the live tensors of model and optimizer, by name."""
        moments = self.optimizer.state_dict()["state"]
        return {
            "student": dict(self.student.state_dict()),
            "optimizer": {str(i): dict(values) for i, values in moments.items()},
            "random": self._random_state(),
        }

    def _random_state(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _save(self) -> None:
        facts = {
            "identity": self.run.identity, "position": self.order.state(self.position),
            "tokens": self.tokens, "seconds": self.seconds,
        }  # fmt: skip
        save_checkpoint(
            self.run.folder / "checkpoints", self.step, self._state(), facts,
            self.run.train.keep_checkpoints,
        )  # fmt: skip

    def _resume(self) -> None:
        found = latest_checkpoint(self.run.folder / "checkpoints")
        if found is None:
            _truncate(self._metrics, -1)
            return
        folder, facts = found
        _require_identity(self.run, facts["identity"], folder)
        materialise_moments(self.optimizer)
        state = self._state()
        load_checkpoint(folder, facts, state)
        self.student.load_state_dict(state["student"])
        saved = self.optimizer.state_dict()
        saved["state"] = {int(i): values for i, values in state["optimizer"].items()}
        self.optimizer.load_state_dict(saved)
        torch.set_rng_state(state["random"]["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random"]["cuda"], self.device)
        self.step = int(facts["step"])
        self.position = self.order.resume(facts["position"])
        self.tokens, self.seconds = int(facts["tokens"]), float(facts["seconds"])
        _truncate(self._metrics, self.step)
        self.progress.say(f"{self.run.folder.name}: going on from step {self.step}")

    def _log(self, row: dict[str, Any]) -> None:
        self._metrics.parent.mkdir(parents=True, exist_ok=True)
        with durable.disk_errors(self._metrics), self._metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            if self.step % self.run.train.checkpoint_every == 0:
                os.fsync(file.fileno())


def make_optimizer(student: DistilledStudent, options: TrainOptions) -> torch.optim.AdamW:
    """Returns AdamW; vectors (norms, biases) are not decayed."""
    parameters = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, fused=True)


def materialise_moments(optimizer: torch.optim.AdamW) -> None:
    """Gives a fresh AdamW the state it has after a step, so that a checkpoint has where to go."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def teacher_weights(batches: Sequence[Batch], reader: BatchReader) -> dict[str, dict[str, float]]:
    """Returns domain → teacher → mean fused weight over the step's rows of that domain."""
    if any(batch.target is None for batch in batches):
        return {}
    weights = torch.cat([b.target.weights for b in batches if b.target is not None], dim=1)
    domain = torch.cat([batch.row_domain for batch in batches])
    means: dict[str, dict[str, float]] = {}
    for i, name in enumerate(reader.corpus.info.domains):
        mine = weights[:, domain == i]
        if mine.shape[1]:
            means[name] = dict(zip(reader.caches, mine.mean(1).tolist(), strict=True))
    return means


def _segments(batch: Batch) -> int:
    """Segments that have a target (the same for every teacher)."""
    if not batch.segment_weights:
        return 0
    total: Tensor = torch.stack(list(batch.segment_weights.values())).sum(0)
    return int((total > 0).sum())


def _mean(losses: Sequence[StepLoss], name: str, count: int) -> float:
    return float(sum(getattr(loss, name) for loss in losses)) / max(count, 1)


def _truncate(metrics: Path, step: int) -> None:
    """Drops rows beyond the step that is resumed; they will be written again."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            continue  # a line cut by the kill; its step is beyond the checkpoint
    durable.write_bytes(metrics, "".join(f"{line}\n" for line in kept).encode())
