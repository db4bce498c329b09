"""The direct reader against zarr-python on the same files, and what it refuses."""

from __future__ import annotations

import json
import resource
import shutil
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr
from pcodec import ChunkConfig, standalone

from storage import manifest
from storage.codec import PRESETS, FixedPoint, from_bfloat16, to_bfloat16
from storage.errors import ConfigError, CorruptShard, IncompleteCache, MissingShard, StaleCache
from storage.fingerprint import canonical_json, fingerprint
from storage.layout import GROUP, Layout, create_group, order_names, quiet_zarr, shard_name
from storage.lookup import Table
from storage.notes import encode_rows, sum_gaps
from storage.orders import IdOrders, learn_orders
from storage.reader import CacheReader, max_open
from storage.shard import Shard
from storage.tables import restore
from storage.types import LOG_ZERO, AnyArray, Bool, HostNotes
from storage.verify import verify
from storage.writer import CacheWriter

LAYOUT = Layout(
    blocks=7, blocks_per_part=3, block_length=384, vocab_size=70_000, preset="balanced", k=32,
    draws=5, top_p=1.0, seed=0, temperatures=(1.5, 2.0), feature_layers=(2, 5), segments=2, hidden_size=6,
)  # fmt: skip
IDENTITY = {"corpus": "c", "teacher": {"model.safetensors": "0"}, "store": {"k": 32}}


def random_notes(layout: Layout, rows: int, seed: int) -> HostNotes:
    """Notes on some rows as a teacher might make them: distinct ids, falling logprobs, empty tails."""
    generator = np.random.default_rng(seed)
    width = layout.k + layout.draws
    skewed = (layout.vocab_size * generator.random((rows, 4 * width)) ** 3).astype(np.int64)
    ids = np.stack([np.random.default_rng(i).permutation(np.unique(row))[:width] for i, row in
                    enumerate(skewed)])  # fmt: skip
    logits = np.sort(generator.normal(size=(rows, width)) * 4)[:, ::-1]
    logp = (logits - np.log(np.exp(logits).sum(1, keepdims=True)) - 0.1).astype(np.float32)
    logp[:3, 1:] = LOG_ZERO
    logp[:3, 0] = 0.0
    if layout.top_p < 1:
        kept = np.arange(layout.k) < generator.integers(1, layout.k + 1, rows)[:, None]
        ids[:, : layout.k] = np.where(kept, ids[:, : layout.k], ids[:, :1])
        logp[:, : layout.k] = np.where(kept, logp[:, : layout.k], LOG_ZERO)
    picked = generator.integers(layout.k, width, (rows, layout.draws)) if layout.draws else None
    take = np.take_along_axis
    statistic = -generator.random((rows, 3)).astype(np.float32) * 9
    return HostNotes(
        ids[:, : layout.k], logp[:, : layout.k],
        ids[:, :0] if picked is None else take(ids, picked, 1),
        logp[:, :0] if picked is None else take(logp, picked, 1),
        -statistic[:, 0], statistic[:, 1], statistic[:, 2],
        generator.random((rows, len(layout.temperatures))).astype(np.float32),
    )  # fmt: skip


def scored_rows(layout: Layout, part: int) -> Bool:
    """Which rows of a part have notes: some do not, and the last block's second half is padding."""
    first, last = layout.part_range(part)
    scored = np.random.default_rng(part).random((last - first, layout.block_length)) < 0.9
    if last == layout.blocks:
        scored[-1, layout.block_length // 2 :] = False
    return scored


def some_orders(layout: Layout = LAYOUT) -> IdOrders:
    return learn_orders(random_notes(layout, 1500, 77).ids, layout.vocab_size)


def random_part(layout: Layout, part: int, orders: IdOrders) -> dict[str, AnyArray]:
    """Arrays of a part as they are stored."""
    scored = scored_rows(layout, part)
    arrays: dict[str, AnyArray] = {
        name: np.zeros((len(scored), *spec.shape[1:]), spec.dtype)
        for name, spec in layout.arrays().items()
    }
    generator = np.random.default_rng(part)
    for name, array in arrays.items():
        if name.startswith("feature"):
            array[:] = generator.integers(0, 1 << 14, array.shape)
    encode_rows(layout, orders, random_notes(layout, int(scored.sum()), part), scored, arrays)
    return arrays


@pytest.fixture
def root(tmp_path: Path) -> Path:
    writer = CacheWriter(tmp_path / "cache", IDENTITY, LAYOUT, some_orders)
    for part in range(LAYOUT.parts):
        writer.write_part(part, random_part(LAYOUT, part, writer.orders))
    return tmp_path / "cache"


def test_bit_equal_to_zarr_python(root: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group = zarr.open_group(root / GROUP, mode="r")
        reader = CacheReader(root)
        ids = np.array([6, 0, 3, 3, 5, 1])
        for name, spec in LAYOUT.arrays().items():
            plain = group[name][:]
            assert plain.shape == spec.shape and plain.dtype == spec.dtype
            assert np.array_equal(reader.array(name, ids), plain[ids])


@pytest.mark.parametrize("part", [0, 2])  # the last is not full
def test_shards_are_those_that_zarr_python_writes(root: Path, tmp_path: Path, part: int) -> None:
    """Byte for byte; of a block with several chunks, the same chunks in another order."""
    orders, (first, last) = some_orders(), LAYOUT.part_range(part)
    create_group(tmp_path / GROUP, LAYOUT, orders)
    with quiet_zarr(), zarr.config.set({"array.write_empty_chunks": True}):
        group = zarr.open_group(tmp_path / GROUP, mode="r+")
        for name, array in random_part(LAYOUT, part, orders).items():
            group[name][first:last] = array
    for name, spec in LAYOUT.arrays().items():
        path = shard_name(name, part, len(spec.shape))
        ours, theirs = (root / path).read_bytes(), (tmp_path / path).read_bytes()
        if spec.chunks_per_block == 1:
            assert ours == theirs
        assert len(ours) == len(theirs)
        found = np.empty((2, last - first, *spec.shape[1:]), spec.dtype)
        for folder, out in zip((root, tmp_path), found, strict=True):
            shard = Shard(folder / path, spec, part)
            for block in range(last - first):
                shard.read_into(block, out[block])
        assert np.array_equal(*found)


@pytest.mark.parametrize("name", ["head_ids", "draw_ids", "id_class", "head_floor"])
@pytest.mark.parametrize("vocab", [900, LAYOUT.vocab_size])
def test_codes_that_stand_for_nothing_are_refused(tmp_path: Path, name: str, vocab: int) -> None:
    """What a writer wrote wrong has its checksums right."""
    layout = replace(LAYOUT, vocab_size=vocab)
    writer = CacheWriter(tmp_path, IDENTITY, layout, lambda: some_orders(layout))
    for part in range(layout.parts):
        arrays = random_part(layout, part, writer.orders)
        arrays[name][0, ..., 7] = np.iinfo(arrays[name].dtype).max // 2
        writer.write_part(part, arrays)
    with pytest.raises(CorruptShard, match="written wrong"):
        CacheReader(tmp_path, "one").read(np.array([0]))
    assert verify(tmp_path).sound and not verify(tmp_path, deep=True).sound


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_look_ups_are_numpys(dtype: type) -> None:
    values = np.random.default_rng(0).random(999).astype(np.float32)
    index = np.random.default_rng(1).integers(0, 999, (3, 5, 7)).astype(dtype)
    found = Table(values)[index]
    assert found.flags.c_contiguous and found.flags.writeable and found.dtype == np.float32
    assert np.array_equal(found, values[index])
    assert Table(values)[index[:0]].shape == (0, 5, 7)
    with pytest.raises(IndexError, match="999"):
        Table(values)[np.array([999], dtype)]


def sorted_rows(ids: AnyArray, values: AnyArray) -> tuple[AnyArray, AnyArray]:
    """Rows as sets: by id, and the greater value first where an id repeats."""
    order = np.lexsort((-values, ids), axis=-1)
    return np.take_along_axis(ids, order, -1), np.take_along_axis(values, order, -1)


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("vocab", [200, 70_000])
def test_returns_what_was_written_decoded(
    tmp_path: Path, preset: str, top_p: float, vocab: int
) -> None:
    layout = replace(LAYOUT, preset=preset, top_p=top_p, vocab_size=vocab)
    writer = CacheWriter(tmp_path, IDENTITY, layout, lambda: some_orders(layout))
    arrays = random_part(layout, 1, writer.orders)
    writer.write_part(1, arrays)
    notes, scored = CacheReader(tmp_path).read(np.arange(3, 6)), scored_rows(layout, 1)
    wrote, codecs = random_notes(layout, int(scored.sum()), 1), layout.codecs
    logprobs = codecs.logprobs.decode(codecs.logprobs.encode(wrote.logprobs))
    expected = sorted_rows(wrote.ids, logprobs)
    found_ids, found = sorted_rows(notes.head.ids[scored], notes.head.logprobs[scored])
    if top_p < 1:  # an unused entry repeats an id of its row, which one is the encoder's affair
        for ids in (expected[0], found_ids):
            ids[(expected[1] if ids is expected[0] else found) <= LOG_ZERO] = -1
        expected, (found_ids, found) = sorted_rows(*expected), sorted_rows(found_ids, found)
    assert np.array_equal(found_ids, expected[0])
    assert np.array_equal(found, expected[1])
    assert notes.draws is not None and notes.draws.logprobs is not None
    draws = sorted_rows(wrote.draw_ids, wrote.draw_logprobs)
    found_ids, found = sorted_rows(notes.draws.ids[scored], notes.draws.logprobs[scored])
    assert np.array_equal(found_ids, draws[0])
    regular = draws[1] > LOG_ZERO / 2
    if codecs.exact:
        assert np.array_equal(found, draws[1])
    elif top_p == 1:  # with a random cut a draw may lie above the floor
        assert np.all(np.abs(found - draws[1])[regular] <= 0.251)
    bits = codecs.statistics.bits if isinstance(codecs.statistics, FixedPoint) else 60
    for name in ("entropy", "log_tail_mass", "gold_logprob", "log_z"):
        error = np.abs(getattr(notes.stats, name)[scored] - getattr(wrote, name)).max()
        assert error <= 2.0 ** -(bits + 1) * 1.001
    assert np.array_equal(notes.features.layers[5], from_bfloat16(arrays["feature_5"]))
    assert notes.features.layers[5].shape == (3, 2, 6)
    assert np.all(notes.head.logprobs[~scored] == (0.0 if codecs.exact else LOG_ZERO))


def test_smaller_head_gives_its_mass_to_the_tail(tmp_path: Path) -> None:
    layout = replace(LAYOUT, draws=0)
    writer = CacheWriter(tmp_path, IDENTITY, layout, lambda: some_orders(layout))
    writer.write_part(0, random_part(layout, 0, writer.orders))
    ids, scored = np.arange(3), scored_rows(layout, 0)
    whole, small = CacheReader(tmp_path).read(ids), CacheReader(tmp_path, k=4, layers=[5]).read(ids)
    best = np.sort(whole.head.logprobs, -1)[..., ::-1]
    assert np.array_equal(np.sort(small.head.logprobs, -1)[..., ::-1], best[..., :4])
    mass = np.exp(whole.head.logprobs).sum(-1) + np.exp(whole.stats.log_tail_mass)
    again = np.exp(small.head.logprobs).sum(-1) + np.exp(small.stats.log_tail_mass)
    fits = scored & (mass <= 1)  # made-up masses may exceed 1; a tail is never more than all
    np.testing.assert_allclose(again[fits], mass[fits], rtol=1e-5)
    assert list(small.features.layers) == [5] and small.features.last == {}
    with pytest.raises(ConfigError, match="1 to 32"):
        CacheReader(tmp_path, k=33)
    with pytest.raises(ConfigError, match=r"\[2, 5\]"):
        CacheReader(tmp_path, layers=[3])
    with pytest.raises(ConfigError, match=r"some of \['mean'\]"):
        CacheReader(tmp_path, pooled=["last"])
    assert CacheReader(tmp_path, layers=[], pooled=["last"]).read(ids).features.last == {}


def test_only_the_pooling_that_is_wanted_is_read(tmp_path: Path) -> None:
    layout = replace(LAYOUT, pooling=("mean", "last"))
    writer = CacheWriter(tmp_path, IDENTITY, layout, lambda: some_orders(layout))
    arrays = random_part(layout, 0, writer.orders)
    writer.write_part(0, arrays)
    reader, ids = CacheReader(tmp_path, layers=[5], pooled=["last"]), np.arange(3)
    assert {n for n in reader.packed(ids) if "_last" in n or n == "feature_5"} == {"feature_last_5"}
    features = reader.read(ids).features
    assert features.layers == {} and list(features.pooled("last")) == [5]
    assert np.array_equal(features.last[5], from_bfloat16(arrays["feature_last_5"]))
    assert not np.array_equal(arrays["feature_last_5"], arrays["feature_5"])


def test_draws_stand_for_their_own_head_only(root: Path) -> None:
    with pytest.raises(ConfigError, match="k = 32"):
        CacheReader(root, k=4)
    with pytest.raises(ConfigError, match="k = 32"):
        CacheReader(root, k=0)


def test_each_part_owns_one_shard_of_each_array(root: Path) -> None:
    for part in range(LAYOUT.parts):
        vouched = manifest.load(root, part, fingerprint(IDENTITY))
        assert vouched is not None
        assert len(vouched.objects) == len(LAYOUT.arrays())
        assert all(f"/c/{part}/" in name for name in vouched.objects)


@pytest.mark.parametrize("where", [0.01, 0.3, 0.6, 0.97, 1.0])
def test_flipped_byte_is_refused(root: Path, where: float) -> None:
    """Anywhere in a shard: a chunk, the index, its checksum."""
    path = root / GROUP / "head_ids/c/1/0/0"
    data = bytearray(path.read_bytes())
    data[min(len(data) - 1, int(len(data) * where))] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(CorruptShard, match="head_ids"):
        CacheReader(root).array("head_ids", np.arange(3, 6))


def test_damaged_orders_are_refused_and_restored_from_their_spare(root: Path) -> None:
    before = CacheReader(root).read(np.arange(7))
    for name in order_names():
        data = bytearray((root / name).read_bytes())
        data[len(data) // 2] ^= 1
        (root / name).write_bytes(data)
        with pytest.raises(CorruptShard, match="scholiast repair"):
            CacheReader(root)
        assert restore(root, LAYOUT) == [root / name]
        (root / name).unlink()
        with pytest.raises(MissingShard, match="orders"):
            CacheReader(root)
        assert restore(root, LAYOUT) == [root / name] and restore(root, LAYOUT) == []
    assert np.array_equal(CacheReader(root).read(np.arange(7)).head.ids, before.head.ids)


@pytest.mark.parametrize("data", [b"", b"\0\0\0\0", b"x"])
def test_emptied_orders_are_refused(root: Path, data: bytes) -> None:
    (root / order_names()[0]).write_bytes(data)
    with pytest.raises(CorruptShard, match="orders"):
        CacheReader(root)
    assert restore(root, LAYOUT) == [root / order_names()[0]]


def test_two_writers_of_other_bits_never_mix(root: Path) -> None:
    """The part is one of the two, whole, whatever the order in which they write and commit."""
    one, two = (CacheWriter(root, IDENTITY, LAYOUT, some_orders) for _ in range(2))
    parts = [random_part(LAYOUT, number, one.orders) for number in (0, 1)]
    barrier = threading.Barrier(2)

    def write(writer: CacheWriter, arrays: dict[str, AnyArray]) -> None:
        barrier.wait()
        writer.write_part(0, arrays)

    for _ in range(3):
        threads = [
            threading.Thread(target=write, args=pair)
            for pair in zip((one, two), parts, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = CacheReader(root).packed(np.arange(3))
        assert any(
            all(np.array_equal(found[name], a) for name, a in arrays.items()) for arrays in parts
        )
        report = verify(root)
        assert report.sound and not report.leftovers


def test_a_finished_part_is_never_replaced(tmp_path: Path) -> None:
    """Who comes second, with other bits, leaves the first one's part; nothing of theirs stays."""
    writer = CacheWriter(tmp_path, IDENTITY, LAYOUT, some_orders)
    first = writer.write_part(0, random_part(LAYOUT, 0, writer.orders))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert writer.write_part(0, random_part(LAYOUT, 1, writer.orders)) == first
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def with_manifest(root: Path, part: int, **changes: object) -> None:
    """Writes a part's manifest anew, its own checksum right."""
    path = manifest.path_of(root, part, fingerprint(IDENTITY))
    body = {**json.loads(path.read_bytes()), **changes}
    del body["sha256"]
    path.write_bytes(canonical_json({**body, "sha256": fingerprint(body)}))


@pytest.mark.parametrize("changes", [{"blocks": 2}, {"first_block": 1}, {"objects": {}}])
def test_a_manifest_of_another_range_or_of_nothing_is_refused(
    root: Path, changes: dict[str, object]
) -> None:
    with_manifest(root, 0, **changes)
    with pytest.raises(CorruptShard, match="is of another part"):
        CacheReader(root).read(np.array([0]))


def crc32c(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("chunk", "entry", "message"),
    [
        (b"junk and more of it", None, "cannot be decompressed"),
        (bytes(4), None, "cannot be decompressed"),
        (standalone.simple_compress(np.zeros(385, np.uint16), ChunkConfig()), None, "another number"),
        (standalone.simple_compress(np.zeros(383, np.uint16), ChunkConfig()), None, "another number"),
        (standalone.simple_compress(np.zeros(384, np.uint32), ChunkConfig()), None, "decompressed"),
        (b"", (2**63, 9), "bytes that are not there"),
        (b"", (0, 2**40), "bytes that are not there"),
        (b"", (3, 2**64 - 2), "bytes that are not there"),
    ],
)  # fmt: skip
def test_a_shard_that_was_written_wrong_is_refused(
    tmp_path: Path, chunk: bytes, entry: tuple[int, int] | None, message: str
) -> None:
    """Its checksums are right."""
    spec, data = LAYOUT.arrays()["entropy"], chunk + crc32c(chunk)
    pair = (0, len(data)) if entry is None else entry
    index = np.array([pair, *[(2**64 - 1,) * 2] * (spec.chunks_per_shard - 1)], "<u8").tobytes()
    (tmp_path / "shard").write_bytes(data + index + crc32c(index))
    with pytest.raises(CorruptShard, match=message):
        Shard(tmp_path / "shard", spec, 0).read_into(0, np.empty(384, np.uint16))


def test_readers_share_the_descriptors_of_the_process(root: Path) -> None:
    """Many shards are read with few descriptors, and what is read is the same."""
    expected = CacheReader(root).read(np.arange(7))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        readers = [CacheReader(root) for _ in range(6)]
        assert 16 <= max_open() <= 128 // 6
        for _ in range(2):
            found = [reader.read(np.arange(7)) for reader in readers]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert all(np.array_equal(f.head.ids, expected.head.ids) for f in found)
    assert all(len(reader._shards) <= 128 // 6 for reader in readers)


@pytest.mark.parametrize("k", [1, 5, 8, 9, 16, 23, 64])
def test_sums_of_gaps_are_running_sums(k: int) -> None:
    gaps = np.random.default_rng(k).integers(0, 900, (2, k, 11)).astype(np.uint16)
    expected = np.cumsum(gaps, 1, dtype=np.uint16)
    sum_gaps(gaps)
    assert np.array_equal(gaps, expected)


def test_part_is_not_read_with_other_orders(root: Path, tmp_path: Path) -> None:
    other = learn_orders(random_notes(LAYOUT, 300, 5).ids, LAYOUT.vocab_size)
    CacheWriter(tmp_path / "other", IDENTITY, LAYOUT, lambda: other)
    for name in order_names():
        shutil.copyfile(tmp_path / "other" / name, root / name)
    with pytest.raises(CorruptShard, match="other orders of ids"):
        CacheReader(root).read(np.array([0]))


def test_truncated_and_missing_shards_are_refused(root: Path) -> None:
    path = root / GROUP / "entropy/c/0/0"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptShard, match="size"):
        CacheReader(root).read(np.array([0]))
    path.unlink()
    with pytest.raises(MissingShard, match="entropy"):
        CacheReader(root).read(np.array([0]))


def test_part_without_manifest_is_not_read(root: Path) -> None:
    manifest.path_of(root, 2, fingerprint(IDENTITY)).unlink()
    reader = CacheReader(root)
    reader.read(np.array([5]))
    with pytest.raises(IncompleteCache, match="part 2"):
        reader.read(np.array([6]))


def test_cache_of_another_identity_is_refused_with_both_sides(root: Path) -> None:
    other = {**IDENTITY, "store": {"k": 11}}
    with pytest.raises(StaleCache, match=r"expected:\s+store\.k=11\n\s+found:\s+store\.k=32"):
        CacheWriter(root, other, LAYOUT, some_orders)


def test_part_of_another_identity_is_refused(root: Path) -> None:
    """The listing's names tell; and a manifest whose name lies is refused when it is read."""
    other = "f" * 64
    with pytest.raises(StaleCache, match=r"expected:\s+fingerprint ffffffffffff…"):
        manifest.done_parts(root, manifest.Owners((0,), (other,)), LAYOUT.parts)
    manifest.path_of(root, 0, fingerprint(IDENTITY)).rename(manifest.path_of(root, 0, other))
    with pytest.raises(StaleCache, match="not what its name says"):
        manifest.finished(root, 0, other)


def test_flipped_byte_in_a_manifest_is_refused(root: Path) -> None:
    path = manifest.path_of(root, 1, fingerprint(IDENTITY))
    path.write_bytes(path.read_bytes().replace(b'"blocks":3', b'"blocks":2'))
    with pytest.raises(CorruptShard, match="manifest"):
        CacheReader(root).read(np.array([3]))


def test_writing_a_part_again_gives_the_same_bytes(root: Path) -> None:
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    writer = CacheWriter(root, IDENTITY, LAYOUT, some_orders)
    writer.write_part(1, random_part(LAYOUT, 1, writer.orders))
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before


def test_wrong_arrays_are_refused(root: Path) -> None:
    writer = CacheWriter(root, IDENTITY, LAYOUT, some_orders)
    arrays = random_part(LAYOUT, 1, writer.orders)
    with pytest.raises(ValueError, match="entropy"):
        writer.write_part(1, {**arrays, "entropy": arrays["entropy"][:1]})
    with pytest.raises(ValueError, match="stored"):
        writer.write_part(1, {k: v for k, v in arrays.items() if k != "entropy"})


def test_bfloat16_rounds_to_nearest_even() -> None:
    import torch

    values = torch.randn(10_000) * torch.logspace(-20, 20, 10_000)
    ours = to_bfloat16(values.numpy())
    theirs = values.bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(ours, theirs)


def test_swapped_shards_of_one_size_are_refused(root: Path) -> None:
    """Each is sound by itself, and of the size that its manifest states: only the sha256 tells."""
    names = [shard_name("entropy", part, 2) for part in (0, 1)]
    data = [(root / name).read_bytes() for name in names]
    end = 16 * LAYOUT.arrays()["entropy"].chunks_per_shard + 4
    for part, own in enumerate(data):  # bytes between chunks and index belong to nothing
        padding = bytes(max(map(len, data)) - len(own))
        (root / names[part]).write_bytes(own[:-end] + padding + own[-end:])
        vouched = manifest.load(root, part, fingerprint(IDENTITY))
        assert vouched is not None
        objects = {**vouched.objects, **manifest.describe(root, [names[part]])}
        with_manifest(root, part, objects=objects)
    whole = CacheReader(root)
    for part in (0, 1):
        whole.array("entropy", np.array([3 * part]))
    for name, other in ((names[0], "a"), (names[1], names[0]), ("a", names[1])):
        (root / name).rename(root / other)
    for part in (0, 1):
        with pytest.raises(CorruptShard, match="sha256"):
            CacheReader(root).array("entropy", np.array([3 * part]))
        assert [p.part for p in verify(root).problems] == [0, 1]


def test_a_shard_is_hashed_once_a_process(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, first = np.arange(7), CacheReader(root).read(np.arange(7))
    monkeypatch.setattr("hashlib.file_digest", None)  # not asked any more
    again = CacheReader(root)
    assert np.array_equal(again.read(blocks).head.ids, first.head.ids)
    again._shards.clear()  # as if others had taken the descriptors
    again.read(blocks)
    path = root / shard_name("entropy", 0, 2)
    path.write_bytes(path.read_bytes())
    with pytest.raises(TypeError):
        CacheReader(root).read(blocks)
