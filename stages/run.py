"""What one training is: its folder, its options, what identifies it, and whether it is done."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stages.order import Ranges
from stages.ranks import Ranks
from stages.target_options import LossOptions
from stages.train_options import LoraOptions, TrainOptions
from storage import durable
from storage.checked import parse, read_bounded
from storage.errors import CheckpointError
from storage.fingerprint import describe_differences, differences, fingerprint
from storage.types import Int64

_SETTINGS = ("fusion.", "loss.", "student.", "train.")
_FILES = "student.files"  # sha256 of them, beside the settings of that section


@dataclass(frozen=True)
class Run:
    """One student's training.

    Attributes:
        folder: where metrics, checkpoints and the finished model go.
        identity: what decides the result; a checkpoint of another identity is refused.
        train, loss: options.
        train_blocks: ranges of blocks.
        heldout_blocks: int64 block ids.
        dtype: of the exported weights.
        lora: the adapters that are merged at export, if there are any.
        card: gives the model card of what was saved in a folder, to stand beside it.
    """

    folder: Path
    identity: dict[str, Any]
    train: TrainOptions
    loss: LossOptions
    train_blocks: Ranges
    heldout_blocks: Int64
    dtype: torch.dtype
    lora: LoraOptions | None = None
    card: Callable[[Path], str] | None = None

    @property
    def model_folder(self) -> Path:
        return self.folder / "model"

    @property
    def steps(self) -> int:
        return self.train.steps_over(sum(count for _, count in self.train_blocks))


def finished(run: Run) -> bool:
    """Returns whether the run's model is exported.

    Raises:
        StaleCache, CheckpointError: the folder holds a model of another run.
    """
    path = run.model_folder / "scholiast.json"
    if not path.exists():
        return False
    require_identity(run, exported_facts(path).get("identity"), run.model_folder)
    return True


def exported_facts(path: Path) -> dict[str, Any]:
    """Returns what an exported student's scholiast.json says.

    Raises:
        CheckpointError: it is no such file.
    """
    try:
        facts = parse(read_bounded(path))
    except (OSError, ValueError) as error:
        facts = error
    if not isinstance(facts, dict):
        raise CheckpointError(
            "what the model was made from cannot be read", where=path, found=facts,
            todo=f"delete {path.parent}, and run the same command again",
        )  # fmt: skip
    return facts


@contextlib.contextmanager
def claimed(run: Run, ranks: Ranks) -> Iterator[None]:
    """Keeps the run's folder for these ranks, for the length of the block.

    Raises:
        CheckpointError: another training is at work there.
    """

    def claim() -> None:
        durable.make_folder(run.folder)
        try:
            held.enter_context(durable.claimed(run.folder / ".training"))
        except BlockingIOError as error:
            raise CheckpointError(
                "another training is at work in the folder", where=run.folder, found=error.strerror,
                todo="wait for its end, or stop it, or name another run_dir",
            ) from error  # fmt: skip

    with contextlib.ExitStack() as held:
        ranks.on_first(claim)
        yield


def require_identity(run: Run, found: Any, where: Path) -> None:
    """Refuses what another run has left.

    Raises:
        CheckpointError: says which settings differ.
    """
    found = found if isinstance(found, dict) else {}
    if isinstance(found.get("loss"), dict):  # memory, not meaning: earlier versions named them
        loss = {k: v for k, v in found["loss"].items() if k not in ("chunk_bytes", "chunk_tokens")}
        found = {**found, "loss": loss}
    if fingerprint(found) != fingerprint(run.identity):
        ours, theirs = describe_differences(run.identity, found)
        options = settings_of(run.identity, found)
        what, restore = "the folder holds another run", "restore those settings"
        if options:
            what = "the folder holds a student of other settings"
            restore = f"give this command, too, what it was trained with: {' '.join(options)}"
        raise CheckpointError(
            what, where=where, expected=f"{ours}, as given now", found=f"{theirs}, as it was trained",
            todo=f"{restore}, or name another run_dir (and in corpus_dir and cache_dir what is there "
            f"now), or delete {run.folder}",
        )  # fmt: skip


def settings_of(now: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Returns the options that give a command the settings of another run of this folder, quoted for a
    shell; none where more differs than settings: corpus, caches, the student's own files.

    Args:
        now, found: identities.
    """
    options = []
    for key, _, value in differences(now, found):
        if not key.startswith(_SETTINGS) or key.startswith(_FILES) or not _has(found, key):
            return []
        text = value if isinstance(value, str) else json.dumps(value)
        options += ["--set", shlex.quote(f"{key}={text}")]
    return options


def _has(identity: Any, key: str) -> bool:
    """Returns whether an identity names a key at all: an earlier version's may not."""
    for part in key.split("."):
        if not isinstance(identity, Mapping) or part not in identity:
            return False
        identity = identity[part]
    return True
