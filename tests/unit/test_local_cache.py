"""The bounded folder of fetched objects: by content, checked, least recently opened evicted."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.errors import CorruptShard
from storage.fingerprint import bytes_sha256
from storage.local_cache import LocalCache


def content(i: int, size: int = 1000) -> bytes:
    return bytes([i]) * size


def giving(data: bytes, fetched: list[int] | None = None) -> Callable[[Path], None]:
    def fetch(target: Path) -> None:
        target.write_bytes(data)
        if fetched is not None:
            fetched.append(data[0])

    return fetch


def get(cache: LocalCache, i: int, fetched: list[int] | None = None) -> int:
    data = content(i)
    return cache.opened(bytes_sha256(data), len(data), giving(data, fetched), f"object {i}")


def kept(folder: Path) -> set[int]:
    return {path.read_bytes()[0] for path in folder.glob("??/*")}


def test_is_bounded_and_evicts_the_least_recently_opened(tmp_path: Path) -> None:
    cache, fetched = LocalCache(tmp_path, 5000), list[int]()
    for i in range(5):
        os.close(get(cache, i, fetched))
        os.utime(next(p for p in tmp_path.glob("??/*") if p.read_bytes()[0] == i), (i + 1, i + 1))
    assert kept(tmp_path) == {0, 1, 2, 3, 4}
    os.close(get(cache, 0, fetched))  # a hit: now the newest
    for i in range(5, 8):
        os.close(get(cache, i, fetched))
        assert sum(p.stat().st_size for p in tmp_path.glob("??/*")) <= 5000
    assert fetched == [0, 1, 2, 3, 4, 5, 6, 7]
    assert 0 in kept(tmp_path) and 7 in kept(tmp_path) and not kept(tmp_path) & {1, 2}


def test_bytes_that_changed_since_they_were_fetched_are_fetched_again(tmp_path: Path) -> None:
    fetched = list[int]()
    os.close(get(LocalCache(tmp_path, 5000), 3, fetched))
    path = next(tmp_path.glob("??/*"))
    path.write_bytes(content(4))  # the same size
    held = get(LocalCache(tmp_path, 5000), 3, fetched)
    assert os.read(held, 2000) == content(3) and fetched == [3, 3]


def test_what_is_open_stays_and_can_be_read_to_its_end(tmp_path: Path) -> None:
    cache = LocalCache(tmp_path, 2000)
    held = get(cache, 0)
    for i in range(1, 6):
        os.close(get(cache, i))
        assert 0 in kept(tmp_path)
    assert os.pread(held, 2000, 0) == content(0)
    os.close(held)
    for i in range(6, 9):
        os.close(get(cache, i))
    assert 0 not in kept(tmp_path)


def test_wrong_bytes_are_fetched_once_more_and_then_refused(tmp_path: Path) -> None:
    cache, data, tries = LocalCache(tmp_path, 10_000), content(1), list[int]()
    answers = iter([content(2), data])
    digest = bytes_sha256(data)
    os.close(cache.opened(digest, 1000, lambda p: p.write_bytes(next(answers)) and None, "x"))
    assert kept(tmp_path) == {1}
    with pytest.raises(CorruptShard, match="object 3"):
        cache.opened("0" * 64, 1000, giving(content(3), tries), "object 3")
    assert tries == [3, 3] and kept(tmp_path) == {1}


def test_a_cut_copy_is_fetched_again(tmp_path: Path) -> None:
    cache = LocalCache(tmp_path, 10_000)
    os.close(get(cache, 1))
    next(tmp_path.glob("??/*")).write_bytes(b"cut")
    fd = get(cache, 1)
    assert os.pread(fd, 2000, 0) == content(1)
    os.close(fd)


def _many(folder: Path, log: Path) -> None:
    cache = LocalCache(folder, 6000)
    for turn in range(60):
        i = turn % 12
        fetched: list[int] = []
        fd = get(cache, i, fetched)
        if os.pread(fd, 2000, 0) != content(i):
            raise AssertionError("other bytes")
        os.close(fd)
        with log.open("ab") as file:
            file.write(b"x" * len(fetched))


def test_processes_share_a_folder(tmp_path: Path) -> None:
    """Each gets the right bytes while others evict; nothing is left half made."""
    context = multiprocessing.get_context("fork")
    folder, log = tmp_path / "cache", tmp_path / "log"
    workers = [context.Process(target=_many, args=(folder, log)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert not list(folder.rglob("*.part")) and len(kept(folder)) <= 6 + 4


def test_who_waits_is_not_held_up_by_a_reader(tmp_path: Path) -> None:
    """One keeps the object open for good; another that waited while it was fetched gets it too."""
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    late = context.Process(target=_slow, args=(tmp_path / "cache", log))

    def fetch(target: Path) -> None:
        late.start()
        time.sleep(0.3)  # it waits by now
        target.write_bytes(content(1))

    held = LocalCache(tmp_path / "cache", 6000).opened(bytes_sha256(content(1)), 1000, fetch, "x")
    late.join(20)
    os.close(held)
    assert late.exitcode == 0 and not log.exists()


def _slow(folder: Path, log: Path) -> None:
    def fetch(target: Path) -> None:
        time.sleep(0.3)
        target.write_bytes(content(1))
        with log.open("ab") as file:
            file.write(b"x")

    os.close(LocalCache(folder, 6000).opened(bytes_sha256(content(1)), 1000, fetch, "x"))


def test_an_object_that_is_being_fetched_is_waited_for(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    folder, log = tmp_path / "cache", tmp_path / "log"
    workers = [context.Process(target=_slow, args=(folder, log)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 3 and log.read_bytes() == b"x"
