"""Trainings on several ranks: imports are paid once, each rank is a fork. Run by test_ranks.

Usage: rank_runs.py CONFIG FOLDER main|more; prints one JSON object, what each training came to.
"""

from __future__ import annotations

import errno
import io
import json
import os
import random
import shutil
import signal
import socket
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from warm import warm_up

from pipeline.cli import main
from stages.checkpoint_pieces import PieceWriter
from stages.train_student import Trainer

SEED = 7


@dataclass
class Plan:
    """What befalls one rank of a training.

    Attributes:
        signals: step → signal that it sends itself before that step.
        fails: step whose computation raises.
        full_from: step from whose checkpoint on its disk is full.
    """

    signals: dict[int, int] = field(default_factory=dict)
    fails: int = 0
    full_from: int = 0


def train(config: str, plans: list[Plan], **settings: object) -> list[tuple[int, str]]:
    """Runs train-student on as many ranks as there are plans; returns (exit status, output) of each."""
    arguments = ["train-student", config]
    for key, value in settings.items():
        arguments += ["--set", f"{key.replace('__', '.')}={value}"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [fork(arguments, r, len(plans), port, plan) for r, plan in enumerate(plans)]
    ended = []
    for child, pipe in ranks:
        with os.fdopen(pipe) as output:
            text = output.read()
        ended.append((os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text))
    return ended


def fork(arguments: list[str], rank: int, world: int, port: int, plan: Plan) -> tuple[int, int]:
    """Starts one rank; returns its process id and where its output can be read."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    os.close(read)
    code, output = 1, os.fdopen(write, "w")
    try:
        if world > 1:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        torch.set_num_threads(1)
        befall(plan)
        shown = io.StringIO()
        with redirect_stdout(shown), redirect_stderr(shown):
            code = main.main(arguments, standalone_mode=False) or 0
        output.write(shown.getvalue())
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        output.write(traceback.format_exc())
    output.close()
    os._exit(code)


def befall(plan: Plan) -> None:
    optimize = Trainer._optimize

    def optimized(self: Trainer, *arguments: Any, **named: Any) -> Any:
        if self.step + 1 in plan.signals:
            os.kill(os.getpid(), plan.signals[self.step + 1])
        if self.step + 1 == plan.fails:
            raise MemoryError("nothing is left")
        if self.step + 1 == plan.full_from:
            PieceWriter.write_data = full  # type: ignore[method-assign]
        return optimize(self, *arguments, **named)

    Trainer._optimize = optimized  # type: ignore[method-assign]


def full(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def flip(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])


def latest(folder: Path) -> Path:
    checkpoints = folder / "students/fused/checkpoints"
    return checkpoints / (checkpoints / "latest").read_text()


class Played:
    """What trainings came to: name → step → the ends of its ranks."""

    def __init__(self, config: str, root: Path) -> None:
        self.config, self.root = config, root
        self.came: dict[str, Any] = {}

    def go(self, name: str, step: str, plans: list[Plan], **settings: object) -> None:
        ended = train(self.config, plans, **{"run_dir": self.root / name, **settings})
        self.came.setdefault(name, {})[step] = ended


CALM = Plan()
TWO, FSDP = [CALM, CALM], {"train__parallel": "fsdp"}


def main_runs(played: Played) -> None:
    """Curves are read from the folders by the test."""
    go, came, root, moments = played.go, played.came, played.root, random.Random(SEED)
    go("one", "all", [CALM])
    go("ddp", "all", TWO)
    go("fsdp", "all", TWO, **FSDP)

    first, second = sorted(moments.sample(range(8, 19), 2))
    came["kills"] = [first, second]
    go("killed", "one", [Plan({first: signal.SIGKILL})], train__async_checkpoint="true")
    go("killed", "fsdp", [CALM, Plan({second: signal.SIGKILL})], **FSDP)
    go("killed", "ddp", TWO)
    go("moved", "ddp", [CALM, Plan({first: signal.SIGKILL})], train__async_checkpoint="true")
    go("moved", "one", [CALM])

    go("told", "usr1", [CALM, Plan({5: signal.SIGUSR1})], **FSDP, train__async_checkpoint="true")
    came["told"]["saved"] = latest(root / "told").name
    shutil.copytree(root / "told", root / "damaged")
    go("told", "term", [Plan({9: signal.SIGTERM}), Plan({9: signal.SIGTERM})])
    go("told", "alone", [Plan({12: signal.SIGTERM})])
    go("told", "rest", [CALM])

    flip(next(latest(root / "damaged").glob("rank-00001.safetensors")))
    go("damaged", "two", TWO, **FSDP)
    go("damaged", "one", [CALM])
    go("uneven", "three", [CALM, CALM, CALM])


def more_runs(played: Played) -> None:
    """Further losses and layouts, and what fails on one rank alone."""
    go, came, root = played.go, played.came, played.root
    lean = {"train__gradient_checkpointing": "true", "train__precision": "bf16", "train__steps": 4}
    go("lean", "all", TWO, **FSDP, **lean)
    go("lean_one", "all", [CALM], **lean)

    few = {"train__batch_blocks": 2, "train__accumulate": 2, "train__steps": 4}
    gram = {"loss__features__kind": "gram", **few}
    go("gram", "all", TWO, **gram)
    go("gram_one", "all", [CALM], **gram)
    go("gram_cut", "all", TWO, **{**gram, "train__accumulate": 1})
    frozen = {"loss__features__projection": "random", "loss__features__pairs": "auto", **few}
    go("frozen", "killed", [CALM, Plan({4: signal.SIGKILL})], **FSDP, **frozen)
    go("frozen", "rest", [CALM], **frozen)
    go("frozen_one", "all", [CALM], **frozen)

    cache = shutil.copytree(root.parent / "run/cache", root / "cache")
    flip(cache / "two/notes.zarr/entropy/c/0/0")
    go("corrupt", "two", TWO, cache_dir=cache)
    go("failed", "first", [Plan(fails=3), CALM])
    go("failed", "second", [CALM, Plan(fails=3)], **FSDP)
    go("full", "two", [CALM, Plan(full_from=5)], **FSDP)
    came["full"]["latest"] = latest(root / "full").name


if __name__ == "__main__":
    warm_up(sys.argv[1])
    all_of_it = Played(sys.argv[1], Path(sys.argv[2]))
    (main_runs if sys.argv[3] == "main" else more_runs)(all_of_it)
    print(json.dumps(all_of_it.came))
