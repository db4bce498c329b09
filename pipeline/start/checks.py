"""What `scholiast doctor` looks at whatever the run: versions, devices, folders, limits."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pipeline.console import human_bytes
from pipeline.start import machine
from storage.errors import ScholiastError

State = Literal["ok", "warn", "bad"]
OK: Final[State] = "ok"
WARN: Final[State] = "warn"
BAD: Final[State] = "bad"

_LITTLE_SPACE = 5e9  # bytes of disk
_LITTLE_MEMORY = 4e9
_FEW_FILES = 4_096  # open at once: a shard of each array, part in the order's window and teacher
_SHOWN = ("torch", "transformers", "datasets", "tokenizers", "zarr", "numcodecs", "pcodec",
          "huggingface-hub", "pyarrow")  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One thing looked at.

    Attributes:
        area, name: what it is.
        state: "ok"; "warn": works, but not well, or not yet; "bad": will fail.
        found: what was seen.
        todo: what to do; "" where nothing is.
    """

    area: str
    name: str
    state: State
    found: str
    todo: str = ""


def failed(area: str, name: str, error: ScholiastError) -> Check:
    """Returns the check that an error ended."""
    sides = [f"expected {error.expected}"] if error.expected is not None else []
    sides += [f"found {error.found}"] if error.found is not None else []
    where = f" ({error.where})" if error.where else ""
    return Check(area, name, BAD, "; ".join([f"{error.what}{where}", *sides]), error.todo)


def versions() -> list[Check]:
    """Returns a check of Python and of each package against the ranges that ours names."""
    from importlib.metadata import PackageNotFoundError, metadata, requires

    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    area = "versions"
    try:
        needed = [Requirement(text) for text in requires("scholiast") or ()]
        python = SpecifierSet(str(metadata("scholiast")["Requires-Python"]))
    except PackageNotFoundError:
        return [Check(area, "scholiast", BAD, "not installed", "run `pip install -e .` at its top")]
    here = platform.python_version()
    right = python.contains(here, prereleases=True)
    checks = [Check(area, "python", OK if right else BAD, f"{here} (needs {python})",
                    "" if right else f"use a Python {python}")]  # fmt: skip
    for one in needed:
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            checks.append(_version(one.name, one.specifier, area))
    rank = {name: i for i, name in enumerate(("python", *_SHOWN))}
    return sorted(checks, key=lambda check: rank.get(check.name, len(rank)))


def _version(name: str, wanted: object, area: str) -> Check:
    from importlib.metadata import PackageNotFoundError, version

    from packaging.specifiers import SpecifierSet

    range_of = SpecifierSet(str(wanted))
    todo = f"run `pip install '{name}{range_of}'`"
    try:
        here = version(name)
    except PackageNotFoundError:
        return Check(area, name, BAD, f"not installed (needs {range_of})", todo)
    right = range_of.contains(here, prereleases=True)
    return Check(
        area, name, OK if right else BAD, f"{here} (needs {range_of})", "" if right else todo
    )


def devices(device: str = "auto") -> list[Check]:
    """Returns checks of processor, memory, GPUs, and of bf16 where the run will compute."""
    from stages.device import choose_device

    area = "devices"
    name, flags = machine.cpu()
    extensions = f"; {', '.join(flags)}" if flags else "; no AVX2, AVX-512 or AMX"
    checks = [Check(area, "processor", OK, f"{name}, {machine.cores()} cores{extensions}")]
    free, all_of_it = machine.available_bytes(), machine.memory_bytes()
    little = free < _LITTLE_MEMORY
    checks.append(
        Check(area, "memory", WARN if little else OK,
              f"{human_bytes(free)} free of {human_bytes(all_of_it)}",
              "end other programs: weights are read into it" if little else "")
    )  # fmt: skip
    for i, gpu in enumerate(machine.gpus()):
        found = f"{gpu.name}, {human_bytes(gpu.free)} free of {human_bytes(gpu.memory)}, compute " \
                f"capability {gpu.capability}"  # fmt: skip
        checks.append(Check(area, f"GPU {i}", OK if gpu.bf16 else WARN,
                            f"{found}, {'computes' if gpu.bf16 else 'does not compute'} in bf16",
                            "" if gpu.bf16 else "set train.precision: fp32"))  # fmt: skip
    try:
        chosen = choose_device(device)
    except ScholiastError as error:
        return [*checks, failed(area, "device", error)]
    if chosen.type == "cpu":
        checks.append(Check(area, "device", OK, "the CPU" if device == "cpu" else
                            "the CPU: torch sees no GPU"))  # fmt: skip
    return [*checks, _bf16(str(chosen), area)]


def _bf16(device: str, area: str) -> Check:
    rates = machine.measure(device)
    told = (
        f"{rates.gain:.1f} times as fast"
        if rates.gain >= 1
        else f"{1 / rates.gain:.1f} times slower"
    )
    found = (
        f"{told} {'as' if rates.gain >= 1 else 'than'} fp32: {rates.bf16 / 1e9:,.1f} against "
        f"{rates.fp32 / 1e9:,.1f} GFLOP/s ({rates.method})"
    )
    if rates.gain >= 1:
        return Check(area, "bf16", OK, found)
    todo = (
        "where they are not so yet, set train.precision: fp32 and teachers.NAME.dtype: float32 (twice "
        "the memory)"
    )
    return Check(area, "bf16", WARN, found, todo)


def limits() -> list[Check]:
    """Returns a check of how many files may be open at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    told = ["no limit" if n == resource.RLIM_INFINITY else f"{n:,}" for n in (soft, hard)]
    few = soft != resource.RLIM_INFINITY and soft < _FEW_FILES
    return [Check("system", "open files", WARN if few else OK, f"{told[0]} (at most {told[1]})",
                  "have the hard limit raised (limits.conf, or an administrator); readers open "
                  "shards again and again otherwise" if few else "")]  # fmt: skip


def folder(path: Path, name: str, needed: float = 0.0) -> list[Check]:
    """Returns checks of a folder that will be written to: it need not exist, and nothing stays there.

    Args:
        name: the key, for messages.
        needed: bytes that the run will put there, about; 0 if not known.
    """
    area, home = "folders", _existing(path)
    try:
        with tempfile.TemporaryDirectory(prefix=".scholiast-doctor-", dir=home) as trial:
            checks = [
                _space(path, home, name, needed), _renames(Path(trial), name), _locks(Path(trial), name)
            ]  # fmt: skip
    except OSError as error:
        todo = "choose a folder you may write to"
        return [Check(area, name, BAD, f"{path} cannot be written: {error.strerror}", todo)]
    return checks


def _existing(path: Path) -> Path:
    path = path.resolve()
    while not path.is_dir():
        path = path.parent
    return path


def _space(path: Path, home: Path, name: str, needed: float) -> Check:
    free = shutil.disk_usage(home).free
    wanted = max(needed, _LITTLE_SPACE)
    takes = f"; the run will take about {human_bytes(needed)}" if needed else ""
    found = f"{path} on {_file_system(home)}, {human_bytes(free)} free{takes}"
    todo = "free some space, or choose another folder" if free < wanted else ""
    return Check("folders", name, OK if free >= wanted else WARN, found, todo)


def _renames(trial: Path, name: str) -> Check:
    """Puts a new file in an old one's place, as every commit does, and flushes both."""
    from storage import durable

    start = time.perf_counter()
    try:
        for text in (b"old", b"new"):
            durable.write_bytes(trial / "file", text)
        whole = (trial / "file").read_bytes() == b"new" and len(list(trial.iterdir())) == 1
    except (OSError, ScholiastError) as error:
        return Check("folders", f"{name}: renames", BAD, f"a file cannot be replaced: {error}",
                     "choose a folder on another file system")  # fmt: skip
    milliseconds = 500 * (time.perf_counter() - start)
    return Check("folders", f"{name}: renames", OK if whole else BAD,
                 f"atomic and flushed, {milliseconds:.1f} ms a file" if whole else "the old file is read",
                 "" if whole else "choose a folder on another file system")  # fmt: skip


def _locks(trial: Path, name: str) -> Check:
    """Tries both kinds of lock that commands use: flock, and POSIX's."""
    area, label = "folders", f"{name}: locks"
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((trial / "lock").open("w")) for _ in range(2)]
        try:
            fcntl.flock(files[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(files[1], fcntl.LOCK_EX | fcntl.LOCK_NB)
                return Check(area, label, WARN, "two at once get one lock", _ALONE)
            fcntl.lockf(files[1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return Check(area, label, WARN, f"there are none: {error.strerror}", _ALONE)
    return Check(area, label, OK, "held against a second one")


_ALONE = "start one command at a time in this run, or choose a folder on another file system"


def _file_system(path: Path) -> str:
    """Returns the kind of file system that a folder lies on, as far as the system tells."""
    best, kind = "", "an unknown file system"
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, mount, of, *_ = line.split(" ")
            if len(mount) >= len(best) and path.is_relative_to(mount):
                best, kind = mount, of
    return kind


def hub_cache() -> Check:
    """Returns a check of the folder that downloaded models go to."""
    from huggingface_hub import constants

    path = Path(constants.HF_HUB_CACHE)
    home = _existing(path)
    free = shutil.disk_usage(home).free
    if not os.access(home, os.W_OK):
        return Check("folders", "hub cache", WARN, f"{path} cannot be written",
                     "set HF_HUB_CACHE to a folder you may write to")  # fmt: skip
    little = free < _LITTLE_SPACE
    return Check("folders", "hub cache", WARN if little else OK, f"{path}, {human_bytes(free)} free",
                 "free some space, or set HF_HUB_CACHE" if little else "")  # fmt: skip


def worst(checks: Sequence[Check]) -> State:
    """Returns the worst state of any."""
    states = {check.state for check in checks}
    return BAD if BAD in states else WARN if WARN in states else OK
