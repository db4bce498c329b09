"""What a step becomes on several ranks, and checkpoints written while the training goes on."""

from __future__ import annotations

import errno
import json
import shlex
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.staging import DefaultStager

import stages.checkpoint
from pipeline.config import merged
from stages.checkpoint import (
    Checkpoints,
    checkpoint_of,
    latest_checkpoint,
    load_checkpoint,
    read_facts,
)
from stages.checkpoint_pieces import PieceWriter
from stages.ranks import Ranks
from stages.run import settings_of
from stages.stream import shared_out
from storage import durable
from storage.errors import CheckpointError, ConfigError, DiskFull

ALONE = Ranks(torch.device("cpu"))


@pytest.mark.parametrize(
    ("batch_blocks", "accumulate", "world", "expected"),
    [
        (2, 6, 1, (2, 6)),
        (2, 6, 3, (2, 2)),  # the very batches of one process
        (4, 1, 2, (2, 1)),
        (6, 2, 3, (4, 1)),
        (4, 3, 2, (3, 2)),
    ],
)
def test_a_step_is_the_same_blocks_on_any_ranks(
    batch_blocks: int, accumulate: int, world: int, expected: tuple[int, int]
) -> None:
    blocks, batches = shared_out(batch_blocks, accumulate, world)
    assert (blocks, batches) == expected
    assert blocks <= batch_blocks and blocks * batches * world == batch_blocks * accumulate


@pytest.mark.parametrize(("batch_blocks", "accumulate", "world"), [(1, 1, 2), (3, 3, 2), (1, 4, 8)])
def test_a_step_that_does_not_come_out_even_is_refused(
    batch_blocks: int, accumulate: int, world: int
) -> None:
    with pytest.raises(ConfigError, match=f"multiple of {world}"):
        shared_out(batch_blocks, accumulate, world)


def test_a_snapshot_is_written_while_the_weights_move_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts once `latest` names it, and holds what was true when it was taken."""
    may_write, save = threading.Event(), stages.checkpoint.dcp_save

    def slow(*arguments: Any, **named: Any) -> Any:
        assert may_write.wait(60)
        return save(*arguments, **named)

    monkeypatch.setattr(stages.checkpoint, "dcp_save", slow)
    weights = {"student": {"w": torch.full((3,), 1.0)}, "step": {"s": torch.tensor(5.0)}}
    checkpoints = Checkpoints(tmp_path, ALONE, 2, background=True)
    checkpoints.save(5, weights, {"tokens": 9})
    weights["student"]["w"].fill_(2.0)  # the next step, before anything is written
    assert latest_checkpoint(tmp_path) is None
    may_write.set()
    checkpoints.save(6, weights, {"tokens": 11})
    checkpoints.close()
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000005", "step-00000006"]
    assert read(tmp_path / "step-00000005") == [1.0, 1.0, 1.0]
    found = latest_checkpoint(tmp_path)
    assert found is not None and found[1]["tokens"] == 11 and read(found[0]) == [2.0, 2.0, 2.0]


def test_a_stager_that_serves_once_is_no_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch 2.11's, which closes itself whenever it has staged something."""
    stage = DefaultStager.stage

    def once(self: DefaultStager, *arguments: Any, **named: Any) -> Any:
        try:
            return stage(self, *arguments, **named)
        finally:
            self.close()

    monkeypatch.setattr(DefaultStager, "stage", once)
    checkpoints = Checkpoints(tmp_path, ALONE, 2, background=True)
    for step in (1, 2, 3):
        checkpoints.save(step, {"student": {"w": torch.full((3,), float(step))}}, {})
    checkpoints.close()
    assert steps_in(tmp_path) == [2, 3] and read(tmp_path / "step-00000003") == [3.0, 3.0, 3.0]


@pytest.mark.parametrize("again", [False, True])
def test_a_kill_while_one_is_dropped_leaves_none_that_is_not_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """Neither when the oldest goes, nor when a step is saved again that was left for an earlier one."""
    saved(tmp_path, 1, 2)

    def killed(folder: Path, **_: Any) -> None:
        (folder / "facts.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        saved(tmp_path, 2 if again else 3, keep=2)
    for step in steps_in(tmp_path):
        assert read(tmp_path / f"step-{step:08d}") == [float(step)] * 3
    saved(tmp_path, 4)
    assert not list(tmp_path.glob(".step-*")) and 4 in steps_in(tmp_path)


def read(folder: Path) -> list[float]:
    tensors = {"student": {"w": torch.zeros(3)}}
    load_checkpoint(folder, read_facts(folder), tensors, ALONE)
    return tensors["student"]["w"].tolist()


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_told_and_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    weights = {"student": {"w": torch.full((3,), 1.0)}}
    checkpoints = Checkpoints(tmp_path, ALONE, 2, background)
    checkpoints.save(1, weights, {})
    checkpoints.wait()
    monkeypatch.setattr(PieceWriter, "write_data", full)
    with pytest.raises(DiskFull):
        checkpoints.save(2, weights, {})
        checkpoints.wait()
    checkpoints.close()
    found = latest_checkpoint(tmp_path)
    assert found is not None and found[1]["step"] == 1 and read(found[0]) == [1.0, 1.0, 1.0]


def full(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def saved(root: Path, *steps: int, keep: int = 9) -> None:
    checkpoints = Checkpoints(root, ALONE, keep, background=False)
    for step in steps:
        checkpoints.save(step, {"student": {"w": torch.full((3,), float(step))}}, {"tokens": step})


def steps_in(root: Path) -> list[int]:
    return [int(path.name[5:]) for path in sorted(root.glob("step-*"))]


@pytest.mark.parametrize("keep", [1, 2])
def test_what_lies_beyond_the_step_does_not_push_it_out(tmp_path: Path, keep: int) -> None:
    """As after a kill between a checkpoint's name and `latest`, or when `latest` was set back."""
    saved(tmp_path, 10, 20, 30)
    (tmp_path / "latest").write_text("step-00000010")
    saved(tmp_path, 15, keep=keep)
    found = latest_checkpoint(tmp_path)
    assert found is not None and found[1]["step"] == 15 and read(found[0]) == [15.0, 15.0, 15.0]
    assert steps_in(tmp_path) == [10, 15][-keep:]


def test_without_latest_the_newest_counts(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20)
    (tmp_path / "latest").unlink()
    (tmp_path / "step-of-mine").mkdir()
    found = latest_checkpoint(tmp_path)
    assert found is not None and found[1]["step"] == 20
    assert checkpoint_of(tmp_path, 10)[1]["tokens"] == 10


@pytest.mark.parametrize("text", [b"", b"step-00000099", b"\xff\xfe", b"../checkpoints"])
def test_a_latest_that_names_nothing_is_refused(tmp_path: Path, text: bytes) -> None:
    root = tmp_path / "checkpoints"
    saved(root, 10, 20)
    (root / "latest").write_bytes(text)
    with pytest.raises(CheckpointError) as refused:
        latest_checkpoint(root)
    assert "step-00000010" in str(refused.value) and str(root / "latest") in str(refused.value)
    assert f"delete {root} " in str(refused.value), "not the run's folder"


@pytest.mark.parametrize(("old", "new"), [('"tokens": 7', '"tokens": 3'), ("{", ""), ("}", "}}")])
def test_facts_that_were_changed_are_refused(tmp_path: Path, old: str, new: str) -> None:
    saved(tmp_path, 7)
    path = tmp_path / "step-00000007/facts.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(CheckpointError, match="not those that were written"):
        latest_checkpoint(tmp_path)


def test_what_a_kill_has_left_makes_room_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (7, 8):
        (tmp_path / f".step-{step:08d}.tmp").mkdir()
    left: list[list[Path]] = []
    monkeypatch.setattr(
        durable, "require_free", lambda *_: left.append(list(tmp_path.glob(".step-*")))
    )
    saved(tmp_path, 8)
    assert left == [[]] and steps_in(tmp_path) == [8]


def test_other_settings_are_told_as_options(tmp_path: Path) -> None:
    """What a shell and the configuration make of them is what the other run was trained with."""
    now = {
        "corpus": "c0ffee", "student": {"files": {"config.json": "ab"}, "keep_layers": [0, 2]},
        "loss": {"alpha": 0.9, "divergence": "forward_kl"},
        "train": {"steps": 6, "epochs": None, "seed": 1}, "fusion": {"static": {"one": 0.5}},
    }  # fmt: skip
    then: dict[str, Any] = json.loads(json.dumps(now))
    then["student"]["keep_layers"] = [0, 1]
    then["loss"]["divergence"], then["train"] = (
        "reverse_kl",
        {"steps": None, "epochs": 3, "seed": 1},
    )
    then["fusion"]["static"] = None
    options = settings_of(now, then)
    words = shlex.split(" ".join(options))
    assert words[::2] == ["--set"] * 5
    (tmp_path / "x.yaml").write_text(json.dumps(now))
    laid = merged(tmp_path / "x.yaml", words[1::2])
    assert laid == then
    for key, value in (("corpus", "decaf"), ("student", {**then["student"], "files": {}})):
        assert settings_of(now, {**then, key: value}) == [], "more than settings differs"
    assert settings_of(now, {**then, "train": {"steps": 6, "epochs": None}}) == [], (
        "of a version without such a key"
    )
