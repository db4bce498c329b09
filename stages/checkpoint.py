"""Training checkpoints by DCP (torch.distributed.checkpoint), for resuming on any number of ranks.

A checkpoint is a folder of its own. All ranks write their pieces under another name and hash them; then
rank 0 writes the facts, renames the folder and, last, replaces `latest` atomically. A folder with its own
name is thus whole, and `latest` says which one the training goes on from (without `latest`, the newest).
Overwriting one in place would lose it at the wrong moment.

DCP plans who writes and reads what; how it lies there is our own (see checkpoint_pieces), because DCP's
storage is pickles. The facts are JSON that carries its sha256.

Names of tensors do not depend on how the student is parallel, and DCP cuts them anew when it loads, so
a checkpoint of one process, of DDP or of FSDP2 serves any of them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import re
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from stages.checkpoint_pieces import INDEX, PieceReader, PieceWriter, file_of
from stages.ranks import Ranks
from storage import durable
from storage.checked import parse_signed
from storage.errors import CheckpointError
from storage.fingerprint import file_sha256, fingerprint

_LATEST, _FACTS = "latest", "facts.json"


@contextlib.contextmanager
def _dcp() -> Iterator[None]:
    """Keeps DCP from warning that it runs in one process, and raises what it has wrapped."""
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavail)")
    try:
        yield
    except CheckpointException as wrapped:
        causes = [cause for cause, _ in wrapped.failures.values()]
        full = (errno.ENOSPC, errno.EDQUOT)
        raise next((c for c in causes if getattr(c, "errno", 0) in full), causes[0]) from None


def save_checkpoint(
    root: Path, step: int, tensors: dict[str, Any], facts: dict[str, Any], keep: int, ranks: Ranks
) -> None:
    """Commits the state after `step` and drops all but the last `keep` checkpoints up to it.

    Later ones are of a course that was left, by a kill or by hand, and go as well.

    Args:
        root: folder of the run's checkpoints, seen by all ranks.
        tensors: state dicts of tensors, for DCP.
        facts: JSON: whatever else a resume needs.
        ranks: who write together; all of them call this.

    Raises:
        DiskFull: the earlier checkpoints are untouched.
    """
    name = f"step-{step:08d}"
    temporary = root / f".{name}.tmp"

    def begin() -> None:
        for left in root.glob(".step-*.tmp"):  # by a kill, or by a disk that was full
            shutil.rmtree(left, ignore_errors=True)
        size = sum(t.nbytes for t in _leaves(tensors))
        durable.require_free(
            root,
            size + (16 << 20),
            f"the checkpoint of step {step}",
            "smaller train.keep_checkpoints",
        )
        with durable.disk_errors(root):
            temporary.mkdir(parents=True)

    def write() -> dict[str, str]:
        with durable.disk_errors(root), _dcp():
            dcp_save(
                tensors, storage_writer=PieceWriter(temporary), process_group=ranks.group,
                no_dist=ranks.world == 1,
            )  # fmt: skip
        mine = [temporary / file_of(ranks.rank), *([temporary / INDEX] if ranks.first else [])]
        return {path.name: file_sha256(path) for path in mine if path.exists()}

    def commit() -> None:
        if (root / name).exists():  # of a course that was left
            _drop(root / name)
        with durable.disk_errors(root):
            (temporary / _FACTS).write_text(json.dumps({**body, "sha256": fingerprint(body)}))
            durable.replace_folder(temporary, root / name)
            durable.write_bytes(root / _LATEST, name.encode())
        _prune(root, step, keep)

    ranks.on_first(begin)
    digests = ranks.gather(ranks.together(write))
    files = {name: digest for mine in digests for name, digest in sorted(mine.items())}
    body = {**facts, "step": step, "ranks": ranks.world, "files": files}
    ranks.on_first(commit)


def _prune(root: Path, step: int, keep: int) -> None:
    """Drops all checkpoints but the last `keep` up to a step."""
    there = _folders(root)
    kept = [number for number in there if number <= step][-keep:]
    for number in there.keys() - set(kept):
        _drop(there[number])


def _drop(folder: Path) -> None:
    """Deletes a checkpoint, under another name first: a kill in between leaves none that is not whole."""
    dropped = folder.with_name(f".{folder.name}.old.tmp")
    folder.rename(dropped)
    durable.fsync_folder(folder.parent)
    shutil.rmtree(dropped)


def _folders(root: Path) -> dict[int, Path]:
    """Returns the checkpoints of a run, step → folder, ascending."""
    marks = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in root.glob("step-*"))
    return dict(sorted((int(mark[1]), path) for mark, path in marks if mark))


def _leaves(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)


class Checkpoints:
    """Saves one run's checkpoints, each at once or while the training goes on.

    Args:
        root: their folder.
        ranks: who train together; all of them call the same methods in the same order.
        keep: how many are kept.
        background: copy the state to memory, and write it in a thread. Costs that memory meanwhile; at
            most one is being written at a time, and a failure is raised by the next call.
    """

    def __init__(self, root: Path, ranks: Ranks, keep: int, background: bool) -> None:
        self._root, self._keep = root, keep
        self._ranks = ranks.apart() if background else ranks
        self._pool = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._pending: Future[None] | None = None

    def save(self, step: int, tensors: dict[str, Any], facts: dict[str, Any]) -> None:
        """Saves the state after a step, or begins to.

        Raises:
            DiskFull: this one or, in the background, the one before could not be written.
        """
        self.wait()
        arguments = (facts, self._keep, self._ranks)
        if self._pool is None:
            save_checkpoint(self._root, step, tensors, *arguments)
            return
        # A stager for each save: torch 2.11's empties itself after the first (pytorch issue 183413).
        stager = DefaultStager(StagingOptions(False, False, False, False))
        copies: Any = stager.stage(tensors)
        stager.close()
        self._pending = self._pool.submit(save_checkpoint, self._root, step, copies, *arguments)

    def wait(self) -> None:
        """Returns when `latest` names what was last saved."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits, and lets go of thread and memory."""
        self.wait()
        if self._pool is not None:
            self._pool.shutdown()


def latest_checkpoint(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """Returns the newest checkpoint's folder and facts, or None if there is none.

    Raises:
        CheckpointError: `latest` names what is not there, or it cannot be read.
    """
    pointer, there = root / _LATEST, list(_folders(root).values())
    if pointer.exists():
        name = pointer.read_bytes().decode(errors="replace").strip()
        found = [folder for folder in there if folder.name == name]
        if not found:
            raise CheckpointError(
                "the file names no checkpoint that is there", where=pointer,
                expected=f"one of {[folder.name for folder in there] or 'none'}", found=repr(name),
                todo=f"write one of these names into it, or delete {root} to train from the beginning",
            )  # fmt: skip
    else:  # a kill came between the first checkpoint's name and this file
        found = there[-1:]
    return (found[0], read_facts(found[0])) if found else None


def checkpoint_of(root: Path, step: int | None) -> tuple[Path, dict[str, Any]]:
    """Returns folder and facts of the checkpoint after a step, or of the newest.

    Raises:
        CheckpointError: there is none.
    """
    there = _folders(root)
    if step in there:
        return there[step], read_facts(there[step])
    found = latest_checkpoint(root) if step is None else None
    if found is None:
        raise CheckpointError(
            "there is no such checkpoint", where=root, expected=f"one of {list(there) or 'none'}",
            found="the newest" if step is None else f"step {step}",
            todo="name one that is there; train.keep_checkpoints says how many are kept",
        )  # fmt: skip
    return found


def read_facts(folder: Path) -> dict[str, Any]:
    """Returns what a checkpoint says of itself.

    Raises:
        CheckpointError: it cannot be read, or its own checksum does not hold.
    """
    try:
        facts = parse_signed((folder / _FACTS).read_bytes())
        whole = _possible(facts)
    except (OSError, ValueError):
        whole = False
    if not whole:
        raise CheckpointError(
            "the checkpoint's facts are missing, or are not those that were written",
            where=folder / _FACTS, todo=_older(folder),
        )  # fmt: skip
    return facts


def _possible(facts: dict[str, Any]) -> bool:
    """Returns whether facts have what every checkpoint's have, and name files of the folder itself."""
    files, numbers = facts.get("files"), [facts.get("step"), facts.get("ranks")]
    return (
        isinstance(files, dict)
        and all(re.fullmatch(r"[a-z]+(-\d+)?\.[a-z]+", name) for name in files)
        and all(isinstance(digest, str) for digest in files.values())
        and all(isinstance(number, int) and number > 0 for number in numbers)
    )


def _older(folder: Path) -> str:
    """Returns what to do about a checkpoint that cannot be used."""
    root = folder.parent
    return (
        f"write the name of an older step-* folder into {root / _LATEST}, or delete {root} to train "
        "from the beginning"
    )


def load_checkpoint(
    folder: Path, facts: dict[str, Any], tensors: dict[str, Any], ranks: Ranks
) -> None:
    """Loads a checkpoint into the given tensors, in place; the ranks share out the hashing.

    Args:
        facts: from `latest_checkpoint`; they hold the sha256 of every file.

    Raises:
        CheckpointError: it is damaged or has other tensors.
    """

    def check() -> None:
        if INDEX not in facts["files"]:
            raise CheckpointError(
                "the checkpoint is of an earlier version, whose tensors are listed in a pickle",
                where=folder, expected=INDEX, todo=f"delete {folder.parent} to train from the beginning",
            )  # fmt: skip
        for name, digest in list(facts["files"].items())[ranks.rank :: ranks.world]:
            path = folder / name
            if not path.is_file() or file_sha256(path) != digest:
                raise CheckpointError(
                    "a file of the checkpoint is missing or has bytes that were not written there",
                    where=path, todo=_older(folder),
                )  # fmt: skip

    def load() -> None:
        try:
            with _dcp():
                dcp_load(
                    tensors, storage_reader=PieceReader(folder, facts["files"]),
                    process_group=ranks.group, no_dist=ranks.world == 1,
                )  # fmt: skip
        except Exception as error:
            text = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise CheckpointError(
                f"the checkpoint cannot be loaded: {text}", where=folder,
                todo=_older(folder),
            ) from error  # fmt: skip

    ranks.together(check)
    ranks.together(load)
