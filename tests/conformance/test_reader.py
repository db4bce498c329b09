"""The direct reader against zarr-python on the same files, and what it refuses."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import zarr

from storage import manifest
from storage.codec import from_bfloat16, to_bfloat16
from storage.errors import CorruptShard, IncompleteCache, MissingShard, StaleCache
from storage.fingerprint import fingerprint
from storage.layout import GROUP, Layout
from storage.reader import CacheReader
from storage.types import AnyArray
from storage.writer import CacheWriter

LAYOUT = Layout(
    blocks=7, blocks_per_part=3, block_length=384, vocab_size=70_000, k=10, precision="balanced",
    temperatures=(1.5, 2.0), feature_layers=(2, 5), segments=2, hidden_size=6,
)  # fmt: skip
IDENTITY = {"corpus": "c", "teacher": {"model.safetensors": "0"}, "store": {"k": 10}}


def random_part(layout: Layout, part: int) -> dict[str, AnyArray]:
    """Arrays of a part as they are stored; the last block's second half is padding: all zeros."""
    generator = np.random.default_rng(part)
    first, last = layout.part_range(part)
    arrays: dict[str, AnyArray] = {}
    for name, spec in layout.arrays().items():
        shape = (last - first, *spec.shape[1:])
        if np.dtype(spec.dtype).kind == "f":
            arrays[name] = generator.normal(size=shape).astype(spec.dtype)
        else:
            top = min(layout.vocab_size, 1 << 15)
            arrays[name] = generator.integers(0, top, shape).astype(spec.dtype)
        if spec.dimensions[1] == "token" and last == layout.blocks:
            arrays[name][-1, layout.block_length // 2 :] = 0
    return arrays


@pytest.fixture
def root(tmp_path: Path) -> Path:
    writer = CacheWriter(tmp_path / "cache", IDENTITY, LAYOUT)
    for part in range(LAYOUT.parts):
        writer.write_part(part, random_part(LAYOUT, part))
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


def test_returns_what_was_written_decoded(root: Path) -> None:
    stored = random_part(LAYOUT, 1)
    notes = CacheReader(root).read(np.arange(3, 6))
    assert np.array_equal(notes.head.ids, stored["head_ids"])
    expected = LAYOUT.logprob_codec.decode(stored["head_logprobs"])
    assert np.array_equal(notes.head.logprobs, expected)
    assert np.array_equal(notes.stats.log_z, stored["log_z"])
    assert np.array_equal(notes.features.layers[5], from_bfloat16(stored["feature_5"]))
    assert notes.features.layers[5].shape == (3, 2, 6)


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
    with pytest.raises(StaleCache, match=r"expected:\s+store\.k=11\n\s+found:\s+store\.k=10"):
        CacheWriter(root, other, LAYOUT)


def test_part_of_another_identity_is_refused(root: Path) -> None:
    """The listing's names tell; and a manifest whose name lies is refused when it is read."""
    other = "f" * 64
    with pytest.raises(StaleCache, match=r"expected:\s+fingerprint ffffffffffff…"):
        manifest.done_parts(root, manifest.Owners((0,), (other,)))
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
    CacheWriter(root, IDENTITY, LAYOUT).write_part(1, random_part(LAYOUT, 1))
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before


def test_wrong_arrays_are_refused(root: Path) -> None:
    writer = CacheWriter(root, IDENTITY, LAYOUT)
    arrays = random_part(LAYOUT, 1)
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
