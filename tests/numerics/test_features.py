"""Feature alignment: pooling, distances and projections against plain loops; which layers are paired."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Lab
from safetensors.torch import load_file
from torch import Tensor

from stages.annotate import pool
from stages.checkpoint import latest_checkpoint, load_checkpoint
from stages.features import LOSSES, FeatureAligner, FixedProjection, require_same_batches
from stages.layer_pairs import at_depth, resolve_pairs, wanted_layers
from stages.optimizer import make_optimizer
from stages.ranks import Ranks
from stages.target_options import FeatureOptions
from stages.train_options import TrainOptions
from storage.errors import ConfigError

N, D, D_TEACHER = 5, 4, 6


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_pooling_is_that_of_a_plain_loop(pooling: str) -> None:
    """Over blocks with holes, padding and empty spans; in value and in gradient."""
    hidden = drawn(0, 3, 10, D).float().requires_grad_()
    present = torch.rand(3, 10, generator=torch.Generator().manual_seed(1)) < 0.5
    present[0], present[1, 3:], present[2, 7:] = True, False, False
    found, counts = pool(hidden, present, 3, pooling)
    expected = torch.zeros(3, 3, D)
    for b in range(3):
        for g, span in enumerate((range(0, 3), range(3, 6), range(6, 10))):
            there = [t for t in span if present[b, t]]
            assert int(counts[b, g]) == len(there)
            if there and pooling == "last":
                expected[b, g] = hidden[b, there[-1]]
            elif there:
                expected[b, g] = torch.stack([hidden[b, t] for t in there]).mean(0)
    assert (counts == 0).any() and found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    weight = drawn(2, 3, 3, D).float()
    ours, theirs = (torch.autograd.grad((x * weight).sum(), hidden)[0] for x in (found, expected))
    torch.testing.assert_close(ours, theirs)


def plain(kind: str, ours: list[Tensor], theirs: list[Tensor], weight: list[float]) -> Tensor:
    """Σ of weight·distance, a segment at a time."""

    def cosine(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())

    def normed(a: Tensor) -> Tensor:
        return (a - a.mean()) / a.std(correction=0)

    total = torch.zeros((), dtype=torch.float64)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if kind == "cosine":
            total = total + weight[i] * (1 - cosine(normed(a), normed(b)))
        elif kind == "mse":
            total = total + weight[i] * sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / D
        else:
            others = [j for j in range(len(ours)) if j != i]
            squares = [weight[j] * (cosine(a, ours[j]) - cosine(b, theirs[j])) ** 2 for j in others]
            company = sum(weight[j] for j in others)
            total = total + weight[i] * sum(squares) / company if company else total
    return total


@pytest.mark.parametrize("kind", list(LOSSES))
@pytest.mark.parametrize(
    "weight", [[0.3, 0.0, 1.0, 0.6, 0.2], [0.0, 0.7, 0.0, 0.0, 0.0], [0.0] * 5]
)
def test_losses_are_those_of_plain_loops(kind: str, weight: list[float]) -> None:
    """In value, and in gradient to every row; rows without weight get none."""
    ours, theirs = drawn(3, N, D).requires_grad_(), drawn(4, N, D if kind != "gram" else D_TEACHER)
    given = torch.tensor(weight, dtype=torch.float64)
    expected = plain(kind, list(ours), list(theirs), weight)
    found = LOSSES[kind](ours, theirs, given)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-12)  # LayerNorm adds 1e-5
    if expected.requires_grad:
        mine, right = (torch.autograd.grad(x, ours)[0] for x in (found, expected))
        torch.testing.assert_close(mine, right, rtol=1e-3, atol=1e-5)
        assert not mine[[i for i, w in enumerate(weight) if w == 0]].any()
    assert torch.autograd.gradcheck(lambda x: LOSSES[kind](x, theirs, given), ours)


@pytest.mark.parametrize("kind", list(LOSSES))
def test_an_empty_segment_neither_counts_nor_harms(kind: str) -> None:
    """Zeros on both sides, as padding leaves them: the same loss without them, finite gradients."""
    ours, theirs, weight = drawn(5, N, D), drawn(6, N, D), torch.rand(N).double()
    whole = LOSSES[kind](ours, theirs, weight)
    padded = torch.cat([ours, torch.zeros(2, D)]).requires_grad_()
    loss = LOSSES[kind](
        padded, torch.cat([theirs, torch.zeros(2, D)]), torch.cat([weight, torch.zeros(2)])
    )
    torch.testing.assert_close(loss, whole)
    (gradient,) = torch.autograd.grad(loss, padded)
    assert bool(gradient.isfinite().all()) and not gradient[N:].any()


def test_what_each_kind_does_not_see() -> None:
    """cosine: shift and scale of the hidden vector; gram: any rotation; mse: nothing."""
    ours, theirs, weight = drawn(7, N, D), drawn(8, N, D), torch.ones(N, dtype=torch.float64)
    turned = ours @ torch.linalg.qr(drawn(9, D, D)).Q
    for kind, changed, same in (
        ("cosine", 100 * ours + 7, True), ("gram", 3 * turned, True), ("mse", ours + 7, False),
        ("cosine", turned, False), ("gram", ours + 7, False),
    ):  # fmt: skip
        a, b = (float(LOSSES[kind](x, theirs, weight)) for x in (ours, changed))
        assert (a == pytest.approx(b, rel=1e-4)) == same, kind
    for kind in LOSSES:
        assert float(LOSSES[kind](theirs, theirs, weight)) == pytest.approx(0.0, abs=1e-9)


def aligner(seed: int = 0, **options: Any) -> FeatureAligner:
    torch.manual_seed(1)
    pairs = [(1, "a", 2), (2, "a", 3), (2, "b", 2)]
    return FeatureAligner(pairs, FeatureOptions(**options), D, {"a": D_TEACHER, "b": 3}, seed)


@pytest.mark.parametrize("kind", list(LOSSES))
@pytest.mark.parametrize("projection", ["linear", "random"])
def test_pairs_are_added_up_with_their_teachers_weights(kind: str, projection: str) -> None:
    one = aligner(kind=kind, projection=projection)
    pooled = {n: drawn(n, 3, 2, D).float() for n in (1, 2)}
    features = {("a", 2): drawn(11, 3, 2, 6).float(), ("a", 3): drawn(12, 3, 2, 6).float(),
                ("b", 2): drawn(13, 3, 2, 3).float()}  # fmt: skip
    weights = {name: torch.rand(3, 2, generator=torch.Generator().manual_seed(i))
               for i, name in enumerate("ab")}  # fmt: skip
    total = sum(
        LOSSES[kind](
            project(pooled[ours]).flatten(0, 1), features[name, layer].flatten(0, 1),
            weights[name].flatten(),
        )
        for project, (ours, name, layer) in zip(one.projections, one.pairs, strict=True)
    )  # fmt: skip
    found = one(pooled, features, weights)
    torch.testing.assert_close(found, total / 2)  # two student layers
    assert float(found.detach()) > 0.01
    trained = [p for project in one.projections for p in project.parameters()]
    assert bool(trained) == (kind != "gram" and projection == "linear")


def test_random_projections_are_of_the_seed_and_keep_lengths() -> None:
    first, again, other = (
        [project.weight for project in aligner(seed, projection="random").projections]
        for seed in (3, 3, 4)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    x = drawn(0, 64, 300).float()
    for size in (100, 900):
        project = FixedProjection(300, size, torch.Generator().manual_seed(0))
        share = project(x).norm(dim=1) / x.norm(dim=1)
        # Σ of `size` squared normals: the length's spread is about 1/√(2·size).
        assert abs(float(share.mean()) - 1) < 0.03 and float(share.std()) < 2 / math.sqrt(2 * size)


def test_random_projections_are_kept_and_never_trained(lab: Lab) -> None:
    """Not in the optimizer, the same after training, in the checkpoint, not in the export."""
    one = aligner(projection="random")
    groups = make_optimizer(one, TrainOptions(steps=1)).param_groups
    assert not any(group["params"] for group in groups)
    features = {"weight": 1.0, "projection": "random", "pairs": "auto"}
    work = lab.workspace(loss__features=features, train__steps=2, train__seed=5)
    work.cache_teachers()
    run = work.train_students()["fused"]
    found = latest_checkpoint(run.folder / "checkpoints")
    assert found is not None and found[1]["step"] == 2
    state = {
        f"aligner.projections.{i}.weight": torch.zeros(size, 32) for i, size in enumerate((32, 64))
    }
    load_checkpoint(found[0], found[1], {"student": state}, Ranks(torch.device("cpu")))
    generator = torch.Generator().manual_seed(5)
    for weight in state.values():
        assert torch.equal(weight, FixedProjection(32, len(weight), generator).weight)
    saved = load_file(run.model_folder / "model.safetensors")
    assert saved and not [name for name in saved if "aligner" in name or "projection" in name]
    pairs = [{"student": 1, "teacher": name, "layer": 2} for name in ("one", "two")]
    assert run.identity["feature_pairs"] == pairs  # layer 2 of 3 is layer 1⅓ of 2


def test_last_tokens_are_aligned_from_the_cache(lab: Lab) -> None:
    """Both ways of decoding give the arrays' bits; another pooling is other features."""
    lab.config["store"] |= {"segments": 2, "pooling": ["last", "mean"]}
    lab.config["loss"]["features"] = {"weight": 1.0, "kind": "gram", "pairs": "auto"}
    lab.workspace().cache_teachers()
    ids, batches = np.array([4, 0, 3]), {}
    for pooled in ("mean", "last"):
        work = lab.workspace(loss__features__pooled=pooled)
        reader = work.batch_reader(on_device=True)
        packed = reader.read(ids)
        name = {"mean": "feature_2", "last": "feature_last_2"}[pooled]
        stored = {x for x in packed.packed["one"] if x.startswith("feature_")}
        assert stored == {name, "feature_count"}, "what is not aligned is not read"
        batches[pooled] = work.batch_reader().read(ids).features
        on_device = reader.ready(packed, torch.device("cpu")).features
        assert on_device.keys() == batches[pooled].keys() == {("one", 2), ("two", 2)}
        for key, values in batches[pooled].items():
            assert torch.equal(on_device[key], values) and values.shape[:2] == (3, 2)
    assert not torch.equal(batches["mean"]["one", 2], batches["last"]["one", 2])
    lab.workspace(loss__features__pooled="last", train__steps=2).train_students()
    lines = (lab.root / "run/students/fused/metrics.jsonl").read_text().splitlines()
    losses = [row["features"] for row in map(json.loads, lines) if "features" in row]
    assert len(losses) == 2 and all(0.0 < loss < 4.0 for loss in losses)


@pytest.mark.parametrize(
    ("layer", "depth", "ours", "expected"),
    [(29, 30, 6, 6), (30, 30, 6, 6), (1, 30, 6, 1), (15, 30, 6, 3), (12, 30, 6, 2), (13, 30, 6, 3),
     (3, 4, 2, 2), (1, 4, 2, 1), (2, 2, 24, 24), (1, 2, 24, 12), (5, 12, 30, 13)],
)  # fmt: skip
def test_layers_at_the_same_relative_depth(
    layer: int, depth: int, ours: int, expected: int
) -> None:
    assert at_depth(layer, depth, ours) == expected
    exact = layer / depth * ours
    assert expected == max(1, math.floor(exact + 0.5 + 1e-9))


def test_pairs_by_depth_and_by_hand() -> None:
    stored = {"a": (2, 3), "b": (3,), "c": ()}
    auto = FeatureOptions(weight=1.0)
    assert auto.pairs == "auto"
    pairs = resolve_pairs(auto, stored, {"a": 4, "b": 3}, 2)
    assert pairs == [(1, "a", 2), (2, "a", 3), (2, "b", 3)]
    assert wanted_layers(auto, stored) == stored
    by_name = FeatureOptions(weight=1.0, pairs=({"student": 1, "teacher": {"a": 2}},))
    assert resolve_pairs(by_name, stored, {}, 0) == [(1, "a", 2)]
    assert wanted_layers(by_name, stored) == {"a": (2,), "b": (), "c": ()}
    both = FeatureOptions(weight=1.0, pairs=({"student": 1, "teacher": 3},))
    assert resolve_pairs(both, {"a": (2, 3), "b": (3,)}, {}, 0) == [(1, "a", 3), (1, "b", 3)]
    assert resolve_pairs(FeatureOptions(), stored, {}, 0) == []
    assert wanted_layers(FeatureOptions(), stored) == {"a": (), "b": (), "c": ()}


def test_pairs_must_be_stored() -> None:
    stored = {"a": (2, 3), "b": (3,)}
    for pairs, match in (
        (({"student": 1, "teacher": 2},), "'b' holds no features of layer 2"),
        (({"student": 1, "teacher": {"c": 2}},), "no teacher 'c'"),
        ((), "no layers"),
    ):
        with pytest.raises(ConfigError, match=match):
            resolve_pairs(FeatureOptions(weight=1.0, pairs=pairs), stored, {}, 0)
    with pytest.raises(ConfigError, match="no teacher's features are stored"):
        resolve_pairs(FeatureOptions(weight=1.0), {"a": ()}, {}, 2)


def test_a_model_that_does_not_tell_its_depth_is_refused(lab: Lab, tmp_path: Path) -> None:
    from pipeline.student_identity import depth_of

    assert depth_of(lab.root / "a", "teachers.one.model") == 3
    (tmp_path / "config.json").write_text('{"hidden_size": 32}')
    with pytest.raises(ConfigError, match=r"by hand in loss\.features\.pairs"):
        depth_of(tmp_path, "teachers.one.model")


def test_a_gram_matrix_wants_the_micro_batches_of_one_process() -> None:
    gram, cosine = (FeatureOptions(weight=1.0, kind=kind) for kind in ("gram", "cosine"))
    require_same_batches(gram, 4, 4)
    require_same_batches(cosine, 4, 2)
    require_same_batches(FeatureOptions(kind="gram"), 4, 2)
    with pytest.raises(ConfigError, match="whole micro-batches"):
        require_same_batches(gram, 4, 2)
