"""Stage two: the student on fused targets, streamed from the caches.

A plain loop: AdamW, a schedule, clipping, accumulation, bf16 autocast. Losses are summed over rows
and divided by the step's global count, so batch shape, accumulation and the number of ranks do not
change the mean: the configuration alone says what a step is, and ranks share it out. A killed run goes
on from its newest checkpoint and reaches the same weights bit for bit on the same machine and number
of ranks: order, optimizer, random state and schedule are all functions of what is saved.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from stages.batches import Batch, BatchReader
from stages.checkpoint import Checkpoints, latest_checkpoint, load_checkpoint
from stages.device import Usage, random_state, set_random_state
from stages.evaluate import heldout_losses
from stages.export import export
from stages.features import require_same_batches
from stages.loggers import open_loggers
from stages.lora import merged
from stages.metrics import (
    MetricsLog,
    domain_means,
    domain_sums,
    loss_sums,
    require_finite,
    weight_means,
    weight_sums,
)
from stages.optimizer import make_optimizer, materialise_moments, moments
from stages.order import BlockOrder, Position
from stages.parallel import ParallelStudent, full_state
from stages.progress import Progress, Silent
from stages.ranks import Ranks
from stages.run import Run, require_identity
from stages.schedule import alpha_at, lr_share, weights_share
from stages.step_loss import StepLoss
from stages.stop import StopSignals, names
from stages.stream import shared_out, steps_of_batches
from stages.student import DistilledStudent
from storage.blocks import require_targets
from storage.errors import CheckpointError, CorpusError, ScholiastError, Stopped


class Trainer:
    """Trains one student from its beginning or from its newest checkpoint.

    Args:
        run: what to train, on what.
        student: the module, the same on every rank.
        tokenizer: exported beside the student.
        reader: batches of training blocks.
        evaluation: batches of held-out blocks, with fused targets.
        progress: who listens.
        ranks: who train together.
        stop: signals that end the training after a step.
        fetch_threads: threads that fetch remote parts ahead.

    Raises (on construction):
        CorpusError: there is nothing to train on.
        ConfigError: a step cannot be shared out among the ranks, or not in the same micro-batches
            where that matters, or a logger is not installed.
        CheckpointError: the folder's checkpoint belongs to another run, or is damaged.
    """

    def __init__(
        self,
        run: Run,
        student: DistilledStudent,
        tokenizer: Any,
        reader: BatchReader,
        evaluation: BatchReader,
        progress: Progress,
        ranks: Ranks,
        stop: StopSignals,
        fetch_threads: int = 0,
    ) -> None:
        if not any(count for _, count in run.train_blocks):
            raise CorpusError(
                "there are no training blocks", where="corpus.sources",
                todo="give at least one source with split: train",
            )  # fmt: skip
        require_targets(reader.corpus, run.train_blocks)
        options = run.train
        self.run, self.student, self.tokenizer = run, student, tokenizer
        self.reader, self.evaluation = reader, evaluation
        self.progress = progress if ranks.first else Silent()
        self.ranks, self.stop, self.fetch_threads = ranks, stop, fetch_threads
        self.share = shared_out(options.batch_blocks, options.accumulate, ranks.world)
        require_same_batches(run.loss.features, options.batch_blocks, self.share[0])
        info = reader.corpus.info
        self.order = BlockOrder(
            run.train_blocks, info.blocks_per_part, options.seed, info.fingerprint
        )
        self.parallel = ParallelStudent(student, ranks, options)
        self.optimizer = make_optimizer(student, options)
        self.checkpoints = Checkpoints(
            run.folder / "checkpoints", ranks, options.keep_checkpoints, options.async_checkpoint
        )
        self.step, self.position, self.saved = 0, Position(), -1
        self.tokens, self.seconds = 0, 0.0  # trained on so far, over all resumed stretches
        torch.manual_seed(options.seed + ranks.rank)
        self.metrics = MetricsLog(run.folder / "metrics.jsonl")
        self._resume()

    # -- the loop

    def train(self) -> None:
        """Trains to the last step and exports the model.

        Raises:
            Stopped: by a signal, after a step, with everything saved.
            ScholiastError: the loss is no longer finite, or data or disk fail.
        """
        run, options = self.run, self.run.train
        loggers = self.ranks.together(self._open_loggers)
        self.metrics = MetricsLog(run.folder / "metrics.jsonl", loggers)
        self.student.train()
        self.progress.start(f"train {run.folder.name}", run.steps, "step", self.step)
        stream = steps_of_batches(
            self.reader, self.order, self.position, *self.share, rank=self.ranks.rank,
            world=self.ranks.world, workers=options.workers, fetch_threads=self.fetch_threads,
        )  # fmt: skip
        usage, before = Usage(self.ranks.device), self.seconds
        if self.step == 0 and options.eval_every:
            self._log({"step": 0, "heldout": self._evaluate()})
        while self.step < run.steps:
            begun = time.perf_counter()
            batches, position, rows, segments = self._next(stream)
            waited = time.perf_counter() - begun
            row, stopped = self._optimize(batches, rows, segments, waited, begun)
            self.step, self.position = self.step + 1, position
            self.tokens += rows
            self.seconds = before + usage.seconds
            row |= {"tokens": self.tokens, "seconds": self.seconds}
            last = self.step == run.steps
            if options.eval_every and (last or self.step % options.eval_every == 0):
                row["heldout"] = self._evaluate()
            if self.step % options.log_every == 0 or last or "heldout" in row:
                row["peak_bytes"] = int(self.ranks.largest(usage.peak_bytes))
                self._log(row)
            if self.step % options.checkpoint_every == 0 or last:
                self._save()
            self.progress.advance(1, loss=row["total"], tokens_per_s=self.tokens / self.seconds)
            if stopped and self.step < run.steps:
                self._end_early(stopped)
        stream.close()
        self.checkpoints.close()
        self.progress.finish()
        self._export()
        self.metrics.close()

    def _next(self, stream: Iterator[Any]) -> tuple[list[Batch], Position, int, int]:
        """Returns a step's batches, the position after it, and the counts that its losses are divided
        by: rows and segments with a target, of all ranks."""
        error: ScholiastError | None = None
        batches: list[Batch] = []
        position = self.position
        try:
            read, position = next(stream)
            batches = [self.reader.ready(batch, self.ranks.device) for batch in read]
        except ScholiastError as failed:
            error = failed
        mine = [
            sum(b.rows for b in batches),
            sum(b.segments for b in batches),
            float(error is not None),
        ]
        rows, segments, failures = self.ranks.sum(mine)
        if failures:
            self.ranks.fail(error)
        if error is not None:
            raise error
        return batches, position, int(rows), int(segments)

    def _optimize(
        self, batches: Sequence[Batch], rows: int, segments: int, waited: float, begun: float
    ) -> tuple[dict[str, Any], str]:
        """One optimizer step; returns its row of metrics (means over the rows of all ranks) and the
        names of the signals that want it to be the last one.

        Args:
            rows, segments: of the whole step, over all ranks.
            waited, begun: seconds spent on reading; when the step began.
        """
        options = self.run.train
        share = lr_share(self.step, self.run.steps, options)
        alpha = alpha_at(self.step, self.run.steps, self.run.loss)
        far = weights_share(self.step, self.run.steps, self.reader.ramp)
        batches = [self.reader.ramped(batch, far) for batch in batches]
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * share
        self.optimizer.zero_grad(set_to_none=True)
        losses: list[StepLoss] = []
        for i, batch in enumerate(batches, 1):
            with self.parallel.accumulating(last=i == len(batches)):
                loss = self.parallel(batch, rows, segments, alpha)
                self.parallel.backward(loss.total, last=i == len(batches))
            losses.append(loss)
        norm = float(self.parallel.clip(options.clip))
        apart = [
            loss_sums(losses), [waited], self.stop.flags(),
            domain_sums(batches, losses, self.reader), weight_sums(batches, self.reader),
        ]  # fmt: skip
        terms, (waits,), flags, domains, weights = self.ranks.sums(apart)
        total, ce, kd, features, correct, agreed = terms
        require_finite(self.step + 1, total, norm)
        self.optimizer.step()
        seconds = time.perf_counter() - begun
        return {
            "step": self.step + 1, "rows": rows, "lr": options.lr * share, "total": total,
            "alpha": alpha, "ce": ce / max(rows, 1), "kd": kd / max(rows, 1),
            "features": features / max(segments, 1), "accuracy": correct / max(rows, 1),
            "agreement": agreed / max(rows, 1), "grad_norm": norm,
            "domains": domain_means(domains, self.reader),
            "weights": weight_means(weights, self.reader),
            "tokens_per_s": rows / seconds, "data_wait": waits / self.ranks.world / seconds,
        }, names(flags)  # fmt: skip

    def _evaluate(self) -> dict[str, Any]:
        if not len(self.run.heldout_blocks):
            return {}
        found = heldout_losses(
            self.student, self.evaluation, self.run.heldout_blocks, self.run.train.batch_blocks,
            self.ranks,
        )  # fmt: skip
        self.parallel.settle()
        return found

    def _end_early(self, signals: str) -> None:
        if self.saved != self.step:
            self._save()
        self.checkpoints.close()
        self.metrics.close()
        raise Stopped(
            f"{self.run.folder.name}: stopped by {signals} after step {self.step} of "
            f"{self.run.steps}; everything is saved", where=self.run.folder / "checkpoints",
            todo="run the same command again to go on, on any number of ranks",
        )  # fmt: skip

    def _export(self) -> None:
        run = self.run
        state = full_state(self.student.model, self.ranks.first)
        facts = {"identity": run.identity, "steps": run.steps}

        def write() -> None:
            whole = state if run.lora is None else merged(state, run.lora)
            export(
                self.student.model, whole, self.tokenizer, run.dtype, run.model_folder, facts, run.card
            )  # fmt: skip

        self.ranks.on_first(write)

    # -- what survives a kill

    def _state(self) -> dict[str, Any]:
        """Returns the live tensors of model and optimizer, by name, and this rank's random state."""
        return {
            "student": dict(self.student.state_dict()),
            "optimizer": moments(self.optimizer, self.student),
            "random": {str(self.ranks.rank): random_state(self.ranks.device)},
        }

    def _save(self) -> None:
        facts = {
            "identity": self.run.identity, "position": self.order.state(self.position),
            "tokens": self.tokens, "seconds": self.seconds,
        }  # fmt: skip
        self.checkpoints.save(self.step, self._state(), facts)
        self.saved = self.step

    def _resume(self) -> None:
        root = self.run.folder / "checkpoints"
        found = self.ranks.on_first(lambda: latest_checkpoint(root))
        if found is None:
            self.ranks.on_first(lambda: self.metrics.truncate(-1))
            return
        folder, facts = found
        require_identity(self.run, facts.get("identity"), folder)
        materialise_moments(self.optimizer)
        state = self._state()
        same_ranks = facts.get("ranks", 1) == self.ranks.world
        if not same_ranks:  # its random states belong to other ranks
            torch.manual_seed(hash((self.run.train.seed, int(facts["step"]), self.ranks.rank)))
            del state["random"]
        load_checkpoint(folder, facts, state, self.ranks)
        if same_ranks:
            set_random_state(self.ranks.device, state["random"][str(self.ranks.rank)])
        self.step = self.saved = int(facts["step"])
        self.position = self.order.resume(facts.get("position"))
        self.tokens, self.seconds = counted(facts, folder)
        self.ranks.on_first(lambda: self.metrics.truncate(self.step))
        self.progress.say(f"{self.run.folder.name}: going on from step {self.step}")

    def _open_loggers(self) -> list[Any]:
        if not self.ranks.first:
            return []
        first = self.step + 1 if self.step else 0
        return open_loggers(self.run.train.loggers, self.run.folder, self.run.identity, first)

    def _log(self, row: dict[str, Any]) -> None:
        if self.ranks.first:
            self.metrics.write(row, flush=self.step % self.run.train.checkpoint_every == 0)


def counted(facts: dict[str, Any], folder: Path) -> tuple[int, float]:
    """Returns the tokens and the seconds that a checkpoint's facts state.

    Raises:
        CheckpointError: they state none.
    """
    tokens, seconds = facts.get("tokens"), facts.get("seconds")
    if not isinstance(tokens, int) or not isinstance(seconds, int | float) or tokens < 0:
        raise CheckpointError(
            "the checkpoint does not say how far the training was", where=folder,
            expected="tokens and seconds", found=f"{tokens!r:.40}, {seconds!r:.40}",
            todo=f"delete {folder.parent} to train from the beginning",
        )  # fmt: skip
    return tokens, float(seconds)
