"""Remote stores: a real S3 server on loopback, and fsspec's memory:// for what needs no server."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Lab
from s3_server import KEY, SECRET, s3_server
from test_stream import order_of, same

from pipeline.publish import publish
from stages.batches import Batch
from stages.order import Position
from stages.prefetch import Prefetcher
from stages.stream import steps_of_batches
from storage import checked, manifest, remote
from storage.errors import (
    ConfigError,
    CorruptShard,
    IncompleteCache,
    MissingShard,
    RemoteError,
    ScholiastError,
    StaleCache,
)
from storage.fingerprint import fingerprint
from storage.local_cache import LocalCache
from storage.reader import CacheReader
from storage.remote import RemotePath

Cli = Callable[..., Any]
URL = "s3://tests/lab"


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(tmp_path_factory.mktemp("s3")) as url:
        yield url


@pytest.fixture
def s3(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The environment that reaches the server; the driver, to look at it from behind."""
    names = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET,
             "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}  # fmt: skip
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "_filesystems", {})
    store = remote._filesystem(URL)
    for _ in range(100):  # the port is open before the server has found its parts
        try:
            store.makedirs("tests", exist_ok=True)
            break
        except OSError:
            time.sleep(0.1)
    return store


@pytest.fixture(scope="module")
def lab_of_caches(cached_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(Path(shutil.copytree(cached_parts, tmp_path_factory.mktemp("remote") / "lab")))


@pytest.fixture
def pushed(s3: Any, lab_of_caches: Lab) -> Lab:
    """The lab, its corpus and caches whole on the server."""
    publish(lab_of_caches.workspace(), URL)
    return lab_of_caches


def far(lab: Lab, folder: Path, url: str = URL, **changes: Any) -> Any:
    """Opens the lab's run on what lies in the store, with a local cache of its own."""
    return lab.workspace(
        corpus_dir=f"{url}/corpus", cache_dir=f"{url}/cache", reading__local_cache=str(folder),
        run_dir=str(folder.parent / "run"), **changes,
    )  # fmt: skip


def batches_of(work: Any, steps: int = 12, **how: int) -> list[Batch]:
    reader = work.batch_reader()
    stream = steps_of_batches(reader, order_of(reader), Position(), 2, 2, **how)
    found = [batch for _ in range(steps) for batch in next(stream)[0]]
    stream.close()
    return found


@pytest.mark.parametrize(
    "how",
    [{}, pytest.param({"workers": 2}, marks=pytest.mark.long), {"workers": 2, "fetch_threads": 3}],
)
def test_joined_reading_from_s3_is_bit_equal(
    pushed: Lab, tmp_path: Path, how: dict[str, int]
) -> None:
    plain = batches_of(pushed.workspace())
    work = far(pushed, tmp_path / "fetched")
    if how:  # the driver's thread runs before the workers are forked
        work.batch_reader().read([0])
    found = batches_of(work, **how)
    assert len(found) == len(plain) and all(same(a, b) for a, b in zip(plain, found, strict=True))


@pytest.mark.long
def test_a_student_trained_and_evaluated_from_s3_is_the_same(
    pushed: Lab, tmp_path: Path, cli: Cli
) -> None:
    weights = []
    for name, where in {"near": pushed.root / "run", "far": URL}.items():
        config = pushed.write(
            run_dir=str(tmp_path / name), corpus_dir=f"{where}/corpus", cache_dir=f"{where}/cache",
            reading__local_cache=str(tmp_path / "fetched"),
        )  # fmt: skip
        for command in ("plan", "status", "train-student", "evaluate"):
            result = cli(command, config)
            assert result.exit_code == 0, result.output
        model = tmp_path / name / "students/fused/model/model.safetensors"
        weights.append(model.read_bytes())
    assert weights[0] == weights[1]


def test_wrong_credentials_are_refused(
    pushed: Lab, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pushed.write(
        corpus_dir=f"{URL}/corpus", cache_dir=f"{URL}/cache", reading__local_cache=str(tmp_path)
    )
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        monkeypatch.setenv(name, "wrong")
        monkeypatch.setattr(remote, "_filesystems", {})
        result = cli("train-student", config)
        assert result.exit_code == 1 and "refuses our credentials" in result.output
        assert "AWS_SECRET_ACCESS_KEY" in result.output
        assert SECRET not in result.output


def test_a_bucket_or_cache_that_is_not_there(pushed: Lab, tmp_path: Path) -> None:
    cache = LocalCache(tmp_path, 10**9)
    for url in ("s3://no-such-bucket/cache/one", f"{URL}/cache/no-such-teacher"):
        with pytest.raises(IncompleteCache, match="has no cache"):
            CacheReader(RemotePath(url, cache), "one")
    with pytest.raises(IncompleteCache, match="not been prepared"):
        far(pushed, tmp_path / "c", "s3://no-such-bucket").finished_jobs()


def test_an_endpoint_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(remote, "_filesystems", {})
    with pytest.raises(RemoteError, match=r"cannot be reached[^$]*127\.0\.0\.1:9"):
        RemotePath("s3://tests/x", LocalCache(tmp_path, 1)).read_bytes()


def shard_of(lab: Lab, array: str) -> tuple[str, bytes]:
    """A shard of part 0 of teacher "one": its key in the store, its bytes."""
    root = lab.root / "run/cache/one"
    path = next(p for p in (root / f"notes.zarr/{array}/c/0").rglob("0") if p.is_file())
    return f"{URL}/cache/one/{path.relative_to(root)}".removeprefix("s3://"), path.read_bytes()


def test_a_flipped_byte_and_a_missing_object_are_refused(
    pushed: Lab, tmp_path: Path, s3: Any
) -> None:
    key, data = shard_of(pushed, "entropy")
    try:
        s3.pipe_file(key, bytes([data[0] ^ 1]) + data[1:])
        for workers in (0, 2):
            with pytest.raises(CorruptShard, match=r"s3://tests/lab/cache/one.*entropy"):
                batches_of(far(pushed, tmp_path / "fetched"), workers=workers)
        s3.rm(key)
        with pytest.raises(MissingShard, match="entropy"):
            batches_of(far(pushed, tmp_path / "fetched"))
    finally:
        s3.pipe_file(key, data)
    batches_of(far(pushed, tmp_path / "fetched"))


def test_an_object_of_another_size_is_not_fetched(
    in_memory: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have any, and fill the disk before its sha256 is known."""
    store = remote._filesystem("memory://lab")
    key = shard_of(in_memory, "entropy")[0].replace("tests/lab", "/lab")
    data, fetched, get = store.cat_file(key), list[str](), type(store).get_file

    def seen(self: Any, path: str, *arguments: Any, **named: Any) -> Any:
        fetched.append(path)
        return get(self, path, *arguments, **named)

    monkeypatch.setattr(type(store), "get_file", seen)
    try:
        store.pipe_file(key, data * 100)
        with pytest.raises(
            CorruptShard, match=rf"memory://lab[^$]*found: *{len(data) * 100} bytes"
        ):
            batches_of(far(in_memory, tmp_path / "fetched", "memory://lab"))
    finally:
        store.pipe_file(key, data)
    assert fetched and key not in fetched


def test_of_json_without_an_end_no_more_is_asked_for(
    in_memory: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checked, "LARGEST", 10_000)
    store = remote._filesystem("memory://lab")
    read, cat = list[int](), type(store).cat_file

    def seen(self: Any, *arguments: Any, **named: Any) -> Any:
        data = cat(self, *arguments, **named)
        read.append(len(data))
        return data

    store.pipe_file("/endless/cache.json", b" " * 1_000_000)
    monkeypatch.setattr(type(store), "cat_file", seen)
    with pytest.raises(CorruptShard, match=r"cache\.json"):
        CacheReader(RemotePath("memory://endless", LocalCache(tmp_path, 1)), "one")
    assert read == [10_001]


def test_an_empty_file_is_damaged_and_no_fault_of_the_store(s3: Any, tmp_path: Path) -> None:
    """Of which S3 has no range."""
    s3.pipe_file("tests/empty/cache.json", b"")
    with pytest.raises(CorruptShard, match=r"cache\.json"):
        CacheReader(RemotePath("s3://tests/empty", LocalCache(tmp_path, 1)), "one")


def test_the_local_cache_stays_bounded(pushed: Lab, tmp_path: Path) -> None:
    """A limit of a few parts: all is read, in two epochs, and the folder never holds more."""
    work = far(pushed, tmp_path / "fetched", reading__local_cache_bytes=60_000)
    reader, plain = work.batch_reader(), pushed.workspace().batch_reader()
    evicted, before = 0, set[Path]()
    for part in [*range(reader.corpus.info.parts)] * 2:
        ids = reader.corpus.part(part).block_ids
        assert same(reader.read(ids), plain.read(ids))
        for cache in reader.caches.values():
            cache._shards.clear()  # nothing is held open
        now = set((tmp_path / "fetched").glob("??/*"))
        evicted, before = evicted + len(before - now), now
        assert sum(p.stat().st_size for p in now) <= 60_000
    assert evicted > 20


def test_pushing_again_sends_no_part_and_a_broken_copy_is_finished(
    pushed: Lab, tmp_path: Path, s3: Any
) -> None:
    work = pushed.workspace()
    nothing = {"corpus": 0, "cache/one": 0, "cache/two": 0}
    assert publish(work, URL) == nothing == publish(work, URL, dry_run=True)
    key, data = shard_of(pushed, "head_ids")
    name = next(n for n in s3.ls("tests/lab/cache/one/manifests", detail=False) if "/000000-" in n)
    s3.rm(key)
    s3.rm(name)  # as if the copy had been stopped before this part's commit
    with pytest.raises(IncompleteCache, match="parts missing: one: 1 of"):
        far(pushed, tmp_path / "fetched").finished_jobs()
    resent = publish(work, URL)
    assert resent["cache/one"] > len(data) and resent["cache/two"] == 0
    assert s3.cat_file(key) == data
    whole = "tests/lab/cache/one/cache.json"  # no manifest vouches for it
    data = s3.cat_file(whole)
    s3.pipe_file(whole, data[:-1] + b" ")
    assert publish(work, URL) == {**nothing, "cache/one": len(data)}
    assert s3.cat_file(whole) == data


@pytest.mark.long
def test_pushing_over_something_else_is_refused(pushed: Lab, s3: Any) -> None:
    before = sorted(s3.find("tests/lab/cache"))
    other = pushed.workspace(store__k=4, run_dir=str(pushed.root / "other"))
    other.cache_teachers()
    with pytest.raises(StaleCache, match="push to another place"):
        publish(other, URL)
    assert sorted(s3.find("tests/lab/cache")) == before


def test_listing_is_that_of_the_local_folder(pushed: Lab, tmp_path: Path) -> None:
    near = manifest.listing(pushed.root / "run/cache/one")
    there = manifest.listing(RemotePath(f"{URL}/cache/one", LocalCache(tmp_path, 1)))
    assert len(near) and near.parts.tolist() == there.parts.tolist()
    assert near.prefixes.tolist() == there.prefixes.tolist()


# -- without a server


@pytest.fixture
def in_memory(lab_of_caches: Lab) -> Lab:
    publish(lab_of_caches.workspace(), "memory://lab")
    return lab_of_caches


def test_parts_are_fetched_before_they_are_read(in_memory: Lab, tmp_path: Path) -> None:
    reader = far(in_memory, tmp_path / "fetched", "memory://lab").batch_reader()
    fetcher = Prefetcher(reader, order_of(reader), 2)
    fetcher.ahead_of(Position())
    objects, deadline = 0, time.monotonic() + 60
    for source in (reader.corpus, *reader.caches.values()):
        owner = getattr(source, "identity", reader.corpus.info.identity)
        for part in order_of(reader).upcoming(Position(), 65):
            vouched = manifest.load(source.root, part, fingerprint(owner))
            for size, digest in vouched.objects.values():  # type: ignore[union-attr]
                copy = tmp_path / "fetched" / digest[:2] / digest
                while not copy.exists() and time.monotonic() < deadline:
                    time.sleep(0.01)
                assert copy.stat().st_size == size
                objects += 1
    fetcher.close()
    assert objects > 100


def test_no_more_is_fetched_ahead_than_the_local_cache_holds(
    in_memory: Lab, tmp_path: Path
) -> None:
    """Not even before anything tells how large a part is."""
    work = far(in_memory, tmp_path / "fetched", "memory://lab")
    reader, fetched = work.batch_reader(), list[int]()
    for source in (reader.corpus, *reader.caches.values()):
        source.root.cache.limit = 100  # type: ignore[union-attr]
        source.fetch = lambda part: fetched.append(part) or 5  # type: ignore[method-assign,assignment]
    fetcher = Prefetcher(reader, order_of(reader), 2)
    fetcher.ahead_of(Position())
    time.sleep(0.2)
    fetcher.close()
    sources = 1 + len(reader.caches)
    assert len(set(fetched)) == max(2, 100 // 2 // (5 * sources))


def test_local_folders_are_not_copied(lab_of_caches: Lab, tmp_path: Path) -> None:
    work = lab_of_caches.workspace(reading__local_cache=str(tmp_path / "fetched"))
    batches_of(work, fetch_threads=2)
    assert not (tmp_path / "fetched").exists()


def test_stage_one_writes_to_local_folders_only(lab: Lab, cli: Cli) -> None:
    for key, command in (("cache_dir", "cache-teachers"), ("corpus_dir", "prepare")):
        result = cli(command, lab.write(**{key: "memory://elsewhere"}))
        assert result.exit_code == 2 and "works on local folders" in result.output
    assert "the run's folder is local" in cli("plan", lab.write(run_dir="memory://x")).output


def test_push_takes_a_url_and_sends_nothing_damaged(
    lab_of_caches: Lab, cli: Cli, tmp_path: Path
) -> None:
    config = lab_of_caches.write()
    assert cli("push", config, tmp_path).exit_code == 2
    path = lab_of_caches.root / "run/cache/one/notes.zarr/entropy/c/0/0"
    data = path.read_bytes()
    try:
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        result = cli("push", config, "memory://damaged")
        assert result.exit_code == 1 and "scholiast verify" in result.output
    finally:
        path.write_bytes(data)


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_pushing_again_mends_what_the_store_lost(
    lab_of_caches: Lab, tmp_path: Path, scheme: str
) -> None:
    """Gone or of another size: told by the listing. Other bytes: told by reading them, if asked."""
    url = f"{scheme}://{tmp_path}/mended"
    work = lab_of_caches.workspace()
    publish(work, url)
    cache = RemotePath(f"{url}/cache/one", LocalCache(tmp_path / "c", 10**9))
    gone, short, other = (
        f"notes.zarr/{name}/c/0/0" for name in ("entropy", "gold_logprob", "id_class")
    )
    own = {n: (lab_of_caches.root / "run/cache/one" / n).read_bytes() for n in (gone, short, other)}
    (cache / gone).call(lambda store, path: store.rm(path))
    (cache / short).call(lambda store, path: store.pipe_file(path, own[short][:-1]))
    turned = bytes([own[other][0] ^ 1]) + own[other][1:]
    (cache / other).call(lambda store, path: store.pipe_file(path, turned))
    publish(work, url)
    assert (cache / gone).read_bytes() == own[gone] and (cache / short).read_bytes() == own[short]
    assert (cache / other).read_bytes() == turned
    publish(work, url, verify=True)
    assert (cache / other).read_bytes() == own[other]
    # Beside no manifest, or another one, a size tells nothing: a plain push sends what it vouches for.
    name = min((lab_of_caches.root / "run/cache/one/manifests").glob("000000-*")).name
    for old in (None, b"{}"):
        (cache / other).call(lambda store, path: store.pipe_file(path, turned))
        (cache / f"manifests/{name}").call(
            lambda store, path, old=old: (
                store.rm(path) if old is None else store.pipe_file(path, old)
            )
        )
        publish(work, url)
        assert (cache / other).read_bytes() == own[other]


@pytest.mark.parametrize(
    "name",
    ["notes.zarr/near_ids/c/0/0", "spare/far_ids", "notes.zarr/logprob_levels/c/0",
     "notes.zarr/entropy/zarr.json"],
)  # fmt: skip
def test_push_refuses_what_no_manifest_vouches_for(lab_of_caches: Lab, cli: Cli, name: str) -> None:
    path = lab_of_caches.root / "run/cache/one" / name
    data = path.read_bytes()
    try:
        path.write_bytes(data[:-1] if name.endswith("json") else bytes([data[0] ^ 1]) + data[1:])
        result = cli("push", lab_of_caches.write(), f"memory://refused/{name}")
        assert result.exit_code == 1 and "to do:     run `scholiast" in result.output, result.output
    finally:
        path.write_bytes(data)


@pytest.mark.parametrize(
    ("url", "message"),
    [("gs://bucket/x", "gcsfs"), ("nope://bucket/x", "no driver knows this kind of URL")],
)
def test_a_url_without_a_driver(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RemotePath(url, LocalCache(tmp_path, 1)).read_bytes()


def test_s3_without_its_driver_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from storage.remote import *\n"
        "try: RemotePath('s3://b/x', LocalCache(Path('.'), 1)).read_bytes()\n"
        "except ConfigError as error: print(error.todo)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], env={**os.environ},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stdout.strip() == "pip install 'scholiast[s3]'"


def test_our_errors_keep_what_they_say_on_their_way_between_processes() -> None:
    import pickle

    error = RemoteError("what", where="w", expected=1, found=2, todo="do")
    again: ScholiastError = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and vars(again) == vars(error)
