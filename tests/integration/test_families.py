"""The ready configurations, against a hub cache of this test's own: real names, depths, contexts and
padding of heads, in models that are tiny and random. Only the paths of the text are set."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tokenizer, sentences

from pipeline.config import load_config
from pipeline.start.checks import OK
from pipeline.start.families import FOLDER, names
from pipeline.start.run_checks import check_run
from stages.tokenizer import load_tokenizer, vocab_size
from storage.blocks import BlockReader

Cli = Callable[..., Any]


@dataclass(frozen=True)
class Real:
    """What the hub's config.json of a model says.

    Attributes:
        kind: model type.
        layers, context: as they are.
        rows, ids: of the head, of the tokenizer; the difference is padding.
    """

    kind: str
    layers: int
    context: int
    rows: int
    ids: int


QWEN_7B, QWEN_HALF = (
    Real("qwen2", 28, 32_768, 152_064, 151_665),
    Real("qwen2", 24, 32_768, 151_936, 151_665),
)
REAL = {
    "HuggingFaceTB/SmolLM2-1.7B": Real("llama", 24, 8_192, 49_152, 49_152),
    "HuggingFaceTB/SmolLM2-360M": Real("llama", 32, 8_192, 49_152, 49_152),
    "HuggingFaceTB/SmolLM2-135M": Real("llama", 30, 8_192, 49_152, 49_152),
    "Qwen/Qwen2.5-7B": Real("qwen2", 28, 131_072, 152_064, 151_665),
    "Qwen/Qwen2.5-Coder-7B": QWEN_7B,
    "Qwen/Qwen2.5-Math-7B": Real("qwen2", 28, 4_096, 152_064, 151_665),
    "Qwen/Qwen2.5-0.5B": QWEN_HALF,
    "Qwen/Qwen2.5-7B-Instruct": QWEN_7B,
    "Qwen/Qwen2.5-Coder-7B-Instruct": QWEN_7B,
    "Qwen/Qwen2.5-0.5B-Instruct": QWEN_HALF,
    "meta-llama/Llama-3.1-8B": Real("llama", 32, 131_072, 128_256, 128_256),
    "meta-llama/Llama-3.2-1B": Real("llama", 16, 131_072, 128_256, 128_256),
}  # fmt: skip


def save_snapshot(hub: Path, name: str, real: Real, tokenizer: Any) -> None:
    """Lays a tiny model into a hub cache, as a download leaves it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = hub / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(commit)
    snapshot = folder / "snapshots" / commit
    config: Any = AutoConfig.for_model(
        real.kind, hidden_size=8, intermediate_size=8, num_hidden_layers=real.layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=real.context,
        tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(snapshot)
    tokenizer.save_pretrained(snapshot)
    # As it is loaded: transformers adds the family's own special tokens to ours.
    config.vocab_size = vocab_size(load_tokenizer(snapshot, "test")) + real.rows - real.ids
    torch.manual_seed(len(name))
    loader: Any = AutoModelForCausalLM
    loader.from_config(config).save_pretrained(snapshot)


@pytest.fixture(scope="module")
def _hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    tokenizer = make_tokenizer(root / "tokenizer", 300)
    for name, real in REAL.items():
        save_snapshot(root / "cache", name, real, tokenizer)
    return root / "cache"


@pytest.fixture
def hub(_hub: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(_hub))
    return _hub


def overrides(family: str, root: Path, rows_of_each: int = 300) -> list[str]:
    """Writes a small text for each source; returns what sets its path, and that of the run."""
    told = ["--set", f"run_dir={root}/run"]
    for i, source in enumerate(load_config(FOLDER / f"{family}.yaml").corpus.sources):
        rows = []
        for j, text in enumerate(sentences(rows_of_each, i)):
            chat = [{"role": "user", "content": f"say {j}"}, {"role": "assistant", "content": text}]
            rows.append({"messages": chat} if source.messages_field else {"text": text})
        path = root / f"{i}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        told += ["--set", f"corpus.sources.{i}.path={path}"]
    return told


def test_there_is_one_for_each_family() -> None:
    assert names() == ["chat", "llama3", "qwen2.5", "smollm2"]


@pytest.mark.parametrize("family", names())
def test_a_ready_configuration_loads_and_plans(
    family: str, hub: Path, tmp_path: Path, cli: Cli
) -> None:
    config = FOLDER / f"{family}.yaml"
    options = overrides(family, tmp_path)
    told = [option for option in options if option != "--set"]
    run = load_config(config, told)
    assert {one.model for one in run.teachers.values()} <= set(REAL)
    result = cli("plan", config, *options, "--json")
    assert result.exit_code == 0, result.output
    rows = {row["step"]: row for row in json.loads(result.stdout)["steps"]}
    assert set(rows) == {
        "prepare corpus",
        *(f"cache {name}" for name in run.teachers),
        "train fused",
    }
    assert all(row["basis"].startswith("estimate") for row in rows.values()), "every model is here"
    wrong = [c for c in check_run(run) if c.state != OK and c.area != "folders"]
    assert not wrong, "depths, contexts, tokenizers, columns"


@pytest.mark.long
def test_padded_heads_of_two_sizes_run(hub: Path, tmp_path: Path, cli: Cli) -> None:
    """The same file, with short blocks and one step."""
    config = FOLDER / "qwen2.5.yaml"
    options = overrides("qwen2.5", tmp_path, 20)
    shares = [f"corpus.sources.{i}.heldout=0.3" for i in range(3)]
    for one in (*shares, "corpus.block_length=64", "device=cpu", "threads=1", "train.epochs=null",
                "train.steps=1", "train.accumulate=1"):  # fmt: skip
        options += ["--set", one]
    for command in ("cache-teachers", "train-student"):
        result = cli(command, config, *options)
        assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "run/students/fused/model/config.json").read_text())
    cached = json.loads((tmp_path / "run/cache/general/cache.json").read_text())
    ids = cached["layout"]["vocab_size"]
    assert settings["vocab_size"] - ids == 151_936 - 151_665, "padding is no part of the notes"


def test_only_what_the_assistant_says_is_a_target(hub: Path, tmp_path: Path, cli: Cli) -> None:
    result = cli("prepare", FOLDER / "chat.yaml", *overrides("chat", tmp_path))
    assert result.exit_code == 0, result.output
    corpus = BlockReader(tmp_path / "run/corpus")
    blocks = corpus.read([0])
    snapshot = next(hub.glob("models--Qwen--Qwen2.5-0.5B-Instruct/snapshots/*"))
    text = load_tokenizer(snapshot, "test").decode(blocks.tokens[0][1:][blocks.scored[0]])
    said = np.char.strip(text.split("<|end|>")[:20])
    assert len(said) == 20 and not any("say " in one for one in said)
    assert set(said[:-1]) <= set(sentences(300, 0))
