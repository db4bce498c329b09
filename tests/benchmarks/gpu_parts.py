"""What gpu.py works on: models of real shapes, a corpus of random tokens, caches, the planner's view."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_rows import Shape, Sizes
from torch import Tensor

from pipeline.config import RunConfig
from pipeline.planning import shapes
from pipeline.planning.memory import Peak, student_peak, teacher_peak
from pipeline.planning.pace import Device, Pace
from pipeline.workspace import Workspace
from stages.annotate import annotate_rows, to_host
from stages.behind import Behind
from stages.options import TeacherOptions
from stages.progress import Silent
from stages.teacher_jobs import TeacherJob
from storage.blocks import BlockReader, content_digest, write_part
from storage.corpus_info import CorpusGeneration, CorpusInfo, SourceRange, save_info
from storage.fingerprint import fingerprint
from storage.layout import Layout
from storage.notes import encode_rows
from storage.orders import learn_orders
from storage.sampling import uniforms
from storage.types import HostNotes, TokenBlocks
from storage.writer import CacheWriter

DOCUMENT, BATCH, TEMPERATURES, ROWS = 700, 4, (1.5, 2.0), 1024
SPREAD = 5.3  # of normal logits: entropy 3.0 nats at V = 151,936, 91 % of the mass in 64 ids
KEPT = {"balanced": (64, 0), "compact": (16, 16)}


def settings(shape: Shape) -> dict[str, Any]:
    """Returns a transformers configuration."""
    return {
        "model_type": shape.kind, "architectures": [f"{shape.kind.title()}ForCausalLM"],
        "hidden_size": shape.hidden, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads, "intermediate_size": shape.inner,
        "vocab_size": shape.vocab, "tie_word_embeddings": shape.tied, "initializer_range": 0.02,
        "max_position_embeddings": 32_768, "max_window_layers": shape.layers,
    }  # fmt: skip


def model_folder(root: Path, name: str, shape: Shape) -> Path:
    """Writes config.json and a tokenizer of three ids, which stage one only compares."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = root / "models" / name
    folder.mkdir(parents=True, exist_ok=True)
    core = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2}, unk_token="<eos>"))
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>").save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(settings(shape)))
    return folder


def random_teacher(folder: Path, device: torch.device) -> Any:
    """Returns a bfloat16 model with random weights, made on the device, with logits of SPREAD."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kinds: tuple[Any, Any] = (AutoConfig, AutoModelForCausalLM)
    with torch.device(device):
        model = kinds[1].from_config(kinds[0].from_pretrained(folder), dtype=torch.bfloat16)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head.normal_(0.0, SPREAD / head.shape[1] ** 0.5)
    return model.to(device)


def make_corpus(root: Path, sizes: Sizes) -> BlockReader:
    """Writes a prepared corpus: ids as 1/rank, documents of random lengths; returns its reader."""
    generator = np.random.default_rng(0)
    length, blocks = sizes.length, sizes.blocks
    count = blocks * length + 1
    tokens = np.minimum(np.exp(generator.random(count) * np.log(sizes.vocab)), sizes.vocab - 1)
    starts = generator.random(count) < 1.0 / DOCUMENT
    starts[0] = True
    document, at = np.cumsum(starts) - 1, np.arange(count)
    offset = at - np.maximum.accumulate(np.where(starts, at, 0))
    rows = np.arange(blocks)[:, None] * length + np.arange(length + 1)
    whole = TokenBlocks(
        np.arange(blocks), tokens.astype(np.int32)[rows], document.astype(np.int64)[rows],
        offset.astype(np.int64)[rows], np.ones(rows.shape, bool),
    )  # fmt: skip
    digest = content_digest(whole)
    source = SourceRange("random", "train", 0, blocks, int(document[-1]) + 1, blocks * length)
    info = CorpusInfo(
        identity={"sources": {"000": "random"}, "blocks_per_part": sizes.part},
        fingerprint=digest, tokenizer="0" * 64,
        vocab_size=sizes.vocab, block_length=length, blocks=blocks, blocks_per_part=sizes.part,
        sources=(source,), generations=(CorpusGeneration(0, blocks, digest, 1, fingerprint(digest)),),
    )  # fmt: skip
    for part in range(info.parts):
        first, last = info.part_range(part)
        write_part(root, info.owners.of(part), part, whole.take(slice(first, last)), {})
    save_info(root, info)
    return BlockReader(root)


def layout_of(info: CorpusInfo, preset: str, layer: int | None, hidden: int) -> Layout:
    """Returns what stage one would store by default, with one feature layer if it is given."""
    k, draws = KEPT[preset]
    features = () if layer is None else (layer,)
    return Layout(
        info.blocks, info.blocks_per_part, info.block_length, info.vocab_size, preset, k, TEMPERATURES,
        features, 1, hidden if features else 0, draws=draws,
    )  # fmt: skip


def job_of(root: Path, folder: Path, name: str, info: CorpusInfo, layout: Layout) -> TeacherJob:
    """Returns a teacher's whole share of stage one, as `plan_jobs` would, but for the weights' hashes."""
    options = TeacherOptions(
        model=str(folder), feature_layers=layout.feature_layers, batch_blocks=BATCH
    )
    identity = {"corpus": info.fingerprint, "teacher": name, "layout": layout.to_dict()}
    parts = tuple(range(layout.parts))
    return TeacherJob(name, options, folder, root, identity, layout, (), parts)


# -- caches of made-up teachers


def made_up_caches(
    root: Path, reader: BlockReader, names: tuple[str, ...], device: torch.device
) -> None:
    """Writes the balanced caches of some teachers, a thread each, from made-up logits."""
    with ThreadPoolExecutor(len(names)) as pool:
        work = [pool.submit(_made_up, root / n, reader, i, device) for i, n in enumerate(names)]
        for one in work:
            one.result()


@torch.inference_mode()
def _made_up(root: Path, reader: BlockReader, number: int, device: torch.device) -> None:
    layout = layout_of(reader.info, "balanced", None, 0)
    parts = _notes(reader, layout, number, device)
    blocks, notes = next(parts)
    orders = learn_orders(notes.ids, layout.vocab_size)
    identity = {"corpus": reader.info.fingerprint, "teacher": f"made up, {number}"}
    writer = CacheWriter(root, identity, layout, lambda: orders)

    def write(part: int, blocks: TokenBlocks, notes: HostNotes) -> None:
        arrays = {
            name: np.zeros((len(blocks.block_ids), *spec.shape[1:]), spec.dtype)
            for name, spec in layout.arrays().items()
        }
        encode_rows(layout, orders, notes, blocks.scored, arrays)
        writer.write_part(part, arrays)

    with Behind(depth=2) as behind:
        behind.submit(write, 0, blocks, notes)
        for part, (blocks, notes) in enumerate(parts, 1):
            behind.submit(write, part, blocks, notes)


def _notes(
    reader: BlockReader, layout: Layout, number: int, device: torch.device
) -> Iterator[tuple[TokenBlocks, HostNotes]]:
    """Yields each part's blocks and notes on its scored rows."""
    common, own = (torch.Generator(device).manual_seed(seed) for seed in (1, 2 + number))
    prior = -0.6 * (torch.arange(layout.vocab_size, device=device) + 10.0).log()

    def logits(rows: Tensor) -> Tensor:
        shape = (len(rows), layout.vocab_size)
        z = torch.randn(shape, generator=common, device=device).mul_(4.6)
        return z.add_(torch.randn(shape, generator=own, device=device), alpha=2.5).add_(prior)

    for part in range(reader.info.parts):
        blocks = reader.part(part)
        scored = blocks.scored
        gold = torch.from_numpy(blocks.gold.astype(np.int64)[scored])
        at, positions = np.nonzero(scored)
        uniform = torch.from_numpy(uniforms(0, blocks.block_ids[at], positions))
        rows = torch.arange(len(gold), device=device)
        chunk = ROWS if device.type == "cuda" else 128
        notes = to_host(annotate_rows(rows, gold, uniform, logits, layout, chunk))
        yield blocks, notes


def mean_entropy(root: Path, reader: BlockReader) -> float:
    """Returns nats, over one part's scored rows as the cache holds them."""
    from storage.reader import CacheReader

    blocks = reader.part(0)
    return float(CacheReader(root).read(blocks.block_ids).stats.entropy[blocks.scored].mean())


# -- what `scholiast plan` says


class Planner:
    """The planner's estimates for one of the models, on this device.

    Args:
        root: where the models' folders lie.
        flops: the device's rate of matrix products.
    """

    def __init__(self, root: Path, sizes: Sizes, gpu: bool, flops: float) -> None:
        self._root, self._sizes, self._gpu, self._flops = root, sizes, gpu, flops

    def _work(self, layers: tuple[int, ...], teachers: int, **changed: dict[str, Any]) -> Workspace:
        # Teachers that are not there: the shape is given below, and no weights are asked for.
        options = {
            "model": str(self._root / "nowhere"),
            "feature_layers": layers,
            "batch_blocks": BATCH,
        }
        raw: dict[str, Any] = {
            "run_dir": str(self._root / "plan"),
            "corpus": {
                "tokenizer": str(self._root / "nowhere"), "block_length": self._sizes.length,
                "blocks_per_part": self._sizes.part,
                "sources": [{"domain": "x", "format": "text", "path": "x"}],
            },
            "teachers": {f"t{i}": options for i in range(teachers)},
            "student": {"config": str(self._root / "models/student")},
            "train": {"steps": 1, "batch_blocks": BATCH},
        }  # fmt: skip
        return Workspace(RunConfig.model_validate(raw | changed), Silent())

    def teacher(
        self, folder: Path, layers: tuple[int, ...], chunk: int, preset: str
    ) -> dict[str, Any]:
        """Returns plan_tokens_per_s and plan_bytes of stage one."""
        shape = shapes.Shape.of(json.loads((folder / "config.json").read_text()))
        work = self._work(layers, 1, store={"preset": preset, "chunk_tokens": chunk})
        peak = teacher_peak(work, "t0", shape, self._gpu, self._sizes.part, 1)
        return self._said(work, "teachers.t0", 2.0 * shape.parameters, peak)

    def student(self, teachers: int, chunk_bytes: int | None) -> dict[str, Any]:
        """Returns the same of stage two."""
        work = self._work((), max(1, teachers), loss={"chunk_bytes": chunk_bytes})
        shape = shapes.student_shape(work)
        assert shape is not None
        return self._said(
            work, "student", 8.0 * shape.parameters, student_peak(work, shape, self._gpu, 1)
        )

    def _said(self, work: Workspace, key: str, flops: float, peak: Peak) -> dict[str, Any]:
        rate = Pace(work, Device(self._flops, gpu=self._gpu)).tokens_per_s(key, flops)[0]
        return {"plan_tokens_per_s": rate, "plan_bytes": peak.bytes, "plan_moment": peak.moment}


def disk_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
