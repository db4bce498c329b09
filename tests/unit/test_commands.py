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
from pipeline.commands.setting_keys import offered
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


def completed(line: str, folder: Path, shell: str = "zsh") -> list[str]:
    """Returns what a shell is offered for the last word of a line."""
    words = (
        line.replace("=", " = ").removesuffix(" ") if shell == "bash" else line
    )  # as it cuts them
    count = len(words.split(" ")) - 1
    environment = {
        **os.environ, "_SCHOLIAST_COMPLETE": f"{shell}_complete", "COMP_WORDS": words,
        "COMP_CWORD": words.split(" ")[-1] if shell == "fish" else str(count), "PYTHONPATH": str(TOP),
    }  # fmt: skip
    call = "import sys; sys.argv = ['scholiast']; from pipeline.cli import main; main()"
    shown = subprocess.run(
        [sys.executable, "-c", call], cwd=folder, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if shell == "zsh":  # a line each of type, value, description
        return shown.stdout.splitlines()[1::3]
    told = [line.split(",", 1)[1] for line in shown.stdout.splitlines() if line]
    return [one.split("\t")[0] for one in told]  # fish has the meaning behind it


def test_a_shell_completes_commands_configurations_and_names(lab: Lab) -> None:
    lab.write("mine.yaml", train__baseline=True, run_dir="run")
    (lab.root / "run/students/other/model").mkdir(parents=True)
    (lab.root / "deep/er").mkdir(parents=True)
    (lab.root / "deep/er/one.yml").write_text("{}")
    assert completed("scholiast tra", lab.root) == ["train-student"]
    assert completed("scholiast launch ", lab.root) == ["kubernetes", "local", "slurm"]
    assert completed("scholiast plan mi", lab.root) == ["mine.yaml"]
    assert completed("scholiast doctor mi", lab.root) == ["mine.yaml"]
    assert completed("scholiast plan de", lab.root) == ["deep/er/one.yml"]
    assert completed("scholiast cache-teachers mine.yaml --teacher ", lab.root) == ["one", "two"]
    assert completed("scholiast generate mine.yaml --student o", lab.root) == ["other"]
    assert completed("scholiast export mine.yaml x --student ", lab.root) == [
        "cross_entropy", "fused", "other",
    ]  # fmt: skip
    assert "--dry-run" in completed("scholiast prepare mine.yaml --d", lab.root)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_what_follows_set(shell: str, lab: Lab) -> None:
    lab.write("mine.yaml", run_dir="run")

    def offered(typed: str) -> list[str]:
        return completed(f"scholiast plan mine.yaml {typed}", lab.root, shell)

    before = {"bash": "", "zsh": "train.precision=", "fish": "train.precision="}[shell]
    option = {"bash": "", "zsh": "--set=", "fish": "--set="}[shell]
    assert offered("--set tra") == ["train."]
    assert offered("--set train.pre") == ["train.precision="]
    assert offered("--set teachers.") == ["teachers.one.", "teachers.two."]
    assert offered("--set train.precision=") == [f"{before}{w}" for w in ("auto", "bf16", "fp32")]
    assert offered("--set train.lr=1 --set train.precision=b") == [f"{before}bf16"]
    assert offered("--set=train.precision=b") == [f"{option}{before}bf16"]
    assert offered("--set train.lr=1 --qui") == ["--quiet"]
    assert offered("--set train.lr=") == []


def test_every_key_is_offered_after_set() -> None:
    """Walks from section to section, as a user does, and finds what the reference lists."""
    from pipeline.reference import rows

    configs = [{"teachers": {"NAME": {}}}]
    found, sections = set[str](), [""]
    while sections:
        for one in offered(sections.pop(), configs):
            if one.endswith("."):
                sections.append(one)
            else:
                found.add(one.removesuffix("="))
    listed = {key for key, *_ in rows()}
    assert len(listed) > 100 and listed - {"fusion.static", "fusion.prior"} <= found
    assert {"fusion.static.NAME", "teachers.NAME.dtype", "corpus.sources.0.path"} <= found


def test_values_and_items_are_offered_after_set() -> None:
    configs = [{"corpus": {"sources": [{}, {}]}}, "not a mapping", {"teachers": [1]}]
    assert offered("train.baseline=", configs) == ["train.baseline=true", "train.baseline=false"]
    assert offered("loss.features.pairs=", configs) == ["loss.features.pairs=auto"]
    assert offered("assets=demo-", configs) == ["assets=demo-large"]
    assert offered("corpus.sources.", configs) == ["corpus.sources.0.", "corpus.sources.1."]
    for none in (
        "teachers.",
        "train.lr=",
        "no.such.key",
        "no.such=",
        "train.lr.",
        "=",
        "..",
        "run=",
    ):
        assert offered(none, configs) == []


def test_completing_a_setting_loads_no_models(lab: Lab) -> None:
    lab.write("mine.yaml")
    code = (
        "import os, sys\nsys.argv = ['scholiast']\nfrom pipeline.cli import main\n"
        "try:\n    main()\nfinally:\n"
        "    print([one for one in ('torch', 'pydantic', 'numpy') if one in sys.modules])"
    )
    environment = {
        **os.environ, "_SCHOLIAST_COMPLETE": "bash_complete", "COMP_CWORD": "4",
        "COMP_WORDS": "scholiast plan mine.yaml --set teachers.", "PYTHONPATH": str(TOP),
    }  # fmt: skip
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=lab.root, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert shown.stdout.split() == ["plain,teachers.one.", "plain,teachers.two.", "[]"]


def test_bash_sets_no_space_behind_what_goes_on(lab: Lab) -> None:
    """The script itself in a bash, the function called as readline would."""
    lab.write("mine.yaml")
    program = lab.root / "bin/scholiast"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom pipeline.cli import main\nmain()\n")
    program.chmod(0o755)
    script = """
        source <(scholiast completion bash)
        compopt() { echo "$1 $2"; }
        COMP_WORDS=(scholiast plan mine.yaml --set "$1"); COMP_CWORD=4
        _scholiast_completion scholiast; echo "${COMPREPLY[*]}"
    """
    path = f"{program.parent}:{os.environ['PATH']}"

    def replies(word: str) -> list[str]:
        shown = subprocess.run(
            ["bash", "-c", script, "bash", word], cwd=lab.root, capture_output=True, text=True,
            check=True, env={**os.environ, "PYTHONPATH": str(TOP), "PATH": path},
        )  # fmt: skip
        return shown.stdout.splitlines()

    assert replies("train.pre") == ["-o nospace", "train.precision="]
    assert replies("tra") == ["-o nospace", "train."]
    assert replies("train.none") == [""]


@pytest.mark.parametrize(("shell", "mark"), [
    ("bash", "complete -o nosort -F"), ("zsh", "#compdef scholiast"), ("fish", "complete --no-files"),
])  # fmt: skip
def test_the_scripts_for_shells(shell: str, mark: str, cli: Callable[..., Any]) -> None:
    shown = cli("completion", shell)
    assert shown.exit_code == 0 and mark in shown.output
    assert f"_SCHOLIAST_COMPLETE={shell}_complete" in shown.output
