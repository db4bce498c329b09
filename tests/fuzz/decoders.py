"""The decoders, each as a function of bytes: it returns, or raises an error of ours.

Run with atheris (libFuzzer, which learns from the branches that a case takes):

    python decoders.py NAME [libFuzzer's options]

Checksums are put right before a decoder sees the bytes, or nothing would come past them.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before anything else imports them
    import atheris

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    with atheris.instrument_imports(
        include=["storage", "stages.decode", "stages.checkpoint_pieces", "pipeline.exchange"]
    ):
        import pipeline.exchange.distillkit  # noqa: F401
        import stages.decode  # noqa: F401
        import storage.reader  # noqa: F401

import google_crc32c
import numpy as np
import torch
from safetensors.numpy import save

from pipeline.exchange.distillkit import (
    PackedLayout,
    decode_logprobs,
    load_layout,
    unpack_bits,
)
from pipeline.yaml_text import load_yaml
from stages.checkpoint import load_checkpoint
from stages.checkpoint_pieces import INDEX
from stages.decode import DeviceDecoder
from stages.ranks import Ranks
from storage import manifest
from storage.blocks import BlockReader, object_name, write_part
from storage.codec import PRESETS, from_bfloat16
from storage.corpus_info import CorpusGeneration, CorpusInfo, SourceRange, load_info, save_info
from storage.errors import CorruptShard, ScholiastError
from storage.fingerprint import bytes_sha256, canonical_json, fingerprint
from storage.layout import ArraySpec, Layout, order_names, pcodec
from storage.notes import NotesDecoder
from storage.orders import IdOrders
from storage.shard import Shard
from storage.tables import load_orders
from storage.types import TokenBlocks
from storage.writer import open_cache

_FOLDER = Path(
    tempfile.mkdtemp(
        prefix="scholiast-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None
    )
)
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)
_T, _K, _V = 4, 3, 300
_IDENTITY = {"sources": {"000": {}}, "blocks_per_part": 2}
_SPECS = [
    ArraySpec(dtype, (2, _K, _T), (2, _K, _T), (1, _K, _T), ("block", "entry", "token"))
    for dtype in ("uint16", "uint32", "int32", "float32")
]


def _crc32c(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(4, "little")


def shard(data: bytes) -> None:
    """A shard whose index is any bytes, with its crc32c."""
    spec = _SPECS[data[0] % 4 if data else 0]
    index, body = data[1:33].ljust(32, b"\0"), data[33:]
    path = _FOLDER / "shard"
    path.write_bytes(body + _crc32c(body) + index + _crc32c(index))
    opened = Shard(path, spec, 0)
    for block in range(2):
        opened.read_into(block, np.empty((_K, _T), spec.dtype))


def chunk(data: bytes) -> None:
    """pcodec's bytes as they come to it: one chunk, its crc32c and the index's right."""
    spec, body = _SPECS[data[0] % 4 if data else 0], data[1:]
    index = np.array([[0, len(body) + 4]] * 2, "<u8").tobytes()
    path = _FOLDER / "chunk"
    path.write_bytes(body + _crc32c(body) + index + _crc32c(index))
    opened = Shard(path, spec, 0)
    for block in range(2):
        opened.read_into(block, np.empty((_K, _T), spec.dtype))


def _layout(preset: str = "balanced", **more: Any) -> Layout:
    return Layout(
        blocks=2, blocks_per_part=2, block_length=_T, vocab_size=_V, preset=preset, k=_K,
        temperatures=(2.0,), feature_layers=(), segments=1, hidden_size=0, **more,
    )  # fmt: skip


def orders(data: bytes) -> None:
    """Orders of ids: near from the first half of the bytes, far from the second, or ids at random."""
    folder, half = _FOLDER / "orders", len(data) // 2
    for name, body in zip(order_names(), (data[:half], data[half:]), strict=True):
        if data[-1:] > b"\x80":
            ids = np.frombuffer(body[: len(body) & ~1] or b"\0\0", "<u2")
            body = pcodec().encode(np.resize(ids, 300 if "near" in name else len(ids)))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(body) + _crc32c(bytes(body)))
    found = load_orders(folder, _layout())
    assert len(found.common) == _V and found.ids.max() < _V and found.ranks.min() >= 0


_ORDERS = IdOrders(
    np.stack([np.roll(np.arange(_V, dtype=np.int32), c) for c in range(2)]),
    np.arange(50, dtype=np.int32), _V,
)  # fmt: skip
_LAYOUTS = [_layout(p, draws=d, top_p=t) for p in PRESETS for d in (0, 2) for t in (1.0, 0.9)]


def notes(data: bytes) -> None:
    """Any codes: both decoders refuse the same, or give the same bits."""
    layout, at = _LAYOUTS[data[0] % len(_LAYOUTS) if data else 0], 1
    small = bool(data and data[0] & 0x80)
    arrays = {}
    for name, spec in layout.arrays().items():
        size = int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize
        piece = data[at : at + size].ljust(size, b"\0")
        arrays[name], at = np.frombuffer(piece, spec.dtype).reshape(spec.shape).copy(), at + size
        if small and spec.dtype != "float32":
            arrays[name] %= 2 if name == "id_class" else 40
    packed = {name: torch.from_numpy(a.copy()) for name, a in arrays.items()}
    plain = NotesDecoder(layout, _ORDERS)
    there = DeviceDecoder(layout, _ORDERS, torch.device("cpu"))
    scored = torch.ones(2, _T, dtype=torch.bool)
    try:
        head, stats = plain.head(arrays), plain.stats(arrays)
        draws = plain.draws(arrays) if layout.draws else None
    except IndexError:  # what the reader makes CorruptShard of
        head = None
    try:
        rows = there.rows(packed, scored)
    except CorruptShard:
        return
    if head is None:
        assert layout.codecs.exact, "one decoder refuses what the other takes"
        return
    assert np.array_equal(rows.ids.numpy().reshape(2, _T, _K), head.ids)
    assert np.array_equal(rows.logprobs.numpy().reshape(2, _T, _K), head.logprobs, equal_nan=True)
    assert np.array_equal(rows.entropy.numpy().reshape(2, _T), stats.entropy, equal_nan=True)
    assert draws is None or (head.ids.min() >= 0 and draws.ids.max() < _V)


def codec(data: bytes) -> None:
    """Every code of a statistic, and bfloat16, stands for a number."""
    codes = np.frombuffer(data[: len(data) & ~1], "<u2")
    for preset in PRESETS.values():
        if not preset.exact:
            values = preset.statistics.decode(codes)
            assert np.isfinite(values).all() and (values >= 0).all()
    assert from_bfloat16(codes).dtype == np.float32


def manifests(data: bytes) -> None:
    """A manifest, signed if it is an object."""
    found = manifest.parse(_FOLDER / "m.json", _signed(data))
    assert all(".." not in name.split("/") for name in found.objects)


def _signed(data: bytes) -> bytes:
    try:
        body = json.loads(data)
        if isinstance(body, dict):
            body.pop("sha256", None)
            return canonical_json({**body, "sha256": fingerprint(body)})
    except (ValueError, RecursionError):
        pass
    return data


def infos(data: bytes) -> None:
    """cache.json and corpus.json, signed; what they claim is counted out where it is taken."""
    folder = _FOLDER / "infos"
    folder.mkdir(exist_ok=True)
    for name in ("cache.json", "corpus.json"):
        (folder / name).write_bytes(_signed(data[1:]))
    if data[:1] > b"\x80":
        opened = open_cache(folder)
        assert opened is not None
        opened[1].arrays()
        opened[1].part_range(opened[1].parts - 1)
    else:
        info = load_info(folder)
        assert info is not None
        info.part_range(info.parts - 1)


def arrow(data: bytes) -> None:
    """An Arrow part, with a manifest that vouches for it."""
    folder = _FOLDER / "arrow"
    (folder / "blocks").mkdir(parents=True, exist_ok=True)
    if not (folder / "corpus.json").exists():
        digest = "0" * 64
        source = SourceRange("x", "train", 0, 2, 1, 9)
        generation = CorpusGeneration(0, 2, digest, 1, digest)
        save_info(
            folder, CorpusInfo(_IDENTITY, digest, digest, 300, _T, 2, 2, (source,), (generation,))
        )
    name = object_name(0)
    (folder / name).write_bytes(data)
    vouched = manifest.Manifest("0" * 64, 0, 0, 2, {name: (len(data), bytes_sha256(data))})
    manifest.save(folder, vouched)
    blocks = BlockReader(folder).read([0, 1])
    assert blocks.tokens.shape == (2, _T + 1) and 0 <= blocks.tokens.min()


def pieces(data: bytes) -> None:
    """A checkpoint's list of tensors and its safetensors file."""
    folder = _FOLDER / "pieces"
    folder.mkdir(exist_ok=True)
    half = int.from_bytes(data[:2], "little")
    files = {INDEX: data[2 : 2 + half], "rank-00000.safetensors": data[2 + half :]}
    for name, body in files.items():
        (folder / name).write_bytes(body)
    facts = {"files": {name: bytes_sha256(body) for name, body in files.items()}}
    load_checkpoint(folder, facts, {"w": torch.zeros(3)}, Ranks(torch.device("cpu")))


def yaml_text(data: bytes) -> None:
    """A configuration's text."""
    try:
        load_yaml(data.decode("utf-8", "replace"))
    except ValueError as error:  # what load_config makes ConfigError of
        raise ScholiastError(str(error)) from error


_BIN = {"scale_dtype": "float16", "element_bits": 3, "num_elements": 2}
_PACKED = [
    {"d": 300, "k": 3, "exact_k": 3},
    {"d": 2, "k": 2, "exact_k": 1, "exact_dtype": "float64", "delta_encoding": False},
    {"d": 1 << 31, "k": 4, "exact_k": 0, "polynomial_terms": [0, 1, "sqrt", "exp"],
     "term_dtype": "bfloat16", "residual_bins": [_BIN, {**_BIN, "element_bits": 1}]},
    {"d": 70_000, "k": 5, "exact_k": 2, "exact_dtype": "bfloat16", "normalize_t": True,
     "polynomial_terms": [64], "residual_bins": [{**_BIN, "element_bits": 63}]},
]  # fmt: skip
"""Layouts of DistillKit's captures."""


def packed_heads(data: bytes) -> None:
    """Two positions of a capture of DistillKit, packed in one of some layouts."""
    layout = PackedLayout.model_validate(_PACKED[data[0] % len(_PACKED) if data else 0])
    _decode(layout, data[1:])


def packed_layout(data: bytes) -> None:
    """The text of a compression configuration, and zeros packed as it says."""
    path = _FOLDER / "layout.yaml"
    path.write_bytes(data)
    layout = load_layout(path, [])
    if layout.k <= 1 << 16:
        _decode(layout, b"")


def _decode(layout: PackedLayout, data: bytes) -> None:
    cut = 2 * layout.id_bytes
    ids = _rows(data[:cut], layout.id_bytes)
    found = unpack_bits(ids, layout.id_bits, layout.k)
    for row, told in zip(ids, found.tolist(), strict=True):
        number = (
            int.from_bytes(row.tobytes(), "big") >> 8 * layout.id_bytes - layout.id_bits * layout.k
        )
        for one in reversed(told):  # the last id has the least significant bits
            assert one == number % (1 << layout.id_bits)
            number >>= layout.id_bits
    values = decode_logprobs(_rows(data[cut:], layout.logprob_bytes), layout)
    assert values.shape == (2, layout.k) and values.dtype == np.float32


def _rows(data: bytes, width: int) -> Any:
    return np.frombuffer(data[: 2 * width].ljust(2 * width, b"\0"), np.uint8).reshape(2, width)


DECODERS: dict[str, Callable[[bytes], None]] = {
    one.__name__: one
    for one in (shard, chunk, orders, notes, codec, manifests, infos, arrow, pieces, yaml_text,
                packed_heads, packed_layout)
}  # fmt: skip


def seeds(name: str) -> list[bytes]:
    """Returns inputs that a decoder takes, to begin from."""
    generator = np.random.default_rng(0)
    made: list[bytes] = []
    if name in ("shard", "chunk"):
        for i, spec in enumerate(_SPECS):
            body = bytes(pcodec().encode(generator.integers(0, 99, _K * _T).astype(spec.dtype)))
            index = np.array([[0, len(body) + 4]] * 2, "<u8").tobytes() if name == "shard" else b""
            made.append(bytes([i]) + index + body)
    elif name == "orders":
        made.append(bytes(pcodec().encode(np.arange(_V, dtype="uint16"))) * 2)
        made.append(np.arange(_V, dtype="<u2").tobytes() * 2 + b"\xff")
    elif name == "notes":
        made = [bytes([i | small]) + generator.bytes(400) for i in range(12) for small in (0, 0x80)]
    elif name == "manifests":
        body = {"fingerprint": "0" * 64, "part": 0, "first_block": 0, "blocks": 2,
                "objects": {"a/b": [5, "0" * 64]}, "carry": {"orders": "0" * 64}}  # fmt: skip
        made.append(canonical_json(body))
    elif name == "infos":
        layout, digest = _layout().to_dict(), "0" * 64
        made.append(
            b"\xff" + canonical_json({"format": 2, "identity": {"corpus": "c"}, "layout": layout})
        )
        sources = (SourceRange("x", "train", 0, 2, 1, 9),)
        generations = (CorpusGeneration(0, 2, digest, 1, digest),)
        info = CorpusInfo(_IDENTITY, digest, digest, 300, _T, 2, 2, sources, generations)
        made.append(b"\0" + canonical_json({"format": 2, **asdict(info)}))
    elif name == "arrow":
        made.append(_arrow_part())
    elif name == "pieces":
        index = {
            "w": {"dtype": "F32", "shape": [3], "pieces": [["rank-00000.safetensors", [0], [3]]]}
        }
        text = json.dumps(index).encode()
        made.append(len(text).to_bytes(2, "little") + text + save({"w@0": np.zeros(3, "f4")}))
    elif name == "packed_heads":
        made = [bytes([i]) + generator.bytes(120) for i in range(len(_PACKED))]
    elif name == "packed_layout":
        made = [json.dumps(layout).encode() for layout in _PACKED]
    elif name == "yaml_text":
        made = [
            b"a: &x {b: [1, 2.5, true]}\nc: {<<: *x, d: 2001-01-01}\ne: [!!binary aGk=]\n",
            b"a: !!set {x}\n",
        ]
    return made or [generator.bytes(64)]


def _arrow_part() -> bytes:
    shape = (2, _T + 1)
    blocks = TokenBlocks(
        np.arange(2), np.ones(shape, np.int32), np.zeros(shape, np.int64), np.zeros(shape, np.int64),
        np.ones(shape, bool),
    )  # fmt: skip
    write_part(_FOLDER / "written", "0" * 64, 0, blocks, {})
    return (_FOLDER / "written" / object_name(0)).read_bytes()


def try_one(name: str, data: bytes) -> str:
    """Returns what came of one input: "read" or the name of our error; anything else is raised."""
    try:
        DECODERS[name](data)
    except ScholiastError as error:
        return type(error).__name__
    return "read"


if __name__ == "__main__":
    chosen = sys.argv.pop(1)
    torch.set_num_threads(1)

    def one_input(data: bytes) -> None:
        try_one(chosen, data)

    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
