"""The Python API: opening, batches from any worker, streams that go on, targets, and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scholiast
import torch
from conftest import Lab, build_parts
from test_stream import leaves, same
from torch.utils.data import DataLoader

from pipeline.publish import publish
from stages.order import BlockOrder, Position


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    root: Path = tmp_path_factory.mktemp("api")
    build_parts(root)
    lab = Lab(root)
    lab.config["store"] |= {"draws": 4, "pooling": ["mean", "last"], "segments": 2}
    lab.workspace().cache_teachers()
    return lab


@pytest.fixture
def cache(lab: Lab) -> scholiast.Cache:
    return scholiast.open_cache(lab.root / "run")


def equal(a: Any, b: Any) -> bool:
    """Whether two batches hold the same bits."""
    pairs = list(zip(leaves(a), leaves(b), strict=True))
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def test_every_name_is_there_and_no_other() -> None:
    assert all(getattr(scholiast, name).__doc__ for name in scholiast.__all__)
    assert dir(scholiast) == scholiast.__all__ == sorted(scholiast.__all__)
    with pytest.raises(AttributeError, match="no attribute 'open'"):
        _ = scholiast.open


# -- opening


def test_a_cache_is_found_by_any_of_its_places(lab: Lab, tmp_path: Path) -> None:
    run, ids = lab.root / "run", np.array([3, 0])
    moved = tmp_path / "elsewhere"
    moved.symlink_to(run / "cache")
    opened = {
        "config": scholiast.open_cache(lab.write(), overrides=["fusion.tau=0.5"]),
        "run": scholiast.open_cache(run),
        "folder": scholiast.open_cache(str(run / "cache")),
        "elsewhere": scholiast.open_cache(moved, corpus=run / "corpus"),
    }
    for name, cache in opened.items():
        assert cache.teachers == ("one", "two"), name
        assert cache.tokens(ids).tokens.shape == (2, cache.block_length + 1)
        notes = cache.notes(ids)
        assert notes["two"].head.ids.shape == (2, 32, 8) and notes["one"].features.last
    assert opened["config"].fusion.tau == 0.5 and opened["run"].fusion.tau == 1.0
    sent = pickle.loads(pickle.dumps(opened["config"]))
    assert sent.fusion.tau == 0.5 and equal(sent.dataset()[1], opened["config"].dataset()[1])
    one = scholiast.open_cache(run / "cache/two")
    assert one.teachers == ("two",) and one.temperatures == (1.0, 2.0) and one.segments == 2
    chosen = scholiast.open_cache(run, teachers=["two", "one"])
    assert chosen.teachers == ("two", "one") and "two, one" in repr(chosen)


def test_a_cache_of_a_store_is_read_through_the_local_cache(
    lab: Lab, cache: scholiast.Cache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    publish(lab.workspace(), "memory://api")
    for place in ("memory://api", "memory://api/cache", "memory://api/cache/one"):
        far = scholiast.open_cache(place)
        item, near = far.dataset()[0], cache.dataset()[0]
        near["notes"] = {name: near["notes"][name] for name in far.teachers}
        assert equal(item, near)
    assert any((tmp_path / ".cache/scholiast").iterdir())


# -- batches


def test_an_item_is_what_our_own_engine_reads(lab: Lab, cache: scholiast.Cache) -> None:
    data = cache.dataset("train")
    assert len(data) == len(cache.block_ids("train")) and data.block_ids[-1] == data[-1]["block_id"]
    batch = scholiast.collate(data.__getitems__(list(range(len(data)))))
    blocks = cache.tokens(batch["block_id"].numpy())
    assert (batch["document_ids"] == -1).any() and not batch["loss_mask"].all()
    mask = batch["loss_mask"].numpy()
    assert np.array_equal(mask, blocks.scored)
    assert np.array_equal(batch["shift_labels"].numpy()[mask], blocks.gold[mask])
    assert (batch["shift_labels"].numpy()[~mask] == -100).all()
    assert torch.equal(batch["labels"][:, 1:], batch["shift_labels"][:, :-1])
    assert (batch["labels"][:, 0] == -100).all()
    assert mask[:, -1].any()  # targets that lie in the next block
    assert set(batch["notes"]["one"]) == {
        "ids", "logprobs", "entropy", "log_tail_mass", "gold_logprob", "log_z", "draw_ids",
        "draw_logprobs", "feature_2", "feature_last_2",
    }  # fmt: skip
    assert batch["notes"]["two"]["feature_2"].shape == (len(data), 2, 64)
    work = lab.workspace(loss__features={"weight": 1.0, "pooled": "last", "pairs": "auto"})
    expected = work.batch_reader().read(batch["block_id"].numpy())
    loss = scholiast.DistillationLoss(cache, scholiast.LossOptions(
        features={"pooled": "last"}, temperature=work.config.loss.temperature,
    ))  # fmt: skip
    assert same(loss.joined(batch), expected)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_the_same_bits(cache: scholiast.Cache, start: str) -> None:
    data = cache.dataset(seed=3, samples=8)
    settings = {"batch_size": 4, "collate_fn": scholiast.collate}
    plain = list(DataLoader(data, **settings))
    workers = DataLoader(data, **settings, num_workers=1, multiprocessing_context=start)
    assert all(equal(a, b) for a, b in zip(plain, workers, strict=True))
    assert [item["block_id"] for item in data] == data.block_ids.tolist()


def test_a_data_sets_order_is_the_trainings_over_epochs(cache: scholiast.Cache) -> None:
    info = cache.corpus.info
    order = BlockOrder(info.ranges("train"), info.blocks_per_part, 5, info.fingerprint)
    count = 2 * len(order) + 3
    assert len(cache.dataset(seed=5)) == len(order)
    data = cache.dataset(seed=5, samples=count)
    assert data.block_ids.tolist() == order.take(Position(), count)[0].tolist()
    assert data[count - 1]["block_id"] == data[-1]["block_id"] == data.block_ids[-1]
    with pytest.raises(IndexError):
        data[count]
    table = data.as_datasets()
    assert len(table) == count and equal(table[7], data[7])
    assert equal(
        scholiast.collate(table.__getitems__([1, 4])), scholiast.collate([data[1], data[4]])
    )


def test_a_stream_goes_on_where_it_stood_with_other_workers_and_ranks(
    cache: scholiast.Cache,
) -> None:
    order = cache.dataset(seed=1, samples=48).block_ids
    stream = cache.stream(4, seed=1)
    batches = iter(DataLoader(stream, batch_size=None, num_workers=2))
    first = [next(batches) for _ in range(5)]
    assert torch.cat([b["block_id"] for b in first]).tolist() == order[:20].tolist()
    for rank in range(2):
        half = cache.stream(2, seed=1, rank=rank, world=2)
        half.load_state_dict(first[2]["state"])
        following = iter(half)
        pieces = [next(following) for _ in range(3)]
        mine = order[12:24].reshape(3, 2, 2)[:, rank]
        assert torch.stack([p["block_id"] for p in pieces]).tolist() == mine.tolist()
        assert pieces[1]["state"] == first[4]["state"]
    with pytest.raises(scholiast.ScholiastError, match="another seed"):
        cache.stream(4, seed=2).load_state_dict(first[0]["state"])


# -- targets


@pytest.mark.parametrize("weights", ["entropy", "em", "min_ce", "single:two"])
def test_targets_are_those_of_the_yaml(lab: Lab, cache: scholiast.Cache, weights: str) -> None:
    fusion = {"weights": weights, "per": "sequence", "floor": 0.1, "mixing": "geometric"}
    work = lab.workspace(fusion=fusion, loss={"temperature": 2.0, "target": "bucket"})
    options = scholiast.FusionOptions.model_validate(fusion)
    batch = scholiast.collate([cache.dataset()[i] for i in (4, 0, 7)])
    found = cache.targets(batch, options, temperature=2.0, tail="bucket")
    expected = work.batch_reader().read(batch["block_id"].numpy()).target
    assert all(torch.equal(x, y) for x, y in zip(leaves(found), leaves(expected), strict=True)
               if isinstance(x, torch.Tensor))  # fmt: skip
    torch.testing.assert_close(found.p.sum(-1) + found.tail, torch.ones_like(found.tail))


# -- what is refused


@pytest.mark.parametrize(
    ("action", "match"),
    [
        (lambda root: scholiast.open_cache(root), "no teacher's cache"),
        (lambda root: scholiast.open_cache(root / "run/cache", corpus=root), "not where it is looked"),
        (lambda root: scholiast.open_cache(root / "run", teachers=["three"]), "no cache of this"),
        (lambda root: scholiast.open_cache(root / "run", k=9), "this many head entries"),
        (lambda root: scholiast.open_cache(root / "run", overrides=["fusion.tau=1"]), "only a conf"),
        (lambda root: scholiast.open_cache(root / "run").dataset("test"), "no blocks of this split"),
        (lambda root: scholiast.open_cache(root / "run").stream(2, split="test"), "no blocks"),
        (lambda root: scholiast.collate([{"input_ids": torch.zeros(1)}]), "items have no notes"),
        (lambda root: loss_of(root, temperature=3.0), "one of 1.0, 2.0"),
        (lambda root: loss_of(root, features={"weight": 1.0}), "student is not known"),
        (lambda root: targets_of(root, weights="static"), "give each of"),
        (lambda root: targets_of(root, teachers=["three"]), "must be some of"),
        (lambda root: targets_of(root, k=4), "says what is read"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(lab: Lab, action: Any, match: str) -> None:
    with pytest.raises(scholiast.ScholiastError, match=match):
        action(lab.root)


def loss_of(root: Path, **options: Any) -> scholiast.DistillationLoss:
    cache = scholiast.open_cache(root / "run")
    return scholiast.DistillationLoss(cache, scholiast.LossOptions.model_validate(options))


def targets_of(root: Path, **options: Any) -> scholiast.FusedTarget:
    cache = scholiast.open_cache(root / "run")
    batch = scholiast.collate([cache.dataset()[0]])
    return cache.targets(batch, scholiast.FusionOptions.model_validate(options))


def test_targets_of_another_caches_batch_are_refused(lab: Lab, cache: scholiast.Cache) -> None:
    one = scholiast.open_cache(lab.root / "run/cache/one")
    batch = scholiast.collate([one.dataset()[0]])
    with pytest.raises(scholiast.ScholiastError, match="no notes of a teacher"):
        cache.targets(batch)
