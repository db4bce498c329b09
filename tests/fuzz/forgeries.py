"""Stores that say something else with every checksum right: what someone would make who means it."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
from fuzz.mutations import Draw, bytes_changed, json_changed
from hypothesis import strategies as st

from storage.fingerprint import bytes_sha256, canonical_json, fingerprint
from storage.layout import Layout, order_names, pcodec, shard_name
from storage.shard import write_shard
from storage.tables import load_orders, spare_name

Files = dict[Path, bytes | None]


def forge(draw: Draw, root: Path) -> Files:
    """Draws a forgery of a cache or a corpus: path → its new bytes."""
    ways = [_facts, _manifest, _object]
    if (root / "cache.json").exists():
        ways += [_chunks, _index, _codes, _orders, _zarr, _beside]
    else:
        ways += [_arrow, _arrow, _bomb]
    return draw(st.sampled_from(ways))(draw, root)


def _facts(draw: Draw, root: Path) -> Files:
    path = root / ("cache.json" if (root / "cache.json").exists() else "corpus.json")
    return {path: json_changed(draw, path.read_bytes(), sign=True)}


def _manifest(draw: Draw, root: Path) -> Files:
    path = draw(st.sampled_from(sorted((root / "manifests").iterdir())))
    return {path: json_changed(draw, path.read_bytes(), sign=True)}


def _zarr(draw: Draw, root: Path) -> Files:
    path = draw(st.sampled_from(sorted(root.rglob("zarr.json"))))
    return {path: json_changed(draw, path.read_bytes(), sign=False)}


def _beside(draw: Draw, root: Path) -> Files:
    """What is read without a checksum: measurements, leases, words of failure."""
    names = [
        "log.jsonl",
        ".leases/000000",
        ".leases/000001.failed",
        "manifests/000000-0123456789ab.json",
    ]
    path = root / draw(st.sampled_from(names))
    line = (
        b'{"tokens": 5, "seconds": 1.5, "peak_bytes": 7, "device": "cpu", "host": "h", "pid": 1, '
    )
    line += b'"started": 1, "job": null, "lifetime": 9.5, "space": "s", "token": "t", "since": 1.0}'
    if draw(st.booleans()):
        return {path: json_changed(draw, line, sign=False) + b"\n"}
    return {path: bytes_changed(draw, line)}


def _object(draw: Draw, root: Path) -> Files:
    path, name = _vouched_file(draw, root)
    return with_manifest(root, {name: bytes_changed(draw, (root / name).read_bytes())}, path)


def _vouched_file(draw: Draw, root: Path) -> tuple[Path, str]:
    manifest = draw(st.sampled_from(sorted((root / "manifests").iterdir())))
    return manifest, draw(st.sampled_from(sorted(json.loads(manifest.read_bytes())["objects"])))


def with_manifest(root: Path, files: dict[str, bytes], manifest: Path) -> Files:
    """Returns objects and the manifest that vouches for them."""
    body = json.loads(manifest.read_bytes())
    body.pop("sha256")
    for name, data in files.items():
        body["objects"][name] = [len(data), bytes_sha256(data)]
    signed = canonical_json({**body, "sha256": fingerprint(body)})
    return {**{root / name: data for name, data in files.items()}, manifest: signed}


def _crc32c(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(4, "little")


def layout_of(root: Path) -> Layout:
    return Layout.from_dict(json.loads((root / "cache.json").read_bytes())["layout"])


def _shard(draw: Draw, root: Path) -> tuple[Path, str, bytes, int]:
    """Draws a shard: its manifest, name, bytes, and the bytes of its index."""
    manifest, name = _vouched_file(draw, root)
    spec = layout_of(root).arrays()[name.split("/")[1]]
    return manifest, name, (root / name).read_bytes(), 16 * spec.chunks_per_shard + 4


def _chunks(draw: Draw, root: Path) -> Files:
    """What pcodec is given is changed, with its crc32c."""
    manifest, name, data, tail = _shard(draw, root)
    index = np.frombuffer(data[-tail:-4], "<u8").reshape(-1, 2).copy()
    row = draw(st.integers(0, 10**6)) % int((index[:, 0] < 2**62).sum())
    begin, size = (int(x) for x in index[row])
    body = bytes_changed(draw, data[begin : begin + size - 4])
    body += _crc32c(body)
    index[row] = len(data) - tail, len(body)
    text = index.tobytes()
    return with_manifest(root, {name: data[:-tail] + body + text + _crc32c(text)}, manifest)


def _index(draw: Draw, root: Path) -> Files:
    """Where chunks lie is changed, with the index's crc32c."""
    manifest, name, data, tail = _shard(draw, root)
    text = bytes_changed(draw, data[-tail:-4])
    return with_manifest(root, {name: data[:-tail] + text + _crc32c(text)}, manifest)


def _codes(draw: Draw, root: Path) -> Files:
    """Any numbers at all, well encoded."""
    manifest, name = _vouched_file(draw, root)
    layout, body = layout_of(root), json.loads(manifest.read_bytes())
    array = name.split("/")[1]
    spec = layout.arrays()[array]
    seed, most = (
        draw(st.integers(0, 2**31)),
        draw(st.sampled_from([1, 50, 400, 2**16 - 1, 2**32 - 1])),
    )
    generator = np.random.default_rng(seed)
    shape = (body["blocks"], *spec.shape[1:])
    if spec.dtype == "float32":
        values = generator.choice([np.nan, np.inf, -np.inf, 0, -1, 1, 1e30, -1e30], shape).astype(
            "f4"
        )
    else:
        values = generator.integers(0, most, shape, np.uint64).astype(spec.dtype)
    path = root / "forged.shard"
    path.unlink(missing_ok=True)
    write_shard(path, spec, values)
    data = path.read_bytes()
    path.unlink()
    return with_manifest(root, {shard_name(array, body["part"], len(spec.shape)): data}, manifest)


def _orders(draw: Draw, root: Path) -> Files:
    """Other orders of ids, whose digest all manifests carry where there is one."""
    layout, names = layout_of(root), order_names()
    name = draw(st.sampled_from(names))
    dtype = draw(
        st.sampled_from(["uint16", "uint16", "uint16", "uint32", "int32", "float32", "uint64"])
    )
    count = draw(st.sampled_from([0, 1, layout.vocab_size - 1, layout.vocab_size, 3 * layout.vocab_size,
                                  40 * layout.vocab_size, 2**18]))  # fmt: skip
    generator = np.random.default_rng(draw(st.integers(0, 2**31)))
    how = draw(st.sampled_from(["bytes", "any", "sound"]))
    values = generator.integers(0, layout.vocab_size + (how == "any"), count).astype(dtype)
    if how == "sound":
        rows = -(-count // layout.vocab_size)
        values = np.concatenate(
            [generator.permutation(layout.vocab_size) for _ in range(max(1, rows))]
        )
        values = values[:count].astype(dtype)
    body = pcodec().encode(values) if count and how != "bytes" else (root / name).read_bytes()[:-4]
    body = bytes_changed(draw, body) if how == "bytes" else bytes(body)
    data = body + _crc32c(body)
    files: Files = {root / name: data}
    if draw(st.booleans()):
        files[root / spare_name(name)] = data
    return files | _carried(root, layout, name, values)


def _carried(root: Path, layout: Layout, name: str, values: Any) -> Files:
    """Returns the manifests with the digest that these orders have."""
    orders = load_orders(root, layout)
    both = [orders.near.reshape(-1), orders.far]
    both[order_names().index(name)] = np.nan_to_num(values).astype("<i4")
    digest = hashlib.sha256(b"".join(one.astype("<i4").tobytes() for one in both)).hexdigest()
    files: Files = {}
    for path in sorted((root / "manifests").iterdir()):
        manifest = json.loads(path.read_bytes())
        manifest.pop("sha256")
        manifest["carry"] = {"orders": digest}
        files[path] = canonical_json({**manifest, "sha256": fingerprint(manifest)})
    return files


def _arrow(draw: Draw, root: Path) -> Files:
    """A sound Arrow file of another table."""
    manifest, name = _vouched_file(draw, root)
    with pa.ipc.open_file(pa.py_buffer((root / name).read_bytes())) as file:
        table = file.read_all()
    rows, column = table.num_rows, draw(st.sampled_from(table.column_names))
    at = table.column_names.index(column)
    width = table.column("tokens").type.list_size
    made = {
        "negative": lambda: pa.array([[-1] * width] * rows, pa.list_(pa.int32(), width)),
        "huge": lambda: pa.array([[2**31 - 1] * width] * rows, pa.list_(pa.int32(), width)),
        "nulls": lambda: pa.array([None] * rows, table.column(column).type),
        "inner nulls": lambda: pa.array([[None] * width] * rows, pa.list_(pa.int32(), width)),
        "text": lambda: pa.array(["x"] * rows),
        "lists": lambda: pa.array([[1]] * rows),
        "wider": lambda: pa.array([[1] * (width + 1)] * rows, pa.list_(pa.int32(), width + 1)),
        "words": lambda: pa.array(["x"] * rows).dictionary_encode(),
    }
    how = draw(st.sampled_from([*made, "fewer", "twice", "without", "renamed", "uneven"]))
    if how in made:
        table = table.set_column(at, column, made[how]())
    elif how == "fewer":
        table = table.slice(0, max(0, rows - 1))
    elif how == "twice":
        table = pa.concat_tables([table, table])
    elif how == "without":
        table = table.drop_columns([column])
    elif how == "renamed":
        table = table.rename_columns([f"{x}x" for x in table.column_names])
    sink = io.BytesIO()
    chunk = 1 if how == "uneven" else None
    with pa.ipc.new_file(
        sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")
    ) as out:
        out.write_table(table, max_chunksize=chunk)
    return with_manifest(root, {name: sink.getvalue()}, manifest)


def _bomb(draw: Draw, root: Path) -> Files:
    """A few kB of Arrow that stand for far more rows."""
    manifest, name = _vouched_file(draw, root)
    with pa.ipc.open_file(pa.py_buffer((root / name).read_bytes())) as file:
        width = file.schema.field("tokens").type.list_size
    codec = draw(st.sampled_from(["zstd", "lz4"]))
    return with_manifest(
        root, {name: bomb(width, draw(st.sampled_from([10, 10**6])), codec)}, manifest
    )


def bomb(width: int, rows: int, codec: str = "zstd") -> bytes:
    """Returns a sound Arrow part of nothing but zeros: rows of `width` tokens."""
    columns = {"block_id": pa.array(np.zeros(rows, np.int64))}
    kinds = {"tokens": np.int32, "document": np.int64, "offset": np.int64, "loss_mask": bool}
    for name, kind in kinds.items():
        zeros = pa.array(np.zeros(rows * width, kind))
        columns[name] = pa.FixedSizeListArray.from_arrays(zeros, width)
    batch, sink = pa.record_batch(columns), io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with pa.ipc.new_file(sink, batch.schema, options=options) as out:
        out.write_batch(batch)
    return sink.getvalue()
