"""Decoding by torch, from packed integers, against the CPU path: the same bits."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_reader import IDENTITY, LAYOUT, random_part, scored_rows, some_orders

from stages.decode import DeviceDecoder
from stages.fusion import NoteRows, rows_of
from storage.codec import PRESETS
from storage.reader import CacheReader
from storage.tables import load_orders
from storage.writer import CacheWriter

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize(
    "changes",
    [{}, {"draws": 0}, {"top_p": 0.9}, {"temperatures": ()}, {"temperatures": (0.5, 2.0)},
     {"vocab_size": 200, "draws": 3}],
    ids=str,
)  # fmt: skip
def test_same_bits(tmp_path: Path, preset: str, changes: dict[str, object], device: str) -> None:
    layout = replace(LAYOUT, preset=preset, **changes)  # type: ignore[arg-type]
    writer = CacheWriter(tmp_path, IDENTITY, layout, lambda: some_orders(layout))
    writer.write_part(0, random_part(layout, 0, writer.orders))
    reader, ids = CacheReader(tmp_path), np.array([2, 0])
    scored = scored_rows(layout, 0)[ids]
    decoder = DeviceDecoder(layout, load_orders(tmp_path, layout), torch.device(device))
    packed = {name: torch.from_numpy(a).to(device) for name, a in reader.packed(ids).items()}
    found = decoder.rows(packed, torch.from_numpy(scored).to(device))
    plain = rows_of(reader.read(ids), scored)
    for field in fields(NoteRows):
        a, b = getattr(plain, field.name), getattr(found, field.name)
        assert (a is None) == (b is None), field.name
        if a is not None:
            assert a.dtype == b.dtype and torch.equal(a, b.cpu()), field.name
