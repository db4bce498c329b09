"""What a cache takes, what its rounding costs, how fast it is written and read.

    python tests/benchmarks/cache.py [FOLDER]      (make bench-cache; FOLDER is runs/bench)

Method. Data: SmolLM2-135M's notes on 131,072 tokens of two domains (notes.py), K = 64 without draws and
16 with 16 draws, temperatures 1.5 and 2 in the grid. Every preset is written as stage one writes it, in
blocks of 1,024 tokens and parts of 64 blocks, its orders of ids learned from 16,384 of the tokens; once
also in 64 parts of 2 blocks, as many as training reads side by side.
Bytes a token count every file of the cache: arrays, shard indices, orders and their spare copies, Zarr
metadata, cache.json, manifests. Baselines count their encoded bytes alone.

kl is the mean over all rows, in nats and float64, of KL(p ‖ q), p the float32 head as the teacher gave it
with the exact rest as one bucket, q what is decoded, with its own bucket (a fused target's: the stored
tail mass at temperature 1, what the partition leaves at 2); kl_t2 the same at temperature 2. A cache with
draws is judged by its head and bucket too. Baselines do not store the tempered partition: their q at
temperature 2 takes the exact one.

Speed: one core (the process is bound to it, one thread). write: encoding, compressing, fsync, manifest.
read: random blocks, four at a time, of three caches of one layout joined by block id, decoded to ids,
logprobs and statistics; tokens a second and teacher. zarr_python: the same blocks of the same files,
each array as zarr-python gives it, not decoded. memcpy: copying the decoded values from memory.
Each rate is the best of ROUNDS turns, methods taking turns, since other work on the machine can only slow
them. Files are in the page cache.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from baselines import BASELINES, Array, Baseline
from notes import LENGTH, TEMPERATURES, len_of_tokenizer, load

from pipeline.commands.group import allow_open_files
from storage.layout import GROUP, Layout, quiet_zarr
from storage.notes import encode_rows
from storage.orders import learn_orders
from storage.reader import CacheReader
from storage.types import HostNotes
from storage.writer import CacheWriter

PART, LEARN, ROUNDS, BATCH, TEACHERS = 64, 16_384, 5, 4, 3
PRESETS = (
    ("balanced", 64, 0, TEMPERATURES, PART),
    ("balanced, in 64 parts", 64, 0, TEMPERATURES, 2),
    ("exact", 64, 0, TEMPERATURES, PART),
    ("compact", 16, 16, TEMPERATURES, PART),
    ("compact, temperature 1 only", 16, 16, (), PART),
)
MISSING = 1e-6


def rows_of(notes: HostNotes, start: int, stop: int, grid: int) -> HostNotes:
    """Returns rows [start, stop), with the first `grid` temperatures."""
    taken = {field.name: getattr(notes, field.name)[start:stop] for field in fields(notes)}
    return HostNotes(**{**taken, "log_z": taken["log_z"][:, :grid]})


def write(root: Path, layout: Layout, notes: HostNotes) -> float:
    """Writes a cache; returns seconds, those of learning the orders left out."""
    blocks = np.arange(LEARN // LENGTH) * layout.blocks // (LEARN // LENGTH)
    rows = (blocks[:, None] * LENGTH + np.arange(LENGTH)).reshape(-1)
    ids = np.concatenate([notes.ids[rows], notes.draw_ids[rows]], 1)
    orders = learn_orders(ids, layout.vocab_size)
    shutil.rmtree(root, ignore_errors=True)
    writer = CacheWriter(root, {"corpus": "bench"}, layout, lambda: orders)
    writer.orders.ranks, writer.orders.ids  # noqa: B018 (tables of a teacher, not of a part)
    start = time.perf_counter()
    for part in range(layout.parts):
        first, last = layout.part_range(part)
        arrays = {
            name: np.zeros((last - first, *spec.shape[1:]), spec.dtype)
            for name, spec in layout.arrays().items()
        }
        for i in range(0, last - first, BATCH):
            at = slice(i, min(i + BATCH, last - first))
            some = rows_of(
                notes, (first + at.start) * LENGTH, (first + at.stop) * LENGTH,
                len(layout.temperatures),
            )  # fmt: skip
            scored = np.ones((at.stop - at.start, LENGTH), bool)
            out = {name: array[at] for name, array in arrays.items()}
            encode_rows(layout, writer.orders, some, scored, out)
        writer.write_part(part, arrays)
    return time.perf_counter() - start


def divergence(
    notes: HostNotes, ids: Array, logprobs: Array, log_tail: Array | None, log_z: Array | None,
    start: int, temperature: float,
) -> Array:  # fmt: skip
    """Returns KL(p ‖ q) of each row [n]: see the method above.

    Args:
        ids, logprobs: decoded head [n, K] of rows [start, start + n), in any order of entries.
        log_tail: decoded [n], None where nothing but the head is stored.
        log_z: decoded log partition at `temperature` [n]; None for the exact one.
    """
    rows = slice(start, start + len(ids))
    true = notes.logprobs[rows].astype(np.float64)
    exact_z = notes.log_z[rows, TEMPERATURES.index(2.0)].astype(np.float64)
    by_id = np.argsort(notes.ids[rows], 1), np.argsort(ids, 1)
    assert np.array_equal(*(np.take_along_axis(x, o, 1) for x, o in
                            zip((notes.ids[rows], ids), by_id, strict=True)))  # fmt: skip
    found = np.take_along_axis(logprobs.astype(np.float64), by_id[1], 1)
    true = np.take_along_axis(true, by_id[0], 1)
    true_tail = np.exp(notes.log_tail_mass[rows].astype(np.float64))
    if temperature == 1.0:
        p, p_tail = np.exp(true), true_tail
        p *= ((1 - p_tail) / p.sum(1))[:, None]  # the float32 softmax's own rounding
        q = np.exp(found)
        q_tail = np.maximum(1 - q.sum(1), MISSING) if log_tail is None else np.exp(log_tail)
    else:
        p = np.exp(true / temperature - exact_z[:, None])
        p_tail = np.maximum(1 - p.sum(1), 0.0)
        q = np.exp(found / temperature - (exact_z if log_z is None else log_z)[:, None])
        q_tail = np.maximum(1 - q.sum(1), 0.0 if log_tail is not None else MISSING)
    scale = (1 - q_tail) / q.sum(1) if log_tail is not None else 1 / (q.sum(1) + q_tail)
    q, q_tail = q * scale[:, None], q_tail * (1.0 if log_tail is not None else scale)
    with np.errstate(divide="ignore", invalid="ignore"):
        head = np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0).sum(1)
        tail = np.where(p_tail > 0, p_tail * np.log(p_tail / np.maximum(q_tail, 1e-12)), 0.0)
    return head + tail


def cache_divergence(notes: HostNotes, reader: CacheReader, temperature: float) -> float | None:
    layout, total = reader.layout, []
    if temperature != 1.0 and temperature not in layout.temperatures:
        return None
    for block in range(layout.blocks):
        read = reader.read(np.array([block]))
        log_z = None
        if temperature != 1.0:
            log_z = read.stats.log_z[0, :, layout.temperatures.index(temperature)].astype(
                np.float64
            )
        total.append(divergence(
            notes, read.head.ids[0], read.head.logprobs[0],
            read.stats.log_tail_mass[0].astype(np.float64), log_z, block * LENGTH, temperature,
        ))  # fmt: skip
    return float(np.concatenate(total).mean())


def best(runs: dict[str, Callable[[], int]]) -> dict[str, float]:
    """Returns the best tokens a second of each, the runs taking turns."""
    rates = dict.fromkeys(runs, 0.0)
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            tokens = run()
            rates[name] = max(rates[name], tokens / (time.perf_counter() - start))
    return rates


def readings(roots: list[Path], layout: Layout) -> dict[str, Callable[[], int]]:
    """Returns what is timed on caches of one layout: each call reads the same random blocks."""
    import zarr

    order = np.random.default_rng(0).permutation(layout.blocks).reshape(-1, BATCH)
    readers = [CacheReader(root, str(i)) for i, root in enumerate(roots)]
    with quiet_zarr():
        group: Any = zarr.open_group(roots[0] / GROUP, mode="r")
        arrays = [group[name] for name in layout.arrays()]
    sample = readers[0].read(order[0])
    held = [sample.head.ids, sample.head.logprobs, sample.stats.entropy, sample.stats.log_tail_mass,
            sample.stats.gold_logprob, sample.stats.log_z]  # fmt: skip
    if sample.draws is not None:
        held.append(sample.draws.ids)
    many = [[np.ascontiguousarray(a) + 0 for a in held] for _ in range(16)]
    into = [np.empty_like(a) for a in many[0]]

    def read() -> int:
        for ids in order:
            for reader in readers:
                reader.read(ids)
        return order.size * LENGTH * len(readers)

    def zarr_read() -> int:
        for ids in order[:2]:
            for block in ids:
                for array in arrays:
                    array[block]
        return 2 * BATCH * LENGTH

    def memcpy() -> int:
        for i in range(64):
            for source, target in zip(many[i % 16], into, strict=True):
                np.copyto(target, source)
        return 64 * BATCH * LENGTH

    return {"read": read, "zarr": zarr_read, "memcpy": memcpy}


def preset_rows(folder: Path) -> Iterator[dict[str, Any]]:
    vocab = len_of_tokenizer(folder / "assets")
    for name, k, draws, grid, part in PRESETS:
        notes = load(folder / "assets", k, draws)
        layout = Layout(
            len(notes.ids) // LENGTH, part, LENGTH, vocab, name.split(",")[0], k, grid, (), 1, 0,
            draws=draws,
        )  # fmt: skip
        roots = [folder / "caches" / f"{name}-{i}" for i in range(TEACHERS)]
        seconds = [write(root, layout, notes) for root in roots]
        size = sum(p.stat().st_size for p in roots[0].rglob("*") if p.is_file())
        reader = CacheReader(roots[0])
        rates = best(readings(roots, layout))
        yield {
            "name": name, "k": k, "draws": draws, "bytes_per_token": size / len(notes.ids),
            "kl": cache_divergence(notes, reader, 1.0), "kl_t2": cache_divergence(notes, reader, 2.0),
            "write_tokens_per_s": len(notes.ids) / min(seconds),
            "read_tokens_per_s": rates["read"], "zarr_python_read_tokens_per_s": rates["zarr"],
            "memcpy_tokens_per_s": rates["memcpy"],
        }  # fmt: skip


def baseline_row(baseline: Baseline, notes: HostNotes) -> dict[str, Any]:
    starts, k = range(0, len(notes.ids), LENGTH), notes.ids.shape[1]

    def encoded() -> list[bytes]:
        return [baseline.encode(notes.ids[i : i + LENGTH], notes.logprobs[i : i + LENGTH])
                for i in starts]  # fmt: skip

    blobs = encoded()
    decoded = [baseline.decode(blob, LENGTH, k) for blob in blobs]
    kl = [
        np.concatenate([
            divergence(notes, ids.astype(np.int64), logp, None, None, i, temperature)
            for i, (ids, logp) in zip(starts, decoded, strict=True)
        ]).mean()
        for temperature in (1.0, 2.0)
    ]  # fmt: skip
    rates = best({
        "write": lambda: len(encoded()) * LENGTH,
        "read": lambda: len([baseline.decode(blob, LENGTH, k) for blob in blobs]) * LENGTH,
    })  # fmt: skip
    return {
        "name": baseline.name, "k": k, "draws": 0,
        "bytes_per_token": sum(map(len, blobs)) / len(notes.ids), "kl": kl[0], "kl_t2": kl[1],
        "write_tokens_per_s": rates["write"], "read_tokens_per_s": rates["read"],
        "zarr_python_read_tokens_per_s": None, "memcpy_tokens_per_s": None,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as Markdown."""

    def cell(value: Any, form: str) -> str:
        return "–" if value is None else format(value, form)

    lines = ["| encoding | K | draws | B/token | KL | KL at T = 2 | written | read "
             "| zarr-python | memcpy |", "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        rates = [
            cell(row[f"{n}_tokens_per_s"] and row[f"{n}_tokens_per_s"] / 1e6, ".2f")
            for n in ("write", "read", "zarr_python_read", "memcpy")
        ]
        lines.append("| " + " | ".join([
            row["name"], str(row["k"]), str(row["draws"]), f"{row['bytes_per_token']:.1f}",
            cell(row["kl"], ".1e"), cell(row["kl_t2"], ".1e"), *rates,
        ]) + " |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/bench")
    notes = load(folder / "assets", 64, 0)
    print(__doc__)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    allow_open_files()  # as the command line does
    rows = [*preset_rows(folder), *(baseline_row(baseline, notes) for baseline in BASELINES)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cache.json").write_text(json.dumps(rows, indent=1))
    print(table(rows))
    print("\nrates in million tokens a second")
    shutil.rmtree(folder / "caches")


if __name__ == "__main__":
    main()
