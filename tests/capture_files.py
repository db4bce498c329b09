"""Captures as other tools would have made them of a corpus, by a teacher that is a formula."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from storage.blocks import BlockReader
from storage.types import AnyArray

K = 6


@dataclass(frozen=True)
class Document:
    """A document's tokens, and log p of every id after each of them, float32 [n, V]."""

    tokens: list[int]
    logp: AnyArray


def documents(folder: Path) -> list[Document]:
    """Returns a corpus's documents, put together again from its blocks."""
    corpus = BlockReader(folder)
    found: dict[int, list[int]] = {}
    for part in range(corpus.info.parts):
        blocks = corpus.part(part)
        for tokens, numbers in zip(blocks.inputs, blocks.document[:, :-1], strict=True):
            for token, number in zip(tokens.tolist(), numbers.tolist(), strict=True):
                if number >= 0:
                    found.setdefault(number, []).append(token)
    return [Document(tokens, teacher(tokens, corpus.info.vocab_size)) for tokens in found.values()]


def teacher(tokens: Sequence[int], vocab_size: int) -> AnyArray:
    """Returns log p after each token, given what was read: the actual next one is likely."""
    state, rows = 1, []
    for i, token in enumerate(tokens):
        state = (state * 1_000_003 + token) % 2**32
        logits = np.random.default_rng(state).normal(0, 2, vocab_size)
        if i + 1 < len(tokens) and state % 5:
            logits[tokens[i + 1]] += 6
        rows.append(logits - np.log(np.exp(logits).sum()))
    return np.array(rows, np.float32)


def top(logp: AnyArray, k: int = K) -> list[tuple[int, float]]:
    """Returns one row's k most probable (id, logprob)."""
    order = np.argsort(-logp, kind="stable")[:k]
    return [(int(i), float(logp[i])) for i in order]


def topk_lines(found: Sequence[Document], k: int = K) -> list[Any]:
    """Returns topk-jsonl's lines: entry j tells of token j + 1."""
    return [
        {"input_ids": d.tokens, "logprobs": [{str(i): v for i, v in top(row, k)} for row in d.logp]}
        for d in found
    ]


def vllm_lines(found: Sequence[Document], k: int = K) -> list[Any]:
    """Returns dumps of prompt_logprobs: the actual token is always there."""
    lines = []
    for d in found:
        entries: list[Any] = [None]
        for row, actual in zip(d.logp, d.tokens[1:], strict=False):
            ranked = np.argsort(-row, kind="stable")
            chosen = [actual, *(int(i) for i in ranked[:k] if i != actual)]
            entries.append({
                str(i): {"logprob": float(row[i]), "rank": int(np.flatnonzero(ranked == i)[0]) + 1,
                         "decoded_token": "?"}
                for i in chosen
            })  # fmt: skip
        lines.append({"prompt_token_ids": d.tokens, "prompt_logprobs": entries})
    return lines


def write_lines(path: Path, lines: Sequence[Any]) -> Path:
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path


def pack_bits(values: AnyArray, bits: int) -> AnyArray:
    """Returns uint8 [R, ⌈K·bits/8⌉] of integers [R, K], most significant bit first."""
    shifts = np.arange(bits - 1, -1, -1)
    return np.packbits(
        ((values[:, :, None] >> shifts) & 1).astype(np.uint8).reshape(len(values), -1), 1
    )


def write_distillkit(path: Path, found: Sequence[Document], layout: dict[str, Any]) -> Path:
    """Writes a Parquet capture: exact float32 values, the rest by one polynomial's residual bin."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import yaml

    path.mkdir()
    bits, k, exact = int(np.ceil(np.log2(layout["d"]))), layout["k"], layout["exact_k"]
    nested = pa.list_(pa.list_(pa.uint8()))
    rows: dict[str, list[Any]] = {
        "input_ids": [],
        "compressed_logprobs": [],
        "bytepacked_indices": [],
    }
    for d in found:
        heads = [top(row, k) for row in d.logp[:-1]]
        ids = np.array([[i for i, _ in head] for head in heads]).reshape(-1, k)
        values = np.array([[v for _, v in head] for head in heads], np.float32).reshape(-1, k)
        if layout["delta_encoding"]:
            values = np.diff(values, axis=1, prepend=np.float32(0))
        chunks = [np.ascontiguousarray(values[:, :exact]).view(np.uint8)]
        at = exact
        for one in layout["residual_bins"]:
            half = 1 << one["element_bits"] - 1
            rest = values[:, at : at + one["num_elements"]]
            scale = (np.abs(rest).max(1, keepdims=True) / half).astype(np.float32)
            codes = np.clip(np.rint(rest / scale), -half, half - 1).astype(np.int64) + half
            chunks += [scale.view(np.uint8), pack_bits(codes, one["element_bits"])]
            at += one["num_elements"]
        rows["input_ids"].append(d.tokens)
        rows["compressed_logprobs"].append(np.concatenate(chunks, 1).tolist())
        rows["bytepacked_indices"].append(pack_bits(ids, bits).tolist())
    schema = pa.schema({"input_ids": pa.list_(pa.uint64()), "compressed_logprobs": nested,
                        "bytepacked_indices": nested})  # fmt: skip
    pq.write_table(pa.table(rows, schema), path / "data_0.parquet")
    (path / "compression_config.yaml").write_text(yaml.safe_dump(layout))
    return path
