"""What stage one's annotation adds to a bare teacher forward with the same head.

    python tests/benchmarks/annotation.py MODEL_FOLDER [rounds]

Methods take turns in one process on torch's own threads; each round is one forward of the same
blocks, and the head's product for every row in the same chunks; "compiled" is store.compile. On a
shared machine single rounds may be slow by any factor, so the least and the median over the rounds
are given; an overhead compares least with least. With OMP_NUM_THREADS=1 the processor time is nearly
free of that noise.

Memory: for each of LENGTHS a process of its own annotates so many random hidden states with the
teacher's head; given is by how much its peak exceeds what it held before, model included, and the
notes themselves, which exist in pieces and joined at the end.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from stages.annotate import annotate_rows
from stages.options import TeacherOptions
from stages.teacher import TransformersTeacher
from storage.layout import Layout
from storage.sampling import uniforms

BLOCKS, LENGTH, CHUNK = 2, 512, 128
TEMPERATURES = (1.5, 2.0)
KEPT = {
    "k = 64": (64, 0, False),
    "k = 64, compiled": (64, 0, True),
    "k = 16, S = 16": (16, 16, False),
    "k = 16, S = 16, compiled": (16, 16, True),
}
BARE = "forward and head only"
LENGTHS = (1024, 4096, 16_384)


def load(folder: Path) -> TransformersTeacher:
    return TransformersTeacher("t", folder, TeacherOptions(model="m"), torch.device("cpu"))


def tokens_of(folder: Path) -> torch.Tensor:
    """Returns int64 [BLOCKS, LENGTH + 1] of the language reference that ships with Python."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    text = "\n".join(topics[name] for name in sorted(topics))[:200_000]
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    count = BLOCKS * (LENGTH + 1)
    return torch.tensor(ids[:count]).view(BLOCKS, LENGTH + 1)


def methods(teacher: TransformersTeacher, tokens: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Returns what is timed, by name."""
    positions = torch.arange(LENGTH).expand(BLOCKS, -1)
    gold = tokens[:, 1:].flatten()
    uniform = torch.from_numpy(uniforms(0, gold.numpy() * 0, torch.arange(len(gold)).numpy()))

    def hidden() -> torch.Tensor:
        return teacher.forward(tokens[:, :-1], positions, ()).last.flatten(0, 1)

    def bare() -> None:
        for rows in hidden().split(CHUNK):
            teacher.logits(rows)

    def noted(k: int, draws: int, compiled: bool) -> Callable[[], object]:
        layout = Layout(
            BLOCKS, BLOCKS, LENGTH, teacher.head_rows, "balanced", k, TEMPERATURES, (), 1, 0,
            draws=draws,
        )  # fmt: skip
        return lambda: annotate_rows(
            hidden(), gold, uniform, teacher.logits, layout, CHUNK, compiled
        )

    return {BARE: bare, **{name: noted(*kept) for name, kept in KEPT.items()}}


@torch.inference_mode()
def measure(folder: Path, rounds: int = 9) -> dict[str, Any]:
    """Returns µs a token of each method and what annotation adds, as a share of the least.

    Args:
        folder: a causal LM's checkpoint with its tokenizer.
        rounds: turns of each method, after one that is not counted.
    """
    teacher = load(folder)
    runs = methods(teacher, tokens_of(folder))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    processor = {name: float("inf") for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start, used = time.perf_counter(), time.process_time()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
                processor[name] = min(processor[name], time.process_time() - used)
    scale = 1e6 / (BLOCKS * LENGTH)
    least = {name: min(found) * scale for name, found in seconds.items()}
    return {
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "least_us": least,
        "median_us": {name: median(found) * scale for name, found in seconds.items()},
        "processor_us": {name: used * scale for name, used in processor.items()},
        "overhead": {name: least[name] / least[BARE] - 1.0 for name in KEPT},
    }


def status(field: str) -> int:
    """Returns bytes of this process: VmRSS, or VmHWM, their peak."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


def held(folder: Path, tokens: int) -> None:
    """Prints, as JSON, what annotating so many tokens takes beyond its input and the notes."""
    teacher = load(folder)
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    hidden = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    layout = Layout(1, 1, tokens, teacher.head_rows, "balanced", 64, TEMPERATURES, (), 1, 0)
    gold, uniform = torch.zeros(tokens, dtype=torch.int64), torch.zeros(tokens).double()
    before = status("VmRSS")
    notes = annotate_rows(hidden, gold, uniform, teacher.logits, layout, CHUNK)
    size = 2 * sum(value.nbytes for value in vars(notes).values())
    print(json.dumps({"beyond": status("VmHWM") - before - size, "notes": size}))


def main() -> None:
    if sys.argv[1] == "--held":
        held(Path(sys.argv[2]), int(sys.argv[3]))
        return
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 9
    result = measure(Path(sys.argv[1]), rounds)
    print(f"{result['threads']} threads, {rounds} rounds, µs a token")
    print(f"{'method':26}{'least':>8}{'median':>8}{'added':>8}{'processor':>11}")
    for name, least in result["least_us"].items():
        added = f"{result['overhead'][name]:.1%}" if name in result["overhead"] else "–"
        print(
            f"{name:26}{least:8.0f}{result['median_us'][name]:8.0f}{added:>8}"
            f"{result['processor_us'][name]:11.0f}"
        )
    for tokens in LENGTHS:
        command = [sys.executable, __file__, "--held", sys.argv[1], str(tokens)]
        found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        print(
            f"T = {tokens:6,}: peak {found['beyond'] / 1e6:.0f} MB beyond what it was given and "
            f"{found['notes'] / 1e6:.1f} MB of notes"
        )


if __name__ == "__main__":
    main()
