"""What every model expected at each token of a passage, for the report's view of single tokens.

A passage is the beginning of a domain's first held-out block. The teachers' part comes from their
notes, the students' from a forward while the evaluation has them in memory. Cost: a block a domain
and student, and some 350 bytes of JSON a row for three teachers and two students.

Shapes: R scored rows of a passage, M teachers, K head entries, P logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from pipeline.block_view import Vocabulary
from pipeline.config import BEFORE
from pipeline.workspace import Workspace
from stages.batches import Batch, BatchReader
from stages.head import Head, run_decoder
from storage.types import LOG_ZERO, AnyArray, Bool, Int64

CANDIDATES: Final = 5
_ROWS_AT_ONCE: Final = 64  # of logits; memory, not meaning


@dataclass(frozen=True)
class Expected:
    """One model's distributions at the R scored rows.

    Attributes:
        entropy, ce: nats [R]; ce is −log p(gold).
        ids, p: [R, CANDIDATES] at most, the most probable ids and their probabilities, largest first.
        weight: [R], of a teacher in the fused target; None for others.
    """

    entropy: AnyArray
    ce: AnyArray
    ids: AnyArray
    p: AnyArray
    weight: AnyArray | None = None


@dataclass(frozen=True)
class _Passage:
    """One domain's rows, and what is known of them so far (`shown`)."""

    batch: Batch
    scored: Bool  # [n]
    shown: dict[str, Any]


class TokenView:
    """Collects what teachers and students expected, to become `tokens` of evaluation.json.

    Args:
        reader: with the caches of the fused teachers.
        heldout: block ids, int64.
        rows: of each passage, at most; 0 for no passages at all.
        vocabulary: of the corpus.
        bf16: whether students run in bfloat16.

    Raises (on construction):
        MissingShard, CorruptShard, IncompleteCache
    """

    def __init__(
        self, reader: BatchReader, heldout: Int64, rows: int, vocabulary: Vocabulary, bf16: bool
    ) -> None:
        self._reader, self._vocabulary, self._bf16 = reader, vocabulary, bf16
        self._pieces: dict[str, int] = {}
        info = reader.corpus.info
        self._passages: list[_Passage] = []
        for index in range(len(info.domains) if rows else 0):
            mine = heldout[info.domain_of(heldout) == index]
            if len(mine):
                self._passages.append(self._passage(mine[:1], rows))

    def add_student(self, name: str, model: Any) -> None:
        """Runs a student, a causal LM in evaluation mode, over the passages; not the untrained one."""
        vocab = self._reader.corpus.info.vocab_size
        for passage in self._passages if name != BEFORE else ():
            expected = student_rows(model, self._bf16, passage.batch, passage.scored, vocab)
            passage.shown["students"][name] = self._columns(expected, passage.scored)

    def as_json(self) -> dict[str, Any] | None:
        """Returns what was collected; None where there are no passages.

        Returns:
            pieces: texts of tokens, which all other lists name by index; passages: [{domain, block,
            text (n + 1 tokens: row t reads text[t] and predicts text[t + 1]), teachers: name →
            columns, fused: columns, students: name → columns}]. Columns are lists of n: entropy and
            ce (nats), weight (teachers), candidates ([piece, …], at most CANDIDATES) and p (their
            probabilities); None at rows without a target.
        """
        passages = [passage.shown for passage in self._passages]
        return {"pieces": list(self._pieces), "passages": passages} if passages else None

    def _passage(self, block: Int64, rows: int) -> _Passage:
        batch, info = self._reader.read(block), self._reader.corpus.info
        n = min(rows, int(batch.present[0].sum()))
        scored: Bool = batch.scored[0, :n].numpy()
        tokens = self._reader.corpus.read(block).tokens[0, : n + 1]
        shown: dict[str, Any] = {
            "domain": info.domains[int(batch.domain[0])], "block": int(block[0]),
            "text": [self._piece(int(token)) for token in tokens],
        }  # fmt: skip
        teachers, fused = _teacher_rows(self._reader, block, batch, scored)
        shown["teachers"] = {name: self._columns(one, scored) for name, one in teachers.items()}
        shown["fused"] = self._columns(fused, scored) if fused else None
        shown["students"] = {}
        return _Passage(batch, scored, shown)

    def _columns(self, expected: Expected, scored: Bool) -> dict[str, list[Any]]:
        columns = {"entropy": _rounded(expected.entropy, 3), "ce": _rounded(expected.ce, 3)}
        if expected.weight is not None:
            columns["weight"] = _rounded(expected.weight, 3)
        kept = expected.p > 0  # a cut head, or a tiny vocabulary, may have fewer
        columns["candidates"] = [
            [self._piece(int(i)) for i in ids[mask]]
            for ids, mask in zip(expected.ids, kept, strict=True)
        ]
        columns["p"] = [_rounded(p[mask], 4) for p, mask in zip(expected.p, kept, strict=True)]
        return {key: _spread(values, scored) for key, values in columns.items()}

    def _piece(self, token: int) -> int:
        return self._pieces.setdefault(self._vocabulary.text(token), len(self._pieces))


def token_view(work: Workspace, reader: BatchReader, heldout: Int64) -> TokenView:
    """Returns the view of a run's held-out blocks, of the teachers so far."""
    vocabulary = Vocabulary(work.tokenizer().backend_tokenizer)
    bf16 = work.config.train.precision == "bf16"
    return TokenView(reader, heldout, work.config.evaluate.token_rows, vocabulary, bf16)


def student_rows(model: Any, bf16: bool, batch: Batch, scored: Bool, vocab_size: int) -> Expected:
    """Returns what a student expects at the scored ones of a block's first rows.

    Args:
        model: a causal LM.
        bf16: whether forward and head run in bfloat16, as its losses are measured.
        batch: one block.
        scored: bool [n], of the first n rows.
        vocab_size: V; ids of padding are no candidates.
    """
    device, n = next(model.parameters()).device, len(scored)
    parts: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            inputs, positions = (x[:, :n].to(device) for x in (batch.inputs, batch.positions))
            hidden = run_decoder(model, inputs, positions, ())[0][0]
        wanted = hidden[torch.from_numpy(scored).to(device)]
        gold = batch.gold[: len(wanted)].to(device)
        head = Head.of(model, bf16)
        for start in range(0, max(1, len(gold)), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            logq_CP = head.logits(wanted[rows]).log_softmax(-1)
            ce = -logq_CP.gather(-1, gold[rows, None])[:, 0]
            entropy = -torch.special.xlogy(logq_CP.exp(), logq_CP.exp()).sum(-1)
            top = logq_CP[:, :vocab_size].topk(min(CANDIDATES, vocab_size))
            parts.append((entropy, ce, top.indices, top.values.exp()))
    return Expected(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))


def _teacher_rows(
    reader: BatchReader, block: Int64, batch: Batch, scored: Bool
) -> tuple[dict[str, Expected], Expected | None]:
    """Returns each teacher's distributions, and the fused one's, at temperature 1.

    Of geometric mixing there is no fused one: heads do not tell it.
    """
    if batch.target is None:
        return {}, None
    n, count = len(scored), int(scored.sum())
    weights_MR = batch.target.teacher_weights[:, :count].double().numpy()
    teachers, heads = {}, []
    for (name, cache), weight_R in zip(reader.caches.items(), weights_MR, strict=True):
        notes = cache.read(block)
        ids_RK, logp_RK = (x[0, :n][scored] for x in (notes.head.ids, notes.head.logprobs))
        p_RK = np.where(logp_RK > LOG_ZERO / 2, np.exp(logp_RK.astype(np.float64)), 0.0)
        stats = (notes.stats.entropy, notes.stats.gold_logprob)
        entropy, gold = (x[0, :n][scored].astype(np.float64) for x in stats)
        order = np.argsort(-p_RK, axis=-1, kind="stable")[:, :CANDIDATES]
        top_ids, top_p = (np.take_along_axis(x, order, -1) for x in (ids_RK, p_RK))
        teachers[name] = Expected(entropy, -gold, top_ids, top_p, weight_R)
        heads.append((ids_RK, p_RK))
    geometric = batch.target.spent is not None
    return teachers, None if geometric else _fused_rows(teachers, heads)


def _fused_rows(
    teachers: Mapping[str, Expected], heads: list[tuple[AnyArray, AnyArray]]
) -> Expected:
    """Returns the mixture Σ_m w_m p_m of the teachers, as far as their notes tell it.

    Its entropy is that of the merged heads with the rest as one symbol, plus what each teacher's
    entropy is above the same figure of its own head, weighted. Exact where heads hold everything.
    """
    weight_MR = np.stack([t.weight for t in teachers.values() if t.weight is not None])
    gold = sum(w * np.exp(-t.ce) for w, t in zip(weight_MR, teachers.values(), strict=True))
    rows, width = weight_MR.shape[1], CANDIDATES
    entropy = np.zeros(rows)
    ids, p = np.zeros((rows, width), np.int64), np.zeros((rows, width))
    for r in range(rows):
        merged, where = np.unique(np.concatenate([h[r] for h, _ in heads]), return_inverse=True)
        weighted = np.concatenate([w[r] * q[r] for w, (_, q) in zip(weight_MR, heads, strict=True)])
        mass = np.bincount(where.ravel(), weighted, len(merged))
        beyond = sum(
            w[r] * (t.entropy[r] - _coarse_entropy(q[r]))
            for w, t, (_, q) in zip(weight_MR, teachers.values(), heads, strict=True)
        )
        entropy[r] = np.maximum(0.0, _coarse_entropy(mass) + beyond)  # NaN stays
        order = np.argsort(-mass, kind="stable")[:width]
        ids[r, : len(order)], p[r, : len(order)] = merged[order], mass[order]
    return Expected(entropy, -np.log(np.maximum(gold, 1e-300)), ids, p)


def _coarse_entropy(p: AnyArray) -> float:
    """Returns the entropy of some probabilities and of what they leave, as one symbol, nats."""
    every = np.append(p, max(0.0, 1.0 - float(p.sum())))
    positive = every[every > 0]
    return float(-(positive * np.log(positive)).sum())


def _rounded(values: AnyArray, digits: int) -> list[Any]:
    """Returns plain numbers; None for NaN, what an imported cache does not tell."""
    return [None if np.isnan(value) else round(float(value), digits) for value in values]


def _spread(values: list[Any], scored: Bool) -> list[Any]:
    """Returns the scored rows' values at their places, None at the others."""
    each = iter(values)
    return [next(each) if one else None for one in scored.tolist()]
