"""Where rows are at home: their folders, configurations, caches and identity."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pipeline.config import load_config, merged
from pipeline.reproduce import instructions
from pipeline.reproduce.rows import (
    COMMON,
    EVALUATION,
    PINNED,
    Row,
    all_rows,
)
from pipeline.workspace import Workspace
from stages.progress import Progress
from storage import durable
from storage.fingerprint import fingerprint

WEAK, _MADE_FROM = "weak", "made_from.json"
_ELSEWHERE = (
    "name", "run_dir", "corpus_dir", "cache_dir", "assets", "device", "threads", "reading", "evaluate",
)  # fmt: skip
_NOT_LEARNED = ("seed", "steps", "eval_every", "checkpoint_every", "keep_checkpoints", "log_every")


class Harness:
    """The rows over one configuration, and the folder their runs are kept in.

    Args:
        config, overrides: the configuration that gives models, corpus, student and schedule.
        folder: for runs, caches of other encodings, the weak teacher, results.
        steps: optimizer steps of every row.
        progress: who listens.

    Raises:
        ConfigError: the configuration is not valid.
    """

    def __init__(
        self, config: Path, overrides: Sequence[str], folder: Path, steps: int, progress: Progress
    ) -> None:
        self.config, self.overrides = config, tuple(overrides)
        self.folder, self.steps, self.progress = folder, steps, progress
        self.base = Workspace(load_config(config, overrides), progress)
        self.chats = instructions.SIZES[self.base.config.assets or "demo"]
        self.raw = merged(config, overrides)
        self.shared = folder / f"shared-{fingerprint(self._shared())[:8]}"
        self.rows = all_rows(self.raw)
        self._prepared: set[tuple[str, bool, bool]] = set()
        self._keys: dict[Row, str] = {}
        self._names: dict[str, str] = {}
        for row in self.rows:
            self._names.setdefault(self.key(row), _slug(row))

    def _shared(self) -> dict[str, Any]:
        """Returns what decides the weak teacher, the mix and the caches of other encodings."""
        said = {k: self.raw.get(k) for k in ("corpus", "teachers", "store")}
        return {**said, "chats": [self.chats.train, self.chats.heldout]}

    def key(self, row: Row) -> str:
        """Returns what decides a row's students, seeds apart: rows of one key are one run.

        It is made of what the configuration and the row say, not of defaults: an option that is added to
        the package leaves finished runs as they are.
        """
        if row not in self._keys:
            self._keys[row] = self._key(row)
        return self._keys[row]

    def _key(self, row: Row) -> str:
        said = merged(self.config, [*self.overrides, *COMMON, *EVALUATION, *row.overrides])
        identity = {k: v for k, v in said.items() if k not in _ELSEWHERE}
        identity["train"] = {k: v for k, v in said["train"].items() if k not in _NOT_LEARNED}
        return fingerprint(
            {
                "settings": identity, "measured": EVALUATION, "steps": self.steps_of(row),
                "kind": row.kind, "of": row.notes_of, "weak": row.weak, "mixed": row.mixed,
            }
        )  # fmt: skip

    def run_folder(self, row: Row, seed: int) -> Path:
        """Returns the folder of one run, named after the first row that needs it."""
        key = self.key(row)
        return self.folder / "runs" / f"{self._names[key]}-{key[:8]}-{seed}"

    def folders(self) -> Iterator[tuple[Row, Path]]:
        """Yields the folders of all runs of this configuration that have begun, whatever their seed."""
        for row in {self.key(row): row for row in self.rows}.values():
            key = self.key(row)
            for folder in (self.folder / "runs").glob(f"{self._names[key]}-{key[:8]}-*"):
                yield row, folder

    def steps_of(self, row: Row) -> int:
        """Returns the optimizer steps of a row; the mix is longer."""
        return round(self.steps * self.chats.longer) if row.mixed else self.steps

    def workspace(self, row: Row, seed: int) -> Workspace:
        """Returns the run of a row and seed."""
        steps = self.steps_of(row)
        places = {
            "run_dir": self.run_folder(row, seed), "train.seed": seed, "train.steps": steps,
            "train.eval_every": "null", "train.keep_checkpoints": 1,
        }  # fmt: skip
        return self._open([*row.overrides, *(f"{k}={v}" for k, v in places.items())], row)

    def yardstick(self, mixed: bool) -> Workspace:
        """Returns what all students of a corpus are measured with, whatever they were taught from:
        the reference's fused target at temperature 1, from the configuration's caches."""
        place = self.shared / ("yardstick-mixed" if mixed else "yardstick")
        own = [f"run_dir={place}", "train.steps=1", "loss.target=bucket"]
        return self._open(own, Row("", "", mixed=mixed))

    def _open(self, own: Sequence[str], row: Row) -> Workspace:
        base, mix = self.base.config, self.shared / "mix"
        corpus = base.corpus_dir or f"{base.run_dir}/corpus"
        cache = base.cache_dir or f"{base.run_dir}/cache"
        more = []
        if row.mixed:
            corpus, cache = f"{mix}/corpus", f"{mix}/cache"
            mixed = [*self.raw["corpus"]["sources"], *instructions.sources(mix / "text")]
            more.append(f"corpus.sources={json.dumps(mixed)}")
        if row.weak:
            # In the precision of the one it is cut from: bfloat16 takes a CPU without units for it ages.
            first = next(iter(base.teachers.values()))
            more += [
                f"teachers.{WEAK}.model={self.shared / WEAK}",
                f"teachers.{WEAK}.dtype={first.dtype}",
            ]
        if row.cache:
            cache = str(self.shared / "caches" / row.cache)
        places = (f"corpus_dir={corpus}", f"cache_dir={cache}", "assets=null")
        work = Workspace(
            load_config(
                self.config,
                [*self.overrides, *PINNED, *COMMON, *EVALUATION, *places, *more, *own],
            ),
            self.progress,
        )
        work.memo = self.base.memo  # of files' hashes
        return work

    def prepare(self, row: Row, work: Workspace) -> None:
        """Builds what a row reads and is not there yet: text, models, corpus, caches."""
        needs = (row.cache, row.weak, row.mixed)
        if needs in self._prepared:
            return
        durable.make_folder(self.shared)
        with self._alone("shared"):
            self.base.ensure_assets()
            self.yardstick(False).cache_teachers()
        if row.mixed:
            with self._alone("mixed"):
                instructions.build(self.shared / "mix" / "text", self.chats)
                self.yardstick(True).cache_teachers()
        with self._alone(row.cache or ("weak" if row.weak else "shared")):
            if row.weak:
                self._build_weak()
            work.cache_teachers()
        self._prepared.add(needs)

    def _alone(self, what: str) -> AbstractContextManager[None]:
        """One process at a time makes a thing; different things are made side by side."""
        return durable.alone(self.shared / f".preparing-{what}.lock")

    def _build_weak(self) -> None:
        """Makes the weak teacher: the first teacher without a sixth of its layers, from the middle,
        and nothing done to heal it."""
        import torch

        from stages.head import find_decoder_layers
        from stages.model_files import locate, model_identity
        from stages.student import cut_layers
        from stages.teacher import load_causal_lm
        from stages.tokenizer import load_tokenizer

        place, (name, options) = self.shared / WEAK, next(iter(self.base.config.teachers.items()))
        key = f"teachers.{name}.model"
        folder = locate(options.model, options.revision, key)
        made_from = json.dumps(model_identity(folder, key, self.base.memo)).encode()
        if (place / _MADE_FROM).exists() and (place / _MADE_FROM).read_bytes() == made_from:
            return
        model = load_causal_lm(
            folder, key, dtype=torch.bfloat16, attention=options.attention,
            device=torch.device("cpu"), trust_remote_code=options.trust_remote_code,
        )  # fmt: skip
        count = len(find_decoder_layers(model))
        first = (count - max(1, count // 6)) // 2
        keep = [i for i in range(count) if not first <= i < first + max(1, count // 6)]
        staged = place.with_name(f".{WEAK}.partial")
        cut_layers(model, keep).to(torch.bfloat16).save_pretrained(staged)
        load_tokenizer(folder, key).save_pretrained(staged)
        durable.write_bytes(staged / _MADE_FROM, made_from)
        durable.replace_folder(staged, place)


def _slug(row: Row) -> str:
    """Returns a folder's name for a row: letters, digits, dots and dashes."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c == ".") else "-" for c in row.name)
    return ("mixed-" if row.mixed else "") + "-".join(part for part in kept.split("-") if part)
