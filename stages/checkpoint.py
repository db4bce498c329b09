"""Training checkpoints: DCP for resuming, save_pretrained for use.

A checkpoint is a folder of its own, written under another name and renamed; `latest` is replaced
atomically afterwards. Overwriting one in place would lose it at the wrong moment.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from storage import durable
from storage.errors import CheckpointError
from storage.fingerprint import file_sha256

_LATEST = "latest"


@contextmanager
def _quiet() -> Iterator[None]:
    """DCP warns that it runs in one process, which is meant."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def save_checkpoint(
    root: Path, step: int, tensors: dict[str, Any], facts: dict[str, Any], keep: int
) -> None:
    """Commits the state after `step` and drops all but the last `keep` checkpoints.

    Args:
        root: folder of the run's checkpoints.
        tensors: state dicts of tensors, for DCP.
        facts: JSON: whatever else a resume needs.

    Raises:
        DiskFull: the earlier checkpoints are untouched.
    """
    name = f"step-{step:08d}"
    temporary = root / f".{name}.tmp"
    size = sum(t.nbytes for t in _leaves(tensors))
    durable.require_free(root, size + (16 << 20), f"the checkpoint of step {step}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with durable.disk_errors(root), _quiet():
        dcp_save(tensors, checkpoint_id=temporary, no_dist=True)
        files = {path.name: file_sha256(path) for path in sorted(temporary.iterdir())}
        body = {**facts, "step": step, "files": files}
        (temporary / "facts.json").write_text(json.dumps(body))
        durable.replace_folder(temporary, root / name)
        durable.write_bytes(root / _LATEST, name.encode())
    for old in sorted(root.glob("step-*"))[:-keep]:
        shutil.rmtree(old)


def _leaves(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)


def latest_checkpoint(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """Returns the newest checkpoint's folder and facts, or None if there is none.

    Raises:
        CheckpointError: `latest` names what is not there or cannot be read.
    """
    pointer = root / _LATEST
    if not pointer.exists():
        return None
    folder = root / pointer.read_text().strip()
    try:
        return folder, json.loads((folder / "facts.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the newest checkpoint cannot be read: {error}", where=folder,
            todo=f"write the name of an older step-* folder into {pointer}, or delete {root} "
            "to train from the beginning",
        ) from error  # fmt: skip


def load_checkpoint(folder: Path, facts: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Loads a checkpoint into the given tensors, in place.

    Args:
        facts: from `latest_checkpoint`; they hold the sha256 of every file.

    Raises:
        CheckpointError: it is damaged or has other tensors.
    """
    for name, digest in facts["files"].items():
        path = folder / name
        if not path.exists() or file_sha256(path) != digest:
            raise CheckpointError(
                "a file of the checkpoint is missing or has bytes that were not written there",
                where=path, todo="point `latest` at an older step-* folder, or delete the "
                "checkpoints to begin anew",
            )  # fmt: skip
    try:
        with _quiet():
            dcp_load(tensors, checkpoint_id=folder, no_dist=True)
    except Exception as error:  # DCP wraps whatever went wrong in its own kinds
        raise CheckpointError(
            f"the checkpoint cannot be loaded: {str(error).strip().splitlines()[-1]}", where=folder,
            todo="point `latest` at an older step-* folder, or delete the checkpoints to begin anew",
        ) from error  # fmt: skip


def export(
    model: Any, tokenizer: Any, dtype: torch.dtype, folder: Path, facts: dict[str, Any]
) -> None:
    """Saves an ordinary transformers checkpoint: safetensors, tokenizer, generation config.

    Args:
        dtype: of the saved weights; the model itself is left as it is.
        facts: provenance, kept beside it as scholiast.json; its presence tells a finished export.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    state = {name: value.detach().to("cpu", dtype) for name, value in model.state_dict().items()}
    before = model.config.dtype
    model.config.dtype = dtype
    with durable.disk_errors(folder):
        model.save_pretrained(temporary, state_dict=state)
        tokenizer.save_pretrained(temporary)
        (temporary / "scholiast.json").write_text(json.dumps(facts, indent=2, sort_keys=True))
        durable.replace_folder(temporary, folder)
    model.config.dtype = before
