"""Which parts a task does: those that are neither finished nor leased to another, from its own place on.

Nothing is handed out. A task of N walks the pending parts from the I-th N-th of them, around; so each
begins in a stretch of its own and helps with what is left. Wherever it looks, manifests say what is done.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from stages.stop import StopSignals, names
from stages.teacher_jobs import TeacherJob
from storage import manifest
from storage.durable import patiently
from storage.leases import Lease, Leases
from storage.writer import owners

_RELIST = 10.0  # seconds that a listing of what is done is believed, once a part was found done
_FEW = 10  # parts that are looked at every second; more are a load for a file server


@dataclass(frozen=True)
class Share:
    """A task's place among those that work on the same caches.

    Attributes:
        index, count: the I-th of N tasks.
        job: the scheduler's name of it, the same after a requeue; None without a scheduler.
        wait: whether to wait for the parts that others are at work on.
        lifetime: of a lease, seconds.
        grace: seconds that a part may still take once a signal has come.
    """

    index: int = 0
    count: int = 1
    job: str | None = None
    wait: bool = True
    lifetime: float = 120.0
    grace: float = 30.0


@dataclass
class Outcome:
    """What one task came to with one teacher.

    Attributes:
        teacher: its name.
        written: parts that this task computed and committed, in order.
        left: parts that others were at work on when it ended.
        dropped: parts that it began and gave up, because of a signal.
    """

    teacher: str
    written: list[int] = field(default_factory=list)
    left: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)


class Claims:
    """The parts of one teacher that this task is to do; an iterator that takes a lease on each.

    Args:
        job: the teacher's; its pending parts are the ones in question.
        leases: this process's.
        share: this task's place.
        stop: no part is given once a signal has come, nor once the leases are abandoned.
        outcome: told which parts are left to others.
        say: told what is waited for.
    """

    def __init__(
        self, job: TeacherJob, leases: Leases, share: Share, stop: StopSignals, outcome: Outcome,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._job, self._leases, self._share, self._stop = job, leases, share, stop
        self._outcome, self._say = outcome, say
        self._owners = owners(job.identity, job.layout)
        self._listed = time.monotonic()
        self._first_seen: dict[int, tuple[object, int]] = {}

    def __iter__(self) -> Iterator[int]:
        pending = self._job.pending
        start = self._share.index % self._share.count * len(pending) // self._share.count
        left: Sequence[int] = pending[start:] + pending[:start]
        while left:
            others: list[int] = []
            yield from self._walk(left, others)
            left = self._watch(others)

    def _walk(self, parts: Sequence[int], others: list[int]) -> Iterator[int]:
        """Takes and yields what is free; collects what is leased to others."""
        todo = list(reversed(parts))
        while todo and not self._stopped():
            part = todo.pop()
            if self._done(part):
                if time.monotonic() - self._listed > _RELIST:
                    done = self._list()
                    todo = [one for one in todo if one not in done]
            elif not self._leases.take(part):
                if lease := self._leases.look(part):
                    self._sight(lease)
                others.append(part)
            elif self._done_by_now(part):  # finished between the two looks
                self._leases.release(part)
            else:
                yield part

    def _watch(self, parts: list[int]) -> list[int]:
        """Waits until a part of others may be tried again, and returns it with those still unclear.

        A lease that was touched since it was first seen is its holder's, which is left to it (or waited
        for) if it is of the same job: what comes after this job would not wait for another one's. One
        that is not touched expires.
        """
        pause, said = self._leases.interval / 2, False
        while parts and not self._stopped():
            unclear: list[int] = []
            now = self._leases.now()
            for at, part in enumerate(parts):
                if self._done(part):
                    continue
                lease = self._leases.look(part, now)
                if lease is None or self._leases.free(lease):
                    return [part, *unclear, *parts[at + 1 :]]
                if self._share.wait or self._sight(lease) or not self._sibling(lease):
                    unclear.append(part)
                else:
                    self._outcome.left.append(part)
            parts = unclear
            if parts and not said:
                said = True
                self._say(f"cache {self._job.name}: waiting for {len(parts)} parts of other tasks")
            if parts:
                time.sleep(pause if len(parts) > _FEW else min(1.0, pause))
        return []

    def _sight(self, lease: Lease) -> bool:
        """Returns whether a lease has not been touched since it was first seen."""
        now = (lease.holder, lease.touched)
        return self._first_seen.setdefault(lease.part, now) == now

    def _sibling(self, lease: Lease) -> bool:
        """Returns whether a lease is held by a task of the same job, or both are of none."""
        return lease.holder is not None and _job(lease.holder.job) == _job(self._share.job)

    def _stopped(self) -> bool:
        return self._leases.abandoned or bool(names(self._stop.flags()))

    def _done(self, part: int) -> bool:
        return manifest.stands(self._job.root, part, self._owners.of(part))

    def _done_by_now(self, part: int) -> bool:
        """Looks again; an NFS client asks anew for a missing entry only once the folder was opened."""
        folder = self._job.local_root / "manifests"

        def reopen() -> None:
            with contextlib.suppress(FileNotFoundError):
                os.close(os.open(folder, os.O_RDONLY))

        patiently(reopen, folder)
        return self._done(part)

    def _list(self) -> set[int]:
        self._listed = time.monotonic()
        done = patiently(
            lambda: manifest.done_parts(self._job.root, self._owners, self._job.layout.parts),
            self._job.root,
        )
        return set(done.tolist())


def _job(task: str | None) -> str | None:
    return task and task.split(".")[0]


class Dropped(Exception):
    """The part in work is given up: a signal has come, and it would take too long."""


class Grace:
    """Decides, batch by batch, whether a part may be finished after a signal.

    Args:
        stop: the signals.
        seconds: how long the part may still take from the moment one is noticed.
        total: tokens of the part.
    """

    def __init__(self, stop: StopSignals, seconds: float, total: int) -> None:
        self._stop, self._seconds, self._total = stop, seconds, total
        self._begun, self._done, self._until = time.monotonic(), 0, 0.0

    def advance(self, tokens: int) -> None:
        """Is told of finished tokens.

        Raises:
            Dropped
        """
        self._done += tokens
        if self._done >= self._total or not names(self._stop.flags()):
            return
        now = time.monotonic()
        self._until = self._until or now + self._seconds
        if now + (now - self._begun) / self._done * (self._total - self._done) > self._until:
            raise Dropped
