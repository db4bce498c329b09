"""The loss inside transformers' Trainer, and inside trainers that are made from it (TRL's SFTTrainer).

What has to be got right, and is, against our own loop:

- *Division.* A step's loss is Σ over rows ÷ the step's rows of all micro-batches and processes. The
  Trainer counts `labels` for that; here rows (and segments) with a target are counted, so that packed
  blocks, masked messages and a block's last row come out as in our own engine. Nothing is divided by
  the number of accumulated batches after that, and under DDP, which averages gradients, the loss is
  multiplied by the number of processes.
- *Attention.* Documents of a block are told apart by `position_ids` alone, with no attention mask.
- *The wrapped forward.* The loss runs inside the model's forward, where DDP and FSDP look.
"""

from __future__ import annotations

import inspect
from functools import partial
from types import MethodType
from typing import Any

import torch
from transformers import Trainer

from pipeline.api.loss import DistillationLoss
from stages.batches import count_segments
from storage.errors import ConfigError

TERMS = ("ce", "kd", "features", "correct", "agreed")


class DistillationMixin:
    """Put before a Trainer: `class MyTrainer(DistillationMixin, SFTTrainer): pass`.

    Logs also `ce`, `kd` (nats a row), `accuracy`, `agreement` (shares of rows), and `features` where
    features are aligned; `loss` is the step's total, as `total` in our metrics.jsonl.

    Args:
        distillation: the loss. What else a Trainer takes stays as it is; its arguments need
            `remove_unused_columns=False`, its data `scholiast.collate`.

    Raises (on construction):
        ConfigError: arguments under which the loss would not be ours.
    """

    loss_is_scaled_for_ga = True  # told to the Trainer: by rows, over all that is accumulated

    def __init__(self, *arguments: Any, distillation: DistillationLoss, **others: Any) -> None:
        super().__init__(*arguments, **others)
        trainer: Any = self
        _require(trainer.args, distillation)
        trainer.model_accepts_loss_kwargs = True  # the same, to versions that ask for this instead
        self.distillation = distillation.to(trainer.args.device)
        self._segments = 0  # with a target, of the step
        self._sums = torch.zeros(len(TERMS) + 2, dtype=torch.float64, device=trainer.args.device)
        run_inside(trainer.model)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Takes a step's batches and counts rows and segments with a target, over all processes."""
        trainer: Any = super()
        batches, _ = trainer.get_batch_samples(epoch_iterator, num_batches, device)
        spans = self.distillation.cache.segments
        masks = [batch["loss_mask"] for batch in batches]
        counts = [sum(int(m.sum()) for m in masks), sum(count_segments(m, spans) for m in masks)]
        rows, self._segments = self._over_all(torch.tensor(counts, device=device)).tolist()
        return batches, rows

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Returns the batch's share of the step's loss; outside a step, the batch's own mean."""
        trainer: Any = self
        training, state = bool(trainer.model.training), trainer.state
        self.distillation.train(training)
        step = {
            "rows": num_items_in_batch, "segments": self._segments,
            "step": state.global_step, "steps": state.max_steps,
        } if training else {}  # fmt: skip
        loss = model(run=partial(self.distillation, batch=inputs, **step))
        if training:
            self._count(loss, inputs["loss_mask"])
        total = loss.total * (self._processes if training else 1)
        return (total, {"loss": total}) if return_outputs else total

    def log(self, logs: dict[str, float], *arguments: Any, **others: Any) -> None:
        """Logs, with the terms since the last time beside `loss`."""
        if "loss" in logs:
            *sums, rows, segments = self._over_all(self._sums).tolist()
            ce, kd, features, correct, agreed = sums
            by_row = {"ce": ce, "kd": kd, "accuracy": correct, "agreement": agreed}
            logs |= {name: value / max(rows, 1) for name, value in by_row.items()}
            if self.distillation.aligner is not None:
                logs["features"] = features / max(segments, 1)
            self._sums.zero_()
        trainer: Any = super()
        trainer.log(logs, *arguments, **others)

    def _count(self, loss: Any, mask: torch.Tensor) -> None:
        """Adds to the sums since the last log: terms, rows, segments."""
        sums = [getattr(loss, name).detach() for name in TERMS]
        segments = count_segments(mask, self.distillation.cache.segments)
        self._sums += torch.stack([*sums, mask.sum(), mask.new_tensor(segments, dtype=torch.int64)])

    @property
    def _processes(self) -> int:
        trainer: Any = self
        return int(trainer.accelerator.num_processes)

    def _over_all(self, numbers: torch.Tensor) -> torch.Tensor:
        """Returns numbers added up over the processes."""
        trainer: Any = self
        if self._processes == 1:
            return numbers
        added: torch.Tensor = trainer.accelerator.reduce(numbers.to(trainer.args.device), "sum")
        return added


class DistillationTrainer(DistillationMixin, Trainer):  # type: ignore[misc]
    """transformers' Trainer with our loss: the arguments of both."""


def run_inside(model: Any) -> None:
    """Lets a model's forward take `run`, a function of the model that it then returns the result of.

    Wrappers (DDP, FSDP, accelerate's autocast) see a forward like any other.
    """
    plain = model.forward

    def forward(self: Any, *arguments: Any, run: Any = None, **others: Any) -> Any:
        return plain(*arguments, **others) if run is None else run(self)

    # What `generate` and the Trainer look at; with functools.wraps accelerate would unwrap it.
    vars(forward)["__signature__"] = inspect.signature(type(model).forward)
    model.forward = MethodType(forward, model)


def _require(arguments: Any, distillation: DistillationLoss) -> None:
    if arguments.remove_unused_columns:
        raise ConfigError(
            "the trainer would remove the notes from the batches",
            where="remove_unused_columns", expected=False, found=True,
            todo="set remove_unused_columns=False in the trainer's arguments",
        )  # fmt: skip
    if arguments.n_gpu > 1:
        raise ConfigError(
            "several GPUs in one process (DataParallel) are not supported", where="n_gpu",
            expected=1, found=arguments.n_gpu,
            todo="start one process a GPU with torchrun or `accelerate launch`, or show it one GPU",
        )  # fmt: skip
    if any(parameter.requires_grad for parameter in distillation.parameters()):
        raise ConfigError(
            "the loss has projections of its own, which a trainer would not train",
            where="loss.features.projection", expected="random (or loss.features.kind: gram)",
            found="linear",
            todo="open the cache with overrides=['loss.features.projection=random'], or with "
            "['loss.features.weight=0']; or train with a loop of your own, or `scholiast train-student`",
        )  # fmt: skip
