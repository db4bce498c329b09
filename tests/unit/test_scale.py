"""What is opened to know what is done must not grow with the number of parts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Lab

from stages.corpus import prepare
from stages.options import StoreOptions, TeacherOptions
from stages.part_log import Measured, append_log, log_path, measured
from stages.progress import Silent
from stages.teacher_jobs import TeacherJob, plan_jobs, stored
from storage import manifest
from storage.blocks import BlockReader
from storage.corpus_info import CorpusGeneration, CorpusInfo, SourceRange, stored_bytes
from storage.errors import StaleCache
from storage.fingerprint import HashMemo, fingerprint
from storage.orders import learn_orders
from storage.reader import CacheReader
from storage.tables import digest
from storage.writer import CacheWriter

_heard: list[list[str]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _heard:
        _heard[-1].append(str(arguments[0]))


sys.addaudithook(_hook)  # cannot be taken away again: it listens only inside `opened`


def opened(call: Callable[[], object], under: Path) -> list[str]:
    """Files under a folder that the call opens."""
    _heard.append([])
    try:
        call()
    finally:
        names = _heard.pop()
    return [name for name in names if name.startswith(str(under))]


def job_of(lab: Lab, parts: int) -> Callable[[], TeacherJob]:
    """Makes the manifests of a finished cache of so many parts of two blocks, the last of one."""
    blocks = 2 * parts - 1
    info = CorpusInfo(
        identity={}, fingerprint=f"{parts:064x}", tokenizer="t", vocab_size=lab.vocab_size,
        block_length=32, blocks=blocks, blocks_per_part=2,
        sources=(SourceRange("x", "train", 0, blocks, blocks, blocks * 32),),
        generations=(CorpusGeneration(0, blocks, f"{parts:064x}", 1, "i"),),
    )  # fmt: skip
    teachers = {"one": TeacherOptions(model=str(lab.root / "a"))}
    memo, store = HashMemo(lab.root / "memo.json"), StoreOptions(k=8)
    folder = lab.root / f"cache-{parts}"
    job = plan_jobs(teachers, store, info, folder, memo)[0]
    assert job.done == () and job.pending == tuple(range(parts))
    orders = learn_orders(np.zeros((0, 8), np.int64), lab.vocab_size)
    CacheWriter(job.root, job.identity, job.layout, lambda: orders)
    carry = {"orders": digest(orders)}
    for part in range(parts):
        first, last = job.layout.part_range(part)
        objects = {"notes.zarr/entropy/c/0/0": (10 * (last - first), "0" * 64)}
        owner = fingerprint(job.identity)
        done = manifest.Manifest(owner, part, first, last - first, objects, carry)
        manifest.save(job.root, done)
    return lambda: plan_jobs(teachers, store, info, folder, memo)[0]


def test_planning_opens_as_much_for_many_parts_as_for_few(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "SAMPLE", 10)
    counts = []
    for parts in (20, 120):
        plan = job_of(lab, parts)
        job = plan()
        assert job.done == tuple(range(parts)) and job.pending == ()
        counts.append(
            [
                len(opened(call, job.root))
                for call in (plan, lambda: stored(job), lambda: CacheReader(job.root))  # noqa: B023
            ]
        )
    # cache.json; the sampled manifests; cache.json and the two orders of ids
    assert counts[0] == counts[1] == [1, 10, 3]


def test_sizes_from_a_sample_are_scaled_by_blocks(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten bytes a block here, and the last part is short: the sample must give exactly the sum."""
    job = job_of(lab, 120)()
    whole = stored(job)
    monkeypatch.setattr(manifest, "SAMPLE", 7)
    some = stored(job)
    assert (whole.sampled, some.sampled) == (120, 7)
    assert some.arrays == whole.arrays == {"entropy": 10 * 239}
    assert abs(some.bytes - whole.bytes) < 0.02 * whole.bytes


def test_resuming_a_corpus_opens_one_manifest(lab: Lab) -> None:
    for width in (1, 8):
        config = lab.workspace(corpus__blocks_per_part=width).config.corpus
        root = lab.root / f"corpus-{width}"
        arguments = (config, root, HashMemo(lab.root / "memo.json"), Silent())
        info = prepare(*arguments)
        (root / "corpus.json").unlink()
        names = opened(lambda: prepare(*arguments), root / "manifests")  # noqa: B023
        assert len(names) == 1 and f"{info.parts - 1:06d}-" in names[0]
        assert BlockReader(root).info == info
        assert len(opened(lambda: BlockReader(root), root)) == 1  # noqa: B023


def test_corpus_bytes_are_those_on_disk(lab: Lab) -> None:
    work = lab.workspace()
    info, root = work.prepare(), work.config.corpus_folder
    files = [p for name in ("manifests", "blocks") for p in (root / name).iterdir()]
    assert stored_bytes(root, info) == (sum(p.stat().st_size for p in files), info.parts)


def test_listing_passes_over_foreign_names_and_sorts_by_number(tmp_path: Path) -> None:
    folder = tmp_path / "manifests"
    assert len(manifest.listing(tmp_path)) == 0
    folder.mkdir()
    good = ["1000000-00000000000a.json", "000002-00000000000b.json", "999999-00000000000a.json"]
    bad = [".000003-00000000000a.json.5f.tmp", "000004.json", "000005-00000000000A.json", "notes"]
    for name in good + bad:
        (folder / name).touch()
    listed = manifest.listing(tmp_path)
    assert listed.parts.tolist() == [2, 999_999, 1_000_000]
    assert listed.prefixes.tolist() == [b"00000000000b", b"00000000000a", b"00000000000a"]


@pytest.mark.parametrize("name", ["0000001-0123456789ab.json", f"{10**19}-0123456789ab.json"])
def test_only_the_one_way_to_write_a_number_is_a_manifests_name(name: str) -> None:
    assert not len(manifest.parse_names([name]))


def test_one_foreign_part_among_many_is_refused_with_both_sides(tmp_path: Path) -> None:
    ours, theirs = "a" * 64, "b" * 64
    (tmp_path / "manifests").mkdir()
    for part in range(50):
        manifest.path_of(tmp_path, part, theirs if part == 33 else ours).touch()
    owners = manifest.Owners((0,), (ours,))
    with pytest.raises(
        StaleCache, match=r"aaaaaaaaaaaa…\n\s+found:\s+fingerprint bbbbbbbbbbbb…"
    ) as e:
        manifest.done_parts(tmp_path, owners, 50)
    assert "000033-bbbbbbbbbbbb.json" in str(e.value)
    manifest.path_of(tmp_path, 33, theirs).unlink()
    assert np.array_equal(manifest.done_parts(tmp_path, owners, 50), np.delete(np.arange(50), 33))


def test_log_is_read_from_its_end(tmp_path: Path) -> None:
    row = {"part": 0, "tokens": 10, "seconds": 2.0, "peak_bytes": 7, "device": "cpu"}
    assert measured(tmp_path) is None
    append_log(tmp_path, {**row, "peak_bytes": 9})
    assert measured(tmp_path) == Measured(10, 2.0, 9, "cpu")
    line = log_path(tmp_path).read_text()
    log_path(tmp_path).write_text(line.replace("9", "8") * 60_000 + line + '{"part": 1, "tok')
    newest = measured(tmp_path)
    assert newest is not None and newest.peak_bytes == 9 and 0 < newest.tokens < 600_010
    assert newest.tokens / newest.seconds == 5.0
