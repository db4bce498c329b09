"""A step's row of metrics, global over the ranks, and where it is written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stages.batches import Batch, BatchReader
from stages.loggers import Logger, numbers_of
from stages.step_loss import StepLoss
from storage import durable
from storage.errors import ScholiastError

TERMS = ("total", "ce", "kd", "features", "correct", "agreed")


def loss_sums(losses: Sequence[StepLoss]) -> list[float]:
    """Returns the sums of TERMS over a rank's batches."""
    return [float(sum(getattr(loss, name).detach().double() for loss in losses)) for name in TERMS]


def domain_sums(
    batches: Sequence[Batch], losses: Sequence[StepLoss], reader: BatchReader
) -> list[float]:
    """Returns, domain after domain, rows, Σ ce and Σ kd of a rank's batches."""
    sums = torch.zeros(len(reader.corpus.info.domains), 3, dtype=torch.float64)
    for batch, loss in zip(batches, losses, strict=True):
        terms = torch.stack([torch.ones_like(loss.ce_R), loss.ce_R, loss.kd_R], -1)
        sums.index_add_(0, batch.row_domain.cpu(), terms.double().cpu())
    return sums.flatten().tolist()


def domain_means(sums: Sequence[float], reader: BatchReader) -> dict[str, dict[str, float]]:
    """Returns domain → {rows, ce, kd} of the domains that have rows; ce and kd in nats a row."""
    means = {}
    for i, domain in enumerate(reader.corpus.info.domains):
        rows, ce, kd = sums[3 * i : 3 * i + 3]
        if rows:
            means[domain] = {"rows": rows, "ce": ce / rows, "kd": kd / rows}
    return means


def weight_sums(batches: Sequence[Batch], reader: BatchReader) -> list[float]:
    """Returns, domain after domain, the teachers' fused weights and the rows they are summed over."""
    if any(batch.target is None for batch in batches):
        return []
    targets = [batch.target for batch in batches if batch.target is not None]
    weights = torch.cat([target.teacher_weights for target in targets], dim=1).double()
    domain = torch.cat([batch.row_domain for batch in batches])
    numbers = torch.cat([weights, weights.new_ones(1, weights.shape[1])])
    sums = numbers.new_zeros(len(reader.corpus.info.domains), len(numbers))
    return sums.index_add_(0, domain, numbers.t()).flatten().tolist()


def weight_means(sums: Sequence[float], reader: BatchReader) -> dict[str, dict[str, float]]:
    """Returns domain → teacher → mean fused weight over the step's rows of that domain."""
    names, means = list(reader.caches), {}
    width = len(names) + 1
    for i, domain in enumerate(reader.corpus.info.domains if sums else ()):
        *weights, rows = sums[i * width : (i + 1) * width]
        if rows:
            means[domain] = {n: w / rows for n, w in zip(names, weights, strict=True)}
    return means


def require_finite(step: int, total: float, norm: float) -> None:
    """Refuses to go on with a loss or gradient norm that is none.

    Raises:
        ScholiastError: on all ranks, for both numbers are global.
    """
    if not (math.isfinite(total) and math.isfinite(norm)):
        raise ScholiastError(
            "the loss or its gradient is no longer finite", where=f"step {step}",
            found=f"loss {total}, gradient norm {norm}",
            todo="lower train.lr, raise train.warmup, or set train.precision: fp32; "
            "the last checkpoint is untouched",
        )  # fmt: skip


class MetricsLog:
    """metrics.jsonl and the loggers; only rank 0 has one that writes.

    Args:
        path: of metrics.jsonl.
        loggers: told every row's numbers, too.
    """

    def __init__(self, path: Path, loggers: Sequence[Logger] = ()) -> None:
        self._path, self._loggers = path, list(loggers)

    def write(self, row: dict[str, Any], flush: bool) -> None:
        """Appends a row; `flush` brings it to the device."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with durable.disk_errors(self._path), self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            if flush:
                os.fsync(file.fileno())
        numbers = dict(numbers_of({k: v for k, v in row.items() if k != "step"}))
        for logger in self._loggers:
            logger.log(row["step"], numbers)

    def truncate(self, step: int) -> None:
        """Drops rows beyond the step that is resumed; they will be written again."""
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # a line cut by the kill; its step is beyond the checkpoint
        durable.write_bytes(self._path, "".join(f"{line}\n" for line in kept).encode())

    def close(self) -> None:
        """Lets the loggers send what is left."""
        for logger in self._loggers:
            logger.close()
