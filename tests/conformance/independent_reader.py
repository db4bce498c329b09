"""A reader of caches that follows storage/README.md; nothing of this project is imported."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import zarr

LOG_ZERO = np.float32(-10_000)
TABLES = ("near_ids", "far_ids", "logprob_levels")
BITS = {"balanced": 9, "compact": 7}
SIGNS = {"entropy": 1, "log_tail_mass": -1, "gold_logprob": -1}


def checked(path: Path) -> dict[str, Any]:
    """cache.json or a manifest: its sha256 is that of the file without its last 77 bytes, and }."""
    data = path.read_bytes()
    content: dict[str, Any] = json.loads(data)
    if hashlib.sha256(data[:-77] + b"}").hexdigest() != content["sha256"]:
        raise ValueError(f"{path}: its sha256 does not hold")
    return content


class Reader:
    """Notes by block id; every object of a part is checked before anything of it is read."""

    def __init__(self, root: Path) -> None:
        self.root, info = root, checked(root / "cache.json")
        if info["format"] != 2:
            raise ValueError(f"format {info['format']}")
        self.identity, self.layout = info["identity"], info["layout"]
        self.exact, self.cut = self.layout["preset"] == "exact", self.layout["top_p"] < 1
        self.arrays: Any = zarr.open_group(root / "notes.zarr", mode="r")
        near, far = self.arrays["near_ids"][:], self.arrays["far_ids"][:]
        orders = near.astype("<i4").tobytes() + far.astype("<i4").tobytes()
        self.orders = hashlib.sha256(orders).hexdigest()
        common = np.concatenate([far, np.setdiff1d(np.arange(self.layout["vocab_size"]), far)])
        self.ids = np.stack([np.concatenate([row, common]) for row in near])  # [class, rank]

    def check(self, block: int) -> None:
        width, identity, end = self.layout["blocks_per_part"], self.identity, self.layout["blocks"]
        part = block // width
        for grown in (g for g in self.layout["generations"] if g["first_part"] <= part):
            identity = {**identity, "corpus": grown["fingerprint"]}
            end = grown["first_part"] * width + grown["blocks"]
        text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
        owner = hashlib.sha256(text.encode()).hexdigest()
        manifest = checked(self.root / "manifests" / f"{part:06d}-{owner[:12]}.json")
        stated = [manifest[k] for k in ("fingerprint", "part", "first_block", "blocks")]
        if stated != [owner, part, part * width, min(width, end - part * width)]:
            raise ValueError(f"part {part} is not what its manifest's name says")
        if block >= end or manifest["carry"]["orders"] != self.orders:
            raise ValueError(f"no block {block}, or it was written with other orders of ids")
        for name, (size, sha256) in manifest["objects"].items():
            data = (self.root / name).read_bytes()
            if (len(data), hashlib.sha256(data).hexdigest()) != (size, sha256):
                raise ValueError(f"{name} is not what its manifest vouches for")

    def read(self, block: int) -> dict[str, Any]:
        """Returns ids, logprobs [K, T], draws [S, T], statistics [T], log_z [Z, T], features."""
        self.check(block)
        stored = {name: a[block] for name, a in self.arrays.arrays() if name not in TABLES}
        missing = self.layout.get("missing", [])
        notes = {
            n: self.statistic(stored[n]) * sign for n, sign in SIGNS.items() if n not in missing
        }
        if "log_z" in stored:
            signs = np.array([1 if tau >= 1 else -1 for tau in self.layout["temperatures"]])
            notes["log_z"] = self.statistic(stored["log_z"]) * signs[:, None]
        for name in stored.keys() & {"head_ids", "draw_ids"}:
            ranks = np.cumsum(stored[name].astype(int), 0)
            notes[name] = self.ids[stored["id_class"].astype(int), ranks]
        for name in (name for name in stored if name.startswith("feature_")):
            bits = stored[name].astype(np.uint32) << 16
            notes[name] = stored[name] if name == "feature_count" else bits.view(np.float32)
        return notes | (self.rounded(stored) if not self.exact else {
            name: stored[name] for name in stored if name.endswith("_logprobs")
        })  # fmt: skip

    def rounded(self, stored: dict[str, Any]) -> dict[str, Any]:
        levels, above = self.arrays["logprob_levels"][:], stored["head_logprobs"].astype(int)
        unused, floor = self.cut & (above == 0), stored["head_floor"].astype(int)
        notes = {"head_logprobs": np.where(unused, LOG_ZERO, levels[above + floor])}
        if "draw_logprobs" in stored:
            depth = stored["draw_logprobs"] / np.float32(2)
            notes["draw_logprobs"] = np.maximum(levels[floor + int(self.cut)] - depth, LOG_ZERO)
        return notes

    def statistic(self, code: Any) -> Any:
        if self.exact:
            return code
        steps = 2.0 ** BITS[self.layout["preset"]]
        coarse = np.where(code == 65_535, 10_000, 32_768 / steps + (code - 32_768.0) / 4)
        return np.where(code <= 32_768, code / steps, coarse).astype(np.float32)
