"""The command line as a whole: same options everywhere, light help, exit codes, completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from conftest import Lab

from pipeline.cli import main
from pipeline.commands.group import EXIT_CODES
from pipeline.error_catalogue import classes
from storage import errors

TOP = Path(__file__).resolve().parents[2]
TEXT_ONLY = {"completion"}  # a script for a shell
READERS = {"doctor", "plan", "status", "generate", "verify", "inspect"}  # and write nothing


def commands(group: click.Group = main, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


ALL = dict(commands())


def options(command: click.Command) -> set[str]:
    return {name for one in command.params for name in one.opts if isinstance(one, click.Option)}


def test_every_command_takes_the_same_options() -> None:
    for name, command in ALL.items():
        if name in TEXT_ONLY:
            continue
        assert {"--set", "--quiet", "-q", "--debug", "--json"} <= options(command), name
        assert ("--dry-run" in options(command)) == (name not in READERS), name


def test_every_option_is_described_and_means_one_thing() -> None:
    kinds: dict[str, set[str]] = {}
    for name, command in ALL.items():
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.help, f"{name} {option.opts[0]}"
                kind = option.type.name.removesuffix(" range")
                kinds.setdefault(option.opts[0], set()).add(kind)
    assert not {name: found for name, found in kinds.items() if len(found) > 1}


def test_help_of_every_command_loads_nothing_heavy() -> None:
    """What makes --help quick: a process that has shown all of it has none of these."""
    heavy = ["torch", "transformers", "datasets", "pyarrow", "zarr", "numpy", "pydantic", "matplotlib",
             "huggingface_hub", "rich", "jinja2", "yaml"]  # fmt: skip
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom pipeline.cli import main\n"
        f"for name in {list(ALL)}:\n"
        "    shown = CliRunner().invoke(main, [*name.split(), '--help'])\n"
        "    assert shown.exit_code == 0 and 'Usage: ' in shown.output, name\n"
        f"print([one for one in {heavy} if one in sys.modules])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "[]"


def test_exit_codes_are_documented() -> None:
    codes = {0, 130, *(kind.exit_code for kind in classes())}
    assert codes == set(EXIT_CODES)
    text = (TOP / "pipeline/README.md").read_text()
    shown = main.get_help(click.Context(main, info_name="scholiast"))
    for code, meaning in EXIT_CODES.items():
        assert f"  {code:<4} {meaning}" in shown
        assert f"| {code} | {meaning} |" in text


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (None, 0), (ValueError("x"), 1), (OSError("x"), 1), (errors.CorruptShard("x"), 1),
        (errors.ConfigError("x"), 2), (click.UsageError("x"), 2), (errors.Stopped("x"), 75),
        (errors.OtherRank(1, "x", 75), 75), (KeyboardInterrupt(), 130),
    ],
)  # fmt: skip
def test_how_a_command_ends_is_its_exit_code(
    raised: BaseException | None, code: int, lab: Lab, cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def read_status(work: object) -> list[Any]:
        if raised is not None:
            raise raised
        return []

    monkeypatch.setattr("pipeline.status.read_status", read_status)
    ended = cli("status", lab.write(), "--json")
    assert ended.exit_code == code and "Traceback" not in ended.output
    if raised is None:
        assert json.loads(ended.output) == []


def test_wrong_usage_is_two(cli: Callable[..., Any], tmp_path: Path) -> None:
    for words in (["plan"], ["plan", "x.yaml", "--no-such"], ["no-such"], ["completion", "tcsh"],
                  ["plan", tmp_path / "none.yaml"]):  # fmt: skip
        assert cli(*words).exit_code == 2


@pytest.mark.parametrize(("typed", "meant"), [
    ("train", "'train-student'"), ("trian-student", "'train-student'"),
    ("Cache_Teachers", "'cache-teachers'"), ("cache", "'cache-teachers' or 'export-cache'"),
    ("teachers", "'cache-teachers'"), ("eval", "'evaluate'"), ("reprot", "'report'"),
    ("launch slrum", "'slurm'"),
])  # fmt: skip
def test_a_mistyped_or_shortened_command_gets_a_hint(
    typed: str, meant: str, cli: Callable[..., Any]
) -> None:
    ended = cli(*typed.split(), "my.yaml")
    word = typed.split()[-1]
    assert ended.exit_code == 2
    assert f"Error: No such command {word!r}. Did you mean {meant}" in ended.output


def test_a_command_like_none_gets_no_hint(cli: Callable[..., Any]) -> None:
    for typed in ("zzz", "--no-such", ""):
        ended = cli(typed, "my.yaml")
        assert ended.exit_code == 2 and "Did you mean" not in ended.output


def completed(line: str, folder: Path) -> list[str]:
    """Returns what a shell is offered for the last word of a line."""
    words = line.split(" ")
    environment = {
        **os.environ, "_SCHOLIAST_COMPLETE": "bash_complete", "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1), "PYTHONPATH": str(TOP),
    }  # fmt: skip
    call = "import sys; sys.argv = ['scholiast']; from pipeline.cli import main; main()"
    shown = subprocess.run(
        [sys.executable, "-c", call], cwd=folder, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    return [word.split(",", 1)[1] for word in shown.stdout.split()]


def test_a_shell_completes_commands_configurations_and_names(lab: Lab) -> None:
    lab.write("mine.yaml", train__baseline=True, run_dir="run")
    (lab.root / "run/students/other/model").mkdir(parents=True)
    (lab.root / "deep/er").mkdir(parents=True)
    (lab.root / "deep/er/one.yml").write_text("{}")
    assert completed("scholiast tra", lab.root) == ["train-student"]
    assert completed("scholiast launch ", lab.root) == ["kubernetes", "local", "slurm"]
    assert completed("scholiast plan mi", lab.root) == ["mine.yaml"]
    assert completed("scholiast plan de", lab.root) == ["deep/er/one.yml"]
    assert completed("scholiast cache-teachers mine.yaml --teacher ", lab.root) == ["one", "two"]
    assert completed("scholiast generate mine.yaml --student o", lab.root) == ["other"]
    assert completed("scholiast export mine.yaml x --student ", lab.root) == [
        "cross_entropy", "fused", "other",
    ]  # fmt: skip
    assert "--dry-run" in completed("scholiast prepare mine.yaml --d", lab.root)


@pytest.mark.parametrize(("shell", "mark"), [
    ("bash", "complete -o nosort -F"), ("zsh", "#compdef scholiast"), ("fish", "complete --no-files"),
])  # fmt: skip
def test_the_scripts_for_shells(shell: str, mark: str, cli: Callable[..., Any]) -> None:
    shown = cli("completion", shell)
    assert shown.exit_code == 0 and mark in shown.output
    assert f"_SCHOLIAST_COMPLETE={shell}_complete" in shown.output
