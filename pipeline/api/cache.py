"""A corpus and the notes of M teachers on it, joined by block id: to look at, and to learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.api.places import Places, find
from pipeline.config import RunConfig, load_config
from pipeline.student_identity import depth_of
from stages.model_files import locate
from stages.options import ReadingOptions
from stages.target_options import FusionOptions, LossOptions
from storage.blocks import BlockReader
from storage.errors import ConfigError
from storage.layout import Layout
from storage.local_cache import LocalCache
from storage.reader import CacheReader
from storage.remote import root_of
from storage.types import Int64, TeacherNotes, TokenBlocks

if TYPE_CHECKING:
    from pipeline.api.blocks import BlockDataset, BlockStream
    from stages.batches import BatchReader
    from stages.fusion import FusedTarget
    from stages.options import Pooling, Tail


def open_cache(
    source: str | Path | RunConfig,
    *,
    corpus: str | Path | None = None,
    teachers: Sequence[str] | None = None,
    k: int | None = None,
    overrides: Sequence[str] = (),
) -> Cache:
    """Opens a corpus with its teachers' caches for reading; nothing is loaded but their small files.

    Args:
        source: a run's configuration (a .yaml file, or one that is loaded), whose `fusion` and `loss`
            then are the cache's; or a run's folder, a folder of teachers' caches, or one teacher's
            cache, local or a URL such as s3://bucket/prefix.
        corpus: the corpus folder or URL, where it does not lie beside the caches.
        teachers: which, in this order; with a configuration those it fuses, in its order, otherwise
            all that are there, by name.
        k: how many of the head's entries are read, the most probable ones; all if not given, and all
            of a cache with draws.
        overrides: as `--set`, of a configuration's file: "fusion.tau=0.5".

    Raises:
        IncompleteCache: no cache, no such teacher, or no corpus.
        StaleCache: a cache of another corpus.
        ConfigError: the configuration is wrong, or the caches cannot be put side by side.
        CorruptShard, MissingShard, RemoteError
    """
    if isinstance(source, str | Path) and Path(source).suffix in (".yaml", ".yml"):
        source = load_config(Path(source), overrides)
    elif overrides:
        raise ConfigError(
            "only a configuration's file can be read with overrides",
            where="open_cache(overrides=…)", expected="a .yaml file",
            found=source if isinstance(source, str | Path) else "one that is loaded already",
            todo="open the run's .yaml file, or give FusionOptions and LossOptions where they are used",
        )  # fmt: skip
    if isinstance(source, RunConfig):
        names = tuple(teachers or source.fused_teachers)
        where = source.corpus_folder if corpus is None else root_of(str(corpus), source.local_cache)
        places = Places(where, {name: source.cache_folder / name for name in names})
        return Cache(places, source.fusion.k if k is None else k, source)
    reading = ReadingOptions()
    local = LocalCache(Path(reading.local_cache).expanduser(), reading.local_cache_bytes)
    given = None if corpus is None else root_of(str(corpus), local)
    found = find(root_of(str(source), local), given)
    return Cache(found if teachers is None else _chosen(found, teachers), k)


def _chosen(found: Places, teachers: Sequence[str]) -> Places:
    unknown = [name for name in teachers if name not in found.caches]
    if unknown or not teachers:
        raise ConfigError(
            "there is no cache of this teacher", where="open_cache(teachers=…)",
            expected=f"some of {list(found.caches)}", found=unknown or "none", todo="name others",
        )  # fmt: skip
    return Places(found.corpus, {name: found.caches[name] for name in teachers})


class Cache:
    """A corpus and M teachers' notes on it. Made by `open_cache`.

    It may be sent to other processes, forked or spawned: these open their own files. One thread at a
    time.

    Attributes:
        config: the run's configuration, if it was opened from one.
        fusion, loss: the configuration's, or the defaults.
        corpus: the tokens; `corpus.info` says what corpus.json does.
        readers: teacher → its cache.
    """

    def __init__(
        self, places: Places, k: int | None = None, config: RunConfig | None = None
    ) -> None:
        self._opened = (places, k, config)
        self.config = config
        self.fusion = FusionOptions() if config is None else config.fusion
        self.loss = LossOptions() if config is None else config.loss
        self.corpus = BlockReader(places.corpus)
        self.readers = {name: CacheReader(root, name, k) for name, root in places.caches.items()}
        self._batch_readers: dict[tuple[str, float, str], BatchReader] = {}
        self._require_whole()

    def __reduce__(self) -> Any:
        return Cache, self._opened

    def __repr__(self) -> str:
        info = self.corpus.info
        return (
            f"<Cache of {', '.join(self.teachers)}: {info.blocks} blocks of {info.block_length} "
            f"tokens, {info.vocab_size} ids, k = {self.k}>"
        )

    # -- what it is

    @property
    def teachers(self) -> tuple[str, ...]:
        """Names of the teachers, in the order of everything that is listed by teacher."""
        return tuple(self.readers)

    @property
    def layouts(self) -> dict[str, Layout]:
        """Teacher → what its cache stores: k, draws, temperatures, feature_layers, segments, …"""
        return {name: reader.layout for name, reader in self.readers.items()}

    @property
    def domains(self) -> tuple[str, ...]:
        return self.corpus.info.domains

    @property
    def block_length(self) -> int:
        """T, tokens of a block."""
        return self.corpus.info.block_length

    @property
    def vocab_size(self) -> int:
        """V, the tokenizer's ids; a student's logits beyond them are padding."""
        return self.corpus.info.vocab_size

    @property
    def k(self) -> int:
        """The most head entries that any teacher's notes have here."""
        return max(reader.k for reader in self.readers.values())

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Temperatures at which targets can be had."""
        return (1.0, *next(iter(self.layouts.values())).temperatures)

    @property
    def segments(self) -> int:
        """G, spans of a block that features are pooled over; 1 where none are stored."""
        return next((la.segments for la in self.layouts.values() if la.feature_layers), 1)

    def depths(self) -> dict[str, int]:
        """Returns teacher → its decoder layers: what pairs of layers by relative depth are made of.

        Raises:
            ConfigError: the cache was not opened from a configuration, or a model does not tell.
            TeacherError: a model's folder is not there.
        """
        if self.config is None:
            raise ConfigError(
                "a cache does not know how many layers its teachers have",
                where="loss.features.pairs", found="auto",
                todo="name the pairs, or open the cache from the run's configuration",
            )  # fmt: skip
        found = {}
        for name in self.teachers:
            options, key = self.config.teachers[name], f"teachers.{name}.model"
            folder = locate(options.model, options.revision, key)
            found[name] = depth_of(folder, key)
        return found

    def block_ids(self, split: str = "train", domain: str | None = None) -> Int64:
        """Returns the ids, int64 and ascending, of a split's ("train", "heldout") blocks."""
        return self.corpus.info.block_ids(split, domain)

    # -- what is in it

    def tokens(self, block_ids: Int64 | Sequence[int]) -> TokenBlocks:
        """Returns the blocks: `inputs`, `gold`, `positions`, `document`, `scored` …, NumPy [n, T].

        Raises:
            MissingShard, CorruptShard, RemoteError
        """
        return self.corpus.read(block_ids)

    def notes(self, block_ids: Int64 | Sequence[int]) -> dict[str, TeacherNotes]:
        """Returns teacher → what it noted about the blocks, NumPy.

        `head.ids`, `head.logprobs` [n, T, K] at temperature 1, never renormalised; `stats.entropy`,
        `.log_tail_mass`, `.gold_logprob` [n, T], `.log_z` [n, T, Z]; `draws` [n, T, S]; `features`
        [n, G, D]. Row t is the distribution of token t + 1; rows without a target hold zeros.

        Raises:
            IncompleteCache, MissingShard, CorruptShard, RemoteError
        """
        ids = np.asarray(block_ids, np.int64)
        return {name: reader.read(ids) for name, reader in self.readers.items()}

    # -- what is learned from it

    def dataset(
        self, split: str = "train", *, seed: int | None = None, samples: int | None = None
    ) -> BlockDataset:
        """Returns a map-style data set of joined blocks (see BlockDataset)."""
        from pipeline.api.blocks import BlockDataset

        return BlockDataset(self, split, seed=seed, samples=samples)

    def stream(self, batch_blocks: int, *, seed: int = 0, **others: Any) -> BlockStream:
        """Returns an endless data set of batches that can be resumed (see BlockStream)."""
        from pipeline.api.blocks import BlockStream

        return BlockStream(self, batch_blocks, seed=seed, **others)

    def targets(
        self,
        batch: Mapping[str, Any],
        fusion: FusionOptions | None = None,
        *,
        temperature: float = 1.0,
        tail: Tail | None = None,
    ) -> FusedTarget:
        """Returns the fused target of a batch's R rows, those where `loss_mask` is true, block by block.

        Args:
            batch: from a data set's `collate` or a stream.
            fusion: how the teachers are weighted and mixed, as in the YAML's `fusion`; the cache's own
                if not given.
            temperature: one of `temperatures`.
            tail: what stands for the mass outside the heads: "draws", "bucket", "renormalised",
                "residual"; draws if each of these teachers' caches holds some, else the bucket, if not
                given.

        Returns:
            ids int64 and p float32 [M, R, K], tail and weights float32 [M, R], on the batch's device: the
            probability of id v is Σ_m weights_m · (Σ of p_m where ids_m = v), and Σ_m weights_m · tail_m
            is left for the others. With geometric mixing M is 1, and K is all teachers' entries.

        Raises:
            ConfigError: the options do not fit the teachers, or the caches cannot serve them.
        """
        from pipeline.api.blocks import as_batch

        reader = self.batch_reader(self.fusion if fusion is None else fusion, temperature, tail)
        target = as_batch(reader, batch).target
        assert target is not None
        return target

    def batch_reader(
        self, fusion: FusionOptions, temperature: float = 1.0, tail: Tail | None = None,
        pooled: Pooling = "mean",
    ) -> BatchReader:  # fmt: skip
        """Returns what fuses these teachers by these options; the same object for the same options.

        Raises:
            ConfigError: they do not fit the teachers or the caches.
        """
        from stages.batches import BatchReader

        key = (f"{fusion.model_dump_json()}{pooled}", temperature, str(tail))
        if key not in self._batch_readers:
            self._batch_readers[key] = BatchReader(
                self.corpus,
                self.fused_readers(fusion),
                temperature,
                fusion,
                tail=tail,
                pooled=pooled,
            )
        return self._batch_readers[key]

    def fused_readers(self, fusion: FusionOptions) -> dict[str, CacheReader]:
        """Returns teacher → its cache, of those that these options fuse.

        Raises:
            ConfigError: the options do not fit the teachers.
        """
        chosen = [n for n in self.teachers if fusion.teachers is None or n in fusion.teachers]
        self._require(fusion, chosen)
        return {name: self.readers[name] for name in chosen}

    def _require(self, fusion: FusionOptions, chosen: Sequence[str]) -> None:
        unknown = sorted(set(fusion.teachers or ()) - set(self.teachers))
        try:
            fusion.require_teachers(chosen)
            if unknown or not chosen:
                raise ValueError(f"fusion.teachers must be some of {list(self.teachers)}")
            if fusion.k not in (None, self.k):
                raise ValueError(f"fusion.k is {fusion.k}, and open_cache(k=…) says what is read")
        except ValueError as error:
            raise ConfigError(
                "the options of fusion do not fit this cache", where="fusion", expected=str(error),
                todo="change them, or open the cache with other teachers or another k",
            ) from error  # fmt: skip

    def _require_whole(self) -> None:
        """What BatchReader refuses is refused when a cache is opened."""
        self.batch_reader(FusionOptions(weights="uniform"))
