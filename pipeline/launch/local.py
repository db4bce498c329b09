"""A pool of processes on this machine, under the same contract as any scheduler's tasks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from pipeline.launch.logs import END
from pipeline.launch.steps import Call, launch_folder
from pipeline.workspace import Workspace
from storage.errors import ScholiastError, Stopped

_LINES = 12  # of a failed task's output that are shown


def run_pool(work: Workspace, call: Call, workers: int) -> None:
    """Runs `workers` tasks of stage one and waits for them.

    Each gets an even share of the cores as threads, unless the configuration or the environment says, and
    the GPU of its turn.

    Raises:
        ScholiastError: a task failed; with the end of its output.
        Stopped: by SIGTERM or SIGUSR1, which each task got.
    """
    work.prepare()
    logs = launch_folder(work) / "logs"
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    pool: list[tuple[subprocess.Popen[bytes], Path]] = []
    told: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        told.append(number)
        for process, _ in pool:
            process.send_signal(number)

    before = {each: signal.signal(each, forward) for each in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        for index in range(workers):
            if told:  # those that run know; no more are begun
                break
            words = ["cache-teachers", "--task", str(index), "--tasks", str(workers)]
            path = logs / f"local-{index}.out"
            with path.open("wb") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", "pipeline.cli", *call.arguments(words)],
                    stdout=output, stderr=subprocess.STDOUT,
                    env={"OMP_NUM_THREADS": threads, **os.environ, "LOCAL_RANK": str(index)},
                )  # fmt: skip
            pool.append((process, path))
        codes = [process.wait() for process, _ in pool]
    finally:
        for process, _ in pool:
            if process.poll() is None:  # interrupted
                process.terminate()
                process.wait()
        for each, handler in before.items():
            signal.signal(each, handler)
    for code, (_, path) in zip(codes, pool, strict=True):
        with path.open("a") as log:  # as batch scripts do, for `status`
            log.write(f"{END} code={code if code >= 0 else 128 - code}\n")
    require_success(codes, [path for _, path in pool], bool(told))


def require_success(codes: list[int], logs: list[Path], told: bool) -> None:
    """Raises what a pool came to, if it is not the end of all work.

    Args:
        codes, logs: of each task, its exit code and where its output went.
        told: whether the pool was told to stop.

    Raises:
        ScholiastError, Stopped
    """
    bad = [(code, path) for code, path in zip(codes, logs, strict=True) if code]
    if told or (bad and all(code == Stopped.exit_code for code, _ in bad)):
        raise Stopped(
            "the tasks were stopped; finished parts are kept", todo="run the same command again"
        )
    if bad:
        code, path = next((one for one in bad if one[0] != Stopped.exit_code), bad[0])
        raise ScholiastError(
            f"{len(bad)} of {len(codes)} tasks failed; the first with exit code {code}", where=path,
            found="\n" + "\n".join(path.read_text(errors="replace").splitlines()[-_LINES:]),
            todo="mend it and run the same command again: finished parts are kept",
        )  # fmt: skip
