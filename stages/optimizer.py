"""AdamW, and its moments by the names of the parameters they belong to."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stages.train_options import TrainOptions


def make_optimizer(student: nn.Module, options: TrainOptions) -> torch.optim.AdamW:
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


def moments(optimizer: torch.optim.AdamW, student: nn.Module) -> dict[str, dict[str, Any]]:
    """Returns the live moments by parameter name: the same names however the student is sharded."""
    return {
        name: dict(optimizer.state[parameter])
        for name, parameter in student.named_parameters()
        if parameter in optimizer.state
    }
