"""What `scholiast plan --measure` found, kept in RUN_DIR/calibration.json, and when it still holds.

An entry holds while what it was measured with is the same: the model, the options that decide its speed
and memory, the packages' versions. On which device is said beside it: whoever asks says which will do.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.cache_workspace import CacheWorkspace
from pipeline.start import machine
from pipeline.workspace import Workspace
from stages.model_files import locate, read_config
from storage import durable
from storage.fingerprint import fingerprint

STUDENT = "student"


@dataclass(frozen=True)
class Measured:
    """What one model was measured to take.

    Attributes:
        identity: fingerprint of what decides it, without the device.
        device: its name, as `device_name` gives it.
        gpu: whether that is one.
        tokens: how many were measured.
        tokens_per_s: of the whole stage: forward, head and notes; or forward, backward and optimizer.
        peak_bytes: largest memory: allocated on the GPU, or the process's resident size.
        base_bytes: of it what was there before the model was (the interpreter and its libraries; 0 on a
            GPU).
        arrays: a teacher's encoded bytes a token, by array; empty for the student.
    """

    identity: str
    device: str
    gpu: bool
    tokens: int
    tokens_per_s: float
    peak_bytes: int
    base_bytes: int
    arrays: dict[str, float]


def path_of(work: CacheWorkspace) -> Path:
    """Returns the file's place."""
    return work.config.run / "calibration.json"


def load(work: CacheWorkspace) -> dict[str, Measured]:
    """Returns "teachers.NAME" or "student" → what was measured; empty if nothing readable is there:
    it is a measurement that can be taken again, and decides no result."""
    try:
        body = json.loads(path_of(work).read_text())
        return {name: Measured(**entry) for name, entry in body["measured"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def save(work: CacheWorkspace, measured: dict[str, Measured]) -> None:
    """Writes the file; what it held of other models stays."""
    merged = {**load(work), **measured}
    body = {"measured": {name: asdict(one) for name, one in merged.items()}}
    durable.make_folder(work.config.run)
    durable.write_bytes(path_of(work), json.dumps(body, indent=1).encode())


def fitting(work: CacheWorkspace, key: str, will_do: Callable[[Measured], bool]) -> Measured | None:
    """Returns what was measured of a model, if it was measured as the configuration now has it.

    Args:
        key: "teachers.NAME" or "student".
        will_do: whether the device on which it was measured will.
    """
    found = load(work).get(key)
    if found is None or not will_do(found):
        return None
    if key == STUDENT:
        assert isinstance(work, Workspace)
        now = student_identity(work)
    else:
        now = teacher_identity(work, key.removeprefix("teachers."))
    return found if found.identity == now else None


def teacher_identity(work: CacheWorkspace, name: str) -> str:
    """Returns the fingerprint of what decides a teacher's speed, memory and bytes."""
    options = work.config.teachers[name]
    folder = locate(options.model, options.revision, f"teachers.{name}.model")
    return fingerprint({
        "model": read_config(folder, f"teachers.{name}.model"),
        "teacher": options.model_dump(mode="json"), "store": work.config.store.model_dump(mode="json"),
        **_common(work),
    })  # fmt: skip


def student_identity(work: Workspace) -> str:
    """Returns the fingerprint of what decides the student's speed and memory."""
    config = work.config
    train = config.train.model_dump(
        mode="json",
        include={"batch_blocks", "accumulate", "precision", "gradient_checkpointing", "compile"},
    )  # fmt: skip
    return fingerprint({
        "model": read_config(work.student_folder(), "student"),
        "student": config.student.model_dump(mode="json"),
        "train": train, "loss": config.loss.model_dump(mode="json"),
        "teachers": {
            name: list(config.teachers[name].feature_layers) for name in config.fused_teachers
        },
        "entries": [config.store.entries, config.store.drawn, config.fusion.k, config.fusion.mixing],
        "segments": config.store.segments, **_common(work),
    })  # fmt: skip


def _common(work: CacheWorkspace) -> dict[str, Any]:
    packages = ("scholiast", "torch", "transformers")
    return {
        "block_length": work.config.corpus.block_length, "threads": work.config.threads,
        "versions": {name: version(name) for name in packages},
    }  # fmt: skip


def device_name(work: CacheWorkspace) -> tuple[str, bool]:
    """Returns (the device's name, whether it is a GPU); a CPU's with the threads that torch takes."""
    import torch

    from stages.device import choose_device

    device = choose_device(work.config.device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device), True
    threads = work.config.threads or torch.get_num_threads()
    return f"cpu: {machine.cpu()[0]}, {threads} thread{'' if threads == 1 else 's'}", False
