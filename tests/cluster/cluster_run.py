"""A run on the private cluster, and what its jobs did to it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import Lab, digests, sentences
from private_slurm import PrivateSlurm

from storage.leases import leases
from storage.verify import verify

HERE = Path(__file__).parent
PARTS = 12


class Run:
    """A run of 12 parts of one teacher, and what its jobs did to it."""

    def __init__(self, lab: Lab, slurm: PrivateSlurm, cli: Callable[..., Any]) -> None:
        self.lab, self.slurm, self.cli = lab, slurm, cli
        self.cache = lab.root / "run/cache"
        lab.config |= {"teachers": {"one": {"model": f"{lab.root}/a", "batch_blocks": 1}}}
        lab.config["loss"] = {"chunk_tokens": 16}
        rows = [json.dumps({"text": text}) for text in sentences(38, 4)]
        (lab.root / "y.jsonl").write_text("\n".join(rows) + "\n")
        lab.config["corpus"]["blocks_per_part"] = 5
        lab.config["corpus_dir"] = f"{lab.root}/corpus"
        assert lab.workspace().prepare().parts == PARTS
        path = os.pathsep.join([str(HERE), *(p for p in sys.path if p)])
        lab.config["cluster"] = {
            "command": f"{sys.executable} {HERE}/slowly.py",
            "setup": [f"export PYTHONPATH={path}", "export MASTER_ADDR=127.0.0.1 OMP_NUM_THREADS=1"],
            "defaults": {"partition": "scavenge", "cpus": 1, "time": "10"},
            "tasks": 4, "concurrent": 2, "lease": 12.0, "grace": 2.0, "warning": 60,
        }  # fmt: skip

    def slowed(self, batch: float = 0.0, step: float = 0.0) -> None:
        self.lab.config["cluster"]["setup"].append(f"export SLOW_BATCH={batch} SLOW_STEP={step}")

    def launch(self, *options: str, **changes: Any) -> dict[str, str]:
        """Launches with --submit; returns the jobs by step."""
        result = self.cli("launch", "slurm", self.lab.write(**changes), "--submit", *options)
        assert result.exit_code == 0, result.output
        rows = [line for line in result.output.splitlines() if ": job " in line]
        self.output = result.output
        return {line.split(":")[0]: line.split(": job ")[1].split()[0] for line in rows}

    def manifests(self) -> int:
        return len(list((self.cache / "one/manifests").glob("*.json")))

    def workers(self) -> list[int]:
        """Returns the processes that hold leases."""
        held = leases(self.cache / "one")
        return sorted({lease.holder.pid for lease in held if lease.holder})

    def in_the_middle(self) -> None:
        """Waits until some parts are written and a task is at work on another."""
        self.slurm.wait_for(lambda: self.manifests() >= 2 and self.workers(), 180)

    def computed(self) -> list[int]:
        text = (self.cache / "one/log.jsonl").read_text()
        return [json.loads(line)["part"] for line in text.splitlines()]

    def logs(self, step: str) -> str:
        return "".join(p.read_text() for p in self.lab.root.glob(f"run/launch/logs/{step}-*.out"))

    def require_whole(self, again: int = 0) -> None:
        """The cache has every part, each byte verified, the same bits as a run in one process; no more
        than `again` parts were written twice."""
        report = verify(self.cache / "one", deep=True)
        assert report.sound and report.complete and report.checked == PARTS
        assert all(leftover.ours for leftover in report.leftovers)
        done = self.computed()
        assert set(done) <= set(range(PARTS)) and len(done) <= len(set(done)) + again
        alone = self.lab.workspace(cache_dir=f"{self.lab.root}/alone")
        alone.cache_teachers()
        assert digests(self.cache) == digests(self.lab.root / "alone")
