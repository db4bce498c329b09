"""The view of single tokens against whole distributions, and tokens that are no whole text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Lab, build_parts, make_tokenizer
from whole_caches import dense_logits, model, whole_caches

from pipeline.block_view import Vocabulary
from pipeline.reporting.token_view import CANDIDATES, TokenView, student_rows
from stages.student import DistilledStudent

ROWS = 20


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Caches that hold every id, unrounded, of two teachers weighted by their entropies."""
    root: Path = tmp_path_factory.mktemp("tokens")
    build_parts(root)
    lab = Lab(root)
    return whole_caches(lab)


def dense(work: Any, name: str, batch: Any) -> np.ndarray[Any, Any]:
    """Returns log p [R, V]."""
    vocab = work.batch_reader().corpus.info.vocab_size
    return torch.log_softmax(dense_logits(work, name, batch)[:, :vocab], -1).numpy()


@pytest.fixture(scope="module")
def seen(work: Any) -> dict[str, Any]:
    """What the view shows of a block, and what it is to be held to."""
    reader, info = work.batch_reader(), work.prepared()
    heldout = info.block_ids("heldout")
    vocabulary = Vocabulary.read(Path(work.config.corpus.tokenizer))
    view = TokenView(reader, heldout, ROWS, vocabulary, bf16=False)
    view.add_student("mine", model(work, "one"))
    view.add_student("before", model(work, "one"))
    shown = view.as_json()
    assert shown is not None
    batch = reader.read(heldout[:1])
    logp = {name: dense(work, name, batch) for name in ("one", "two")}
    weights = batch.target.weights.double().numpy()
    mixture = weights[0, :, None] * np.exp(logp["one"]) + weights[1, :, None] * np.exp(logp["two"])
    logp["fused"] = np.log(mixture)
    return {"shown": shown, "logp": logp, "batch": batch, "block": int(heldout[0]),
            "tokens": reader.corpus.read(heldout[:1]).tokens[0], "vocabulary": vocabulary,
            "weights": weights}  # fmt: skip


def test_text_is_what_is_read_and_what_follows(seen: dict[str, Any]) -> None:
    shown, [passage] = seen["shown"], seen["shown"]["passages"]
    assert (passage["domain"], passage["block"]) == ("x", seen["block"])
    texts = [shown["pieces"][i] for i in passage["text"]]
    assert texts == [seen["vocabulary"].text(int(t)) for t in seen["tokens"][: ROWS + 1]]
    assert len(set(shown["pieces"])) == len(shown["pieces"])
    assert list(passage["students"]) == ["mine"]  # the untrained one is left out


@pytest.mark.parametrize("name", ["one", "two", "fused", "mine"])
def test_figures_are_those_of_whole_distributions(seen: dict[str, Any], name: str) -> None:
    passage, batch = seen["shown"]["passages"][0], seen["batch"]
    groups = {**passage["teachers"], "fused": passage["fused"], **passage["students"]}
    columns, logp = groups[name], seen["logp"]["one" if name == "mine" else name]
    scored = batch.scored[0, :ROWS].tolist()
    assert not all(scored), "every row has a target: the case was not tried"
    row = 0
    for t, has_target in enumerate(scored):
        assert all((values[t] is not None) == has_target for values in columns.values())
        if not has_target:
            continue
        p = np.exp(logp[row])
        assert columns["entropy"][t] == pytest.approx(-(p * logp[row]).sum(), abs=2e-3)
        assert columns["ce"][t] == pytest.approx(-logp[row][int(batch.gold[row])], abs=2e-3)
        best = np.argsort(-p)[:CANDIDATES]
        assert columns["p"][t] == pytest.approx(p[best].tolist(), abs=2e-4)
        texts = [seen["shown"]["pieces"][i] for i in columns["candidates"][t]]
        assert texts[0] == seen["vocabulary"].text(int(best[0]))
        row += 1
    if name in passage["teachers"]:
        expected = seen["weights"][list(passage["teachers"]).index(name)]
        found = [w for w in columns["weight"] if w is not None]
        assert found == pytest.approx(expected[: len(found)].tolist(), abs=1e-3)


def test_a_students_losses_are_those_that_are_measured(work: Any) -> None:
    """The rows' own forward against that of the evaluation, over a whole block."""
    reader, network = work.batch_reader(), model(work, "two")  # has logits beyond the vocabulary
    block = work.prepared().block_ids("heldout")[:1]
    batch = reader.read(block)
    scored = batch.scored[0, : int(batch.present[0].sum())].numpy()
    vocab = reader.corpus.info.vocab_size
    with torch.no_grad():
        expected = DistilledStudent(network, work.config.loss, False)(batch, batch.rows, 1).ce_R
    found = student_rows(network, False, batch, scored, vocab)
    assert len(found.ce) == batch.rows > ROWS
    assert found.ce.tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    assert found.ids.max() < vocab


def test_no_rows_no_passages(work: Any) -> None:
    heldout = work.prepared().block_ids("heldout")
    vocabulary = Vocabulary.read(Path(work.config.corpus.tokenizer))
    view = TokenView(work.batch_reader(), heldout, 0, vocabulary, bf16=False)
    view.add_student("mine", model(work, "one"))
    assert view.as_json() is None
    assert TokenView(work.batch_reader(), heldout[:0], 9, vocabulary, False).as_json() is None


def test_what_is_shown_is_json(seen: dict[str, Any]) -> None:
    assert json.loads(json.dumps(seen["shown"], allow_nan=False)) == seen["shown"]
    columns = seen["shown"]["passages"][0]["fused"]
    assert all(math.isfinite(value) for value in columns["entropy"] if value is not None)


# -- tokens as text


def test_bytes_that_are_no_character_are_shown_as_bytes(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, 258, ["plain words alone"])
    vocabulary = Vocabulary.read(tmp_path)
    texts = [vocabulary.text(i) for i in tokenizer("é 🍵")["input_ids"]]
    assert texts == ["⟨C3⟩", "⟨A9⟩", " ", "⟨F0⟩", "⟨9F⟩", "⟨8D⟩", "⟨B5⟩"]
    assert vocabulary.text(tokenizer.eos_token_id) == "<eos>"
    assert vocabulary.text(10**6) == "#1000000"
    every = [vocabulary.text(i) for i in range(len(tokenizer))]
    assert not any("\ufffd" in text or "«" in text for text in every)


def test_pieces_of_several_kinds_are_text() -> None:
    from tokenizers import Tokenizer, decoders, models

    levels = Tokenizer(models.BPE({"Ġa": 0, "aÃ": 1, "ÿ": 2}, []))
    levels.decoder = decoders.ByteLevel()
    assert [Vocabulary(levels).text(i) for i in range(3)] == [" a", "a⟨C3⟩", "⟨FF⟩"]
    fallback = Tokenizer(models.BPE({"<0xE2>": 0, "▁b": 1, "<0x41>": 2}, []))
    fallback.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    assert [Vocabulary(fallback).text(i) for i in range(3)] == ["⟨E2⟩", " b", "A"]
