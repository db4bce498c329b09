"""A folder in which the commands of a README run: its names are there, tiny; its programs come first.

Everything is small and random (conftest's models), but laid out as the READMEs call it: `models/NAME`,
`data/*.jsonl`, `notes.txt`, the demonstration's configuration and assets, captures of other tools.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml
from capture_files import documents, topk_lines, vllm_lines, write_distillkit, write_lines
from conftest import make_model, make_tokenizer, sentences

TOP: Final = Path(__file__).resolve().parents[1]

PLACEHOLDERS: Final = {
    "CONFIG": "pipeline/configs/demo.yaml",
    "NAME": "code",
    "I": "0",
    "N": "2",
}
"""Words of the READMEs' commands that stand for something of the user's (a name before "=" is one)."""

ANSWERS: Final = {
    "scholiast init mine.yaml  ": [
        "models/code", "models/prose", "", "", "2", "docs=data/docs.jsonl", "", "", "32", "y",
    ],
}  # fmt: skip
"""What is typed where a command asks, by how its line begins."""

PROGRAMS: Final = (
    "scholiast", "torchrun", "make", "sbatch", "squeue", "srun", "scontrol", "apptainer", "docker",
    "kubectl", "lm-eval", "hf", "pip", "git",
)  # fmt: skip
"""Those of readme_program.py."""

DOMAINS: Final = ("reference", "code", "bible")
TEACHERS: Final = ("generalist", "code", "bible")
HUB: Final = {"SmolLM2-1.7B": 24, "SmolLM2-360M": 32, "SmolLM2-135M": 30}
"""Models that a ready configuration names, and their layers: what is there of them but the weights."""

TINY: Final[dict[str, Any]] = {
    "device": "cpu", "threads": 1,
    "corpus": {"block_length": 32, "blocks_per_part": 16},
    "store": {"preset": "balanced", "k": 8, "temperatures": [2.0], "chunk_tokens": 16},
    "loss": {"chunk_tokens": 16, "features": {"pairs": [{"student": 1, "teacher": 2}]}},
    "student": {"keep_layers": [0, 2]},
    "teachers": {name: {"feature_layers": [2]} for name in TEACHERS},
    "train": {"epochs": None, "steps": 3, "batch_blocks": 2, "eval_every": 3, "precision": "fp32"},
    "evaluate": {"prompts": 1, "prompt_tokens": 4, "new_tokens": 4, "resamples": 0},
}  # fmt: skip
"""Laid over the demonstration's configuration."""


class Sandbox:
    """A folder for one README's commands, run in their order.

    Attributes:
        root: the folder.
    """

    def __init__(self, root: Path, home: Path, address: Path) -> None:
        """
        Args:
            home: HOME of the commands, and of the warm process.
            address: where that listens.
        """
        self.root = root
        self._environment = {
            **environment(home),
            "PATH": f"{root}/.venv/bin:/usr/bin:/bin",
            "READMES_SOCKET": str(address),
            "READMES_TOP": str(TOP),
        }

    def run(self, script: str) -> Done:
        """Runs lines of shell until one fails, with this sandbox's names for placeholders."""
        script = re.sub(
            rf"\b(?:{'|'.join(PLACEHOLDERS)})\b(?!=)", lambda one: PLACEHOLDERS[one[0]], script
        )
        typed = [lines for begin, lines in ANSWERS.items() if begin in script]
        with _stdin(typed[0] if typed else None) as stdin:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", script], cwd=self.root, env=self._environment,
                stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
                check=False, start_new_session=True,
            )  # fmt: skip
        return Done(done.returncode, done.stdout)


@dataclass(frozen=True)
class Done:
    """How a script ended: its exit code, and what it printed on both streams."""

    code: int
    output: str


@contextlib.contextmanager
def _stdin(typed: Sequence[str] | None) -> Iterator[int]:
    """Yields a terminal at which these lines have been typed, or nothing to read."""
    if typed is None:
        yield subprocess.DEVNULL
        return
    ours, theirs = pty.openpty()
    try:
        os.write(ours, "".join(f"{line}\n" for line in typed).encode() + b"\x04")
        yield theirs
    finally:
        os.close(theirs)
        os.close(ours)


def environment(home: Path) -> dict[str, str]:
    """Returns the environment of everything that runs for a README."""
    return {
        "HOME": str(home), "LANG": "C.UTF-8", "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "USER": "reader",
        "PYTHONPATH": f"{TOP}:{TOP}/tests:{TOP}/pipeline/api/public", "PATH": "/usr/bin:/bin",
    }  # fmt: skip


@contextlib.contextmanager
def warm_process(home: Path, address: Path) -> Iterator[None]:
    """Starts what the sandbox's programs ask (readme_server.py), and ends it."""
    words = [sys.executable, str(TOP / "tests/readme_server.py"), str(address)]
    with subprocess.Popen(
        words, env=environment(home), cwd=home, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            yield
        finally:
            process.kill()


def lay_out(root: Path) -> None:
    """Makes what the READMEs' names say, and the programs."""
    programs = root / ".venv/bin"
    programs.mkdir(parents=True)
    for name in PROGRAMS:
        call = f'exec {sys.executable} -IS {TOP}/tests/readme_program.py "$0" "$@"'
        (programs / name).write_text(f"#!/bin/sh\n{call}\n")
        (programs / name).chmod(0o755)
    tokenizer = make_tokenizer(root / "models/code")
    make_model(root / "models/code", len(tokenizer), 1, layers=6, hidden=16)
    for name in ("a", "b", "prose"):
        shutil.copytree(root / "models/code", root / "models" / name)
    (root / "data").mkdir()
    _write_rows(root / "data/docs.jsonl", 30, 11)
    (root / "notes.txt").write_text("\n\n".join(sentences(48, 12)))
    _demonstration(root, len(tokenizer))


def _demonstration(root: Path, vocab_size: int) -> None:
    """Lays the demonstration out: its own configuration, made tiny, its text and its models."""
    assets = root / "runs/demo/assets"
    for i, domain in enumerate(DOMAINS):
        for split, count in (("train", 9), ("heldout", 2)):
            _write_rows(assets / f"text/{split}/{domain}.jsonl", count, 20 + i)
    for i, name in enumerate(TEACHERS):
        shutil.copytree(root / "models/code", assets / "models" / name)
        make_model(assets / "models" / name, vocab_size, 30 + i)
    real = yaml.safe_load((TOP / "pipeline/configs/demo.yaml").read_text())
    config = root / PLACEHOLDERS["CONFIG"]
    config.parent.mkdir(parents=True)
    config.write_text(yaml.safe_dump(_laid_over(real, TINY), sort_keys=False))


def hub_models(home: Path, model: Path) -> None:
    """Lays the small files of the hub's models into HOME's cache, as a download leaves them."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    for name, layers in HUB.items():
        folder = home / f".cache/huggingface/hub/models--HuggingFaceTB--{name}"
        snapshot = folder / "snapshots" / commit
        shutil.copytree(model, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text(commit)
        config = json.loads((snapshot / "config.json").read_text())
        config |= {"num_hidden_layers": layers, "max_position_embeddings": 8192}
        (snapshot / "config.json").write_text(json.dumps(config))


def captured_run(root: Path) -> None:
    """Writes my.yaml, with two teachers of our own and three that other tools capture, and again.yaml,
    the same corpus with one that is captured."""
    config = yaml.safe_load((root / PLACEHOLDERS["CONFIG"]).read_text())
    for key in ("name", "assets"):
        del config[key]
    own = {name: config["teachers"][name] for name in ("generalist", "code")}
    captured = {name: {"model": "nowhere/it"} for name in ("large", "other", "third")}
    config |= {
        "run_dir": "runs/mine", "teachers": {**own, **captured},
        "fusion": {"weights": "max_prob"}, "loss": {"chunk_tokens": 16},
    }  # fmt: skip
    (root / "my.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    config |= {
        "run_dir": "runs/again", "corpus_dir": "runs/mine/corpus",
        "teachers": {"big": {"model": "nowhere/it"}},
    }  # fmt: skip
    (root / "again.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def captures(root: Path) -> None:
    """Writes what other tools have captured over the text of runs/mine."""
    found = documents(root / "runs/mine/corpus")
    layout = {"k": 8, "d": 400, "exact_k": 8, "exact_dtype": "float32", "residual_bins": [],
              "delta_encoding": True}  # fmt: skip
    write_distillkit(root / "captures", found, layout)
    for i, half in enumerate((found[::2], found[1::2])):
        write_lines(root / f"dump-{i}.jsonl", vllm_lines(half, 8))
    write_lines(root / "sequences.jsonl", [{"input_ids": one.tokens} for one in found])
    probabilities = [
        [{token: math.exp(p) for token, p in entry.items()} for entry in line["logprobs"][:-1]]
        for line in topk_lines(found, 8)
    ]
    write_lines(root / "logits.jsonl", probabilities)


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration with another laid over it, key by key."""
    both = {
        key: _laid_over(below[key], value) if isinstance(value, dict) and key in below else value
        for key, value in above.items()
    }
    return {**below, **both}


def _write_rows(path: Path, count: int, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lines(path, [{"text": text} for text in sentences(count, seed)])
