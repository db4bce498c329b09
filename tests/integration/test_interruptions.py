"""Killed with -9 anywhere, each command run again goes on and ends with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Lab, digests

Cli = Callable[..., Any]

SCHOLIAST = [sys.executable, "-m", "pipeline.cli"]


def kill_when(condition: Callable[[], bool], *arguments: object) -> None:
    """Starts a command and kills it with -9 as soon as the condition holds."""
    process = subprocess.Popen(
        [*SCHOLIAST, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.002)
    assert process.poll() is None, "the command ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def manifests(run_dir: Path) -> int:
    return len(list(run_dir.glob("cache/*/manifests/*.json")))


def succeed(cli: Cli, *arguments: object) -> None:
    """Runs a command in this process, where the imports are already paid for."""
    result = cli(*arguments)
    assert result.exit_code == 0, result.output


@pytest.mark.long
def test_killed_cache_goes_on_and_ends_the_same(lab: Lab, cli: Cli, cached_parts: Path) -> None:
    undisturbed = cached_parts / "run"
    config, folder = lab.write(), lab.root / "run"
    for parts in (1, 9):
        kill_when(lambda parts=parts: manifests(folder) >= parts, "cache-teachers", config)  # type: ignore[misc]
    kept = {p: p.stat().st_mtime_ns for p in folder.glob("cache/*/manifests/*.json")}
    assert len(kept) >= 9
    succeed(cli, "cache-teachers", config)
    assert all(p.stat().st_mtime_ns == mtime for p, mtime in kept.items()), "finished parts redone"
    assert digests(folder / "cache") == digests(undisturbed / "cache")
    assert digests(folder / "corpus") == digests(undisturbed / "corpus")


@pytest.mark.long
def test_killed_training_reaches_the_same_weights(lab: Lab, cli: Cli) -> None:
    """With dropout, so that the random state has to survive too."""
    settings = json.loads((lab.root / "a/config.json").read_text())
    (lab.root / "a/config.json").write_text(json.dumps({**settings, "attention_dropout": 0.1}))
    options: dict[str, Any] = {"train__steps": 40, "train__checkpoint_every": 3}
    options |= {"corpus_dir": f"{lab.root}/corpus", "cache_dir": f"{lab.root}/cache"}
    undisturbed = lab.write("undisturbed.yaml", run_dir=f"{lab.root}/undisturbed", **options)
    config = lab.write(**options)
    succeed(cli, "cache-teachers", undisturbed)
    succeed(cli, "train-student", undisturbed)
    folder = lab.root / "run/students/fused"

    def step() -> int:
        try:
            return int((folder / "checkpoints/latest").read_text().rsplit("-", 1)[1])
        except (OSError, IndexError):
            return 0

    for at in (3, 15):
        kill_when(lambda at=at: step() >= at, "train-student", config)  # type: ignore[misc]
    succeed(cli, "train-student", config)
    assert digests(folder / "model") == digests(lab.root / "undisturbed/students/fused/model")

    def rows(path: Path) -> list[dict[str, object]]:
        measured = ("seconds", "peak_bytes", "tokens_per_s", "data_wait")
        lines = map(json.loads, path.read_text().splitlines())
        return [{k: v for k, v in row.items() if k not in measured} for row in lines]

    other = lab.root / "undisturbed/students/fused/metrics.jsonl"
    assert rows(folder / "metrics.jsonl") == rows(other)


@pytest.mark.long
def test_interrupt_says_how_to_go_on(lab: Lab, cli: Cli) -> None:
    config = lab.write(train__steps=2000)
    succeed(cli, "cache-teachers", config)
    process = subprocess.Popen(
        [*SCHOLIAST, "train-student", str(config)], stderr=subprocess.PIPE, text=True,
        # A shell starts its background jobs, and so all their children, with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    metrics = lab.root / "run/students/fused/metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors and "run the same command again" in errors
