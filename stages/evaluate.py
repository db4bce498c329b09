"""What is measured on held-out blocks: of the student by a forward, of the teachers from their notes.

A teacher's perplexity needs no teacher: the cache holds the exact logprob of every gold token. So
does that of the fused ensemble, log Σ_m w_m p_m(gold); of geometric mixing see `fused_gold_logprob`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from stages.batches import BatchReader
from stages.mixing import fused_gold_logprob
from stages.ranks import Ranks
from stages.student import DistilledStudent
from storage.types import Int64

OVERALL = "overall"


def heldout_losses(
    student: DistilledStudent,
    reader: BatchReader,
    block_ids: Int64,
    batch_blocks: int,
    ranks: Ranks | None = None,
) -> dict[str, dict[str, float]]:
    """Returns the student's losses by domain and overall.

    Args:
        student: left in the mode it was in.
        reader: with caches, so that the distillation loss can be told.
        block_ids: held-out blocks, int64.
        batch_blocks: blocks of one forward.
        ranks: who share out the batches. Forwards of a sharded student need all of them, so each
            does the same number: one that has run out repeats a batch, uncounted.

    Returns:
        domain → {rows, ce, kd (nats a row; at the reader's temperature), perplexity, accuracy,
        agreement (with the fused target's most probable id)}.
    """
    device, training = next(student.parameters()).device, student.training
    ranks = ranks or Ranks(device)
    info, batches = reader.corpus.info, _batches(reader, block_ids, batch_blocks)
    sums = np.zeros((len(info.domains), 5))
    student.eval()
    with torch.no_grad():
        for i in range(ranks.rank, -(-len(batches) // ranks.world) * ranks.world, ranks.world):
            domain, ids = batches[min(i, len(batches) - 1)]
            batch = reader.read(ids).to(device)
            loss = student(batch, batch.rows, 1)
            if i < len(batches):
                sums[domain] += [
                    batch.rows,
                    *map(float, (loss.ce, loss.kd, loss.correct, loss.agreed)),
                ]
    student.train(training)
    sums = np.reshape(ranks.sum(sums.flatten().tolist()), sums.shape)
    return _table({n: row for n, row in zip(info.domains, sums, strict=True) if row[0]})


def _batches(reader: BatchReader, block_ids: Int64, batch_blocks: int) -> list[tuple[int, Int64]]:
    """Returns (domain's index, block ids) of each batch; none mixes two domains."""
    domains, found = reader.corpus.info.domain_of(block_ids), []
    for index in range(len(reader.corpus.info.domains)):
        mine = block_ids[domains == index]
        found += [(index, mine[i : i + batch_blocks]) for i in range(0, len(mine), batch_blocks)]
    return found


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
    reader = reader.at(1.0)
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
            weights = batch.target.teacher_weights.numpy()
            fused = fused_gold_logprob(batch.target, batch.gold, torch.from_numpy(gold)).numpy()
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
