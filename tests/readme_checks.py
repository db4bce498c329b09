"""What a fenced block of a README must be: its language, its YAML, and what its console shows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml
from readme_blocks import Block

from pipeline.config import RunConfig, validated

LANGUAGES: Final = ("sh", "console", "yaml", "python", "json", "text")
"""`sh`: commands; `console`: commands after "$ ", with what they print; `text` alone is not run."""

_COMMAND = re.compile(
    r"^\s*(\$ |\.venv/bin/|python3? -[mc] |(scholiast|make|torchrun|srun|sbatch|pip3?|apptainer|docker|"
    r"kubectl|lm-eval|hf|git|mkdir|cd|export) \S)"
)

_BASE: Final[dict[str, Any]] = {
    "run_dir": "runs/base",
    "corpus": {"tokenizer": "models/a", "sources": [
        {"domain": "docs", "format": "jsonl", "path": "data/docs.jsonl", "heldout": 0.1}]},
    "teachers": {"large": {"model": "models/a"}, "code": {"model": "models/code"}},
    "student": {"model": "models/a"},
}  # fmt: skip
"""What a block of YAML that is a piece of a configuration is laid over."""


def fence_fault(block: Block) -> str | None:
    """Returns what is wrong with a fence: no language, an unknown one, or commands called text."""
    where = f"{block.path}:{block.line - 1}"
    if block.language not in LANGUAGES:
        return f"{where}: language {block.language!r} is none of {', '.join(LANGUAGES)}"
    commands = [line for line in block.text.splitlines() if _COMMAND.match(line)]
    if block.language == "text" and commands:
        return f"{where}: {commands[0]!r} is a command: call the block sh or console"
    return None


def configuration(text: str) -> RunConfig:
    """Returns what a block of YAML says: a whole configuration as it is, a piece of one over _BASE.

    Raises:
        ConfigError: it is not one.
    """
    piece: Mapping[str, Any] = yaml.safe_load(text)
    required = [name for name, one in RunConfig.model_fields.items() if one.is_required()]
    if all(name in piece for name in required):
        return validated(piece, Path("block"))
    whole: dict[str, Any] = dict(_BASE)
    for section, value in piece.items():
        whole[section] = {**_BASE.get(section, {}), **value} if isinstance(value, dict) else value
    return validated({"train": {"steps": 1}, **whole}, Path("block"))


def commands(text: str) -> list[tuple[str, str]]:
    """Returns a console's (command, output) pairs; a command goes on after a final backslash.

    Raises:
        ValueError: it begins with something else than a command.
    """
    found: list[tuple[str, str]] = []
    lines = iter(text.splitlines(keepends=True))
    for line in lines:
        if line.startswith("$ "):
            command = line[2:]
            while command.rstrip("\n").endswith("\\"):
                command += next(lines)
            found.append((command, ""))
        elif found:
            found[-1] = (found[-1][0], found[-1][1] + line)
        else:
            raise ValueError(f"a console begins with a command, not with {line!r}")
    return found


_NUMBER = (
    r"(?:[-−+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?: ?(?:%|B|kB|MB|GB|TB|ms|s|min|h|d))?(?![A-Za-z])"
    r"|–(?=\s|$)|nan|inf)"
)
_QUOTED = r"""(?<![\w])(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")(?!\w)"""
_PATH = r"(?!\w+/s\b)[^\s,()]*\w/[^\s,()]*"  # not a rate
_PIECE = re.compile(
    rf"(?P<quoted>{_QUOTED})|(?P<path>{_PATH})|(?P<number>(?<![A-Za-z]){_NUMBER})|(?P<space>\s+)|."
)
_WILD: Final = {"quoted": _QUOTED, "path": _PATH, "number": _NUMBER, "space": r"\s+"}
_FREE_WORDS, _WORDS_OF_A_SENTENCE = 3, 9


def shape(line: str) -> re.Pattern[str]:
    """Returns what a printed line must match to be of the same form as the one shown.

    Words, signs and their order are kept. Any number (with its unit), quoted text, path and width of
    a gap stands for any other. Of a sentence (nine words or more up to a full stop, without columns)
    only the first three words count: which one a command says depends on its figures.
    """
    words = line.split()
    if len(words) >= _WORDS_OF_A_SENTENCE and line.endswith(".") and "  " not in line.strip():
        return re.compile(r"\s*" + r"\s+".join(map(re.escape, words[:_FREE_WORDS])) + r"\s.*")
    pieces = _PIECE.finditer(line.strip())
    text = "".join(_WILD[one.lastgroup] if one.lastgroup else re.escape(one[0]) for one in pieces)
    return re.compile(rf"\s*{text}\s*")


def unlike(shown: str, printed: str) -> str | None:
    """Returns the first line that is shown and has no printed one of its shape, None if all have.

    The lines must be met in their order; others may be printed between them, so that a README may
    leave some out.
    """
    real = iter(printed.splitlines())
    for line in filter(str.strip, shown.splitlines()):
        wanted = shape(line)
        if not any(wanted.fullmatch(one) for one in real):
            return line
    return None
