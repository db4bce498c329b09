"""The format's specification: a reader that follows it, apart from our code, gives what ours gives."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path

import independent_reader
import numpy as np
import pytest
from independent_reader import Reader
from test_reader import IDENTITY, LAYOUT, random_part, some_orders

from storage import manifest
from storage.codec import PRESETS
from storage.fingerprint import fingerprint
from storage.generations import Generation
from storage.layout import Layout, order_names
from storage.reader import CacheReader
from storage.tables import spare_name
from storage.types import LOG_ZERO, AnyArray
from storage.writer import CacheWriter

GENERATIONS = (Generation(0, 4, "c"), Generation(2, 2, "d"))
MEANS_ALONE = (
    '{"format":2,"identity":{"corpus":"c","store":{"k":32},'
    '"teacher":{"model.safetensors":"0"}},"layout":{"block_length":384,"blocks":7,'
    '"blocks_per_part":3,"draws":5,"feature_layers":[2,5],"generations":[],"hidden_size":6,'
    '"k":32,"preset":"balanced","seed":0,"segments":2,"temperatures":[1.5,2.0],"top_p":1.0,'
    '"vocab_size":70000},'
    '"sha256":"91d0e3a246410a890af400871afe2484ab4c236337d154ce50823af42872ae25"}'
)


def write(root: Path, layout: Layout) -> Path:
    writer = CacheWriter(root, IDENTITY, layout, lambda: some_orders(layout))
    for part in range(layout.parts):
        writer.write_part(part, random_part(layout, part, writer.orders))
    return root


def require_same(root: Path, layout: Layout, blocks: list[int]) -> None:
    """Every value that the two readers give of these blocks is equal, bit for bit."""
    ours, theirs = CacheReader(root).read(np.array(blocks)), Reader(root)
    for n, block in enumerate(blocks):
        found = theirs.read(block)
        expected: dict[str, AnyArray] = {
            "head_ids": ours.head.ids[n].T, "head_logprobs": ours.head.logprobs[n].T,
            "entropy": ours.stats.entropy[n], "log_tail_mass": ours.stats.log_tail_mass[n],
            "gold_logprob": ours.stats.gold_logprob[n],
        }  # fmt: skip
        for name in layout.missing:
            assert np.isnan(expected.pop(name)).all()
        if layout.temperatures:
            expected["log_z"] = ours.stats.log_z[n].T
        if ours.draws is not None:
            expected["draw_ids"] = ours.draws.ids[n].T
            if ours.draws.logprobs is not None:
                expected["draw_logprobs"] = ours.draws.logprobs[n].T
        if layout.feature_layers:
            expected["feature_count"] = ours.features.count[n]
        for layer, values in ours.features.layers.items():
            expected[f"feature_{layer}"] = values[n]
        for layer, values in ours.features.last.items():
            expected[f"feature_last_{layer}"] = values[n]
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert np.array_equal(found[name], value), (block, name)


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_reader_from_the_text_gives_what_ours_gives(
    tmp_path: Path, preset: str, top_p: float
) -> None:
    layout = replace(LAYOUT, preset=preset, top_p=top_p, temperatures=(0.5, 1.0, 2.0))
    require_same(write(tmp_path, layout), layout, [6, 0, 3])
    logprobs = Reader(tmp_path).read(0)["head_logprobs"]
    assert np.any(logprobs == LOG_ZERO) and np.any(logprobs > -1)


@pytest.mark.long
@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 200},  # every id is near to every class, ranks are uint16
        {"temperatures": (), "preset": "compact"},  # draws without logprobs
        {"draws": 0, "feature_layers": ()},
        {"pooling": ("mean", "last")},
        {"pooling": ("last",)},
        {"blocks": 6, "generations": GENERATIONS},
        {"missing": ("entropy",), "draws": 0, "temperatures": ()},  # as imported caches may be
        {"missing": ("entropy", "gold_logprob"), "preset": "exact", "feature_layers": ()},
    ],
    ids=str,
)
def test_so_it_is_with_what_may_be_absent_and_in_a_grown_cache(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    layout = replace(LAYOUT, **changes)  # type: ignore[arg-type]
    blocks = [0, 3, 6, 7] if layout.generations else [0, 6]
    require_same(write(tmp_path, layout), layout, blocks)
    if layout.generations:
        with pytest.raises(ValueError, match="no block 4"):  # the gap between generations
            Reader(tmp_path).read(4)


def test_means_alone_go_unsaid_as_before_there_was_a_choice(tmp_path: Path) -> None:
    """The very bytes of cache.json that were written then, and what they are read as."""
    CacheWriter(tmp_path, IDENTITY, LAYOUT, some_orders)
    assert (tmp_path / "cache.json").read_text() == MEANS_ALONE
    assert Layout.from_dict(json.loads(MEANS_ALONE)["layout"]) == LAYOUT
    assert LAYOUT.pooling == ("mean",) and CacheReader(tmp_path).pooled == ("mean",)
    both = replace(LAYOUT, pooling=("mean", "last"))
    assert both.to_dict() == {**LAYOUT.to_dict(), "pooling": ("mean", "last")}
    assert list(both.arrays())[: len(LAYOUT.arrays())] == list(LAYOUT.arrays())


def test_levels_and_statistics_are_the_formulas_of_the_text(tmp_path: Path) -> None:
    for preset, scale in (("balanced", 420), ("compact", 160)):
        layout = replace(LAYOUT, preset=preset)
        CacheWriter(tmp_path / preset, IDENTITY, layout, lambda: some_orders(LAYOUT))
        i, joint = np.arange(266.0 + scale + 1), 3 * np.log(12 / scale)
        levels = np.where(
            i > 277, 3 * np.log(np.maximum(i - 266, 1) / scale), joint + (i - 278) / 4
        )
        levels[0] = LOG_ZERO
        reader, codec = Reader(tmp_path / preset), layout.codecs.statistics
        found = reader.arrays["logprob_levels"][:]
        np.testing.assert_allclose(found, levels, rtol=1e-6, atol=1e-7)
        codes = np.arange(65_536, dtype=np.uint16)  # far beyond what the other tests write
        assert np.array_equal(reader.statistic(codes), codec.decode(codes))


def test_spare_copies_are_the_bytes_of_the_orders(tmp_path: Path) -> None:
    CacheWriter(tmp_path, IDENTITY, LAYOUT, some_orders)
    for name in order_names():
        assert (tmp_path / spare_name(name)).read_bytes() == (tmp_path / name).read_bytes()
    assert (tmp_path / "spare/near_ids").exists() and (tmp_path / "spare/far_ids").exists()


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("cache.json", b'"k":32,"preset"', b'"k":31,"preset"'),
        (f"manifests/000000-{fingerprint(IDENTITY)[:12]}.json", b'"blocks":3', b'"blocks":2'),
        ("notes.zarr/head_ids/c/0/0/0", b"", b"\0"),
    ],
)
def test_what_is_altered_is_refused(tmp_path: Path, name: str, old: bytes, new: bytes) -> None:
    write(tmp_path, LAYOUT)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data.replace(old, new, 1))
    assert (tmp_path / name).read_bytes() != data
    with pytest.raises(ValueError, match=r"sha256|vouches"):
        Reader(tmp_path).read(0)


def test_orders_of_another_cache_are_refused(tmp_path: Path) -> None:
    other = replace(LAYOUT, k=8)
    CacheWriter(tmp_path / "other", IDENTITY, other, lambda: some_orders(other))
    root = write(tmp_path / "cache", LAYOUT)
    for name in ("zarr.json", "c/0"):
        path = f"notes.zarr/far_ids/{name}"
        (root / path).write_bytes((tmp_path / "other" / path).read_bytes())
    with pytest.raises(ValueError, match="other orders"):
        Reader(root).read(0)


def test_manifest_vouches_for_one_shard_of_each_array(tmp_path: Path) -> None:
    write(tmp_path, LAYOUT)
    body = json.loads(manifest.path_of(tmp_path, 1, fingerprint(IDENTITY)).read_bytes())
    arrays = {name.split("/")[1] for name in body["objects"]}
    assert arrays == set(LAYOUT.arrays()) and all("/c/1" in name for name in body["objects"])


def test_reader_imports_nothing_of_ours_and_is_short() -> None:
    text = Path(str(independent_reader.__file__)).read_text()
    modules = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            modules.add(str(node.module))
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    assert modules == {"__future__", "typing", "json", "hashlib", "pathlib", "numpy", "zarr"}
    assert len(text.splitlines()) < 100
