"""Weights and mixing from the configuration to the batch, the student and the evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Lab, build_parts
from test_stream import same

from pipeline.publish import publish
from stages import batches
from stages.batches import BatchReader
from stages.evaluate import cached_sums, table
from stages.mixture_em import fit
from stages.order import BlockOrder, Position
from stages.stream import steps_of_batches
from stages.weighting import WEIGHTINGS
from storage.errors import ConfigError, CorpusError

CPU = torch.device("cpu")
IDS = np.array([4, 0, 7])


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Two teachers' notes on two domains, and a third that is only held out."""
    root: Path = tmp_path_factory.mktemp("fusion")
    build_parts(root)
    lab = Lab(root)
    held = {"domain": "z", "split": "heldout", "format": "jsonl", "path": f"{root}/held.jsonl"}
    lab.config["corpus"]["sources"].append(held)
    lab.config["store"]["segments"] = 2
    lab.config |= {"corpus_dir": f"{root}/run/corpus", "cache_dir": f"{root}/run/cache"}
    lab.workspace().cache_teachers()
    return lab


def fusion(weights: str, **others: Any) -> dict[str, Any]:
    name = f"{weights}:two" if weights == "single" else weights
    return {"weights": name, "static": {"one": 1.0, "two": 3.0}, **others}


def weights_of(batch: batches.Batch) -> torch.Tensor:
    assert batch.target is not None
    return batch.target.teacher_weights


@pytest.mark.parametrize("weights", WEIGHTINGS)
def test_the_device_path_gives_the_same_bits(cached: Lab, weights: str) -> None:
    for more in (
        {},
        {"per": "sequence", "prior": {"one": 2.0}, "floor": 0.1, "mixing": "geometric"},
    ):
        work = cached.workspace(fusion=fusion(weights, **more))
        plain, packed = work.batch_reader(), work.batch_reader(on_device=True)
        batch = plain.read(IDS)
        assert same(batch, packed.ready(packed.read(IDS), CPU))
        assert same(batch, plain.ready(batch, CPU))
        torch.testing.assert_close(weights_of(batch).sum(0), torch.ones(batch.rows))


@pytest.mark.parametrize("weights", ["entropy", "min_ce"])
def test_sequences_are_pieces_of_documents_and_blocks_do_not_mix(cached: Lab, weights: str) -> None:
    reader = cached.workspace(fusion=fusion(weights, per="sequence")).batch_reader()
    batch, blocks = reader.read(IDS), reader.corpus.read(IDS)
    stats = [cache.stats(IDS) for cache in reader.caches.values()]
    plain = torch.full((2, *batch.scored.shape), -1.0)
    for b in range(len(IDS)):
        documents = blocks.document[b, :-1]
        for document in np.unique(documents):
            rows = np.flatnonzero((documents == document) & blocks.scored[b])
            if not len(rows):
                continue
            value = [s.entropy[b, rows] if weights == "entropy" else -s.gold_logprob[b, rows]
                     for s in stats]  # fmt: skip
            means = torch.tensor([float(each.mean(dtype=np.float64)) for each in value])
            one = (-means).softmax(0) if weights == "entropy" else (means == means.min()).float()
            plain[:, b, rows] = one[:, None]
    torch.testing.assert_close(weights_of(batch), plain[:, batch.scored])
    assert len(batch.row_sequence.unique()) > len(IDS)


def test_em_is_fitted_domain_by_domain_to_training_blocks(cached: Lab) -> None:
    reader = cached.workspace(fusion={"weights": "em"}).batch_reader()
    info, every = reader.corpus.info, []
    for domain in ("x", "y", "z"):
        ids = info.block_ids("train", domain)
        scored = reader.corpus.read(ids).scored
        gold = np.stack([c.stats(ids).gold_logprob[scored] for c in reader.caches.values()])
        every.append(gold)
        expected = fit(gold if len(ids) else np.concatenate(every, 1))
        some = info.block_ids("heldout" if domain == "z" else "train", domain)[:2]
        found = weights_of(reader.read(some))
        torch.testing.assert_close(
            found, torch.tensor(expected).float()[:, None].expand(found.shape)
        )
    fewer = cached.workspace(fusion={"weights": "em", "calibration_blocks": 1}).batch_reader()
    assert not torch.equal(weights_of(fewer.read(some)), found)


def test_em_is_fitted_once_however_many_workers_read(
    cached: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fitting = batches.domain_weights

    def counted(*arguments: Any) -> Any:
        with (tmp_path / "fits").open("a") as file:
            file.write("x")
        return fitting(*arguments)

    monkeypatch.setattr(batches, "domain_weights", counted)
    found = []
    for workers in (0, 2):
        reader = cached.workspace(fusion={"weights": "em"}).batch_reader()
        info = reader.corpus.info
        order = BlockOrder(info.ranges("train"), info.blocks_per_part, 0, info.fingerprint)
        steps = steps_of_batches(reader, order, Position(), 2, 2, workers=workers)
        found.append([batch for _ in range(2) for batch in next(steps)[0]])
        steps.close()
    assert all(same(a, b) for a, b in zip(*found, strict=True))
    assert (tmp_path / "fits").read_text() == "xx"


def test_em_is_the_same_from_a_remote_store(cached: Lab, tmp_path: Path) -> None:
    publish(cached.workspace(), "memory://fusion")
    near = cached.workspace(fusion={"weights": "em"}).batch_reader().read(IDS)
    far = cached.workspace(
        fusion={"weights": "em"}, corpus_dir="memory://fusion/corpus",
        cache_dir="memory://fusion/cache", reading__local_cache=str(tmp_path / "fetched"),
    )  # fmt: skip
    assert same(near, far.batch_reader().read(IDS)) and any((tmp_path / "fetched").iterdir())


def test_em_needs_a_training_block_with_a_target(
    cached: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = cached.workspace(fusion={"weights": "em"}).batch_reader()
    monkeypatch.setattr(type(reader.corpus.info), "domains", property(lambda info: ("z",)))
    with pytest.raises(CorpusError, match="no training block to fit the weights on"):
        reader.calibrate()


def test_ramped_weights_lie_between_the_first_and_their_own(cached: Lab) -> None:
    """In the target and, averaged, in every segment that has rows."""
    chosen = fusion("min_ce", prior={"one": 3.0}, floor=0.1, ramp=0.5)
    reader = cached.workspace(fusion=chosen).batch_reader()
    every = reader.corpus.read(np.arange(reader.corpus.info.blocks))
    batch = reader.read(np.array([0, int(np.argmin(every.scored[:, 16:].sum(1)))]))
    assert reader.ramped(batch, 1.0) is batch
    first = {"one": 0.1 + 0.8 * 0.75, "two": 0.1 + 0.8 * 0.25}
    for share in (0.0, 0.5):
        found = reader.ramped(batch, share)
        for m, (name, begin) in enumerate(first.items()):
            plain = share * weights_of(batch)[m] + (1 - share) * begin
            torch.testing.assert_close(weights_of(found)[m], plain)
            segments = batches.segment_means(plain, batch.scored, 2)
            torch.testing.assert_close(found.segment_weights[name], segments)
    assert any(bool((w == 0).any()) for w in batch.segment_weights.values())


def test_a_ramp_moves_the_weights_of_the_training_and_not_the_heldout_figures(cached: Lab) -> None:
    logs = {}
    for ramp in (0.0, 1.0):
        work = cached.workspace(run_dir=f"{cached.root}/ramp{ramp}", train__steps=3,
                                fusion=fusion("static", ramp=ramp))  # fmt: skip
        text = (work.train_students()["fused"].folder / "metrics.jsonl").read_text()
        logs[ramp] = [json.loads(line) for line in text.splitlines()]
    for step, expected in ((1, 0.5), (2, 0.375), (3, 0.25)):
        assert logs[0.0][step]["weights"]["x"]["one"] == pytest.approx(0.25)
        assert logs[1.0][step]["weights"]["x"]["one"] == pytest.approx(expected)
    assert logs[0.0][0]["heldout"] == logs[1.0][0]["heldout"]
    assert logs[0.0][1]["kd"] != logs[1.0][1]["kd"]
    assert logs[0.0][1]["features"] != logs[1.0][1]["features"]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_student_learns_from_a_geometric_mixture(cached: Lab, temperature: float) -> None:
    work = cached.workspace(
        run_dir=f"{cached.root}/geometric{temperature}", train__steps=2,
        loss__temperature=temperature, fusion=fusion("static", mixing="geometric"),
    )  # fmt: skip
    text = (work.train_students()["fused"].folder / "metrics.jsonl").read_text()
    row = json.loads(text.splitlines()[-1])
    assert row["weights"]["x"] == pytest.approx({"one": 0.25, "two": 0.75})
    assert row["features"] > 0 and row["kd"] > 0
    reader = work.batch_reader()
    batch = reader.read(IDS)
    assert batch.target is not None and batch.target.ids.shape[0] == 1
    tables = teachers_tables(reader)
    assert tables["one"]["z"]["weight"] == pytest.approx(0.25)
    fused = tables["fused"]["overall"]["ce"]
    assert 0 < fused < max(tables[name]["overall"]["ce"] for name in ("one", "two")) + 0.5
    at_one = cached.workspace(fusion=fusion("static", mixing="geometric")).batch_reader()
    assert teachers_tables(at_one) == tables


def teachers_tables(reader: BatchReader) -> dict[str, Any]:
    info = reader.corpus.info
    heldout = info.block_ids("heldout")
    sums = cached_sums(reader.at(1.0, "bucket"), heldout)
    return {name: table(one, info, heldout, 0, 0) for name, one in sums.items()}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"fusion": {"weights": "best"}}, r"none of uniform, static, entropy, .*single:NAME"),
        ({"fusion": {"weights": "single:three"}}, r"NAME is one of \['one', 'two'\]"),
        ({"fusion": {"weights": "single:one", "teachers": ["two"]}}, r"NAME is one of \['two'\]"),
        ({"fusion": {"prior": {"three": 2.0}}}, "fusion.prior names"),
        ({"fusion": {"floor": 0.5}}, "must be below 1/2"),
        ({"fusion": {"mixing": "geometric"}, "store": {"k": 8, "draws": 4}}, "here it is draws"),
        ({"fusion": {"mixing": "geometric"}, "loss__target": "renormalised"}, "biased"),
        ({"fusion": {"mixing": "geometric", "ramp": 0.1}}, "not linear"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(
    cached: Lab, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        cached.workspace(**changes)
