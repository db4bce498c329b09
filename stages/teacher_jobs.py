"""Which parts each teacher still has to annotate. No torch here: asking takes a moment."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.model_files import (
    context_length,
    dimension,
    hidden_size,
    locate,
    model_identity,
    read_config,
)
from stages.options import StoreOptions, TeacherOptions
from storage import manifest
from storage.blocks import CorpusInfo
from storage.errors import ConfigError, TeacherError
from storage.fingerprint import HashMemo, fingerprint
from storage.layout import FORMAT, Layout
from storage.writer import require_identity

COMPRESSION = 0.55
"""Stored bytes over raw ones, as measured at k = 64 on real logits; used until parts are measured."""


@dataclass(frozen=True)
class TeacherJob:
    """One teacher's share of stage one.

    Attributes:
        name, options, folder: the teacher and where its checkpoint lies.
        root: its cache folder.
        identity: what its cache is named by.
        layout: what its cache stores.
        done, pending: indices of finished parts and of those to do.
    """

    name: str
    options: TeacherOptions
    folder: Path
    root: Path
    identity: dict[str, Any]
    layout: Layout
    done: tuple[int, ...]
    pending: tuple[int, ...]

    @property
    def block_tokens(self) -> int:
        """Tokens of one part (the last may have fewer)."""
        return self.layout.blocks_per_part * self.layout.block_length

    def expected_bytes(self) -> int:
        """Returns the bytes that the pending parts will take, from finished parts or an estimate."""
        measured = stored_bytes(self)
        if self.done and measured:
            return measured // len(self.done) * len(self.pending)
        raw = self.layout.bytes_per_token_raw() * self.block_tokens * len(self.pending)
        return int(raw * COMPRESSION)


def plan_jobs(
    teachers: Mapping[str, TeacherOptions],
    store: StoreOptions,
    info: CorpusInfo,
    cache_dir: Path,
    memo: HashMemo,
) -> list[TeacherJob]:
    """Returns every teacher's job, in the order of the configuration.

    Raises:
        ConfigError: an option does not fit corpus or teacher.
        TeacherError: a checkpoint is missing or incomplete.
        StaleCache, MissingShard, CorruptShard: what lies in `cache_dir` is not usable.
    """
    return [
        _job(name, options, store, info, cache_dir / name, memo)
        for name, options in teachers.items()
    ]


def _job(
    name: str,
    options: TeacherOptions,
    store: StoreOptions,
    info: CorpusInfo,
    root: Path,
    memo: HashMemo,
) -> TeacherJob:
    key = f"teachers.{name}.model"
    folder = locate(options.model, options.revision, key)
    config = read_config(folder, key)
    _require_fit(name, options, store, info, config)
    layout = Layout(
        blocks=info.blocks, blocks_per_part=info.blocks_per_part, block_length=info.block_length,
        vocab_size=info.vocab_size, k=store.k, precision=store.precision,
        temperatures=store.temperatures, feature_layers=options.feature_layers,
        segments=store.segments, hidden_size=hidden_size(config) if options.feature_layers else 0,
    )  # fmt: skip
    identity = {
        "format": FORMAT,
        "corpus": info.fingerprint,
        "teacher": model_identity(folder, key, memo),
        "dtype": options.dtype,
        "store": {
            "k": store.k,
            "precision": store.precision,
            "temperatures": list(store.temperatures),
            "segments": store.segments,
            "feature_layers": list(options.feature_layers),
        },
    }
    require_identity(root, identity)
    expected = fingerprint(identity)
    done = [p for p in range(layout.parts) if manifest.finished(root, p, expected)]
    pending = sorted(set(range(layout.parts)) - set(done))
    return TeacherJob(name, options, folder, root, identity, layout, tuple(done), tuple(pending))


def _require_fit(
    name: str,
    options: TeacherOptions,
    store: StoreOptions,
    info: CorpusInfo,
    config: dict[str, Any],
) -> None:
    if store.k > info.vocab_size:
        raise ConfigError(
            "more head entries than the vocabulary has ids", where="store.k",
            expected=f"at most {info.vocab_size}", found=store.k, todo="lower store.k",
        )  # fmt: skip
    if store.segments > info.block_length:
        raise ConfigError(
            "more segments than tokens in a block", where="store.segments",
            expected=f"at most {info.block_length}", found=store.segments, todo="lower store.segments",
        )  # fmt: skip
    longest = context_length(config)
    if longest is not None and info.block_length > longest:
        raise ConfigError(
            f"blocks are longer than the context of teacher {name!r}",
            where="corpus.block_length", expected=f"at most {longest}", found=info.block_length,
            todo="prepare the corpus with shorter blocks, or leave this teacher out",
        )  # fmt: skip
    layers = dimension(config, "num_hidden_layers", "n_layer", "num_layers")
    wrong = [n for n in options.feature_layers if layers is not None and n > layers]
    if wrong:
        raise TeacherError(
            "the teacher has no such layer", where=f"teachers.{name}.feature_layers",
            expected=f"1 to {layers}", found=wrong, todo="choose existing layers",
        )  # fmt: skip


def stored_bytes(job: TeacherJob) -> int:
    """Returns the bytes of a teacher's finished parts, their manifests counted."""
    total = 0
    for part in job.done:
        vouched = manifest.load(job.root, part)
        if vouched is not None:
            total += sum(size for size, _ in vouched.objects.values())
            total += manifest.path_of(job.root, part).stat().st_size
    return total


def log_path(root: Path) -> Path:
    """Returns the file of measurements: a line a part, never part of the cache's identity."""
    return root / "log.jsonl"


def append_log(root: Path, row: Mapping[str, Any]) -> None:
    """Appends one measurement; a single write, so that concurrent tasks do not mix lines."""
    fd = os.open(log_path(root), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(fd, (json.dumps(row) + "\n").encode())
    finally:
        os.close(fd)


def read_log(root: Path) -> list[dict[str, Any]]:
    """Returns the measurements; a line cut by a crash is passed over."""
    rows = []
    try:
        lines = log_path(root).read_text().splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
