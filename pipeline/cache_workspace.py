"""A configuration at work, first half: the corpus and the teachers' caches."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig
from stages.model_files import at_hand, locate, parameters, present, read_config
from stages.model_safety import weight_files
from stages.part_log import measured
from stages.progress import Progress
from stages.shares import Outcome, Share
from stages.teacher_jobs import TeacherJob, plan_jobs, stored
from storage import durable
from storage.corpus_info import CorpusInfo
from storage.errors import ConfigError, IncompleteCache
from storage.fingerprint import HashMemo
from storage.leases import sweep
from storage.remote import require_local
from storage.stores import whole_bytes
from storage.writer import is_imported, open_cache, save_info


class CacheWorkspace:
    """Folders and identities of a run, and its stages zero and one.

    Heavy imports happen where they are needed.

    Args:
        config: the run.
        progress: who listens to long work.
        keep_hashes: whether hashes of files may be remembered on disk.
    """

    def __init__(self, config: RunConfig, progress: Progress, keep_hashes: bool = True) -> None:
        self.config, self.progress = config, progress
        self.memo = HashMemo(config.run / "hashes.json", keep_hashes)

    def ensure_assets(self) -> None:
        """Builds the demonstration's models and text if the configuration asks for them."""
        if self.config.assets:
            from pipeline.demo import build
            from pipeline.demo_text import SIZES

            build(self.config.run / "assets", self.progress.say, size=SIZES[self.config.assets])

    def prepared(self) -> CorpusInfo | None:
        """Returns the corpus if it is complete and the one configured.

        Raises:
            StaleCache, CorpusError, TeacherError
        """
        from stages.corpus_identity import require_corpus

        return require_corpus(self.config.corpus, self.config.corpus_folder, self.memo)[1]

    def prepare(self) -> CorpusInfo:
        """Does what is left of stage zero."""
        self.ensure_assets()
        info = self.prepared()
        if info is None:
            from pipeline.planning.parts import width_to_prepare
            from stages.corpus import prepare

            folder = require_local(self.config.corpus_folder, "corpus_dir").absolute()
            self.require_tokenizers()
            with durable.disk_errors(folder):
                durable.make_folder(folder.parent)
            # Of several tasks one prepares; the others wait and find it done.
            with durable.alone(folder.parent / f".{folder.name}.lock"):
                info = prepare(
                    self.config.corpus, folder, self.memo, self.progress,
                    lambda: width_to_prepare(self),
                )  # fmt: skip
        return info

    def require_tokenizers(self) -> None:
        """Refuses teachers that are here and have another tokenizer than the corpus: before it is packed.

        Raises:
            VocabularyMismatch, TeacherError
        """
        from stages.tokenizer import load_tokenizer, require_same_tokenizer

        corpus, key = self.config.corpus, "corpus.tokenizer"
        if not at_hand(corpus.tokenizer, corpus.tokenizer_revision, weights=False):
            return
        place = locate(corpus.tokenizer, corpus.tokenizer_revision, key, weights=False)
        ours = load_tokenizer(place, key)
        for name, options in self.config.teachers.items():
            if not self.imported(name) and at_hand(options.model, options.revision, weights=False):
                key = f"teachers.{name}.model"
                theirs = load_tokenizer(
                    locate(options.model, options.revision, key, weights=False), key,
                    trust_remote_code=options.trust_remote_code,
                )  # fmt: skip
                require_same_tokenizer(ours, theirs, "the corpus", f"teacher {name!r}")

    def jobs(self, info: CorpusInfo) -> list[TeacherJob]:
        """Returns what each teacher has done and has to do."""
        config = self.config
        return plan_jobs(config.teachers, config.store, info, config.cache_folder, self.memo)

    def cache_teachers(self, teachers: Sequence[str] = ()) -> list[TeacherJob]:
        """Does what is left of stage one, or waits for it where other tasks are at work; returns the
        finished jobs (of these teachers alone, if any are named)."""
        self.cache_share(Share(), teachers)
        return self._jobs_of(teachers)

    def cache_share(self, share: Share, teachers: Sequence[str] = ()) -> list[Outcome]:
        """Does a task's share of stage one; returns what it did with each teacher that had pending parts.

        Args:
            share: the task's place among others.
            teachers: these alone, if any are named.

        Raises:
            ConfigError: there is no such teacher.
            Stopped: by SIGTERM or SIGUSR1; finished parts are kept.
        """
        require_local(self.config.cache_folder, "cache_dir")
        self.require_teachers(teachers)
        self.ensure_assets()
        self.require_models()
        jobs = self._jobs_of(teachers)
        for job in jobs:
            if job.imported and job.pending:
                raise IncompleteCache(
                    f"the cache of teacher {job.name!r} was imported, and not to its end",
                    where=job.root, expected=f"{job.layout.parts} parts", found=f"{len(job.done)}",
                    todo="run the same `scholiast import` again: it goes on where it stopped",
                )  # fmt: skip
            if job.done and not (job.root / "cache.json").exists():  # it was lost
                save_info(job.local_root, job.identity, job.layout)
        outcomes = []
        if any(job.pending for job in jobs):
            outcomes = self._cache(jobs, share)
            jobs = self._jobs_of(teachers)
        for job in jobs:
            sweep(job.local_root, set(job.done), not job.pending)
        return outcomes

    def require_teachers(self, names: Sequence[str]) -> None:
        """Refuses names that are no teacher's.

        Raises:
            ConfigError
        """
        unknown = [name for name in names if name not in self.config.teachers]
        if unknown:
            raise ConfigError(
                "there is no such teacher", where="--teacher",
                expected=f"one of {list(self.config.teachers)}", found=unknown[0], todo="name another",
            )  # fmt: skip

    def require_models(self) -> None:
        """Refuses teachers whose folder is not there or holds no model: before the corpus is packed.

        Raises:
            TeacherError
        """
        for name, options in self.config.teachers.items():
            # What the hub has yet to give is asked for when it is its turn.
            if not self.imported(name) and self.there(options.model, options.revision):
                key = f"teachers.{name}.model"
                folder = locate(options.model, options.revision, key)
                read_config(folder, key)
                weight_files(folder, key)

    def _jobs_of(self, teachers: Sequence[str]) -> list[TeacherJob]:
        return [j for j in self.jobs(self.prepare()) if not teachers or j.name in teachers]

    def _cache(self, jobs: list[TeacherJob], share: Share) -> list[Outcome]:
        self._setup_torch()
        from stages.cache_teachers import cache_teachers

        config = self.config
        share = replace(share, lifetime=config.cluster.lease, grace=config.cluster.grace)
        return cache_teachers(
            jobs, config.store, config.corpus_folder, self.tokenizer(), config.device, self.progress,
            share,
        )  # fmt: skip

    def finished_jobs(self) -> tuple[CorpusInfo, list[TeacherJob]]:
        """Returns corpus and jobs of a complete cache.

        Raises:
            IncompleteCache: says which teachers miss how many parts.
        """
        info = self.prepared()
        if info is None:
            raise IncompleteCache(
                "the corpus has not been prepared", where=self.config.corpus_folder,
                todo="run `scholiast cache-teachers` with this configuration first",
            )  # fmt: skip
        jobs = self.jobs(info)
        missing = [
            f"{job.name}: {len(job.pending)} of {job.layout.parts}" for job in jobs if job.pending
        ]
        if missing:
            raise IncompleteCache(
                "the teachers' cache is not complete", where=self.config.cache_folder,
                expected="every part of every teacher", found=f"parts missing: {'; '.join(missing)}",
                todo="run `scholiast cache-teachers` with this configuration first",
            )  # fmt: skip
        return info, jobs

    def there(self, model: str, revision: str | None, *, weights: bool = True) -> bool:
        """Returns whether a model (or its tokenizer alone) can be looked at without building or
        downloading it."""
        if self.config.assets and not Path(model).is_dir():
            return False
        return present(model, revision, weights=weights)

    def imported(self, teacher: str) -> bool:
        """Returns whether a teacher's cache was imported, so that its model is never looked at."""
        opened = open_cache(self.config.cache_folder / teacher)
        return opened is not None and is_imported(opened[0])

    def looked_at(self) -> tuple[CorpusInfo | None, list[TeacherJob]]:
        """Returns corpus and jobs as far as they can be told without building or downloading.

        Raises:
            StaleCache, CorruptShard, MissingShard: what lies there is not usable.
        """
        corpus, teachers = self.config.corpus, self.config.teachers.items()
        if not self.there(corpus.tokenizer, corpus.tokenizer_revision, weights=False):
            return None, []
        info = self.prepared()
        there = (self.imported(n) or self.there(t.model, t.revision) for n, t in teachers)
        if info is None or not all(there):
            return info, []
        return info, self.jobs(info)

    def cache_costs(self, jobs: list[TeacherJob]) -> dict[str, dict[str, Any]]:
        """Returns, per teacher, the cache's size by array and what stage one took."""
        return {job.name: _cache_cost(job) for job in jobs}

    def tokenizer(self) -> Any:
        """Returns the corpus's tokenizer."""
        from stages.tokenizer import load_tokenizer

        return load_tokenizer(self._tokenizer_folder(), "corpus.tokenizer")

    def _tokenizer_folder(self) -> Path:
        corpus = self.config.corpus
        return locate(
            corpus.tokenizer, corpus.tokenizer_revision, "corpus.tokenizer", weights=False
        )

    def _setup_torch(self) -> None:
        import torch

        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        quiet_transformers()


def quiet_transformers() -> None:
    """Silences advice and bars of libraries that would break our own output; errors still raise."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _cache_cost(job: TeacherJob) -> dict[str, Any]:
    tokens = job.layout.blocks * job.layout.block_length
    size, log = stored(job), measured(job.root)
    everything = size.bytes + whole_bytes(job.root)
    return {
        "parameters": None
        if job.imported
        else parameters(job.folder, f"teachers.{job.name}.model"),
        "bytes": everything, "tokens": tokens, "bytes_per_token": everything / tokens,
        "arrays": {name: n / tokens for name, n in size.arrays.items()},
        "tokens_per_second": log.tokens / log.seconds if log else None,
        "peak_bytes": log.peak_bytes if log else None, "device": log.device if log else None,
    }  # fmt: skip
