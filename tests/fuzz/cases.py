"""Runs cases one after the other, each within bounds of time and memory, and counts what came of them."""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
from fuzz.targets import TARGETS, Changed, Ground
from hypothesis import strategies as st

from storage.errors import ScholiastError

SECONDS = 20
"""Of one case."""
MEMORY = 2 << 30
"""Bytes that a case may ask for beyond what the process has."""


@dataclass
class Tally:
    """What came of a target's cases.

    Attributes:
        outcomes: "read" or the name of our error → how many.
        crashes: place and error → an example, as text.
        slowest: seconds of one case.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    crashes: dict[str, str] = field(default_factory=dict)
    slowest: float = 0.0

    @property
    def cases(self) -> int:
        return sum(self.outcomes.values())


class TookTooLong(Exception):
    """A case ran past its time."""


def run_cases(ground: Ground, name: str, seed: int, cases: int, last: Path | None = None) -> Tally:
    """Runs some of a target's cases.

    Args:
        seed, cases: which, and how many; the same give the same.
        last: file that holds the case under way, for whoever finds this process dead.
    """
    target, tally = TARGETS[name], Tally()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=cases, database=None, deadline=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck), verbosity=hypothesis.Verbosity.quiet,
    )  # fmt: skip
    @hypothesis.given(st.data())
    def one(data: Any) -> None:
        files = target.change(ground, data.draw)
        if last is not None:
            last.write_text(_shown(ground, name, files))
        begun = time.monotonic()
        try:
            with Changed(files), bounded():
                target.read(ground, files, data.draw)
            tally.outcomes["read"] += 1
        except ScholiastError as error:
            tally.outcomes[type(error).__name__] += 1
        except (Exception, TookTooLong) as error:
            if type(error).__module__.startswith("hypothesis"):
                raise
            tally.outcomes["CRASH"] += 1
            tally.crashes.setdefault(_place(error), _shown(ground, name, files, error))
        tally.slowest = max(tally.slowest, time.monotonic() - begun)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one()
    return tally


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Bounds the time of a block."""

    def late(*_: object) -> None:
        raise TookTooLong(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def bound_memory() -> None:
    """Bounds this process's address space to what it has and MEMORY."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    rooms = ("/storage/", "/stages/", "/pipeline/")
    own = [
        f
        for f in frames
        if any(room in f.filename for room in rooms) and "site-packages" not in f.filename
    ]
    at = own[-1] if own else frames[-1]
    file = "/".join(at.filename.split("/")[-2:])
    return f"{type(error).__name__} at {file}:{at.lineno}"


def _shown(
    ground: Ground, name: str, files: dict[Path, bytes | None], error: BaseException | None = None
) -> str:
    """Returns a case as JSON: what each file became (bytes as Latin-1), and what was raised."""
    changed = {
        path.relative_to(ground.root).as_posix(): None if data is None else data.decode("latin-1")
        for path, data in files.items()
    }
    return json.dumps({"target": name, "files": changed, "error": f"{error!s:.300}"})
