"""The student's module against the same loss written plainly over the cached notes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Lab, build_parts
from torch import Tensor
from torch.nn.functional import cosine_similarity

from stages.batches import Batch, BatchReader
from stages.losses import bucket_kl, cross_entropy
from stages.student import DistilledStudent, build_student

ALPHA, BETA = 0.7, 0.3


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root: Path = tmp_path_factory.mktemp("student")
    build_parts(root)
    pairs = [{"student": 1, "teacher": 2}, {"student": 2, "teacher": {"two": 2}}]
    features = {"weight": BETA, "kind": "cosine", "pairs": pairs}
    loss = {"alpha": ALPHA, "temperature": 2.0, "features": features, "chunk_tokens": 7}
    store = {"k": 8, "temperatures": [2.0], "segments": 2, "preset": "exact"}
    # Three layers: transformers gives the last one's output only after the final norm.
    opened = Lab(root).workspace(loss=loss, store=store, student__keep_layers=[0, 1, 2])
    opened.cache_teachers()
    return opened


def make(work: Any, checkpointing: bool = False) -> tuple[DistilledStudent, BatchReader]:
    torch.manual_seed(0)
    folder = Path(work.config.student.model)
    model = build_student(work.config.student, folder, torch.device("cpu"))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    pairs = [(1, "one", 2), (1, "two", 2), (2, "two", 2)]
    student = DistilledStudent(model, work.config.loss, False, pairs, {"one": 32, "two": 64})
    return student.train(), work.batch_reader()


def plain(student: DistilledStudent, batch: Batch) -> Tensor:
    """total = (1−α)·CE + α·T²·KD + β·features, dense and a document at a time."""
    out = student.model(
        input_ids=batch.inputs, position_ids=batch.positions, output_hidden_states=True,
        use_cache=False,
    )  # fmt: skip
    assert batch.target is not None and student.aligner is not None
    logits = out.logits[batch.scored]
    rows = batch.rows
    total = (1 - ALPHA) * cross_entropy(logits, batch.gold).sum() / rows
    total = total + ALPHA * 4.0 * bucket_kl(logits, batch.target).sum() / rows
    weights = torch.zeros(2, *batch.scored.shape)
    weights[:, batch.scored] = batch.target.weights
    names, features, segments = ["one", "two"], torch.zeros(()), 0
    for b in range(len(batch.inputs)):
        for g, span in enumerate((slice(0, 16), slice(16, 32))):
            scored, present = batch.scored[b, span], batch.present[b, span]
            if not scored.any():
                continue
            segments += 1
            for projection, (layer, name, theirs) in zip(
                student.aligner.projections, student.aligner.pairs, strict=True
            ):
                ours = projection(out.hidden_states[layer][b, span][present].mean(0))
                given = batch.features[name, theirs][b, g]
                cosine = cosine_similarity(ours - ours.mean(), given - given.mean(), dim=-1)
                weight = weights[names.index(name), b, span][scored].mean()
                features = features + weight * (1 - cosine) / 2  # two student layers
    assert segments == batch.segments
    return total + BETA * features / segments


@pytest.mark.parametrize("checkpointing", [False, True])
def test_total_and_gradients_are_the_plain_ones(work: Any, checkpointing: bool) -> None:
    student, reader = make(work, checkpointing)
    last = reader.corpus.info.block_ids("train", "x")[-1]  # holds padding
    batch = reader.read(np.array([0, 3, last]))
    loss = student(batch, batch.rows, batch.segments)
    expected = plain(make(work)[0], batch)
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=1e-6)
    loss.total.backward()
    other, _ = make(work)
    plain(other, batch).backward()
    for (name, mine), theirs in zip(student.named_parameters(), other.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None, name
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_a_steps_alpha_and_the_rows_losses(work: Any) -> None:
    """α of a step in place of the options'; what is told by row sums to what is told by batch."""
    student, reader = make(work)
    batch = reader.read(np.array([0, 3]))
    loss, other = (student(batch, batch.rows, 2, alpha) for alpha in (None, 0.25))
    moved = (ALPHA - 0.25) * (loss.ce - 4.0 * loss.kd) / batch.rows
    torch.testing.assert_close((other.total - loss.total).double(), moved, rtol=1e-4, atol=1e-5)
    assert len(loss.ce_R) == len(loss.kd_R) == len(batch.row_domain) == batch.rows
    assert float(loss.ce_R.double().sum()) == float(loss.ce)
    assert float(loss.kd_R.double().sum()) == float(loss.kd)


def test_accumulation_gives_the_gradient_of_one_batch(work: Any) -> None:
    whole, reader = make(work)
    pieces, _ = make(work)
    ids = np.array([0, 1, 7, 2])
    batch = reader.read(ids)
    whole(batch, batch.rows, batch.segments).total.backward()
    parts = [reader.read(ids[:1]), reader.read(ids[1:])]
    rows, segments = sum(p.rows for p in parts), sum(p.segments for p in parts)
    for part in parts:
        pieces(part, rows, segments).total.backward()
    for mine, theirs in zip(pieces.parameters(), whole.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-6)


def test_packed_documents_do_not_see_one_another(work: Any) -> None:
    student, reader = make(work)
    batch = reader.read(np.array([1]))
    starts = [i for i, p in enumerate(batch.positions[0].tolist()) if p == 0]
    assert len(starts) > 1
    other = batch.inputs.clone()
    other[0, : starts[1]] = (other[0, : starts[1]] + 1) % 100
    with torch.no_grad():
        states = [
            student.model.get_decoder()(
                input_ids=tokens, position_ids=batch.positions, use_cache=False
            ).last_hidden_state[0, starts[1] :]
            for tokens in (batch.inputs, other)
        ]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
