"""Text from someone else: configurations, and what reaches a terminal or a report."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import console, terminal
from pipeline.config import load_config
from pipeline.reporting.page import render
from pipeline.reporting.report_tables import trusted
from pipeline.status_text import show_status
from pipeline.terminal import for_output, harmless
from pipeline.yaml_text import load_yaml
from storage.errors import ConfigError

Cli = Callable[..., Any]
ESCAPES = "\x1b]0;title\x07\x1b[2J\x9b31m\x08\u202e\u2066\u2028"
ACTED_ON = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff]"
)
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (LAUGHS, "more than 100,000 values"),
        ("a: &a [*a]", "holds itself"),
        ("a: &a {b: {c: *a}}", "holds itself"),
        ("[" * 1200, "nested too deeply"),
        ("x" * (1 << 21), "more than"),
        ("a: !!python/object/apply:os.system [id]", "tag"),
        ("a: !!python/name:os.system", "tag"),
        ("a: !env HOME", "tag"),
        ("a: 2001-99-99", "month"),
        (f"a: {'1' * 5000}", "digits"),
        ("a: !!bool maybe", "maybe"),
        ("a: !!int ''", "index"),
        ("a: \x00", "characters"),
    ],
)  # fmt: skip
def test_yaml_that_is_more_than_values(tmp_path: Path, text: str, told: str) -> None:
    begun = time.monotonic()
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="not YAML") as error:
        load_config(path)
    assert told in str(error.value) and time.monotonic() - begun < 10
    with pytest.raises(ConfigError, match="override"):
        load_config(_sound(tmp_path), [f"teachers.a={text}"])


def _sound(folder: Path) -> Path:
    path = folder / "sound.yaml"
    path.write_text("run_dir: r\nteachers: {}\n")
    return path


def test_aliases_within_reason_are_yaml() -> None:
    assert load_yaml("a: &x {b: 1}\nc: {<<: *x, d: 2}\ne: [*x, *x]") == {
        "a": {"b": 1}, "c": {"b": 1, "d": 2}, "e": [{"b": 1}, {"b": 1}],
    }  # fmt: skip


def test_what_a_terminal_would_act_on_is_shown() -> None:
    shown = harmless(f"naïve 漢字 🍵 a\u00a0b{ESCAPES}\r\n\tend\ud800")
    assert not ACTED_ON.search(shown.replace("\n", "").replace("\t", ""))
    assert shown.startswith("naïve 漢字 🍵 a\u00a0b\\x1b]0;title\\x07") and "\n\tend" in shown


def test_generated_text_is_itself_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for here in (True, False):
        monkeypatch.setattr(terminal.sys, "stdout", SimpleNamespace(isatty=lambda here=here: here))
        assert (ESCAPES in for_output(f"a{ESCAPES}")) is not here


def test_nothing_printed_moves_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Tables, lines of progress, ends of failed tasks' logs."""
    shown = console.Console()
    shown.table([f"head{ESCAPES}"], [[f"cell{ESCAPES}[bold]x[/bold]"]])
    shown.start(f"label{ESCAPES}", 3, "part")
    shown.say(f"said{ESCAPES}")
    ended = {"step": "train", "task": f"7{ESCAPES}", "code": 1, "reason": f"why{ESCAPES}", "todo": "t",
             "log": f"log{ESCAPES}", "tail": (f"tail{ESCAPES}",)}  # fmt: skip
    row = {"step": "train", "state": "partial", "done": 1, "total": 2, "failed_tasks": [ended]}
    show_status(shown, [row])
    out, err = capsys.readouterr()
    assert not ACTED_ON.search(out) and not ACTED_ON.search(err)
    assert all(word in out for word in ("cell", "why", "tail", "[bold]x")) and "said" in err


def test_an_error_says_names_and_does_nothing_else(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text('"a\\e]0;x\\a\\e[2J": 1\n')
    result = cli("plan", path)
    assert result.exit_code == 2 and not ACTED_ON.search(result.output)
    assert "\\x1b]0;x" in result.output


def test_fingerprints_and_names_are_no_markdown() -> None:
    """Of a tampered evaluation: a backtick would end the code, a pipe a cell."""
    view = {
        "run": {
            "name": "a|b<img>", "device": "cpu", "threads": 1, "samples": [], "cache": {},
            "corpus": {"tokens": 1, "blocks": 1, "block_length": 1, "vocab_size": 1}, "versions": {},
            "fingerprints": {"corpus": "x`<script>`\n# y", "caches": {"t`<b>": "`<i>"}},
        },
        "created": "", "summary": {"verdict": "<b>", "rows": [], "note": ""}, "distillation": "",
        "rows": 0, "metrics": {}, "overall": {"rows": []}, "generation": {}, "weights": {"rows": []},
        "writers": {},
        "stages": {"headers": [], "rows": []}, "sources": {"headers": [], "rows": []}, "config": "`",
        "trusted": "teacher <x>",
    }  # fmt: skip
    text = render("report.md.j2", view)
    assert "- corpus `x'<script>' # y`\n" in text and "\n# y" not in text
    outside_code = re.sub(r"`[^`\n]*`", "", re.sub(r"\\.", "", text))
    assert "<" not in outside_code
    assert "- code of models that was run: teacher &lt;x>" in text.replace("\\>", ">")


def test_the_report_tells_whose_code_was_run() -> None:
    config = {
        "teachers": {"a": {"trust_remote_code": True}, "b": {}},
        "student": {"trust_remote_code": True},
    }
    assert trusted({"config": config}) == "teacher a, student"
    assert trusted({"config": {"teachers": {"b": {"trust_remote_code": False}}}}) == ""
