"""Every fenced block of every README runs: commands in a sandbox, Python here, YAML as configuration.

What a block is, its fence says (readme_checks.LANGUAGES); nothing but `text` is left alone, and a
command in a block of text is a fault. Blocks of a README run in their order in one sandbox of its own.
What a `console` shows is held to what its command prints, line by line in form (readme_checks.shape).
`pipeline/api/README.md`'s Python runs in test_other_trainers.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from readme_blocks import Block, readme_blocks
from readme_checks import commands, configuration, fence_fault, unlike
from readme_sandbox import (
    TOP,
    Sandbox,
    captured_run,
    captures,
    hub_models,
    lay_out,
    warm_process,
)

ROOMS = ("pipeline", "stages", "storage", "tests")
READMES = [
    "README.md",
    *(str(path.relative_to(TOP)) for room in ROOMS for path in sorted((TOP / room).rglob("README.md"))),
]  # fmt: skip
RUN = [
    name for name in READMES
    if name != "pipeline/api/README.md"
    and {block.language for block in readme_blocks(TOP / name)} & {"sh", "console", "python"}
]  # fmt: skip


@pytest.fixture(scope="module")
def _warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, Path]]:
    """What every sandbox begins as, HOME, and where the warm process listens."""
    base = tmp_path_factory.mktemp("readmes")
    lay_out(base / "layout")
    (base / "home").mkdir()
    hub_models(base / "home", base / "layout/models/code")
    with warm_process(base / "home", base / "socket"):
        yield base / "layout", base / "home", base / "socket"


@pytest.fixture
def sandbox(_warm: tuple[Path, Path, Path], tmp_path: Path) -> Sandbox:
    layout, home, address = _warm
    root = Path(shutil.copytree(layout, tmp_path / "sandbox"))
    captured_run(root)
    return Sandbox(root, home, address)


def must(sandbox: Sandbox, script: str, where: str) -> str:
    """Runs a script that has to end with 0; returns what it printed."""
    done = sandbox.run(script)
    assert done.code == 0, f"{where}: exit code {done.code} of\n{script}\n{done.output}"
    return done.output


def in_pipeline(sandbox: Sandbox) -> None:
    """What its README takes for done: caches, and what others have captured over the same text."""
    must(
        sandbox,
        "scholiast cache-teachers pipeline/configs/demo.yaml --quiet\n"
        "rm -r runs/demo/assets/models/bible  # so that doctor finds something to say\n"
        "mkdir runs/mine && cp -r runs/demo/corpus runs/demo/cache runs/mine  # the same text\n"
        "scholiast export-cache my.yaml exported-json --format topk-jsonl --teacher generalist\n",
        "before pipeline/README.md",
    )
    captures(sandbox.root)


BEFORE: dict[str, Callable[[Sandbox], None]] = {"pipeline/README.md": in_pipeline}
"""What is done in a sandbox before the blocks of a README, beyond `lay_out`."""


def run_console(sandbox: Sandbox, block: Block, where: str) -> None:
    """Runs each command of a console and compares what is shown with what it prints."""
    for command, shown in commands(block.text):
        printed = must(sandbox, command, where)
        words = shlex.split(command, comments=True)
        if "generate" in words:  # what a student writes: only the prompt is given
            prompt = words[words.index("-p") + 1]
            assert prompt in shown and prompt in printed, f"{where}: {printed}"
            continue
        missed = unlike(shown, printed)
        assert missed is None, f"{where}: nothing like {missed!r} is printed by {command}{printed}"


def run_block(sandbox: Sandbox, block: Block, names: dict[str, Any]) -> None:
    where = f"{block.path.relative_to(TOP)}:{block.line}"
    if block.language == "sh":
        must(sandbox, block.text, where)
    elif block.language == "console":
        run_console(sandbox, block, where)
    elif block.language == "python":
        block.run(names)


def test_the_readmes_are_found() -> None:
    assert {"README.md", "storage/README.md", "stages/README.md", "pipeline/README.md",
            "pipeline/launch/README.md", "pipeline/api/README.md"} <= set(READMES)  # fmt: skip
    assert {"README.md", "pipeline/README.md", "pipeline/launch/README.md"} <= set(RUN)


@pytest.mark.parametrize("name", READMES)
def test_every_fence_says_what_it_is(name: str) -> None:
    faults = [fault for block in readme_blocks(TOP / name) if (fault := fence_fault(block))]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", READMES)
def test_data_are_what_they_say(name: str) -> None:
    for block in readme_blocks(TOP / name, "yaml"):
        configuration(block.text)
    for block in readme_blocks(TOP / name, "json"):
        json.loads(block.text)


@pytest.mark.parametrize("name", RUN)
def test_every_block_runs(
    name: str, sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sandbox.root)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    BEFORE.get(name, lambda _: None)(sandbox)
    names: dict[str, Any] = {"__name__": "readme"}
    for block in readme_blocks(TOP / name):
        run_block(sandbox, block, names)
