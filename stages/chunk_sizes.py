"""How many rows of float32 logits are looked at together: memory and time, not meaning.

A CPU does best with what stays near its cache. On a GPU every chunk costs some two milliseconds of
kernels too small to fill it, so that chunks are as large as small GPUs have room for: at V = 151,936 on
an H200 the loss of 8,192 rows took 141 ms in chunks of 96 MiB, 52 ms of 384 MiB and 38 ms of 1 GiB.
"""

from __future__ import annotations

LOSS_BYTES = {"cpu": 96 << 20, "cuda": 512 << 20}
"""Default of loss.chunk_bytes by device; the gradient takes as much again, at a temperature other than 1
three times as much."""

NOTES_TOKENS = 128
"""Default of store.chunk_tokens on a CPU."""

NOTES_BYTES = 256 << 20
"""Logits of a chunk of notes on a GPU; the passes over them take three times as much again."""


def loss_rows(logits: int, device: str, chunk_bytes: int | None, tokens: int | None = None) -> int:
    """Returns the rows of a chunk of the loss, at least 1.

    Args:
        logits: of a row.
        device: a torch device's type.
        chunk_bytes, tokens: as configured; `tokens` comes first.
    """
    if tokens is not None:
        return tokens
    return max(
        1, (chunk_bytes or LOSS_BYTES.get(device, LOSS_BYTES["cpu"])) // (4 * max(1, logits))
    )


def notes_rows(logits: int, device: str, tokens: int | None) -> int:
    """Returns the rows of a chunk of annotation, at least 1; `tokens` as configured comes first."""
    if tokens is not None:
        return tokens
    return NOTES_TOKENS if device != "cuda" else max(1, NOTES_BYTES // (4 * max(1, logits)))
