"""What the READMEs say about code that can be asked."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import zarr

from pipeline.cli import main
from pipeline.reference import rows, table
from storage.codec import PRESETS
from storage.layout import GROUP, POOLINGS, Layout, create_group
from storage.orders import learn_orders

TOP = Path(__file__).resolve().parents[2]


def test_configuration_reference_is_current_and_complete() -> None:
    assert table() in (TOP / "pipeline/README.md").read_text(), (
        "run `python -m pipeline.reference` and put its table into pipeline/README.md"
    )
    assert not [key for key, _, _, meaning in rows() if not meaning]


def test_every_command_is_described_with_an_example() -> None:
    text = (TOP / "pipeline/README.md").read_text()
    for name, command in main.commands.items():
        for inner, one in getattr(command, "commands", {}).items():
            assert f"`scholiast {name} {inner} CONFIG" in text
            assert f"Example: scholiast {name} {inner} " in (one.help or "")
        if hasattr(command, "commands"):
            continue
        assert any(
            f"`scholiast {name} {what}" in text
            for what in ("CONFIG", "CACHE", "RUN", "[CONFIG]", "[FILE]", "SHELL")
        )
        assert f"Example: scholiast {name} " in (command.help or "")


def test_every_stored_array_and_layout_field_is_in_the_format(tmp_path: Path) -> None:
    text = (TOP / "storage/README.md").read_text()
    for preset in PRESETS:
        layout = Layout(1, 1, 8, 100, preset, 4, (2.0,), (3,), 1, 4, draws=2, top_p=0.9,
                        pooling=POOLINGS)  # fmt: skip
        path = tmp_path / preset / GROUP
        create_group(path, layout, learn_orders(np.zeros((0, 4), np.int64), 100))
        for name in zarr.open_group(path, mode="r").array_keys():
            assert f"| `{name.replace('_3', '_<l>')}` |" in text
        for field in fields(layout):
            assert f"`{field.name}`" in text


def test_every_file_of_a_room_is_in_its_readme() -> None:
    rooms = [
        TOP / "storage",
        TOP / "stages",
        *(p.parent for p in TOP.glob("pipeline/**/__init__.py")),
    ]
    assert len(rooms) > 5
    for room in rooms:
        own = room / "README.md"
        text = (own if own.exists() else TOP / "pipeline/README.md").read_text()
        for path in room.glob("*.py"):
            assert path.name == "__init__.py" or f"`{path.name}`" in text, path
