"""What is measured on held-out blocks: of the student by a forward, of the teachers from their notes.

A teacher's figures need no teacher: the cache holds the exact logprob of every gold token, and the most
probable id with its own. So it is with the fused ensemble: log Σ_m w_m p_m(gold) (of geometric mixing see
`fused_gold_logprob`), and the mixture on the union of the heads. Every figure is a function of sums over
blocks, so that a bootstrap resample of blocks costs one row of a matrix product.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.batches import Batch, BatchReader
from stages.bootstrap import interval, resampled
from stages.calibration import COLUMNS, bin_sums, calibration_error
from stages.chunk_sizes import loss_rows
from stages.fusion import rows_of
from stages.head import Head, run_decoder
from stages.mixing import fused_gold_logprob
from stages.ranks import Ranks
from stages.step_loss import StepLoss
from stages.student import DistilledStudent
from stages.union import merge
from storage.corpus_info import CorpusInfo
from storage.types import Float64, Int64

OVERALL = "overall"
ENSEMBLE = "fused"
STUDENT = ("rows", "ce", "kd", "correct", "agreed")
TEACHER = ("rows", "ce", "correct", "agreed", "entropy", "weight")
_FUSED = ("rows", "ce", "correct")
_WITH_INTERVAL = ("perplexity", "kd", "accuracy", "agreement", "ece", "bits_per_byte")


@dataclass(frozen=True)
class Sums:
    """Sums over the scored rows of some blocks.

    Attributes:
        names: of the first columns: rows, ce (nats), …
        values: float64 [..., F]: those, then calibration's COLUMNS.
    """

    names: tuple[str, ...]
    values: Float64

    def with_bytes(self, bytes_N: Int64 | None) -> Sums:
        """Returns the same with a column for the targets' bytes, if they are known."""
        if bytes_N is None:
            return self
        values = np.insert(self.values, len(self.names), bytes_N, axis=-1)
        return Sums((*self.names, "bytes"), values)


def figures(sums: Sums) -> dict[str, Any]:
    """Returns what sums come to: {rows, ce, perplexity, …}, each of the sums' leading shape.

    ce, kd and entropy are nats a row; perplexity is exp of ce; bits per byte are the nats of all rows
    over ln 2 and the bytes of their targets; accuracy and agreement are shares of the rows.
    """
    total = {name: sums.values[..., i] for i, name in enumerate(sums.names)}
    rows = total["rows"]
    found: dict[str, Any] = {"rows": rows}
    found |= {n: total[n] / rows for n in ("ce", "kd") if n in total}
    found["perplexity"] = np.exp(np.minimum(found["ce"], 700.0))
    if "bytes" in total:
        bytes_ = np.where(total["bytes"] > 0, total["bytes"], np.nan)
        found["bits_per_byte"] = total["ce"] / math.log(2.0) / bytes_
    shares = {
        "correct": "accuracy",
        "agreed": "agreement",
        "entropy": "entropy",
        "weight": "weight",
    }
    found |= {told: total[name] / rows for name, told in shares.items() if name in total}
    if sums.values.shape[-1] > len(sums.names):
        found["ece"] = calibration_error(sums.values[..., len(sums.names) :])
    return found


def table(
    sums: Sums, info: CorpusInfo, block_ids: Int64, resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Returns the figures by domain and overall, with the intervals of a bootstrap over the blocks.

    Args:
        sums: a row a block.
        resamples: 0 leaves `intervals` empty. A resample of the whole draws in each domain apart; a
            domain of one block tells no spread, so it and the whole have no intervals.

    Returns:
        domain → figures, and `intervals`: name → [low, high], 95 %. Domains without a scored row, and
        figures that cannot be had (null), are left out of the intervals.
    """
    domain_N, by_domain, single = info.domain_of(block_ids), {}, set[str]()
    for index, name in enumerate(info.domains):
        mine = sums.values[(domain_N == index) & (sums.values[:, 0] > 0)]
        if len(mine):
            by_domain[name] = (mine.sum(0), resampled(mine, resamples, seed + index))
            single |= {name, OVERALL} if len(mine) == 1 else set()
    if by_domain:
        totals, drawn = zip(*by_domain.values(), strict=True)
        by_domain[OVERALL] = (sum(totals), sum(drawn))
    return {
        name: {
            **_plain(figures(Sums(sums.names, total))),
            "intervals": _intervals(figures(Sums(sums.names, drawn)))
            if resamples and name not in single
            else {},
        }
        for name, (total, drawn) in by_domain.items()
    }


def loss_difference(
    a: Sums, b: Sums, info: CorpusInfo, block_ids: Int64, resamples: int, seed: int
) -> dict[str, Any]:
    """Returns how far one model's held-out loss is above another's, measured on the same rows.

    The bootstrap draws the same blocks for both, in each domain apart, so that what makes text hard or
    easy for both does not widen the interval.

    Args:
        a, b: a row a block.

    Returns:
        ce: a − b, nats a row; interval: [low, high], 95 %, None without resamples or where a domain has
        one block alone.
    """
    ce = a.names.index("ce")
    sums = np.stack([a.values[:, 0], a.values[:, ce] - b.values[:, ce]], 1)
    domain_N, drawn = info.domain_of(block_ids), []
    for index in range(len(info.domains)):
        mine = sums[(domain_N == index) & (sums[:, 0] > 0)]
        if len(mine):
            drawn.append(None if len(mine) == 1 else resampled(mine, resamples, seed + index))
    rows, apart = sums.sum(0)
    whole = None
    if resamples and drawn and all(each is not None for each in drawn):
        total = np.sum([each for each in drawn if each is not None], 0)
        whole = interval(total[:, 1] / total[:, 0])
    return {"ce": float(apart / rows) if rows else None, "interval": whole}


def _plain(found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns one set of figures as JSON has them: null for what cannot be had."""
    values = {name: float(value) for name, value in found.items()}
    return {n: None if math.isnan(v) else int(v) if n == "rows" else v for n, v in values.items()}


def _intervals(found: Mapping[str, Float64]) -> dict[str, list[float]]:
    names = [name for name in _WITH_INTERVAL if name in found and not np.isnan(found[name]).any()]
    return {name: interval(found[name]) for name in names}


def heldout_sums(
    student: DistilledStudent,
    reader: BatchReader,
    block_ids: Int64,
    batch_blocks: int,
    ranks: Ranks | None = None,
) -> Sums:
    """Returns the student's sums of each block, of those that are this rank's (0 elsewhere).

    Args:
        student: left in the mode it was in.
        reader: with caches, so that the distillation loss can be told.
        block_ids: held-out blocks, int64 [N].
        batch_blocks: blocks of one forward.
        ranks: who share out the batches. Forwards of a sharded student need all of them, so each
            does the same number: one that has run out repeats a batch, uncounted.
    """
    device, training = next(student.parameters()).device, student.training
    ranks = ranks or Ranks(device)
    batches = [slice(i, i + batch_blocks) for i in range(0, len(block_ids), batch_blocks)]
    values = np.zeros((len(block_ids), len(STUDENT) + COLUMNS))
    student.eval()
    with torch.no_grad():
        for i in range(ranks.rank, -(-len(batches) // ranks.world) * ranks.world, ranks.world):
            at = batches[min(i, len(batches) - 1)]
            batch = reader.read(block_ids[at]).to(device)
            loss = student(batch, batch.rows, 1)
            if i < len(batches):
                values[at] = _student_sums(loss, batch).cpu().numpy()
    student.train(training)
    return Sums(STUDENT, values)


def _student_sums(loss: StepLoss, batch: Batch) -> Tensor:
    ones = torch.ones_like(loss.ce_R)
    terms = (ones, loss.ce_R, loss.kd_R, loss.correct_R, loss.agreed_R)
    row_block = batch.scored.nonzero()[:, 0]
    return _block_sums(terms, loss.confidence_R, loss.correct_R, row_block, len(batch.scored))


def _block_sums(
    terms: Sequence[Tensor], confidence_R: Tensor, correct_R: Tensor, block_R: Tensor, blocks: int
) -> Tensor:
    """Returns the sums of each block, float64 [blocks, len(terms) + COLUMNS]."""
    rows = torch.stack([term.double() for term in terms], 1)
    sums = rows.new_zeros(blocks, len(terms)).index_add_(0, block_R, rows)
    return torch.cat([sums, bin_sums(confidence_R, correct_R, block_R, blocks)], 1)


def heldout_losses(
    student: DistilledStudent,
    reader: BatchReader,
    block_ids: Int64,
    batch_blocks: int,
    ranks: Ranks | None = None,
) -> dict[str, dict[str, float]]:
    """Returns the student's losses by domain and overall, while it trains.

    Args:
        student, reader, block_ids, batch_blocks, ranks: as for `heldout_sums`.

    Returns:
        domain → {rows, ce, kd (nats a row; at the reader's temperature), perplexity, accuracy,
        agreement (with the fused target's most probable id)}.
    """
    ranks, info = ranks or Ranks(next(student.parameters()).device), reader.corpus.info
    values = heldout_sums(student, reader, block_ids, batch_blocks, ranks).values
    sums = np.zeros((len(info.domains), len(STUDENT)))
    np.add.at(sums, info.domain_of(block_ids), values[:, : len(STUDENT)])
    sums = np.reshape(ranks.sum(sums.flatten().tolist()), sums.shape)
    found = {name: row for name, row in zip(info.domains, sums, strict=True) if row[0]}
    if found:
        found[OVERALL] = sums.sum(0)
    return {name: _plain(figures(Sums(STUDENT, row))) for name, row in found.items()}


def cached_sums(reader: BatchReader, block_ids: Int64) -> dict[str, Sums]:
    """Returns the sums of each block of every teacher and of their fused ensemble, from the caches.

    The teachers' most probable ids, and the mixture's on the union of their heads (an id that a teacher
    has not kept counts nothing there), are at temperature 1; a teacher agrees where its own is the
    mixture's.

    Args:
        reader: at temperature 1, with a bucket for the tail.
        block_ids: held-out blocks, int64 [N].
    """
    names = [*reader.caches]
    columns = {**dict.fromkeys(names, TEACHER), ENSEMBLE: _FUSED}
    values = {n: np.zeros((len(block_ids), len(c) + COLUMNS)) for n, c in columns.items()}
    for i, block in enumerate(block_ids):
        one = np.array([block])
        batch = reader.read(one)
        if batch.rows:
            for name, sums in _cached_block(reader, one, batch).items():
                values[name][i] = sums.numpy()
    return {name: Sums(columns[name], values[name]) for name in columns}


def _cached_block(reader: BatchReader, one: Int64, batch: Batch) -> dict[str, Tensor]:
    """Returns one block's sums of every teacher and of the ensemble."""
    assert batch.target is not None, "teachers are evaluated from their caches"
    union, weights = merge(batch.target, torch.float64), batch.target.teacher_weights.double()
    notes = [rows_of(cache.read(one), batch.scored.numpy()) for cache in reader.caches.values()]
    stats = [cache.stats(one) for cache in reader.caches.values()]
    gold = torch.stack([torch.from_numpy(x.gold_logprob) for x in stats])[:, batch.scored].double()
    fused = fused_gold_logprob(batch.target, batch.gold, gold)
    block_R, found = torch.zeros_like(batch.gold), {}

    def sums(confidence: Tensor, top: Tensor, logprob: Tensor, *more: Tensor) -> Tensor:
        correct = (top == batch.gold).double()
        rows = (torch.ones_like(correct), -logprob, correct, *more)
        return _block_sums(rows, confidence, correct, block_R, 1)[0]

    for m, name in enumerate(reader.caches):
        best, at = notes[m].logprobs.max(-1)
        top = notes[m].ids.gather(-1, at[:, None])[:, 0]
        agreed = (top == union.top_C).double()
        found[name] = sums(best.exp(), top, gold[m], agreed, notes[m].entropy, weights[m])
    found[ENSEMBLE] = sums(union.p.amax(-1), union.top_C, fused)
    return found


@torch.inference_mode()
def forward_speed(
    model: Any, reader: BatchReader, block_ids: Int64, batch_blocks: int, bfloat16: bool
) -> float | None:
    """Returns the tokens a second of a forward with all its logits, or None without blocks.

    One block is run unmeasured; then the first batch is timed.

    Args:
        bfloat16: whether the head's products take bfloat16 factors, and the rest of a model in float32.
    """
    device, head = model.device, Head.of(model, bfloat16)
    if device.type == "cpu":  # widened once, not at every chunk
        head = replace(head, weight=head.weight.float())
    if not len(block_ids):
        return None
    first, batch = (reader.read(block_ids[:n]).to(device) for n in (1, batch_blocks))
    _forward(model, head, first)
    begun = time.perf_counter()
    _forward(model, head, batch)
    return int(batch.present.sum()) / (time.perf_counter() - begun)


def _forward(model: Any, head: Head, batch: Batch) -> None:
    autocast = head.bfloat16 and model.dtype == torch.float32
    with torch.autocast(batch.inputs.device.type, torch.bfloat16, enabled=autocast):
        hidden = run_decoder(model, batch.inputs, batch.positions, ())[0][batch.present]
    step = loss_rows(len(head.weight), hidden.device.type, None)
    for start in range(0, len(hidden), step):
        last = head.logits(hidden[start : start + step])
    float(last[0, 0])  # waits for the device
