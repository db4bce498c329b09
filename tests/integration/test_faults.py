"""Faults by the dozen: kills, full disks, many writers. Whatever happens, the end has the same bits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Lab, digests

from storage.errors import DiskFull
from storage.reader import CacheReader
from storage.stores import find_stores
from storage.tables import load_orders
from storage.verify import verify
from storage.writer import CacheWriter

Cli = Callable[..., Any]

WARM = Path(__file__).with_name("warm.py")


def warm(*arguments: object) -> str:
    """Runs the helper that forks many runs of stage one; returns its last line."""
    done = subprocess.run(
        [sys.executable, str(WARM), *map(str, arguments)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return (done.stdout.splitlines() or [""])[-1]


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: fsync costs nothing there, and no power is cut here."""
    shm = Path("/dev/shm")
    room = shm.is_dir() and os.access(shm, os.W_OK) and shutil.disk_usage(shm).free > 5e7
    with tempfile.TemporaryDirectory(dir=shm if room else None) as folder:
        yield Path(folder)


@pytest.mark.long
def test_fifty_kills_end_in_the_same_bits(lab: Lab, memory: Path) -> None:
    lab.config |= {"teachers": {"one": {"model": f"{lab.root}/a"}}, "loss": {}}
    del lab.config["corpus"]["sources"][1]
    config = lab.write(corpus__blocks_per_part=6, store__chunk_tokens=256, store__temperatures=[])
    told = json.loads(warm("kill", config, memory, 50, 1))
    assert told["kills"] >= 50
    undisturbed = digests(memory / "0")
    assert len(undisturbed) > 40
    for number in range(1, told["rounds"] + 1):
        run = memory / str(number)
        assert digests(run) == undisturbed, f"round {number}"
        for store in (run / "corpus", run / "cache/one"):
            report = verify(store)
            assert report.sound and report.complete
            assert all(leftover.ours for leftover in report.leftovers)


@pytest.mark.long
def test_any_number_of_writers_makes_the_same_cache(lab: Lab, memory: Path) -> None:
    """One, two and five processes with parts of their own; two processes on every part at once."""
    config = lab.write(corpus__blocks_per_part=8, store__chunk_tokens=256)
    warm("share", config, memory, 1, 2, 5)
    one = digests(memory / "1")
    assert len(one) > 100
    for other in ("2", "5", "same"):
        assert digests(memory / other) == one, other
        for store in (memory / other).iterdir():
            report = verify(store, deep=True)
            assert report.sound and report.complete and not report.leftovers


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system of its own in memory; called with mount options, it changes them."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root (and a container that lets it)")

    def set_options(options: str) -> Path:
        subprocess.run([mount, "-o", f"remount,{options}", str(folder)], check=True)
        return folder

    yield set_options
    # Lazily: a reader that the last exception's traceback still holds keeps a file open.
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.long
def test_full_disk_at_every_stage_of_a_part(
    lab: Lab, cli: Cli, small_disk: Callable[[str], Path]
) -> None:
    """A disk that runs out of inodes, which no check of free bytes foresees: ENOSPC wherever a file
    is made. With a few more each time stage one gets further, and ends with the same bits."""
    settings = {
        "corpus__blocks_per_part": 20,
        "store__chunk_tokens": 256,
        "corpus_dir": f"{lab.root}/corpus",
    }
    undisturbed = lab.write("undisturbed.yaml", **settings)
    assert cli("cache-teachers", undisturbed).exit_code == 0
    expected = digests(lab.root / "run/cache")
    inodes, failures, done = 20, 0, set[str]()
    cache = small_disk(f"size=64m,nr_inodes={inodes}")
    config = lab.write(cache_dir=str(cache), **settings)
    while (result := cli("cache-teachers", config)).exit_code:
        assert "the disk is full" in result.output and "free some space" in result.output
        now = {str(path) for path in cache.glob("*/manifests/*.json")}
        assert now >= done, "a finished part was lost"
        for root in find_stores(cache).values():
            assert not any(p.part is not None for p in verify(root).problems)
        done, failures, inodes = now, failures + 1, inodes + 29
        small_disk(f"nr_inodes={inodes}")
    assert failures >= 6
    assert digests(cache) == expected


def test_full_disk_by_the_byte(lab: Lab, cli: Cli, small_disk: Callable[[str], Path]) -> None:
    """From no free byte to enough, a page at a time: a part is whole, or it is not there."""
    config = lab.write(corpus__blocks_per_part=20)
    assert cli("cache-teachers", config).exit_code == 0
    source = CacheReader(lab.root / "run/cache/one")
    parts = {}
    for part in (0, 1):
        ids = np.arange(*source.layout.part_range(part))
        parts[part] = {name: source.array(name, ids) for name in source.layout.arrays()}
    disk = small_disk("size=8m")
    orders = load_orders(source.root, source.layout)
    writer = CacheWriter(disk / "cache", source.identity, source.layout, lambda: orders)
    writer.write_part(0, parts[0])
    page, ballast, failures = os.sysconf("SC_PAGE_SIZE"), disk / "ballast", list[str]()
    with ballast.open("wb") as file, pytest.raises(OSError, match="No space left"):
        while True:
            os.write(file.fileno(), bytes(page))
    while True:
        os.truncate(ballast, ballast.stat().st_size - page)
        try:
            writer.write_part(1, parts[1])
            break
        except DiskFull as error:
            failures.append(error.what)
        report = verify(disk / "cache")
        assert report.sound and report.checked == 1
        CacheReader(disk / "cache").read(np.array([0]))
    assert len(failures) >= 5 and all("the disk is full" in what for what in failures)
    assert verify(disk / "cache", deep=True).checked == 2
    whole = CacheReader(disk / "cache")
    for name, array in parts[1].items():
        assert np.array_equal(whole.array(name, np.arange(*source.layout.part_range(1))), array)
