"""A configuration at work: the one place that turns options into calls of the stages."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cache_workspace import CacheWorkspace
from pipeline.config import BASELINE, FUSED
from pipeline.student_identity import feature_pairs, student_identity
from stages.layer_pairs import wanted_layers
from stages.model_files import (
    locate,
    read_config,
)
from stages.target_options import LossOptions
from stages.teacher_jobs import TeacherJob
from storage import durable
from storage.corpus_info import CorpusInfo
from storage.errors import ConfigError, IncompleteCache
from storage.fingerprint import fingerprint

if TYPE_CHECKING:
    from stages.batches import BatchReader
    from stages.ranks import Ranks
    from stages.run import Run
    from stages.stop import StopSignals

_MEASURED = (
    "temperature", "divergence", "beta", "skew", "target", "chunk_tokens", "chunk_bytes",
)  # fmt: skip
"""Keys of `loss` that decide what KD is, whatever its share."""


class Workspace(CacheWorkspace):
    """All of one run: what the first half has, and training, export and evaluation of students.

    Heavy imports happen where they are needed.
    """

    def runs(self, info: CorpusInfo, jobs: list[TeacherJob]) -> dict[str, Run]:
        """Returns the trainings that the configuration asks for: the fused student, the baseline."""
        import torch

        from pipeline.model_card import model_card
        from stages.run import Run

        config = self.config
        settings = read_config(self.student_folder(), self._student_key)
        dtype = settings.get("dtype") or settings.get("torch_dtype") or "float32"
        heldout, train = info.block_ids("heldout"), info.ranges("train")
        losses = {FUSED: config.loss}
        if config.train.baseline:
            # Trained on gold tokens alone; measured, while it trains, as the fused student is.
            losses[BASELINE] = LossOptions(
                alpha=0.0, **config.loss.model_dump(include=set(_MEASURED))
            )
        return {
            name: Run(
                config.run / "students" / name, student_identity(self, name, loss, info, jobs),
                config.train,
                loss, train, heldout, getattr(torch, dtype), config.student.lora,
                partial(model_card, self, name, loss, info, jobs),
            )
            for name, loss in losses.items()
        }  # fmt: skip

    def train_students(self) -> dict[str, Run]:
        """Trains what is not trained yet, together with the other ranks if there are any.

        Raises:
            IncompleteCache: stage one is not finished.
            Stopped: by SIGTERM or SIGUSR1, with everything saved.
        """
        if os.environ.get("WORLD_SIZE", "1") == "1":
            self.ensure_assets()
            self.finished_jobs()  # refuses what is incomplete before torch is loaded
        from stages.ranks import joined
        from stages.stop import StopSignals

        with StopSignals() as stop, joined(self.config.device) as ranks:
            return self._train_on(ranks, stop)

    def _train_on(self, ranks: Ranks, stop: StopSignals) -> dict[str, Run]:
        from stages.run import claimed, finished

        ranks.on_first(self.ensure_assets)
        info, jobs = self.finished_jobs()
        self._setup_torch()
        runs = self.runs(info, jobs)
        waiting = ranks.on_first(lambda: [n for n, run in runs.items() if not finished(run)])
        tokenizer = self._student_tokenizer() if waiting else None
        for name in waiting:
            with claimed(runs[name], ranks):
                if not ranks.on_first(partial(finished, runs[name])):  # nor by another meanwhile
                    self._train(name, runs[name], jobs, tokenizer, ranks, stop)
        return runs

    def _student_tokenizer(self) -> Any:
        """Returns what is exported beside the student: its own, which must be the corpus's."""
        from stages.tokenizer import load_tokenizer, require_same_tokenizer

        ours = self.tokenizer()
        if self.config.student.model is None:
            return ours
        theirs = load_tokenizer(self.student_folder(), "student.model")
        require_same_tokenizer(ours, theirs, "the corpus", "the student")
        return theirs

    def _train(
        self, name: str, run: Run, jobs: list[TeacherJob], tokenizer: Any, ranks: Ranks,
        stop: StopSignals,
    ) -> None:  # fmt: skip
        import torch

        from stages.head import Head
        from stages.model_checks import check_model
        from stages.student import DistilledStudent, build_student, require_student_fit
        from stages.train_student import Trainer

        # On the CPU at first: a sharded student never lies on one device whole. The seed is also
        # that of trained projections' first values.
        model = build_student(
            self.config.student, self.student_folder(), torch.device("cpu"), run.train.seed
        )
        require_student_fit(model, jobs[0].layout)
        check_model(model, Head.of(model, bfloat16=False), self._student_key, "student.attention")
        pairs, sizes = (
            feature_pairs(self, run.loss, jobs),
            {j.name: j.layout.hidden_size for j in jobs},
        )
        bf16 = run.train.precision == "bf16"
        student = DistilledStudent(model, run.loss, bf16, pairs, sizes, run.train.seed)
        # Two readers: one is read ahead in a thread while the other serves an evaluation.
        on_device = self.config.train.decode == "device"
        reader = self.batch_reader(name == FUSED, on_device)
        evaluation = self.heldout_reader()
        threads = self.config.reading.fetch_threads
        Trainer(
            run, student, tokenizer, reader, evaluation, self.progress, ranks, stop, threads
        ).train()

    def export(self, student: str, step: int | None, folder: Path) -> int:
        """Saves a student from one of its checkpoints as a model; returns the checkpoint's step.

        Raises:
            CheckpointError: there is no such checkpoint.
            ConfigError: there is no such student, or the folder is there already.
        """
        import torch

        self.ensure_assets()
        run, step = self.exportable(student, step, folder)
        self._setup_torch()
        from stages.export import export_checkpoint
        from stages.student import build_student

        model = build_student(self.config.student, self.student_folder(), torch.device("cpu"))
        return export_checkpoint(run, model, self._student_tokenizer(), step, folder)

    def exportable(self, student: str, step: int | None, folder: Path) -> tuple[Run, int]:
        """Returns the training and the step of the checkpoint that an export would save.

        Raises:
            CheckpointError, ConfigError: as `export`.
        """
        runs = self.runs(*self.finished_jobs())
        if student not in runs:
            asked = student == BASELINE and (self.config.run / "students" / student).is_dir()
            raise ConfigError(
                "there is no such student", where="--student", expected=f"one of {list(runs)}",
                found=student,
                todo="it was trained with --set train.baseline=true: give that here, too" if asked
                else "name another",
            )  # fmt: skip
        if folder.exists():
            raise ConfigError(
                "the folder is there already", where=folder, todo="name one that is not there yet"
            )
        from stages.checkpoint import checkpoint_of

        _, facts = checkpoint_of(runs[student].folder / "checkpoints", step)
        return runs[student], int(facts["step"])

    def heldout_reader(self) -> BatchReader:
        """Returns a reader of what held-out figures are measured against.

        Draws give a gradient without bias, but a loss that is too high: there the bucket stands for
        the tail.
        """
        reader = self.batch_reader()
        if reader.tail != "draws":
            return reader
        return reader.at(self.config.loss.temperature, "bucket")

    def batch_reader(self, teachers: bool = True, on_device: bool = False) -> BatchReader:
        """Returns a reader of joined, fused batches (gold tokens alone without teachers)."""
        from stages.batches import BatchReader
        from stages.common_caches import common_tail
        from storage.blocks import BlockReader
        from storage.reader import CacheReader

        config, features = self.config, self.config.loss.features
        stored = {name: config.teachers[name].feature_layers for name in config.fused_teachers}
        wanted, pooled = wanted_layers(features, stored), (features.pooled,)
        caches = {
            name: CacheReader(
                config.cache_folder / name, name, config.fusion.k, wanted[name], pooled
            )
            for name in (config.fused_teachers if teachers else ())
        }
        return BatchReader(
            BlockReader(config.corpus_folder), caches, config.loss.temperature, config.fusion,
            on_device, common_tail(config.loss, caches), features.pooled,
        )  # fmt: skip

    # -- evaluation

    def evaluate(self, models: Mapping[str, Path] | None = None) -> dict[str, Any]:
        """Measures teachers, ensemble and students on the held-out blocks; writes evaluation.json, and
        the figures into the students' model cards.

        Args:
            models: further students, name → folder of an exported model.

        Raises:
            IncompleteCache: a student is not trained.
            ConfigError, VocabularyMismatch, TeacherError: a further student cannot be measured.
        """
        self.ensure_assets()
        models = models or {}
        info, jobs, runs = self.measurable(models)
        from pipeline.evaluation import evaluate
        from pipeline.model_card import refresh_cards

        result = {**self.provenance(info, jobs), **evaluate(self, info, jobs, runs, models)}
        students = {name: fingerprint(run.identity) for name, run in runs.items()}
        result["fingerprints"]["students"] = students
        path = self.config.run / "evaluation.json"
        durable.write_bytes(path, json.dumps(result, indent=1).encode())
        refresh_cards(runs, self.progress)
        return result

    def measurable(
        self, models: Mapping[str, Path]
    ) -> tuple[CorpusInfo, list[TeacherJob], dict[str, Run]]:
        """Returns corpus, jobs and trainings if all that `evaluate` reads is there.

        Raises:
            IncompleteCache, ConfigError, VocabularyMismatch, TeacherError: as `evaluate`.
        """
        info, jobs = self.finished_jobs()
        self._setup_torch()
        from pipeline.evaluation import require_models
        from stages.run import finished

        runs = self.runs(info, jobs)
        for name, run in runs.items():
            if not finished(run):
                raise IncompleteCache(
                    f"the student {name!r} has not been trained", where=run.model_folder,
                    found=self._trained(),
                    todo="run `scholiast train-student` with this configuration first",
                )  # fmt: skip
        require_models(self, models, [*runs, *self.config.teachers])
        return info, jobs, runs

    def provenance(self, info: CorpusInfo, jobs: list[TeacherJob]) -> dict[str, Any]:
        """Returns what the figures belong to: fingerprints, versions, configuration."""
        packages = ("scholiast", "torch", "transformers", "datasets", "zarr", "numcodecs", "pcodec")
        return {
            "name": self.config.name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in packages},
            },
            "fingerprints": {
                "corpus": info.fingerprint,
                "train_blocks": [
                    [s.first_block, s.blocks] for s in info.sources if s.split == "train"
                ],
                "caches": {job.name: fingerprint(job.identity) for job in jobs},
            },
            "config": self.config.model_dump(mode="json"),
        }

    def generate(
        self, student: str, prompt: str, new_tokens: int, temperature: float, seed: int
    ) -> str:
        """Returns what a trained student writes after a prompt.

        Raises:
            IncompleteCache: there is no such student.
            ConfigError: the prompt is empty.
        """
        folder = self.config.run / "students" / student / "model"
        if not folder.is_dir():
            raise IncompleteCache(
                f"there is no trained student {student!r}", where=folder, found=self._trained(),
                todo="run `scholiast train-student`, or name another with --student",
            )  # fmt: skip
        self._setup_torch()
        import torch

        from pipeline.heldout_text import generate
        from stages.device import choose_device
        from stages.teacher import load_causal_lm
        from stages.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(folder, "student")
        tokens = tokenizer(prompt)["input_ids"]
        if not tokens:
            raise ConfigError("the prompt is empty", where="--prompt", todo="give some text")
        model = load_causal_lm(
            folder, f"student {student}", dtype=torch.float32, attention="auto",
            device=choose_device(self.config.device),
            trust_remote_code=self.config.student.trust_remote_code,
        )  # fmt: skip
        return generate(model, tokenizer, tokens, new_tokens, temperature, seed)

    # -- small things

    def _trained(self) -> str:
        """Returns the students that are finished in the run's folder, for people."""
        folders = sorted(self.config.run.glob("students/*/model/scholiast.json"))
        return f"trained here: {', '.join(path.parents[1].name for path in folders) or 'none'}"

    def student_folder(self) -> Path:
        """Returns where the student's checkpoint lies, or its configuration alone."""
        student = self.config.student
        if student.model is None:
            return Path(str(student.config))
        return locate(student.model, student.revision, "student.model")

    @property
    def _student_key(self) -> str:
        """The key of the configuration that says where the student comes from."""
        return "student.config" if self.config.student.model is None else "student.model"
