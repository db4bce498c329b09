"""Who holds a lease: a process, told from others of the same number, host or name."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import uuid
from dataclasses import dataclass, field, fields
from pathlib import Path


@dataclass(frozen=True)
class Holder:
    """Who holds a lease.

    Attributes:
        host, pid, started: the process; `started` tells it from a later one of the same number.
        job: the scheduler's name of the task, the same after a requeue; None without a scheduler.
        lifetime: seconds without a touch after which its leases are anyone's.
        space: the boot and the namespace that `pid` counts in: containers and machines may share a name.
        token: of this object alone.
        since: its own clock when it began, seconds since 1970; for people.
    """

    host: str
    pid: int
    started: int
    job: str | None
    lifetime: float
    space: str = field(default_factory=lambda: _space())
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    since: float = field(default_factory=time.time)

    @classmethod
    def here(cls, job: str | None, lifetime: float) -> Holder:
        """Returns this process."""
        return cls(socket.gethostname(), os.getpid(), _started(os.getpid()) or 0, job, lifetime)

    def succeeds(self, other: Holder) -> bool:
        """Returns whether the other is known to be gone: a dead process, this task before a requeue."""
        if (self.host, self.space) == (other.host, other.space):
            return _started(other.pid) != other.started
        return self.job is not None and self.job == other.job


def understood(data: bytes) -> Holder | None:
    """Returns who a lease's file names, None where it is not written yet or cut by a kill."""
    try:
        body = json.loads(data)
        holder = Holder(**{f.name: body[f.name] for f in fields(Holder)})
        return holder if isinstance(holder.lifetime, int | float) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _space() -> str:
    """Returns what tells whose process numbers these are: hosts and containers may share a name."""
    told: list[str] = []
    with contextlib.suppress(OSError):
        told.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        told.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(told)


def _started(pid: int) -> int | None:
    """Returns when a process of this host was started, clock ticks; None if there is none (any more)."""
    try:
        rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None if Path("/proc/self/stat").exists() or not _there(pid) else 0
    return None if rest[0] in "ZX" else int(rest[19])


def _there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
