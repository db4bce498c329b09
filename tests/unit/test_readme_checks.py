"""The checks of READMEs' blocks can fail."""

from __future__ import annotations

from pathlib import Path

import pytest
from readme_blocks import Block
from readme_checks import commands, configuration, fence_fault, unlike

from storage.errors import ConfigError

TABLE = """\
row  reads     teacher   entropy  candidates
7    'Return'  general      1.76  ' the' 0.656  "'" 0.115
step 3: 12.5 MB in runs/demo/cache, 1,024 tokens/s
model          6.0e6  –
"""


def fence(language: str, text: str) -> str | None:
    return fence_fault(Block(language, (), text, Path("README.md"), 5))


def test_a_fence_needs_a_language_and_text_holds_no_commands() -> None:
    assert fence("text", "corpus ─ prepare ─▶ blocks\n  make of it what you like\n") is not None
    assert fence("text", "corpus ─ prepare ─▶ blocks\nthe scholiast writes\n") is None
    for language in ("", "bash", "ini"):
        assert "README.md:4" in (fence(language, "x") or "")
    for line in ("scholiast plan x", "make test", "$ ls", ".venv/bin/python x", "torchrun -m x",
                 "srun x", "sbatch x", "  pip install .", "python -m pytest"):  # fmt: skip
        assert line.strip() in (fence("text", f"a line\n{line}\n") or ""), line
        assert fence("sh", line) is None


def test_a_console_is_commands_and_what_they_print() -> None:
    found = commands("$ one \\\n    more\nout\n\nput\n$ two\n")
    assert found == [("one \\\n    more\n", "out\n\nput\n"), ("two\n", "")]
    with pytest.raises(ValueError, match="begins with a command"):
        commands("out\n$ one\n")


def test_figures_paths_and_quoted_text_may_differ() -> None:
    assert unlike(TABLE, TABLE) is None
    printed = """\
what a README may leave out
row  reads   teacher   entropy  candidates
12   "it's"  general     –0  'x' 1
row  reads   teacher   entropy  candidates
0    "it's"  general     12.25  'x' 1  '漢' 2e-3
step 12: 1 kB in /tmp/x/cache, 9 tokens/s
model          nan  -1.5
"""
    assert unlike(TABLE, printed) is None
    sentence = "The student taught by the fused teachers beats the other by 42.5 per cent."
    assert unlike(sentence, "The student taught does not.") is None
    assert unlike(sentence, "The pupil taught does not.") == sentence


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("entropy", "entropies"),  # a header
        ("general      1.76", "teacher      1.76"),  # a name
        ("' the' 0.656", "the 0.656"),  # quotes
        ("1.76  ' the'", "' the'"),  # a column
        (", 1,024 tokens/s", ", 1,024 token/s"),
        ("step 3:", "step 3"),
    ],
)
def test_another_form_is_missed(shown: str, printed: str) -> None:
    assert shown in TABLE
    line = next(one for one in TABLE.splitlines() if shown in one)
    assert unlike(TABLE, TABLE.replace(shown, printed)) == line


def test_lines_are_met_in_their_order() -> None:
    assert unlike("one\ntwo\n", "two\none\n") == "two"


def test_a_piece_of_a_configuration_is_one_and_a_wrong_key_is_none() -> None:
    assert configuration("train: {epochs: 2}").train.epochs == 2
    assert configuration("corpus: {block_length: 64}").corpus.block_length == 64
    with pytest.raises(ConfigError, match="blocklength"):
        configuration("corpus: {blocklength: 64}")
    whole = "{run_dir: x, corpus: {}, teachers: {}, student: {}, train: {}}"
    with pytest.raises(ConfigError):  # nothing is laid under it
        configuration(whole)
