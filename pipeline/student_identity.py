"""What decides a student's weights: its run's identity, and the layers that are aligned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import FUSED
from stages.layer_pairs import Pair, resolve_pairs
from stages.model_files import config_file, layer_count, model_identity, read_config
from stages.model_safety import code_identity
from stages.target_options import LossOptions
from stages.teacher_jobs import TeacherJob
from storage.corpus_info import CorpusInfo
from storage.errors import ConfigError
from storage.fingerprint import fingerprint

if TYPE_CHECKING:
    from pipeline.workspace import Workspace

_SAME_STUDENT = {
    "baseline", "decode", "workers", "keep_checkpoints", "checkpoint_every", "log_every",
    "eval_every", "loggers", "parallel", "compile", "async_checkpoint",
}  # fmt: skip
"""Keys of `train` that do not decide what is learned."""

_SAME_LOSS = {"chunk_bytes", "chunk_tokens"}
"""Keys of `loss` that do not: memory, not meaning."""


def student_identity(
    work: Workspace, name: str, loss: LossOptions, info: CorpusInfo, jobs: list[TeacherJob]
) -> dict[str, Any]:
    """Returns what decides a student's weights; the baseline reads no cache and fuses nothing."""
    config, fused = work.config, name == FUSED
    caches = {
        job.name: fingerprint(job.identity)
        for job in jobs
        if fused and job.name in config.fused_teachers
    }
    student = config.student.model_dump(mode="json", exclude={"model", "revision", "config"})
    return {
        "corpus": info.fingerprint,
        "train_blocks": [[s.first_block, s.blocks] for s in info.sources if s.split == "train"],
        "caches": caches,
        "student": {"files": _student_files(work), **student},
        "fusion": config.fusion.model_dump(mode="json") if fused else {},
        "loss": loss.model_dump(mode="json", exclude=_SAME_LOSS),
        "feature_pairs": [
            {"student": ours, "teacher": name, "layer": theirs}
            for ours, name, theirs in feature_pairs(work, loss, jobs)
        ],
        "train": config.train.model_dump(mode="json", exclude=_SAME_STUDENT),
    }


def feature_pairs(work: Workspace, loss: LossOptions, jobs: list[TeacherJob]) -> list[Pair]:
    """Returns which layers a training aligns; depths are looked up where they decide.

    Raises:
        ConfigError: a pair that is not stored, or a model that does not tell its layers.
    """
    fused, student = work.config.fused_teachers, work.config.student
    stored = {job.name: job.layout.feature_layers for job in jobs if job.name in fused}
    if loss.features.weight == 0 or loss.features.pairs != "auto":
        return resolve_pairs(loss.features, stored, {}, 0)
    depths = {
        job.name: depth_of(job.folder, f"teachers.{job.name}.model")
        for job in jobs
        if stored.get(job.name)
    }
    kept = student.keep_layers
    ours = depth_of(work.student_folder(), "student") if kept is None else len(kept)
    return resolve_pairs(loss.features, stored, depths, ours)


def _student_files(work: Workspace) -> dict[str, str]:
    student, folder = work.config.student, work.student_folder()
    if student.model is None:
        trusted = student.trust_remote_code and folder.is_dir()
        code = code_identity(folder, "student.config", work.memo) if trusted else {}
        return {"config.json": work.memo.sha256(config_file(folder)), **code}
    return model_identity(folder, "student.model", work.memo, student.trust_remote_code)


def depth_of(folder: Path, key: str) -> int:
    """Returns how many decoder layers a model has, as its configuration says.

    Raises:
        ConfigError: it does not say.
    """
    count = layer_count(read_config(folder, key))
    if count is None:
        raise ConfigError(
            "the model's configuration does not say how many layers it has", where=f"{key}: {folder}",
            todo="name the layers by hand in loss.features.pairs instead of auto",
        )  # fmt: skip
    return count
