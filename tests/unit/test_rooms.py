"""The house rules a machine can hold: the direction of imports, and a light start."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
FLOOR = {"storage": 0, "stages": 1, "pipeline": 2}
FILES = sorted(path for room in FLOOR for path in (TOP / room).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level names of everything a file imports, wherever the import stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(TOP)))
def test_imports_go_one_way(path: Path) -> None:
    room = path.relative_to(TOP).parts[0]
    upwards = {name for name in imported(path) if FLOOR.get(name, 0) > FLOOR[room]}
    assert not upwards, f"{room} imports {upwards}"


def test_storage_never_imports_torch() -> None:
    heavy = {"torch", "transformers", "datasets"}
    for path in FILES:
        if path.relative_to(TOP).parts[0] == "storage":
            assert not imported(path) & heavy, path


def test_top_level_is_as_it_should_be() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=TOP, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    folders = {name.split("/")[0] for name in listed if "/" in name}
    assert folders == {"pipeline", "stages", "storage", "tests", ".ci"}
    assert {name for name in listed if "/" not in name} == {
        "pyproject.toml", "README.md", "LICENSE", "Makefile", "constraints.txt", ".gitignore",
    }  # fmt: skip


@pytest.mark.parametrize("module", ["pipeline.cli", "pipeline.demo"])
def test_start_up_is_light(module: str) -> None:
    """What makes --help and a second run quick: nothing heavy is imported before it is needed."""
    heavy = ["torch", "transformers", "datasets", "zarr", "pyarrow", "matplotlib", "pydantic"]
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "[]"


def test_completeness_is_told_without_torch() -> None:
    code = (
        "import sys, pipeline.workspace, pipeline.status, stages.teacher_jobs, stages.corpus_identity;"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "[]"
