"""transformers' Trainer with our loss, also on two ranks. Run by test_other_trainers.

Usage: trainer_ranks.py CONFIG STUDENT; prints the rows that rank 0 has logged, as JSON. Imports are paid
once, each rank is a fork.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import scholiast
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

STEPS, LR = 12, 3e-3


def student(folder: str | Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def trainer_of(distillation: Any, model: Any, folder: str | Path, **changes: Any) -> Any:
    """Returns a Trainer with the settings of the README's example.

    Args:
        folder: for what it writes.
        changes: of its arguments.
    """
    arguments = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "learning_rate": LR, "lr_scheduler_type": "cosine",
        "adam_beta2": 0.95, "weight_decay": 0.01, "train_sampling_strategy": "sequential",
        "remove_unused_columns": False, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, **changes,
    }  # fmt: skip
    return scholiast.DistillationTrainer(
        model=model, args=TrainingArguments(**arguments), data_collator=scholiast.collate,
        train_dataset=distillation.cache.dataset(seed=0, samples=4 * STEPS),
        distillation=distillation,
    )  # fmt: skip


def logged(trainer: Any) -> list[dict[str, float]]:
    """Returns the rows that a finished trainer has logged of its steps."""
    return [row for row in trainer.state.log_history if "loss" in row]


def rank(number: int, port: int, config: str, folder: str) -> list[dict[str, float]]:
    """Trains as one of two ranks, which take one of a step's two batches each."""
    os.environ |= {
        "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    distillation = scholiast.DistillationLoss(scholiast.open_cache(config))
    out = Path(folder).parent / "ranks"
    trainer = trainer_of(distillation, student(folder), out, gradient_accumulation_steps=1)
    trainer.train()
    torch.distributed.destroy_process_group()
    return logged(trainer)


def main() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    other = os.fork()
    rows = rank(int(other == 0), port, *sys.argv[1:])
    if other == 0:
        os._exit(0)
    assert os.waitpid(other, 0)[1] == 0
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
