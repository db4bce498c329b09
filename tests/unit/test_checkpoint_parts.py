"""What a step becomes on several ranks, and checkpoints written while the training goes on."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter

import stages.checkpoint
from stages.checkpoint import Checkpoints, latest_checkpoint, load_checkpoint
from stages.ranks import Ranks
from stages.stream import shared_out
from storage.errors import ConfigError, DiskFull

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


def read(folder: Path) -> list[float]:
    tensors = {"student": {"w": torch.zeros(3)}}
    found = latest_checkpoint(folder.parent)
    assert found is not None
    facts = {"files": {}} if found[0] != folder else found[1]
    load_checkpoint(folder, facts, tensors, ALONE)
    return tensors["student"]["w"].tolist()


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_told_and_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    weights = {"student": {"w": torch.full((3,), 1.0)}}
    checkpoints = Checkpoints(tmp_path, ALONE, 2, background)
    checkpoints.save(1, weights, {})
    checkpoints.wait()
    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    with pytest.raises(DiskFull):
        checkpoints.save(2, weights, {})
        checkpoints.wait()
    checkpoints.close()
    found = latest_checkpoint(tmp_path)
    assert found is not None and found[1]["step"] == 1 and read(found[0]) == [1.0, 1.0, 1.0]


def full(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")
