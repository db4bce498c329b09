"""What may be asked for at reading time: decoding on the device, fewer teachers, a smaller head."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Lab

from stages.batches import Batch
from storage.errors import ConfigError


@pytest.fixture(scope="module", params=["balanced", "compact"])
def made(
    request: pytest.FixtureRequest, _parts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Lab:
    lab = Lab(Path(shutil.copytree(_parts, tmp_path_factory.mktemp("made") / "lab")))
    lab.config["store"] |= {
        "preset": request.param,
        "draws": 6 if request.param == "compact" else 0,
    }
    lab.workspace().cache_teachers()
    return lab


@pytest.fixture
def cached(made: Lab, tmp_path: Path) -> Lab:
    lab = Lab(Path(shutil.copytree(made.root, tmp_path / "lab")))
    lab.config["store"] = made.config["store"]
    return lab


def tensors(batch: Batch) -> dict[str, Any]:
    target = batch.target
    assert target is not None
    named = {n: getattr(target, n) for n in ("ids", "logp", "p", "tail", "weights")}
    named |= {f"feature {key}": value for key, value in batch.features.items()}
    return named | {f"weight {key}": value for key, value in batch.segment_weights.items()}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_batch_decoded_on_the_device_has_the_same_bits(cached: Lab, temperature: float) -> None:
    work, ids = cached.workspace(loss__temperature=temperature), np.array([4, 0, 3])
    plain = work.batch_reader().read(ids)
    reader = work.batch_reader(on_device=True)
    packed = reader.read(ids)
    assert packed.target is None and set(packed.packed) == {"one", "two"}
    found, expected = tensors(reader.ready(packed, torch.device("cpu"))), tensors(plain)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def losses(lab: Lab, name: str) -> list[float]:
    lines = (lab.root / "run/students" / name / "metrics.jsonl").read_text().splitlines()
    return [row["total"] for row in map(json.loads, lines) if "total" in row]


def test_training_is_the_same_wherever_notes_are_decoded(cached: Lab) -> None:
    curves = []
    for decode in ("cpu", "device"):
        work = cached.workspace(train__decode=decode)
        work.train_students()
        curves.append(losses(cached, "fused"))
        (cached.root / "run/students").rename(cached.root / f"run/students-{decode}")
    assert len(curves[0]) == 6 and curves[0] == curves[1]


@pytest.mark.after("cache-teachers")
def test_subset_of_teachers_and_of_entries(lab: Lab, cli: Any) -> None:
    config = lab.write(fusion={"teachers": ["two"], "k": 3}, train__steps=2)
    for command in ("train-student", "evaluate", "report"):
        assert cli(command, config).exit_code == 0, command
    found = json.loads((lab.root / "run/evaluation.json").read_text())
    assert list(found["teachers"]) == ["two"]
    batch = lab.workspace(fusion={"teachers": ["two"], "k": 3}).batch_reader().read(np.array([1]))
    assert batch.target is not None and batch.target.ids.shape[0] == 1
    assert batch.target.ids.shape[-1] == 3


@pytest.mark.long
@pytest.mark.parametrize("bare", ["one", "two"])
def test_a_teacher_without_features_has_no_segments_to_disagree_about(lab: Lab, bare: str) -> None:
    """Its segments count the fused weights of the others' features all the same."""
    lab.config["teachers"][bare]["feature_layers"] = []
    other = {"one": "two", "two": "one"}[bare]
    lab.config["loss"]["features"]["pairs"] = [{"student": 1, "teacher": {other: 2}}]
    work = lab.workspace(store__segments=2)
    work.cache_teachers()
    batch = work.batch_reader().read(np.array([0, 1]))
    assert [tuple(f.shape[:2]) for f in batch.features.values()] == [(2, 2)]
    assert {name: tuple(w.shape) for name, w in batch.segment_weights.items()} == {
        "one": (2, 2), "two": (2, 2),
    }  # fmt: skip
    work.train_students()
    assert all(np.isfinite(losses(lab, "fused")))


@pytest.mark.parametrize(
    ("fusion", "store", "message"),
    [
        ({"teachers": ["three"]}, {}, "three"),
        ({"teachers": []}, {}, "none"),
        ({"k": 9}, {}, "more than store.k, 8"),
        ({"k": 3}, {"draws": 4}, "tail draws"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(
    lab: Lab, fusion: dict[str, Any], store: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        lab.workspace(fusion=fusion, store={**lab.config["store"], **store})
