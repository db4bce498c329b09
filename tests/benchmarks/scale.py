"""Manifests for 10^6 parts, by simulation: what opening and planning take.

    python tests/benchmarks/scale.py [PARTS]

Method: a corpus of that many parts is described by its corpus.json; a finished cache of one teacher
has a manifest's name for every part in a real folder. The manifests that are opened (at most
`manifest.SAMPLE`, and the last) have content, the others are empty, which does no harm exactly
because nothing opens them. log.jsonl has a line a part. No shard exists. Each step runs in a process
of its own; seconds are wall-clock after the imports, memory is the process's peak, imports included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from stages.options import StoreOptions, TeacherOptions
from stages.part_log import append_log, log_path, measured
from stages.teacher_jobs import TeacherJob, plan_jobs, stored
from storage import manifest
from storage.blocks import BlockReader
from storage.corpus_info import (
    CorpusGeneration,
    CorpusInfo,
    SourceRange,
    load_info,
    save_info,
    stored_bytes,
)
from storage.fingerprint import HashMemo, fingerprint
from storage.layout import shard_name
from storage.orders import learn_orders
from storage.reader import CacheReader
from storage.tables import digest
from storage.writer import CacheWriter

BLOCKS_PER_PART, BLOCK_LENGTH = 64, 1024
LIMITS = {"seconds": 10.0, "bytes": 10**9}


def build(root: Path, parts: int) -> None:
    """Puts corpus.json, a small checkpoint and the finished cache's names under `root`."""
    blocks = parts * BLOCKS_PER_PART
    source = SourceRange("x", "train", 0, blocks, blocks, blocks * BLOCK_LENGTH)
    info = CorpusInfo(
        identity={"sources": {"000": "x"}, "blocks_per_part": BLOCKS_PER_PART}, fingerprint="c" * 64,
        tokenizer="e" * 64, vocab_size=50_000,
        block_length=BLOCK_LENGTH, blocks=blocks, blocks_per_part=BLOCKS_PER_PART, sources=(source,),
        generations=(CorpusGeneration(0, blocks, "c" * 64, 1, "d" * 64),),
    )  # fmt: skip
    save_info(root / "corpus", info)
    names(
        root / "corpus",
        parts,
        info.owners.of(0),
        lambda part: {f"{part}.arrow": (300_000, "0" * 64)},
    )
    (root / "teacher").mkdir()
    (root / "teacher/config.json").write_text(json.dumps({"hidden_size": 8}))
    save_file({"w": np.zeros(8, np.float32)}, root / "teacher/model.safetensors")
    job = planned(root)
    shapes = {name: len(spec.shape) for name, spec in job.layout.arrays().items()}
    objects = {shard_name(name, 0, n): (10**6, "0" * 64) for name, n in shapes.items()}
    orders = learn_orders(np.zeros((0, job.layout.k), np.int64), job.layout.vocab_size)
    CacheWriter(job.root, job.identity, job.layout, lambda: orders)
    carry = {"orders": digest(orders)}
    names(job.root, parts, fingerprint(job.identity), lambda part: objects, carry)
    row = {"part": 0, "tokens": 65536, "seconds": 9.5, "peak_bytes": 10**9, "device": "cpu"}
    append_log(job.root, row)
    log_path(job.root).write_text(log_path(job.root).read_text() * parts)


def names(
    root: Path, parts: int, owner: str, objects: Callable[[int], dict[str, Any]],
    carry: dict[str, str] | None = None,
) -> None:  # fmt: skip
    """Creates a manifest's name for every part, and content for those that will be opened."""
    folder = root / "manifests"
    folder.mkdir(parents=True)
    for part in range(parts):
        os.close(os.open(manifest.path_of(root, part, owner), os.O_CREAT | os.O_WRONLY))
    picked = np.linspace(0, parts - 1, min(parts, manifest.SAMPLE)).round().astype(int)
    for part in {*picked.tolist(), parts - 1}:
        first = part * BLOCKS_PER_PART
        done = manifest.Manifest(owner, part, first, BLOCKS_PER_PART, objects(part), carry or {})
        manifest.save(root, done)


def planned(root: Path) -> TeacherJob:
    info = load_info(root / "corpus")
    assert info is not None
    teachers = {"one": TeacherOptions(model=str(root / "teacher"))}
    memo = HashMemo(root / "memo.json")
    return plan_jobs(teachers, StoreOptions(), info, root / "cache", memo)[0]


def opening(root: Path) -> None:
    CacheReader(root / "cache/one", "one")
    BlockReader(root / "corpus")


def planning(root: Path) -> None:
    """What `scholiast plan` asks of a corpus and a cache."""
    job = planned(root)
    assert len(job.done) == job.layout.parts and not job.pending
    size, log = stored(job), measured(job.root)
    assert log is not None and size.bytes > 10**6 * len(job.done)
    corpus = BlockReader(root / "corpus").info
    assert stored_bytes(root / "corpus", corpus)[0] > 0


def resuming(root: Path) -> None:
    """What preparing a corpus asks before it goes on: the listing and the last manifest."""
    info = load_info(root / "corpus")
    assert info is not None
    done = manifest.done_parts(root / "corpus", info.owners, info.parts)
    assert manifest.load(root / "corpus", int(done[-1]), info.owners.of(0)) is not None


STEPS = {step.__name__: step for step in (opening, planning, resuming)}


def measure(step: str, root: Path) -> None:
    """Runs one step in this process and prints its figures as JSON."""
    opened = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal opened
        opened += event == "open" and str(arguments[0]).startswith(str(root))

    sys.addaudithook(hook)
    start = time.perf_counter()
    STEPS[step](root)
    seconds = time.perf_counter() - start
    # Not ru_maxrss, which a child inherits from the process that started it.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) * 1024
    print(json.dumps({"seconds": seconds, "bytes": peak, "files_opened": opened}))


def run(parts: int = 10**6) -> dict[str, Any]:
    """Returns {step: {seconds, bytes, files_opened}, "parts": …, "method": …}."""
    result: dict[str, Any] = {
        "parts": parts,
        "method": (__doc__ or "").split("Method: ")[1].strip(),
    }
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        build(Path(folder), parts)
        result["simulated_in_seconds"] = time.perf_counter() - start
        for step in STEPS:
            shown = subprocess.run(
                [sys.executable, __file__, "--measure", step, folder],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            result[step] = json.loads(shown.stdout)
    return result


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], Path(sys.argv[3]))
        return
    result = run(*map(int, sys.argv[1:2]))
    print(f"{result['parts']:,} parts, simulated in {result['simulated_in_seconds']:.0f} s")
    print(result["method"])
    for step in STEPS:
        row = result[step]
        ok = all(row[name] < limit for name, limit in LIMITS.items())
        print(
            f"{step:10} {row['seconds']:8.2f} s {row['bytes'] / 1e6:8.0f} MB "
            f"{row['files_opened']:6,} files opened  {'ok' if ok else 'over the limit'}"
        )


if __name__ == "__main__":
    main()
