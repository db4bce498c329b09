"""Tiny real parts: a trained byte-level BPE tokenizer, random Llama checkpoints, a small corpus."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch
import yaml

# A loaded machine is no failure.
hypothesis.settings.register_profile("project", deadline=None)
hypothesis.settings.load_profile("project")

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = "the quick brown fox jumps over a lazy dog while naïve café owners 漢字 drink tea 🍵 at noon"
WORDS = TEXT.split()


def sentences(count: int, seed: int) -> list[str]:
    """Deterministic pseudo-text with multi-byte characters."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for _ in range(count):
        length = int(torch.randint(3, 40, (1,), generator=generator))
        index = torch.randint(0, len(WORDS), (length,), generator=generator).tolist()
        texts.append(" ".join(WORDS[i] for i in index) + ".")
    return texts


def make_tokenizer(folder: Path, vocab_size: int = 400, texts: list[str] | None = None) -> Any:
    """Trains and saves a byte-level BPE tokenizer with an EOS token and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    core.train_from_iterator(texts or sentences(200, 7), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(
    folder: Path, vocab_size: int, seed: int, layers: int = 3, hidden: int = 32, **extra: Any
) -> Any:
    """Saves a random Llama checkpoint with logits far from uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden, intermediate_size=2 * hidden,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, tie_word_embeddings=True,
        **{"initializer_range": 0.2, **extra},
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def build_parts(root: Path) -> None:
    """Makes tokenizer, teachers "a" and "b" (b's vocabulary is padded) and three small corpora."""
    tokenizer = make_tokenizer(root / "a")
    tokenizer.save_pretrained(root / "b")
    make_model(root / "a", len(tokenizer), 1)
    make_model(root / "b", len(tokenizer) + 24, 2, hidden=64)
    for name, count, seed in (("x", 30, 3), ("y", 30, 4), ("held", 8, 5)):
        rows = [json.dumps({"text": text}) for text in sentences(count, seed)]
        (root / f"{name}.jsonl").write_text("\n".join(rows) + "\n")


def digests(root: Path) -> dict[str, str]:
    """Content of every file that is part of a result: measurements, temporaries and the locks that a
    killed process leaves are not."""
    skipped = ("log.jsonl", "hashes.json")
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in skipped and ".tmp" not in str(path)
        and ".partial" not in path.name and path.suffix != ".lock"
    }  # fmt: skip


def tree(root: Path) -> dict[str, tuple[int, str]]:
    """Everything below a folder: times and contents of files, and the folders."""
    return {
        str(path.relative_to(root)): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder",
        )
        for path in sorted(root.rglob("*"))
    }


class Lab:
    """A folder with everything a tiny run needs, and its configuration as a dict.

    Attributes:
        root: the folder.
        vocab_size: V of the tokenizer.
        config: the configuration that `write` starts from.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.vocab_size = json.loads((root / "a" / "config.json").read_text())["vocab_size"]
        self.config: dict[str, Any] = {
            "run_dir": f"{root}/run",
            "device": "cpu",
            "threads": 1,
            "corpus": {
                "tokenizer": f"{root}/a", "block_length": 32, "blocks_per_part": 3,
                "sources": [
                    {"domain": "x", "format": "jsonl", "path": f"{root}/x.jsonl"},
                    {"domain": "y", "format": "jsonl", "path": f"{root}/y.jsonl"},
                    {"domain": "x", "split": "heldout", "format": "jsonl",
                     "path": f"{root}/held.jsonl"},
                ],
            },
            "teachers": {
                "one": {"model": f"{root}/a", "feature_layers": [2]},
                "two": {"model": f"{root}/b", "feature_layers": [2]},
            },
            "store": {"preset": "balanced", "k": 8, "temperatures": [2.0], "chunk_tokens": 16},
            "student": {"model": f"{root}/a", "keep_layers": [0, 2]},
            "loss": {
                "features": {"weight": 0.1, "pairs": [{"student": 1, "teacher": 2}]},
                "chunk_tokens": 16,
            },
            "train": {
                "steps": 6, "batch_blocks": 2, "accumulate": 2, "lr": 3e-3, "eval_every": 3,
                "checkpoint_every": 2,
            },
            "evaluate": {"prompt_tokens": 4, "new_tokens": 4},
        }  # fmt: skip

    def write(self, name: str = "run.yaml", **changes: Any) -> Path:
        """Writes the configuration with changes laid over it (a__b=value sets a.b)."""
        config = json.loads(json.dumps(self.config))
        for key, value in changes.items():
            node = config
            *path, last = key.split("__")
            for part in path:
                node = node.setdefault(part, {})
            node[last] = value
        path_of_file = self.root / name
        path_of_file.write_text(yaml.safe_dump(config))
        return path_of_file

    def workspace(self, **changes: Any) -> Any:
        """Opens the run in this process."""
        from pipeline.config import load_config
        from pipeline.workspace import Workspace
        from stages.progress import Silent

        return Workspace(load_config(self.write(**changes)), Silent())


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Returns a folder that one of the processes that pytest runs on has made for all of them, each of
    which may read it, and none write there."""
    session = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    place = factory.getbasetemp().parent / f"shared-{session}" if session else factory.mktemp(name)
    root = place / name
    place.mkdir(exist_ok=True)
    with (place / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / f".{name}.made").exists():
            shutil.rmtree(root, ignore_errors=True)
            make(root)
            (place / f".{name}.made").touch()
    return root


@pytest.fixture(scope="session")
def _parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "parts", build_parts)


@pytest.fixture(scope="session")
def cached_parts(_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after stage one of the configuration as it stands: made once, to be copied."""
    return made_once(
        tmp_path_factory, "cached",
        lambda root: Lab(Path(shutil.copytree(_parts, root))).workspace().cache_teachers(),
    )  # fmt: skip


@pytest.fixture(scope="session")
def trained_parts(cached_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after stage two."""
    return made_once(
        tmp_path_factory, "trained",
        lambda root: Lab(Path(shutil.copytree(cached_parts, root))).workspace().train_students(),
    )  # fmt: skip


@pytest.fixture
def lab(request: pytest.FixtureRequest, tmp_path: Path, _parts: Path) -> Lab:
    """A fresh lab of this test's own; with @pytest.mark.after(COMMAND) one in which that has run."""
    mark = request.node.get_closest_marker("after")
    names = {"cache-teachers": "cached_parts", "train-student": "trained_parts"}
    parts = request.getfixturevalue(names[mark.args[0]]) if mark else _parts
    return Lab(Path(shutil.copytree(parts, tmp_path / "lab")))


@pytest.fixture
def cli() -> Callable[..., Any]:
    """Runs a command in this process; returns click's result, errors as exit codes."""
    from click.testing import CliRunner

    from pipeline.cli import main

    def run(*arguments: object, **kwargs: Any) -> Any:
        return CliRunner().invoke(main, [str(a) for a in arguments], **kwargs)

    return run
