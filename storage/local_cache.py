"""A bounded folder of objects fetched from remote stores, shared by any number of processes.

A file is named by the sha256 of its content, so it can be neither stale nor of another store; it is
checked before it gets that name. Locks are the kernel's (flock), so a kill leaves none behind: an
object that is being fetched is waited for, one that a reader has open is not evicted.

Cost: one look over the folder for every 1/64 of the limit fetched, some 3 µs a file; n processes may
therefore exceed the limit together by n/64 of it, and by what is open at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from storage import durable
from storage.errors import CorruptShard
from storage.fingerprint import file_sha256

_STALLED = 3600.0  # seconds without a byte after which what is half fetched is a dead process's


class LocalCache:
    """Objects by content, least recently opened evicted first.

    Args:
        folder: made when first needed.
        limit: bytes.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._seen: set[str] = set()  # objects that this process has hashed
        self._used, self._unseen = 0, limit  # bytes at the last look; bytes added since

    def opened(self, digest: str, size: int, fetch: Callable[[Path], None], where: object) -> int:
        """Returns a file descriptor of the object, which keeps it from eviction until it is closed.

        Args:
            digest, size: sha256 and bytes that the object must have.
            fetch: puts the object's bytes into a file.
            where: its place, for messages.

        Raises:
            CorruptShard: what was fetched, twice, is not the object.
            DiskFull: no space.
        """
        if not re.fullmatch("[0-9a-f]{64}", digest):  # it names a file here
            raise CorruptShard(
                "a manifest states no sha256", where=where, expected="64 hexadecimal digits",
                found=digest[:80],
                todo="put the store's files there again: run `scholiast push --verify` from the original",
            )  # fmt: skip
        path = self.folder / digest[:2] / digest
        while True:
            with contextlib.suppress(FileNotFoundError):
                fd = os.open(path, os.O_RDONLY)
                fcntl.flock(fd, fcntl.LOCK_SH)
                if os.fstat(fd).st_size == size and self._sound(fd, digest):
                    with contextlib.suppress(PermissionError):  # another user's file
                        os.utime(fd)  # what "recently" is measured by
                    return fd
                os.close(fd)
                path.unlink(missing_ok=True)
            self._make(path, digest, size, fetch, where)

    def _sound(self, fd: int, digest: str) -> bool:
        """Returns whether a file's bytes are the object's: hashed when first opened by a process, for
        a power cut or a failing disk may have changed them since they were fetched."""
        if digest not in self._seen:
            with open(fd, "rb", closefd=False) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return False
            os.lseek(fd, 0, os.SEEK_SET)  # for whoever reads from the beginning
            self._seen.add(digest)
        return True

    def _make(
        self, path: Path, digest: str, size: int, fetch: Callable[[Path], None], where: object
    ) -> None:
        """Fetches, checks and renames an object, unless another process is quicker."""
        with durable.disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        # The lock is no lock of the file itself: that becomes the object, and its readers hold it.
        with durable.disk_errors(path), durable.alone(path.with_suffix(".lock")):
            if path.exists():
                return
            self._make_room(size)
            part = path.with_suffix(".part")
            for last in (False, True):
                fetch(part)
                found = part.stat().st_size
                if found == size and file_sha256(part) == digest:
                    part.replace(path)
                    return
                part.unlink()
                if last:
                    raise wrong_bytes(where, size, digest, found)

    def _make_room(self, size: int) -> None:
        if self._unseen >= self.limit // 64 or self._used + self._unseen + size > self.limit:
            with durable.alone(self.folder / "lock"):
                self._used, self._unseen = self._evict(size), 0
        self._unseen += size

    def _evict(self, size: int) -> int:
        """Removes the oldest files until `size` fits, and a sixteenth more; returns bytes used."""
        files = []
        for folder in self.folder.glob("??"):
            for entry in os.scandir(folder):
                with contextlib.suppress(FileNotFoundError):
                    stat = entry.stat()
                    files.append((stat.st_mtime, stat.st_size, entry.path))
        used = sum(size for _, size, _ in files)
        if used + size <= self.limit:
            return used
        for written, bytes_, name in sorted(files):
            if used + size <= self.limit - self.limit // 16:
                break
            if name.endswith(".part") and time.time() - written < _STALLED:
                continue  # somebody is fetching it
            used -= bytes_ if _removed(name) else 0
        return used


def wrong_bytes(where: object, size: int, digest: str, found: int) -> CorruptShard:
    """Returns the error of an object that is not what its manifest states."""
    return CorruptShard(
        "an object of the store has bytes that were not written there", where=where,
        expected=f"{size} bytes, sha256 {digest[:16]}", found=f"{found} bytes",
        todo="put the file there again: run `scholiast push --verify` from the original",
    )  # fmt: skip


def _removed(name: str) -> bool:
    """Removes a file that nobody holds; returns whether it did."""
    try:
        fd = os.open(name, os.O_RDWR)  # NFS locks exclusively only what may be written
    except FileNotFoundError:
        return True
    except PermissionError:  # another user's
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(name)
    except (BlockingIOError, PermissionError):
        return False
    except FileNotFoundError:
        return True
    finally:
        os.close(fd)
    return True
