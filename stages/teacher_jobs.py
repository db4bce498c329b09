"""Which parts each teacher still has to annotate. No torch here: asking takes a moment.

What is done is told by the names of the manifests alone, what it takes by a sample of them, so that
10^6 parts stay a matter of seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.model_files import (
    context_length,
    hidden_size,
    layer_count,
    locate,
    model_identity,
    read_config,
)
from stages.options import StoreOptions, TeacherOptions
from storage import manifest
from storage.corpus_info import CorpusInfo
from storage.errors import ConfigError, StaleCache, TeacherError
from storage.fingerprint import HashMemo
from storage.generations import Generation
from storage.layout import FORMAT, POOLINGS, Layout
from storage.limits import require_possible
from storage.remote import Root, require_local
from storage.types import Int64
from storage.writer import is_imported, open_cache, owners, require_same

COMPRESSION = 0.55
"""Stored bytes over raw ones, as measured at k = 64 on real logits; used until parts are measured."""

LEARNING_TOKENS = 16_384


@dataclass(frozen=True)
class TeacherJob:
    """One teacher's share of stage one.

    Attributes:
        name, options: the teacher.
        model_folder: where its checkpoint lies; None where its cache was imported.
        root: its cache folder.
        identity: what its cache is named by.
        layout: what its cache stores.
        done, pending: indices of finished parts and of those to do.
    """

    name: str
    options: TeacherOptions
    model_folder: Path | None
    root: Root
    identity: dict[str, Any]
    layout: Layout
    done: tuple[int, ...]
    pending: tuple[int, ...]

    @property
    def imported(self) -> bool:
        """Whether the cache was read from another tool's capture: nothing of the model is looked at."""
        return self.model_folder is None

    @property
    def folder(self) -> Path:
        """Where the teacher's checkpoint lies (TeacherError if its cache was imported)."""
        if self.model_folder is None:
            raise TeacherError(
                f"the cache of teacher {self.name!r} was imported: there is no model to load",
                where=self.root, todo="leave out what needs the model itself",
            )  # fmt: skip
        return self.model_folder

    @property
    def local_root(self) -> Path:
        """The cache folder, to write to (ConfigError if it is remote)."""
        return require_local(self.root, "cache_dir")

    def expected_bytes(self) -> int:
        """Returns the bytes that the pending parts will take, from finished parts or an estimate."""
        pending = self.layout.blocks_of(self.pending)
        size = stored_bytes(self)
        if size:
            return size * pending // self.layout.blocks_of(self.done)
        raw = self.layout.bytes_per_token_raw() * self.layout.block_length * pending
        return int(raw * COMPRESSION)


def plan_jobs(
    teachers: Mapping[str, TeacherOptions],
    store: StoreOptions,
    info: CorpusInfo,
    cache_dir: Root,
    memo: HashMemo,
) -> list[TeacherJob]:
    """Returns every teacher's job, in the order of the configuration.

    Raises:
        ConfigError: an option does not fit corpus or teacher.
        TeacherError: a checkpoint is missing or incomplete.
        StaleCache, CorruptShard: what lies in `cache_dir` is not usable.
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
    root: Root,
    memo: HashMemo,
) -> TeacherJob:
    opened = open_cache(root)
    if opened is not None and is_imported(opened[0]):
        return _imported_job(name, options, info, root, *opened)
    key = f"teachers.{name}.model"
    folder = locate(options.model, options.revision, key)
    config = read_config(folder, key)
    _require_fit(name, options, store, info, config)
    layout = Layout(
        blocks=info.blocks, blocks_per_part=info.blocks_per_part, block_length=info.block_length,
        vocab_size=info.vocab_size, preset=store.preset,
        k=min(store.entries, info.vocab_size) if store.k is None else store.k,
        draws=store.drawn, top_p=store.top_p, seed=store.seed if store.drawn else 0,
        temperatures=store.temperatures, feature_layers=options.feature_layers,
        segments=store.segments if options.feature_layers else 1,
        hidden_size=hidden_size(config) if options.feature_layers else 0,
        generations=generations_of(info),
        pooling=store.pooling if options.feature_layers else POOLINGS[:1],
    )  # fmt: skip
    try:
        require_possible(layout)  # or no reader would take what is written
    except ValueError as error:
        raise ConfigError(
            "the cache would be larger than a cache can be", where=f"teachers.{name}", found=error,
            todo="make store's numbers smaller, or cut the corpus into fewer or other parts",
        ) from None  # fmt: skip
    identity = {
        "format": FORMAT,
        "corpus": info.fingerprint,
        "teacher": model_identity(folder, key, memo, options.trust_remote_code),
        "dtype": options.dtype,
        "store": {
            "k": layout.k,
            "draws": layout.draws,
            "top_p": layout.top_p,
            "seed": layout.seed if layout.draws else None,
            "preset": store.preset,
            **layout.codecs.to_dict(),
            "temperatures": list(store.temperatures),
            "segments": layout.segments,  # 1 where nothing is pooled
            "feature_layers": list(options.feature_layers),
            # Means alone go unsaid: so they did before there was a choice.
            **({} if layout.pooling == POOLINGS[:1] else {"pooling": list(layout.pooling)}),
        },
    }
    if opened is not None:
        require_same(root, opened[0], identity, layout)
    return _with_parts(name, options, folder, root, identity, layout)


def _with_parts(
    name: str,
    options: TeacherOptions,
    folder: Path | None,
    root: Root,
    identity: dict[str, Any],
    layout: Layout,
) -> TeacherJob:
    done = manifest.done_parts(root, owners(identity, layout), layout.parts)
    pending = np.setdiff1d(np.arange(layout.parts), done, assume_unique=True)
    return TeacherJob(
        name, options, folder, root, identity, layout, tuple(done.tolist()), tuple(pending.tolist())
    )


def _imported_job(
    name: str,
    options: TeacherOptions,
    info: CorpusInfo,
    root: Root,
    identity: dict[str, Any],
    layout: Layout,
) -> TeacherJob:
    """Returns the job of a cache that was imported: it is what it is, whatever `store` asks for.

    Raises:
        StaleCache: it is of another corpus.
        ConfigError: features are asked for.
    """
    if identity["corpus"] != info.fingerprint:
        raise StaleCache(
            f"the imported cache of teacher {name!r} belongs to another corpus", where=root,
            expected=info.fingerprint[:16], found=identity["corpus"][:16],
            todo="import a capture of this corpus into another cache_dir, or restore the corpus",
        )  # fmt: skip
    if options.feature_layers:
        raise ConfigError(
            f"the cache of teacher {name!r} was imported, and no capture holds hidden states",
            where=f"teachers.{name}.feature_layers", expected=[], found=list(options.feature_layers),
            todo="leave feature_layers out for this teacher",
        )  # fmt: skip
    return _with_parts(name, options, None, root, identity, layout)


def generations_of(info: CorpusInfo) -> tuple[Generation, ...]:
    """Returns the generations as a cache's layout names them: none where there is one."""
    if len(info.generations) == 1:
        return ()
    return tuple(Generation(g.first_part, g.blocks, g.fingerprint) for g in info.generations)


def _require_fit(
    name: str,
    options: TeacherOptions,
    store: StoreOptions,
    info: CorpusInfo,
    config: dict[str, Any],
) -> None:
    if store.k is not None and store.k > info.vocab_size:
        raise ConfigError(
            "more head entries than the vocabulary has ids", where="store.k",
            expected=f"at most {info.vocab_size}", found=store.k, todo="lower store.k",
        )  # fmt: skip
    if info.vocab_size > 1 << 24:
        raise ConfigError(
            "the vocabulary is too large", where="corpus.tokenizer", expected=f"at most {1 << 24:,} ids",
            found=f"{info.vocab_size:,}", todo="use another tokenizer",
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
    layers = layer_count(config)
    wrong = [n for n in options.feature_layers if layers is not None and n > layers]
    if wrong:
        raise TeacherError(
            "the teacher has no such layer", where=f"teachers.{name}.feature_layers",
            expected=f"1 to {layers}", found=wrong, todo="choose existing layers",
        )  # fmt: skip


def learning_blocks(layout: Layout) -> Int64:
    """Returns the blocks from which a cache's orders of ids are learned, evenly over the corpus.

    They are forwarded once more later: an eighth of a small corpus, LEARNING_TOKENS of a large one.
    Of a corpus that has grown its first generation is taken.
    """
    blocks = layout.until(1).blocks
    tokens = min(LEARNING_TOKENS, blocks * layout.block_length // 8)
    count = max(1, tokens // layout.block_length)
    return np.arange(count) * blocks // count


@dataclass(frozen=True)
class Stored:
    """What a teacher's finished parts take on disk.

    Attributes:
        bytes: of all objects and manifests.
        arrays: bytes of each array.
        sampled: how many parts were looked at; arrays are scaled to all by blocks, manifests by parts.
    """

    bytes: int
    arrays: dict[str, int]
    sampled: int


def stored(job: TeacherJob) -> Stored:
    """Returns what the finished parts take, from at most `manifest.SAMPLE` manifests."""
    arrays: dict[str, int] = {}
    own, blocks, sampled = 0, 0, 0
    for vouched, size in manifest.sampled(job.root, job.done, owners(job.identity, job.layout)):
        own, blocks, sampled = own + size, blocks + vouched.blocks, sampled + 1
        for name, (size_of_object, _) in vouched.objects.items():
            array = name.split("/")[1]
            arrays[array] = arrays.get(array, 0) + size_of_object
    share = job.layout.blocks_of(job.done) / blocks if blocks else 0.0
    arrays = {name: round(size * share) for name, size in arrays.items()}
    manifests = round(own * len(job.done) / max(1, sampled))
    return Stored(sum(arrays.values()) + manifests, arrays, sampled)


def stored_bytes(job: TeacherJob) -> int:
    """Returns the bytes of a teacher's finished parts, their manifests counted (see `stored`)."""
    return stored(job).bytes
