"""What `pip install .` and `pip install -e .` install: every package, and `scholiast` by that name."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
ROOMS = ("pipeline", "stages", "storage")
PUBLIC = "pipeline/api/public/"
BUILD = (
    "import sys; from setuptools import build_meta as build; wheel, editable = sys.argv[1:];"
    "build.build_wheel(wheel); build.build_editable(editable)"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tree`, a copy of this one, and what was built of it: `wheel`, `editable`."""
    root = tmp_path_factory.mktemp("wheel")
    for room in ROOMS:
        shutil.copytree(
            TOP / room, root / "tree" / room, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(TOP / name, root / "tree")
    command = [sys.executable, "-c", BUILD, str(root / "wheel"), str(root / "editable")]
    subprocess.run(command, cwd=root / "tree", check=True, capture_output=True)
    for kind in ("wheel", "editable"):
        [wheel] = (root / kind).glob("*.whl")
        zipfile.ZipFile(wheel).extractall(root / kind)
    return root


def test_the_wheel_holds_every_file_once(built: Path) -> None:
    rooms = [built / "tree" / room for room in ROOMS]
    ours = {str(p.relative_to(built / "tree")) for room in rooms for p in room.rglob("*.py")}
    expected = {name.removeprefix(PUBLIC) for name in ours}
    assert "scholiast/__init__.py" in expected and "pipeline/api/cache.py" in expected
    found = {str(p.relative_to(built / "wheel")) for p in (built / "wheel").rglob("*.py")}
    assert found == expected
    data = tomllib.loads((TOP / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    shipped = {
        path.relative_to(built / "tree")
        for pattern in data["pipeline"] for path in (built / "tree/pipeline").glob(pattern)
    }  # fmt: skip
    assert len(shipped) > 8 and all((built / "wheel" / path).is_file() for path in shipped)


@pytest.mark.parametrize(("kind", "home"), [("wheel", "wheel"), ("editable", f"tree/{PUBLIC}")])
def test_the_name_is_installed(built: Path, kind: str, home: str) -> None:
    """Without any other package at hand: -S leaves out this environment's own."""
    code = (
        f"import site; site.addsitedir({str(built / kind)!r}); import scholiast, storage.errors;"
        "print(scholiast.__file__, scholiast.ScholiastError is storage.errors.ScholiastError)"
    )
    shown = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], check=True, capture_output=True, text=True
    )
    assert shown.stdout.split() == [str(built / home / "scholiast/__init__.py"), "True"]
