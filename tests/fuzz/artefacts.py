"""Real artefacts in miniature: a finished run's corpus and caches, its models, a checkpoint, its YAML."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from capture_files import documents, topk_lines, vllm_lines, write_distillkit, write_lines
from conftest import Lab, build_parts

from stages.checkpoint import Checkpoints
from stages.order import BlockOrder, Position
from stages.ranks import Ranks
from storage.blocks import BlockReader
from storage.layout import Layout
from storage.reader import CacheReader
from storage.writer import CacheWriter

TEACHERS = ("one", "two", "exact", "drawn")
"""Of the lab's caches; two more of other presets lie beside them."""


def build(root: Path) -> Lab:
    """Makes everything below a folder: a few seconds."""
    build_parts(root)
    lab = Lab(root)
    lab.config["corpus"] |= {"blocks_per_part": 16, "block_length": 24}
    lab.write()
    lab.workspace().cache_teachers()
    source = CacheReader(root / "run/cache/one")
    for name, changes in (("exact", {"preset": "exact"}), ("drawn", {"preset": "compact", "draws": 4,
                                                                     "top_p": 0.9})):  # fmt: skip
        _random_cache(root / "run/cache" / name, source, changes)
    _checkpoint(root / "checkpoints")
    _captures(root / "captures", lab)
    return lab


def _captures(root: Path, lab: Lab) -> None:
    """A folder for each tool, named as --format names it; of JSON lines a third tell the text alone."""
    found = documents(lab.root / "run/corpus")
    root.mkdir()
    one_bin = {"scale_dtype": "float32", "element_bits": 9, "num_elements": 3}
    layout = {"d": lab.vocab_size, "k": 6, "exact_k": 3, "exact_dtype": "float32",
              "residual_bins": [one_bin], "delta_encoding": True}  # fmt: skip
    write_distillkit(root / "distillkit", found, layout)
    plain, tokenizer = topk_lines(found), lab.workspace().tokenizer()
    for line in plain[1::3]:
        unknown = [None] * len(line["logprobs"])
        line |= {"start": 0, "entropy": [1.5, *unknown[1:]], "gold_logprobs": unknown}
    for line in plain[::3]:
        line["text"] = tokenizer.decode(line.pop("input_ids"), skip_special_tokens=True)
    for kind, lines in (("vllm", vllm_lines(found)), ("topk-jsonl", plain)):
        (root / kind).mkdir()
        write_lines(root / kind / "capture.jsonl", lines)


def _random_cache(folder: Path, source: CacheReader, changes: dict[str, Any]) -> None:
    layout = replace(source.layout, **changes)
    writer = CacheWriter(folder, source.identity, layout, lambda: source.orders)
    generator = np.random.default_rng(0)
    for part in range(layout.parts):
        first, last = layout.part_range(part)
        writer.write_part(part, codes(layout, last - first, len(source.orders.near), generator))


def codes(
    layout: Layout, blocks: int, classes: int, generator: np.random.Generator
) -> dict[str, Any]:
    """Returns arrays that decode to something, of so many blocks."""
    made = {}
    for name, spec in layout.arrays().items():
        shape = (blocks, *spec.shape[1:])
        if spec.dtype == "float32":
            sign = -1.0 if name.endswith("logprobs") else 1.0
            made[name] = (sign * generator.random(shape)).astype("float32")
        elif name == "id_class":
            made[name] = generator.integers(0, classes, shape, spec.dtype)
        elif name.endswith("_ids"):
            made[name] = generator.integers(0, layout.vocab_size // shape[1], shape, spec.dtype)
        else:
            made[name] = generator.integers(0, 50, shape).astype(spec.dtype)
    return made


def order() -> BlockOrder:
    return BlockOrder([(0, 40)], 16, 0, "c")


def tensors(value: float) -> dict[str, Any]:
    """Returns a state like a training's: weights, moments, a random state."""
    names = {f"layer.{i}.weight": torch.full((5, 3), value) for i in range(3)}
    return {
        "student": names | {"norm": torch.full((3,), value, dtype=torch.bfloat16)},
        "optimizer": {"step": torch.tensor(value), "m": torch.full((5, 3), value)},
        "random": {"0": {"cpu": torch.full((16,), int(value), dtype=torch.uint8)}},
    }


ALONE = Ranks(torch.device("cpu"))


def _checkpoint(root: Path) -> None:
    facts = {
        "identity": {"x": 1}, "position": order().state(Position(1, 7)), "tokens": 9, "seconds": 2.5,
    }  # fmt: skip
    checkpoints = Checkpoints(root, ALONE, 2, background=False)
    for step in (4, 8):
        checkpoints.save(step, tensors(float(step)), facts)
    checkpoints.close()


def digest_of(root: Path, corpus: bool) -> str:
    """Returns a digest of every value that reading a store gives."""
    digest = hashlib.sha256()
    reader: Any = BlockReader(root) if corpus else CacheReader(root)
    count = reader.info.blocks if corpus else reader.layout.blocks
    if corpus:
        digest.update(json.dumps(reader.info.identity, sort_keys=True).encode())
    _add(digest, reader.read(np.arange(count)))
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, np.ndarray):
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, dict):
        for key in sorted(value):
            _add(digest, value[key])
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            _add(digest, getattr(value, name))
