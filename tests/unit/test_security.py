"""A cache or a corpus from someone else: what its files claim is refused before it costs anything, and
nothing outside the folder is read as its own or deleted. And a few seconds of `make fuzz`."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pytest
from fuzz.artefacts import build, digest_of
from fuzz.cases import run_cases
from fuzz.decoders import DECODERS, seeds, try_one
from fuzz.forgeries import bomb, with_manifest
from fuzz.targets import TARGETS, Ground, ground_at

from stages.corpus_identity import recorded_width
from storage import manifest
from storage.blocks import BlockReader
from storage.corpus_info import load_begun, load_info
from storage.errors import CorruptShard, ScholiastError
from storage.fingerprint import canonical_json, fingerprint
from storage.layout import order_names, pcodec
from storage.local_cache import LocalCache
from storage.reader import CacheReader
from storage.repair import plan_repair, repair
from storage.tables import load_orders, spare_name
from storage.verify import verify
from storage.writer import CacheWriter, open_cache

Cli = Callable[..., Any]
CASES = 15
"""Of each target and decoder, with a seed that is always the same."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    build(root)
    return root


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "run/cache/one", tmp_path / "cache/one"))


@pytest.fixture
def corpus(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "run/corpus", tmp_path / "corpus"))


@pytest.fixture(scope="module")
def ground(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return ground_at(made, tmp_path_factory.mktemp("ground"))


@pytest.mark.parametrize("name", TARGETS)
def test_fuzzing_for_a_moment(ground: Ground, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ground.root)
    tally = run_cases(ground, name, seed=7, cases=CASES)
    assert not tally.crashes and tally.cases >= CASES // 2


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_for_a_moment(name: str) -> None:
    """Without atheris: seeds are read, and a byte changed in turn is read or refused."""
    for data in seeds(name):
        assert try_one(name, data) == "read"
        for at in np.linspace(0, len(data) - 1, CASES).astype(int).tolist():
            try_one(name, data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
            try_one(name, data[:at])


def test_the_fuzzing_sees_what_it_should(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that is none of ours, and data that are not what was written."""
    monkeypatch.chdir(ground.root)
    with monkeypatch.context() as broken:
        broken.setattr("storage.manifest._require_possible", lambda _: {}["a key"])
        tally = run_cases(ground, "stores damaged", seed=1, cases=3)
    assert any(place.startswith("KeyError at storage/manifest.py") for place in tally.crashes)
    other = Ground(ground.root)
    other.truth = dict.fromkeys(other.truth, "other")
    tally = run_cases(other, "stores damaged", seed=2, cases=CASES)
    assert any(place.startswith("WrongData") for place in tally.crashes)


# -- what files claim


def signed(path: Path, **changes: Any) -> None:
    """Lays values over a JSON file (a__b is nested) and signs it."""
    body = json.loads(path.read_bytes())
    body.pop("sha256")
    for key, value in changes.items():
        node = body
        *above, last = key.split("__")
        for part in above:
            node = node[part]
        node[last] = value
    path.write_bytes(canonical_json({**body, "sha256": fingerprint(body)}))


@pytest.mark.parametrize(
    "changes",
    [
        {"layout__blocks": 10**15}, {"layout__blocks_per_part": 10**9}, {"layout__k": 2**40},
        {"layout__block_length": 2**40}, {"layout__vocab_size": 2**30}, {"layout__draws": 2**25},
        {"layout__block_length": 2**24, "layout__k": 300}, {"layout__k": 0},
        {"layout__temperatures": [1e-3] * 9999}, {"layout__blocks": 1.5}, {"layout__preset": "pickle"},
        {"layout__pooling": ["mean", "mean"]}, {"layout__x": 1}, {"layout": None}, {"identity": {}},
        {"layout__generations": [{"first_part": 9, "blocks": 1, "fingerprint": "x"}]},
    ],
    ids=str,
)  # fmt: skip
def test_a_cache_that_claims_what_cannot_be(cache: Path, changes: dict[str, Any]) -> None:
    signed(cache / "cache.json", **changes)
    with pytest.raises(CorruptShard, match=r"cache\.json states what cannot be"):
        open_cache(cache)
    assert not verify(cache).sound


@pytest.mark.parametrize(
    "changes",
    [
        {"blocks": 10**15}, {"blocks_per_part": 2**40}, {"block_length": 2**40}, {"sources": []},
        {"generations": []}, {"vocab_size": -1}, {"tokenizer": 5}, {"sources__0__blocks": 10**9},
        {"sources__0__domain": None}, {"generations__0__blocks": -3}, {"blocks": True},
        {"identity": {}}, {"identity": {"sources": {}}},
        {"identity": {"sources": [], "blocks_per_part": 2}},
        {"identity": {"sources": {}, "blocks_per_part": 2**40}},
        {"identity": {"sources": {}, "blocks_per_part": "2"}},
    ],
    ids=str,
)  # fmt: skip
def test_a_corpus_that_claims_what_cannot_be(corpus: Path, changes: dict[str, Any]) -> None:
    body = json.loads((corpus / "corpus.json").read_bytes())
    flat = {}
    for key, value in changes.items():
        name, *inner = key.split("__")
        if inner:
            body[name][int(inner[0])][inner[1]] = value
            value = body[name]
        flat[name] = value
    signed(corpus / "corpus.json", **flat)
    with pytest.raises(CorruptShard, match=r"corpus\.json states what cannot be"):
        BlockReader(corpus)


@pytest.mark.parametrize(
    "identity",
    [{}, 5, {"sources": {}}, {"sources": [], "blocks_per_part": 2},
     {"sources": {}, "blocks_per_part": None}, {"sources": {}, "blocks_per_part": True}],
    ids=str,
)  # fmt: skip
def test_a_begun_corpus_that_is_of_nothing(corpus: Path, identity: Any) -> None:
    """It carries no checksum; what can be told from it is nothing then, and the corpus begins anew."""
    (corpus / "corpus.json").unlink()
    body = {"identity": identity, "generations": [(1, fingerprint(identity))]}
    (corpus / "begun.json").write_bytes(canonical_json(body))
    assert load_begun(corpus) is None and recorded_width(corpus) is None
    assert [problem.path for problem in verify(corpus).problems] == ["begun.json"]


def test_json_without_an_end_is_not_read_whole(cache: Path) -> None:
    """Deeper than the interpreter's stack; larger than any of ours (a file with a hole takes no disk)."""
    for content in (b"[" * 200_000, b'{"a":' * 200_000):
        (cache / "cache.json").write_bytes(content)
        with pytest.raises(CorruptShard, match="not those that were written"):
            open_cache(cache)
    with (cache / "cache.json").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(CorruptShard, match="not those that were written"):
        open_cache(cache)


def test_an_index_longer_than_its_shard(cache: Path) -> None:
    """A layout that would have a part of 2^20 blocks: the index alone would be 16 MB; it is not read."""
    body = json.loads((cache / "cache.json").read_bytes())
    signed(cache / "cache.json", layout__blocks_per_part=1 << 20)
    blocks = body["layout"]["blocks"]
    first = min((cache / "manifests").iterdir())
    signed(first, blocks=blocks)
    with pytest.raises(CorruptShard, match="shorter than its index"):
        CacheReader(cache).read(np.array([0]))


def crc(body: bytes) -> bytes:
    return body + int(google_crc32c.value(body)).to_bytes(4, "little")


@pytest.mark.parametrize("how", ["twice", "beyond", "many", "no pcodec", "claims 2^47"])
def test_orders_of_ids_that_are_none(cache: Path, how: str) -> None:
    """The last one ended the process when pcodec was asked how much it holds."""
    opened = open_cache(cache)
    assert opened is not None
    vocab = opened[1].vocab_size
    ids = {
        "twice": np.zeros(vocab),
        "beyond": np.full(1, vocab),
        "many": np.arange(vocab * 40) % vocab,
    }
    body = bytes(pcodec().encode(ids.get(how, np.arange(vocab)).astype("uint16")))
    if how == "no pcodec":
        body = pickle.dumps(ids)
    if how == "claims 2^47":
        body = body[:6] + b"\xff" * 7 + body[13:]
    for name in order_names():
        (cache / name).write_bytes(crc(body))
        (cache / spare_name(name)).write_bytes(crc(body))
    with pytest.raises(CorruptShard, match="order"):
        load_orders(cache, opened[1])


def test_a_pickle_codec_in_the_metadata_is_never_asked(cache: Path) -> None:
    """Metadata may name numcodecs' pickle: we read none of it; writer and verify refuse such a file."""
    path = cache / "notes.zarr/entropy/zarr.json"
    body = json.loads(path.read_bytes())
    body["codecs"] = [{"name": "numcodecs.pickle", "configuration": {"protocol": 5}}]
    whole = digest_of(cache, corpus=False)
    path.write_text(json.dumps(body))
    assert digest_of(cache, corpus=False) == whole
    assert [p.path for p in verify(cache).problems] == ["notes.zarr/entropy/zarr.json"]
    opened = open_cache(cache)
    assert opened is not None
    with pytest.raises(CorruptShard, match="metadata"):
        CacheWriter(cache, *opened, lambda: pytest.fail("the orders are there"))


# -- paths


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "notes.zarr/../../secret", "", "a\0b"]
)
def test_a_manifest_names_nothing_outside(cache: Path, name: str) -> None:
    first = min((cache / "manifests").iterdir())
    body = json.loads(first.read_bytes())
    signed(first, objects={**body["objects"], name: [1, "0" * 64]})
    with pytest.raises(CorruptShard, match="outside its folder"):
        manifest.read(first)


@pytest.mark.parametrize("digest", ["../../../secret", "x" * 64, "0" * 63, ""])
def test_a_digest_is_no_path_of_the_local_cache(cache: Path, tmp_path: Path, digest: str) -> None:
    """What is fetched from a store lies in the local cache under its sha256."""
    first = min((cache / "manifests").iterdir())
    body = json.loads(first.read_bytes())
    signed(first, objects={name: [1, digest] for name in body["objects"]})
    with pytest.raises(CorruptShard, match="cannot be"):
        manifest.read(first)
    with pytest.raises(ScholiastError) as error:
        LocalCache(tmp_path / "local", 10**6).opened(
            digest, 1, lambda p: pytest.fail("fetched"), "x"
        )
    assert "push --verify" in error.value.todo


@pytest.mark.parametrize("whole", [True, False])
def test_a_link_out_of_the_cache_is_not_followed(cache: Path, tmp_path: Path, whole: bool) -> None:
    """Neither read, though its bytes are right, nor deleted by repair; a folder's, or a file's."""
    outside, array = tmp_path / "outside", cache / "notes.zarr/entropy/c"
    target = array if whole else array / "0/0"
    target.rename(outside)
    target.symlink_to(outside)
    with pytest.raises(CorruptShard, match="link leads out"):
        CacheReader(cache).read(np.array([0]))
    report = verify(cache)
    assert {p.mend for p in report.problems} == {"none"} and plan_repair(report) == []
    if whole:
        (outside / "0/0").write_bytes(b"damaged")
        repair(verify(cache, deep=True), clean=True)
        assert (outside / "0/0").read_bytes() == b"damaged"
    assert outside.exists()


def test_a_cache_may_lie_behind_a_link_itself(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "here").symlink_to(cache)
    (tmp_path / "here/notes.zarr/entropy/c/0/0").rename(cache / "moved")
    os.symlink(cache / "moved", cache / "notes.zarr/entropy/c/0/0")  # within: a person's own affair
    assert digest_of(tmp_path / "here", corpus=False) == digest_of(cache, corpus=False)


# -- what decoders are given


def test_tokens_that_the_tokenizer_does_not_know(corpus: Path) -> None:
    """An embedding would be asked for a row that it does not have: on a GPU the end of its context."""
    path = min((corpus / "blocks").iterdir())
    table = pa.ipc.open_file(pa.py_buffer(path.read_bytes())).read_all()
    kind = table.column("tokens").type
    tokens = pa.array([[10**6] * kind.list_size] * table.num_rows, kind)
    table = table.set_column(table.column_names.index("tokens"), "tokens", tokens)
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as out:
        out.write_table(table)
    first = min((corpus / "manifests").iterdir())
    for file, data in with_manifest(
        corpus, {f"blocks/{path.name}": sink.getvalue()}, first
    ).items():
        assert data is not None
        file.write_bytes(data)
    with pytest.raises(CorruptShard, match="tokens that the tokenizer does not know"):
        BlockReader(corpus).read([0])


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
@pytest.mark.parametrize("lie", [None, "rows", "buffers"])
def test_a_part_is_not_decompressed_to_more_than_its_blocks(
    corpus: Path, codec: str, lie: str | None
) -> None:
    """Whether it has more rows, and says so, or only a buffer that has more bytes than its rows have."""
    info = load_info(corpus)
    assert info is not None
    width, most = info.block_length + 1, 10_000
    name = f"blocks/{min(path.name for path in (corpus / 'blocks').iterdir())}"
    data = bomb(width, most, codec)
    if lie:  # the metadata have the part's rows, the buffers stay what they are
        rows = info.part_range(0)[1]
        numbers = [(most, rows)] + ([(most * width, rows * width)] if lie == "buffers" else [])
        for old, new in numbers:
            assert old.to_bytes(8, "little") in data
            data = data.replace(old.to_bytes(8, "little"), new.to_bytes(8, "little"))
    first = min((corpus / "manifests").iterdir())
    for file, written in with_manifest(corpus, {name: data}, first).items():
        assert written is not None
        file.write_bytes(written)
    own, others = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(own)  # which counts from 0
    try:
        with pytest.raises(
            CorruptShard, match=r"cannot be read: (another number of rows|a buffer of)"
        ):
            BlockReader(corpus).read([0])
        assert own.max_memory() <= 100_000
    finally:
        pa.set_memory_pool(others)


def test_memory_and_hashes_of_others_are_no_ground_to_stop(
    made: Path, tmp_path: Path, cli: Cli
) -> None:
    """What is only remembered or measured may be anything: it is then not there."""
    root = ground_at(made, tmp_path / "own").root
    run = root / "run"
    for content in (b"[]", b"{", b'{"x": 5}', b"[" * 100_000):
        (run / "hashes.json").write_bytes(content)
        for file in ("log.jsonl", ".leases/000000"):
            path = run / "cache/one" / file
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        assert cli("status", root / "run.yaml", "--json").exit_code == 0
