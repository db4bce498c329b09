"""What is measured on held-out blocks: of the student by a forward, of the teachers from their notes.

A teacher's perplexity needs no teacher: the cache holds the exact logprob of every gold token. So
does that of the fused ensemble, log Σ_m w_m p_m(gold).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from stages.batches import BatchReader
from stages.student import DistilledStudent
from storage.types import Int64

OVERALL = "overall"


def heldout_losses(
    student: DistilledStudent, reader: BatchReader, block_ids: Int64, batch_blocks: int
) -> dict[str, dict[str, float]]:
    """Returns the student's losses by domain and overall.

    Args:
        student: left in the mode it was in.
        reader: with caches, so that the distillation loss can be told.
        block_ids: held-out blocks, int64.
        batch_blocks: blocks of one forward.

    Returns:
        domain → {rows, ce, kd (nats a row; at the reader's temperature), perplexity, accuracy,
        agreement (with the fused target's most probable id)}.
    """
    device, training = next(student.parameters()).device, student.training
    student.eval()
    info, sums = reader.corpus.info, dict[str, Any]()
    # Blocks of one domain lie together; a batch never mixes two.
    with torch.no_grad():
        for domain in info.domains:
            mine = block_ids[info.domain_of(block_ids) == info.domains.index(domain)]
            total = np.zeros(5)
            for i in range(0, len(mine), batch_blocks):
                batch = reader.read(mine[i : i + batch_blocks]).to(device)
                loss = student(batch, batch.rows, 1)
                sums_of = (loss.ce, loss.kd, loss.correct, loss.agreed)
                total += [batch.rows, *map(float, sums_of)]
            if total[0]:
                sums[domain] = total
    student.train(training)
    return _table(sums)


def _table(sums: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Returns means by domain and overall from sums [rows, ce, kd, correct, agreed]."""
    if not sums:
        return {}
    rows = {**sums, OVERALL: np.sum(list(sums.values()), axis=0)}
    return {
        name: {
            "rows": int(n),
            "ce": ce / n,
            "kd": kd / n,
            "perplexity": math.exp(min(ce / n, 700.0)),
            "accuracy": correct / n,
            "agreement": agreed / n,
        }
        for name, (n, ce, kd, correct, agreed) in rows.items()
    }


def teacher_perplexities(reader: BatchReader, block_ids: Int64) -> dict[str, dict[str, Any]]:
    """Returns the held-out losses of every teacher and of their fused ensemble, from the caches.

    Returns:
        teacher name, and "fused" → domain → {rows, ce, perplexity}; the teachers also have
        `entropy` and `weight`, their means over the rows.
    """
    info = reader.corpus.info
    names = list(reader.caches)
    sums: dict[str, dict[str, Any]] = {name: {} for name in [*names, "fused"]}
    for domain in info.domains:
        mine = block_ids[info.domain_of(block_ids) == info.domains.index(domain)]
        for block in mine:
            one = np.array([block])
            batch = reader.read(one)
            if batch.target is None or not batch.rows:
                continue
            scored = batch.scored.numpy()
            stats = [reader.caches[name].stats(one) for name in names]
            gold = np.stack([each.gold_logprob[scored] for each in stats])
            entropy = np.stack([each.entropy[scored] for each in stats])
            weights = batch.target.weights.numpy()
            fused = np.log((weights * np.exp(gold.astype(np.float64))).sum(0) + 1e-300)
            for name, g, h, w in zip(names, gold, entropy, weights, strict=True):
                row = np.array([len(g), -g.sum(dtype=np.float64), h.sum(), w.sum()])
                sums[name][domain] = sums[name].get(domain, 0) + row
            row = np.array([len(fused), -fused.sum(), 0.0, 0.0])
            sums["fused"][domain] = sums["fused"].get(domain, 0) + row
    return {name: _teacher_table(by_domain, name) for name, by_domain in sums.items()}


def _teacher_table(sums: Mapping[str, Any], name: str) -> dict[str, dict[str, float]]:
    if not sums:
        return {}
    rows = {**sums, OVERALL: np.sum(list(sums.values()), axis=0)}
    table = {}
    for domain, (n, ce, entropy, weight) in rows.items():
        table[domain] = {"rows": int(n), "ce": ce / n, "perplexity": math.exp(min(ce / n, 700.0))}
        if name != "fused":
            table[domain] |= {"entropy": entropy / n, "weight": weight / n}
    return table
