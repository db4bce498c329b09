"""Writes that survive a power cut: temporary name, fsync, rename, fsync of the folder.

A shared folder may fail for a moment (a server that restarts: EIO, ESTALE); what can be done again as a
whole is then done again, `patiently`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from storage.errors import DiskFull, FailingFolder

T = TypeVar("T")

PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN)
"""Errors of a shared folder that may be over in a moment."""
PAUSES = (0.1, 0.3, 1.0, 3.0, 10.0, 20.0)
"""Seconds between the tries: 34 s in all, about what a file server takes to restart."""


def patiently(action: Callable[[], T], where: object) -> T:
    """Returns what an action gives; does it again, a bounded number of times, where the folder fails.

    Args:
        action: what may be done again as a whole: a file's second fsync does not bring back what the
            first one lost, so it must write it anew.
        where: for the message.

    Raises:
        FailingFolder: it failed to the last.
    """
    for pause in (*PAUSES, None):
        try:
            return action()
        except OSError as error:
            if error.errno not in PASSING:
                raise
            if pause is None:
                raise FailingFolder(
                    f"the folder keeps failing: {error.strerror or error}", where=error.filename or where,
                    found=f"{len(PAUSES) + 1} tries in {sum(PAUSES):.0f} s",
                    todo="mend it and run the same command again; what is finished is kept",
                ) from error  # fmt: skip
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def fsync_file(path: Path) -> None:
    """Flushes a file's bytes to the device."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_folder(path: Path) -> None:
    """Flushes a folder's entries, without which a rename may be lost."""
    fsync_file(path)


def fsync_tree(root: Path) -> None:
    """Flushes every file and folder under `root`, children first."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            fsync_file(Path(folder) / name)
        fsync_folder(Path(folder))


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Holds a lock file, made for the time, against other threads and processes.

    The lock is the kernel's (flock), so a kill leaves none behind; the file is opened for writing,
    without which NFS gives no such lock. A file system that has none is used without them.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if _locked(fd, path):
                break
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # its former holder removed it while we waited
    try:
        yield
    finally:
        try:
            path.unlink(missing_ok=True)  # it is ours as long as we hold it
        finally:
            # Closing alone would leave the lock to a process forked in the meantime.
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)


def _locked(fd: int, path: Path) -> bool:
    """Waits for the lock; returns whether the file still stands at `path`."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return _stands(fd, path)


def _stands(fd: int, path: Path) -> bool:
    """Returns whether an open file is the one at `path`: an NFS client may believe in an old entry, but
    knows of a file that it has removed, or was told is gone, that it has no links."""
    with contextlib.suppress(FileNotFoundError):
        found = os.fstat(fd)
        return found.st_nlink > 0 and os.stat(path).st_ino == found.st_ino
    return False


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Holds a lock file, made for the time, that no other process has; does not wait for it.

    Unlike that of `alone` the lock (POSIX's) is this process's only: those that it forks do not keep it
    when it is killed. The file says who holds it. A file system without locks is used without them.

    Raises:
        BlockingIOError: another process holds it; the text says which.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                holder = os.read(fd, 1000).decode(errors="replace")
                os.close(fd)
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                raise BlockingIOError(error.errno, holder) from error
        if _stands(fd, path):
            break
        os.close(fd)  # its former holder removed it just now
    try:
        with disk_errors(path):
            os.write(fd, f"process {os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents, each entry flushed: without that a power cut may lose them."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for one in reversed(missing):
        one.mkdir(exist_ok=True)
        fsync_folder(one.parent)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns ENOSPC and EDQUOT into DiskFull; whatever was half written is named nowhere.

    Raises:
        DiskFull: the device or the quota was exhausted inside the block.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"the disk is full: {error.strerror}",
                where=path,
                todo="free some space and run the same command again; finished parts are kept",
            ) from error
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Puts `data` at `path` so that a reader sees the old bytes or the new, never a mixture.

    Raises:
        DiskFull: no space; the old file, if any, is untouched.
        FailingFolder
    """
    patiently(lambda: _write_once(path, data), path)


def _write_once(path: Path, data: bytes) -> None:
    with disk_errors(path):
        make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with disk_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    fsync_folder(path.parent)


def replace_folder(temporary: Path, final: Path) -> None:
    """Flushes `temporary` and renames it to `final`, which must be absent or may be discarded.

    Between discarding an old `final` and the rename a crash leaves nothing under that name;
    use it only for what can be made again.
    """
    fsync_tree(temporary)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    fsync_folder(final.parent)


def require_free(folder: Path, needed: int, what: str, less: str) -> None:
    """Refuses to begin what cannot be finished.

    Args:
        folder: where the bytes will go (need not exist yet).
        needed: bytes.
        what: what they are, for the message.
        less: by which option there would be less of them.

    Raises:
        DiskFull: fewer than `needed` bytes are free.
        FailingFolder
    """
    free = patiently(lambda: _free(folder), folder)
    if free < needed:
        raise DiskFull(
            f"too little disk space for {what}",
            where=folder,
            expected=f"at least {needed / 1e6:,.3f} MB free",
            found=f"{free / 1e6:,.3f} MB free",
            todo=f"free some space, choose another folder, or store less ({less})",
        )


def existing(folder: Path) -> Path:
    """Returns the folder, or the nearest one above it that is there."""
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return folder


def _free(folder: Path) -> int:
    return shutil.disk_usage(existing(folder)).free
