"""`scholiast import`: from a configuration and options to a cache."""

from __future__ import annotations

import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.exchange.captured import Format, Keys, Reading, Values, capture_files, usual_offset
from pipeline.exchange.found import Wanted
from pipeline.exchange.importing import Import, read_into
from storage import durable
from storage.blocks import BlockReader
from storage.errors import (
    ConfigError,
    CorruptShard,
    IncompleteCache,
    StaleCache,
    VocabularyMismatch,
)
from storage.fingerprint import fingerprint
from storage.remote import require_local
from storage.writer import is_imported, open_cache

if TYPE_CHECKING:
    from pipeline.workspace import Workspace


@dataclass(frozen=True)
class Request:
    """What the command line asks for; see its help for each."""

    teacher: str
    source: Path
    kind: Format
    layout: Path | None
    tokens: Path | None
    tokenizer: Path | None
    values: Values
    keys: Keys
    offset: int | None
    k: int | None
    entropy_bound: bool
    dry_run: bool


def run_import(work: Workspace, request: Request) -> dict[str, Any]:
    """Imports a capture.

    Returns:
        {teacher, cache, dry_run, written (parts), source (as the identity has it), found (see Found)}.

    Raises:
        ConfigError, CorruptShard, VocabularyMismatch: the capture cannot be imported; nothing is written.
        StaleCache: the teacher has another cache. IncompleteCache: no corpus. DiskFull
    """
    config = work.config
    if request.teacher not in config.teachers:
        raise ConfigError(
            "there is no such teacher", where="--teacher", expected=f"one of {list(config.teachers)}",
            found=request.teacher, todo="name another, or add it to teachers",
        )  # fmt: skip
    _require_options(request)
    info = work.prepared()
    if info is None:
        raise IncompleteCache(
            "the corpus has not been prepared", where=config.corpus_folder,
            todo="run `scholiast prepare` with this configuration first",
        )  # fmt: skip
    root = require_local(config.cache_folder, "cache_dir") / request.teacher
    _require_importable(root, request.teacher)
    corpus, files = BlockReader(config.corpus_folder), capture_files(request.source, request.kind)
    reading, source = _reading(work, request, files)
    key = fingerprint({"source": source, "corpus": info.fingerprint})
    wanted = Wanted(config.store.preset, request.k, request.entropy_bound)
    with _scratch_for(root, request.dry_run) as scratch:
        read = None
        try:
            read = read_into(scratch, files, reading, info.vocab_size, key, work.progress)
            job = Import(request.teacher, corpus, read, wanted)
            found = job.cover(work.progress)
            written = 0 if request.dry_run else job.write(root, source, work.progress)
        except (ConfigError, CorruptShard, VocabularyMismatch, StaleCache) as error:
            # Where --k alone is wrong, what was read serves the next try; else it is of no use to it.
            if read is None or not isinstance(error, ConfigError):
                shutil.rmtree(scratch, ignore_errors=True)
            raise
        shutil.rmtree(scratch, ignore_errors=True)
    return {
        "teacher": request.teacher, "cache": str(root), "dry_run": request.dry_run, "written": written,
        "source": source, "found": found.to_dict(),
    }  # fmt: skip


@contextmanager
def _scratch_for(root: Path, dry_run: bool) -> Iterator[Path]:
    """Yields the scratch folder beside a cache, held against other processes.

    A dry run makes no folder that would stay: its own lies in the nearest one that is there, and goes
    however the block ends. What SIGKILL leaves of it the next dry run replaces.

    Raises:
        ConfigError: another process holds it.
    """
    place = durable.existing(root.parent) if dry_run else root.parent
    durable.make_folder(place)
    scratch = place / f".{root.name}.{'dry-run' if dry_run else 'import'}"
    with ExitStack() as stack:
        try:
            stack.enter_context(durable.claimed(place / f"{scratch.name}.lock"))
        except BlockingIOError as error:
            raise ConfigError(
                "another process imports this teacher's cache", where=root, found=error.strerror,
                todo="wait for it, or stop it",
            ) from error  # fmt: skip
        if dry_run:
            stack.enter_context(_leaving_at_sigterm())
            stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        yield scratch


@contextmanager
def _leaving_at_sigterm() -> Iterator[None]:
    """Lets SIGTERM unwind the block, where it would otherwise end the process on the spot."""
    if threading.current_thread() is not threading.main_thread():  # others get no signals
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _require_options(request: Request) -> None:
    """Refuses options that another format has."""
    own = {"layout": "distillkit", "tokens": "topk-jsonl"}
    for name, kind in own.items():
        if getattr(request, name) is not None and request.kind != kind:
            raise ConfigError(
                f"--{name} goes with --format {kind}", where=f"--{name}", found=request.kind,
                todo="leave it out",
            )  # fmt: skip
    plain = {"values": "logprobs", "keys": "ids"}
    for name, usual in plain.items():
        if getattr(request, name) != usual and request.kind != "topk-jsonl":
            raise ConfigError(
                f"--{name} goes with --format topk-jsonl", where=f"--{name}", found=request.kind,
                todo="leave it out",
            )  # fmt: skip


def _require_importable(root: Path, teacher: str) -> None:
    """Refuses a folder in which the teacher's own cache stands, before the capture is read."""
    opened = open_cache(root)
    if opened is not None and not is_imported(opened[0]):
        raise StaleCache(
            f"teacher {teacher!r} has a cache of its own", where=root,
            todo="import under another teacher's name, or into another cache_dir, or delete this folder",
        )  # fmt: skip


def _reading(
    work: Workspace, request: Request, files: list[Path]
) -> tuple[Reading, dict[str, Any]]:
    """Returns how the capture is read, and what its cache's identity says of it."""
    from stages.tokenizer import load_tokenizer, require_same_tokenizer

    tokenizer = work.tokenizer()
    if request.tokenizer is not None:
        theirs = load_tokenizer(request.tokenizer, "--tokenizer")
        require_same_tokenizer(tokenizer, theirs, "the corpus", "the capture")
    offset = request.offset
    if offset is None:
        offset = usual_offset(request.kind, request.tokens)
    reading = Reading(
        request.kind, offset, request.values, request.keys, request.layout, request.tokens,
        tokenizer.get_vocab(), lambda text: list(tokenizer(text)["input_ids"]),
    )  # fmt: skip
    source: dict[str, Any] = {
        "format": request.kind, "offset": offset,
        "files": sorted(work.memo.sha256(path) for path in files),
    }  # fmt: skip
    if request.kind == "distillkit":
        from pipeline.exchange.distillkit import BESIDE, load_layout

        layout = load_layout(request.layout, files)
        source["layout"] = layout.model_dump(mode="json")
        reading = replace(reading, layout=request.layout or files[0].parent / BESIDE)
    if request.kind == "topk-jsonl":
        source |= {"values": request.values, "keys": request.keys}
        source["tokens"] = work.memo.sha256(request.tokens) if request.tokens else None
    work.memo.save()
    return reading, source
