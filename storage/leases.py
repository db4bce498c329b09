"""Advisory leases on parts: which process is at work on what, so that two seldom do the same.

`CACHE/.leases/000123` names a part's holder and is touched every few seconds; one that is no longer
touched expires, and anyone may take it. Nothing depends on a lease for being right: a part is done when
its manifest stands, and of two writers of one part the first to commit wins (writer.py).

Ages are told by the file system's own clock (a file just touched there against the lease), so the
hosts' clocks need not agree.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from storage import durable
from storage.holders import Holder, understood

FOLDER = ".leases"
BEATS = 6  # touches in a lease's lifetime: some may come late
_FAILED = ".failed"
_UNWRITTEN = 5.0  # seconds that a lease may go without its content


@dataclass(frozen=True)
class Lease:
    """What is seen of a lease.

    Attributes:
        part: of which part.
        holder: None where its file cannot be understood: not written yet, or cut by a kill.
        touched: its time of modification, ns of the file system's clock.
        age: seconds since then by the same clock.
    """

    part: int
    holder: Holder | None
    touched: int
    age: float

    @property
    def expired(self) -> bool:
        """Whether it is anyone's."""
        return self.age > (self.holder.lifetime if self.holder else _UNWRITTEN)


class Leases:
    """This process's leases in one cache: a context, with a thread that touches them.

    Args:
        root: the cache folder.
        holder: who takes them.
    """

    def __init__(self, root: Path, holder: Holder) -> None:
        self.folder, self.holder = root / FOLDER, holder
        self._held: set[int] = set()
        self._failed = False
        self.abandoned = False  # by `abandon`: this process takes no more
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="leases", daemon=True)

    @property
    def interval(self) -> float:
        """Seconds between two touches."""
        return self.holder.lifetime / BEATS

    def __enter__(self) -> Leases:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        for part in sorted(self._held):
            with contextlib.suppress(OSError):
                self._give_up(part)
        with contextlib.suppress(OSError):
            self.folder.rmdir()  # the last one out; otherwise it is not empty

    def take(self, part: int) -> bool:
        """Takes a part's lease if no one else has it; returns whether it did.

        Raises:
            DiskFull, FailingFolder
        """
        with durable.disk_errors(self.folder):
            taken = durable.patiently(lambda: self._take(part), self.folder)
        if taken:
            self._held.add(part)
        return taken

    def _take(self, part: int) -> bool:
        path, data = self.folder / _name(part), json.dumps(asdict(self.holder)).encode()
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except FileNotFoundError:  # the folder was removed by the last one out
                continue
            except FileExistsError:
                break
            with os.fdopen(fd, "wb") as file:
                file.write(data)
            return True
        seen = self.look(part)
        if seen is None or not self.free(seen):
            return seen is not None and seen.holder == self.holder
        with contextlib.suppress(FileNotFoundError), durable.alone(self.folder / ".lock"):
            now = self.look(part)
            if now is not None and (now.holder, now.touched) == (seen.holder, seen.touched):
                temporary = self.folder / f".{_name(part)}.{self.holder.token}.tmp"
                temporary.write_bytes(data)
                temporary.replace(path)
                return True
        return False  # another one was quicker

    def free(self, lease: Lease) -> bool:
        """Returns whether a lease may be taken over."""
        gone = lease.holder is not None and self.holder.succeeds(lease.holder)
        return gone or lease.expired

    def now(self) -> int:
        """Returns the file system's time, ns, for many looks.

        Raises:
            DiskFull, FailingFolder
        """
        with durable.disk_errors(self.folder):
            return durable.patiently(lambda: clock(self.folder), self.folder)

    def look(self, part: int, now: int | None = None) -> Lease | None:
        """Returns what is seen of a part's lease; None if there is none.

        Args:
            part: which.
            now: from `now`; if not given the file system is asked.

        Raises:
            DiskFull, FailingFolder
        """

        def look() -> Lease | None:
            return _look(self.folder, part, clock(self.folder) if now is None else now)

        with durable.disk_errors(self.folder):
            return durable.patiently(look, self.folder)

    def release(self, part: int) -> None:
        """Gives a finished part's lease up, and takes away the mark of an earlier failure."""
        with contextlib.suppress(OSError):
            (self.folder / (_name(part) + _FAILED)).unlink(missing_ok=True)
            self._give_up(part)
        self._held.discard(part)

    def drop(self, part: int) -> None:
        """Gives up the lease of a part that is not finished."""
        with contextlib.suppress(OSError):
            self._give_up(part)
        self._held.discard(part)

    def abandon(self) -> None:
        """Gives up all that is held: this process has failed and only waits to end."""
        self.abandoned = True
        for part in list(self._held):
            self.drop(part)

    def fail(self, part: int, text: str) -> None:
        """Leaves word that this process failed on a part (the first it fails on), for `status`."""
        if not self._failed:
            self._failed = True
            body = {**asdict(self.holder), "error": text}
            with contextlib.suppress(OSError):
                (self.folder / (_name(part) + _FAILED)).write_text(json.dumps(body))

    def _give_up(self, part: int) -> None:
        path = self.folder / _name(part)
        if _holder(path) == self.holder:  # it may have expired and be another's
            path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(self.interval):
            for part in list(self._held):
                path = self.folder / _name(part)
                with contextlib.suppress(OSError):  # a beat that is missed; there are others
                    if _holder(path) == self.holder:
                        os.utime(path)  # without times: a file server then takes its own clock


def sweep(root: Path, done: Collection[int], all_done: bool) -> None:
    """Removes what killed processes left on finished parts; the whole folder where all are finished."""
    folder = root / FOLDER
    if all_done:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for name in _names(folder):
        if name.isdecimal() and int(name) in done:
            with contextlib.suppress(OSError):
                (folder / name).unlink(missing_ok=True)


def clock(folder: Path) -> int:
    """Returns the time of a folder's file system, ns, from a file touched there."""
    probe = folder / f".clock.{uuid.uuid4().hex}.tmp"
    try:
        probe.touch()
        return probe.stat().st_mtime_ns
    except FileNotFoundError:  # the folder is gone, and with it every lease
        return time.time_ns()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def leases(root: Path) -> list[Lease]:
    """Returns the leases of a cache, by part; their ages by this host's clock where the folder cannot be
    written to: not one's own, a read-only mount, a full disk or quota."""
    folder = root / FOLDER
    parts = sorted(int(name) for name in _names(folder) if name.isdecimal())
    if not parts:
        return []
    try:
        now = clock(folder)
    except OSError:
        now = time.time_ns()
    found = (_look(folder, part, now) for part in parts)
    return [lease for lease in found if lease is not None]


def failures(root: Path) -> dict[int, dict[str, Any]]:
    """Returns what processes left word of: part → the holder's fields and `error`."""
    return dict(_failures(root / FOLDER))


def _failures(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for name in sorted(_names(folder)):
        number, point, rest = name.partition(".")
        if number.isdecimal() and point + rest == _FAILED:
            with contextlib.suppress(OSError, ValueError, RecursionError):
                yield int(number), json.loads((folder / name).read_bytes())


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _name(part: int) -> str:
    return f"{part:06d}"


def _look(folder: Path, part: int, now: int) -> Lease | None:
    try:
        fd = os.open(folder / _name(part), os.O_RDONLY)
    except FileNotFoundError:
        return None
    with os.fdopen(
        fd, "rb"
    ) as file:  # opened first: an NFS client then asks the server for its times
        holder, touched = understood(file.read()), os.fstat(fd).st_mtime_ns
    return Lease(part, holder, touched, (now - touched) / 1e9)


def _holder(path: Path) -> Holder | None:
    try:
        return understood(path.read_bytes())
    except FileNotFoundError:
        return None
